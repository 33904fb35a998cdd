"""A run on a TPU pod from one command: create or reuse, copy, install, run, follow, restart, fetch, delete.

`launch/tpu_pod.py` is its script, docs/pod.md its page. Every wait has a deadline and says how long it has been.
"""

import collections
import json
import pathlib
import sys
import tempfile
import time
from dataclasses import dataclass

from r1jax.core import errors
from r1jax.pod import answers, archive, commands, gke, remedies, shell
from r1jax.pod import request as requests
from r1jax.pod.remedies import PodError
from r1jax.pod.request import PodRequest
from r1jax.pod.shell import say
from r1jax.pod.worker import RESTART_EXITS


class PodLost(Exception):
    """Raised when the pod is gone or going: its text says at which step."""


@dataclass(frozen=True)
class Pace:
    """How long the launcher waits for what, in seconds."""

    poll: float = 20.0  # between two looks at the pod's state
    answer: float = 300.0  # for one command of gcloud
    ready: float = 1800.0  # from ACTIVE to the last worker READY
    connect: float = 600.0  # until the workers of a new pod take connections, and until gcloud answers again
    install: float = 3600.0  # the installation, the end of a run that is stopped, and the copy of the results
    silence: float = 90.0  # of worker 0, after which the connection is taken to be dead; it speaks every 15
    reconnect: float = 1800.0  # without any connection to worker 0, and without a word that the pod is lost
    wind_down: float = 300.0  # from the end of worker 0's process to that of the last one
    delete: float = 1800.0
    short: float = 600.0  # a run that ends sooner than this made no progress worth a restart


_QUIET_S = 600.0  # without a line of the log, after which the launcher says that the run is alive
_STOPPED = "the run was stopped by --only=stop; the same command again resumes it"
_SHORT_RUNS = 3  # so many short runs in a row end the restarts


class Launch:
    """One call of the launcher: the request, and what it learnt of the pod."""

    def __init__(self, request: PodRequest, pace: Pace):
        self.request, self.pace = request, pace
        self.workers = 0  # of all slices
        self.is_queued, self.is_ours = True, True  # a queued resource, or a TPU VM by itself; created by the launcher
        self.touched = False  # whether something may exist by our doing
        self.patience_s = pace.connect  # for errors of gcloud that may go away

    # What exists

    def describe(self) -> answers.QueuedPod | None:
        answer = self._ask(commands.describe(self.request))
        return None if answer is None else answers.queued(answer)

    def describe_node(self, node: str) -> answers.PodNode | None:
        answer = self._ask(commands.describe_node(self.request, node))
        return None if answer is None else answers.node(answer)

    def _ask(self, command: list[str]) -> dict | None:
        """Returns gcloud's answer, None where there is nothing of that name; raises PodError for any other error."""
        done = self._call(command, self.pace.answer)
        if done is None:
            return None
        try:
            return json.loads(done.out)
        except ValueError:
            raise PodError(f"gcloud's answer is no JSON: {done.out[:100]!r}") from None

    def _call(self, command: list[str], timeout_s: float, what: str = "") -> shell.Finished | None:
        """Returns a command of gcloud that succeeded, None where what it is about does not exist; tries again meanwhile.

        Raises PodError for an error with a known remedy, and for another one that lasts.
        """
        limit = time.monotonic() + self.patience_s
        while True:
            done = shell.run(command, timeout_s, what)
            if done.code == 0:
                return done
            if remedies.is_missing(done.text):
                return None
            self._wait_out(done.text, limit)

    def _wait_out(self, text: str, limit: float) -> None:
        """Waits a little after an error that may go away; raises PodError for another one, and after `limit`."""
        if not remedies.is_transient(text) or time.monotonic() > limit:
            raise PodError(remedies.explain(text, self.request))
        say(f"gcloud fails ({remedies.last_error(text)}); trying again")
        time.sleep(self.pace.poll)

    def find(self) -> str:
        """Looks for the queued resource of this name, then for a TPU VM that none holds; returns its state, "" for none.

        Raises PodError where it has other chips than the request.
        """
        queued = self.describe()
        if queued is not None:
            self._refuse_other(queued.accelerator, queued.count)
            self.touched, self.is_queued, self.is_ours = True, True, queued.is_ours
            return self._state(queued)
        node = self.describe_node(self.request.nodes[0])
        if node is None:
            return ""
        self._refuse_other(node.accelerator, 1)
        self.touched, self.is_queued, self.is_ours = True, False, False
        return node.state

    def _state(self, queued: answers.QueuedPod) -> str:
        """Returns the state of a queued resource in gcloud's words, that of a TPU VM where it is ACTIVE: of a lost one."""
        if queued.state != "ACTIVE":
            return queued.state
        nodes = [self.describe_node(name) for name in self.request.nodes]
        states = ["TERMINATED" if node is None else node.state for node in nodes]
        return next((state for state in states if answers.is_lost(state)), states[0])

    def state(self) -> str:
        """Returns the pod's state in gcloud's words, "" where there is none, "unknown" where gcloud does not say."""
        try:
            if self.is_queued:
                queued = self.describe()
                return "" if queued is None else self._state(queued)
            node = self.describe_node(self.request.nodes[0])
            return "" if node is None else node.state
        except PodError:
            return "unknown"

    def is_lost(self) -> bool:
        return answers.is_lost(self.state())

    # Create and delete

    def ensure(self) -> None:
        """Creates the pod or reuses the one of this name, and returns when all its workers are ready.

        One that is lost is deleted and created again if the launcher made it or Google took its TPUs back; another one,
        such as a TPU VM that its owner stopped, raises PodError.
        """
        name, state = self.request.name, self.find()
        if state and not answers.is_lost(state):
            say(f"{name} exists: reusing it")
        else:
            if state:
                if not self.is_ours and state not in answers.TAKEN_BACK:
                    raise PodError(
                        f"{name} is {state}, and was not created by this launcher: start it again, or delete it with "
                        "--only=delete"
                    )
                say(f"{name} is {state}: it is deleted and created again")
                self.delete()
            self._create()
        if self.is_queued:
            self._await_active()
        self.await_ready()

    def _refuse_other(self, accelerator: str, count: int) -> None:
        difference = answers.differences(self.request, accelerator, count)
        if difference:
            raise PodError(
                f"--name={self.request.name} is taken in {self.request.zone}: it has {difference}; give another --name, "
                "or delete it first with --only=delete"
            )

    def _create(self) -> None:
        say(f"creating {self.request.name}: {self.request.slices} x {self.request.slice.accelerator_type}")
        self.touched = self.is_queued = self.is_ours = True
        limit = time.monotonic() + self.patience_s
        while (done := shell.run(commands.create(self.request), self.pace.answer)).code:
            self._wait_out(done.text, limit)
            if self.describe() is not None:  # the request came through, and its answer was lost
                return

    def _await_active(self) -> None:
        """Waits in the queue. Raises PodError for a request that fails, which is deleted, and PodLost."""
        started, limit_s, last = time.monotonic(), self.request.queue_hours * 3600, ("", 0.0)
        while True:
            queued, waited = self.describe(), time.monotonic() - started
            if queued is None:
                raise PodError(f"{self.request.name} was deleted by someone else while it was in the queue")
            if queued.state == "ACTIVE":
                return
            if queued.state == "FAILED" and not remedies.is_preemption(queued.error):
                self.delete()
                reason = remedies.explain(queued.error or "the request failed without a reason", self.request)
                raise PodError(f"{reason}; the failed request was deleted")
            if answers.is_lost(queued.state):
                raise PodLost("the pod was preempted while it was being created")
            if waited > limit_s:
                raise PodError(f"no TPUs within --queue_hours={self.request.queue_hours:g} (state {queued.state})")
            if queued.state != last[0] or waited - last[1] >= shell.SAY_S * 5:
                say(f"{queued.state} for {waited / 60:.0f} min, of {limit_s / 60:.0f} at most")
                last = (queued.state, waited)
            time.sleep(self.pace.poll)

    def await_ready(self) -> None:
        """Waits until every TPU VM is ready, and counts the workers. Raises PodLost, or PodError after a deadline."""
        limit, last = time.monotonic() + self.pace.ready, ""
        while True:
            nodes = [self.describe_node(name) for name in self.request.nodes]
            states = ", ".join(sorted({"missing" if node is None else node.state for node in nodes}))
            if any(node is not None and answers.is_lost(node.state) for node in nodes):
                raise PodLost(f"a TPU VM is {states}")
            if states == "READY":
                break
            if time.monotonic() > limit:
                raise PodError(f"the TPU VMs are {states} and not READY {self.pace.ready / 60:.0f} min after they came")
            if states != last:
                say(f"TPU VMs: {states}")
                last = states
            time.sleep(self.pace.poll)
        self.workers = sum(node.workers for node in nodes if node is not None)
        say(f"{self.request.name} is ready with {self.workers} workers; it costs money until it is deleted")

    def delete(self) -> None:
        """Deletes the pod, and returns when it is gone."""
        command = (
            commands.delete(self.request)
            if self.is_queued
            else commands.delete_node(self.request, self.request.nodes[0])
        )
        try:
            self._call(command, self.pace.delete, f"deleting {self.request.name}")
        except PodError as error:
            raise PodError(f"{self.request.name} could not be deleted: {error}") from None
        limit = time.monotonic() + self.pace.delete
        while (self.describe() if self.is_queued else self.describe_node(self.request.nodes[0])) is not None:
            if time.monotonic() > limit:
                raise PodError(f"{self.request.name} still exists {self.pace.delete / 60:.0f} min after its deletion")
            time.sleep(self.pace.poll)
        self.touched = False
        say(f"{self.request.name} is deleted")

    # On the workers

    def everywhere(self, command: str, what: str, timeout_s: float, patience_s: float = 0.0) -> dict[str, str]:
        """Runs a shell command on every worker, and returns {host: answer}.

        Each has to answer, which gcloud's exit code does not say; where some do not, all are asked again for
        `patience_s`. Raises PodError with the last words, and PodLost if the pod is lost.
        """
        limit = time.monotonic() + patience_s
        while True:
            output = self._all(command, what, timeout_s)
            result = answers.of_workers(output)
            if len(result) >= self.workers:
                return result
            if self.is_lost():
                raise PodLost(f"the pod was preempted during: {what}")
            missing = f"{what}: {self.workers - len(result)} of {self.workers} workers"
            cause = remedies.of_gcloud(output)
            if not remedies.is_transient(cause):
                raise PodError(f"{missing} failed: {remedies.explain(cause, self.request)}")
            if time.monotonic() > limit:
                raise PodError(f"{missing} failed: {_last_words(output)}")
            say(f"{missing} do not answer yet ({_last_words(output)}); trying again")
            time.sleep(self.pace.poll)

    def _all(self, command: str, what: str, timeout_s: float) -> str:
        """Runs a shell command on every worker, and returns what they and gcloud print."""
        several = [commands.ssh(self.request, node, "all", command) for node in self.request.nodes]
        return "\n".join(done.text for done in shell.run_all(several, timeout_s, what))

    def copy(self) -> None:
        """Copies the checkout to every worker and installs it; waits for a new pod to take connections."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / commands.ARCHIVE
            count = archive.write(path, self.request.with_files)
            say(f"copying {count} files ({path.stat().st_size / 2**20:.1f} MiB) to {self.workers} workers")
            several = [commands.copy(self.request, node, str(path)) for node in self.request.nodes]
            limit = time.monotonic() + self.pace.connect
            while True:
                results = shell.run_all(several, self.pace.answer)
                if not any(done.code for done in results):
                    break
                text = next(done.text for done in results if done.code)
                if self.is_lost():
                    raise PodLost("the pod was preempted while the checkout was copied")
                if not remedies.is_transient(remedies.of_gcloud(text)) or time.monotonic() > limit:
                    raise PodError(f"the workers take no files: {remedies.explain(text, self.request)}")
                say(f"the workers take no files yet ({remedies.last_error(text)}); trying again")
                time.sleep(self.pace.poll)
        self.everywhere(commands.unpack(), "unpacking", self.pace.answer)
        self.everywhere(commands.install(self.request), "installing", self.pace.install)
        say("installed")

    def states(self) -> dict[str, str]:
        """Returns what every worker says of the run, as r1jax.pod.worker.state; waits for a new pod to take connections."""
        return self.everywhere(commands.status(), "asking the workers", self.pace.answer, self.pace.connect)

    def attempt(self) -> int | None:
        """Runs the command, or follows it where it is running; returns its exit code, None if it is to be resumed."""
        mine, before = f"running {self.request.run_id}", self.states()
        if self._is_mine(before):
            say("the run is under way: following it")
            return self.follow(-50)
        self.copy()
        if any(state == "stopped" != before.get(host) for host, state in self.states().items()):
            raise PodError(_STOPPED)
        started = self.everywhere(commands.start(self.request, self.workers), "starting the run", self.pace.answer)
        self._is_mine(started)
        if other := sorted(f"{host}: {state}" for host, state in started.items() if state != mine):
            raise PodError(
                f"the run did not start on {len(other)} of {self.workers} workers ({other[0]}): give --only=stop, then "
                "the same command again"
            )
        say("the run has begun; it goes on if this launcher ends")
        return self.follow(1)

    def _is_mine(self, states: dict[str, str]) -> bool:
        """Returns whether a worker runs this command; raises PodError where one runs another."""
        running = {state.split()[1] for state in states.values() if state.startswith("running")}
        if other := running - {self.request.run_id}:
            raise PodError(
                f"another command runs on {self.request.name} ({min(other)}, and this one is "
                f"{self.request.run_id}); wait for its end, or stop it with --only=stop"
            )
        return bool(running)

    def follow(self, line: int) -> int | None:
        """Prints worker 0's log from a line on until the run ends, over as many connections as it takes.

        gcloud connects again by itself too, and then the log comes from the same line again. Returns as `attempt`.
        Raises PodLost when the pod is lost, PodError after a deadline.
        """
        limit = time.monotonic() + self.request.run_hours * 3600
        heard, printed, end = time.monotonic(), time.monotonic(), ""
        while not end:
            command = commands.ssh(self.request, self.request.nodes[0], "0", commands.worker("follow", str(line)))
            at = line  # the number of the next line that comes; `line` is that of the next one to print
            reasons = collections.deque[str](maxlen=20)
            for text in shell.stream(command, self.pace.silence, reasons):
                if text.startswith("|") and text[1:].endswith("|"):
                    if at >= line:
                        print(text[1:-1], flush=True)
                        line, printed = at + 1, time.monotonic()
                    at += 1
                elif text.startswith(f"{commands.MARK} alive "):
                    at = int(text.split()[2])
                    line = at if line < 0 else line
                    if at > line:  # gcloud connected again by itself, later in the log: lines between are missing
                        break
                    if time.monotonic() - printed > _QUIET_S:
                        say(f"no new line for {_QUIET_S / 60:.0f} min; the run is alive")
                        printed = time.monotonic()
                elif text.startswith(f"{commands.MARK} "):
                    end = text.removeprefix(f"{commands.MARK} ")
                heard = time.monotonic()
                if heard > limit:
                    raise PodError(f"followed for --run_hours={self.request.run_hours:g}; the run goes on")
            if end:
                break
            state, silent = self.state(), time.monotonic() - heard
            if answers.is_lost(state):
                raise PodLost(f"the pod is {state or 'gone'}")
            why = "".join(reasons)
            say(f"the connection to worker 0 broke (state {state}): {remedies.last_error(why)}")
            if not remedies.is_transient(remedies.of_gcloud(why)):
                raise PodError(f"{remedies.explain(why, self.request)}; the run goes on")
            if silent > self.pace.reconnect:
                raise PodError(
                    f"no connection to worker 0 for {silent / 60:.0f} min (state {state}); the run may go on"
                )
            time.sleep(self.pace.poll)
        return self._verdict(end)

    def _verdict(self, end: str) -> int | None:
        """Returns the exit code of the whole run, None if the same command is to be given again.

        Raises PodError for a run that the user stopped.
        """
        say(f"worker 0: {end}")
        limit, states = time.monotonic() + self.pace.wind_down, list(self.states().values())
        while any(state.startswith("running") for state in states) and time.monotonic() < limit:
            time.sleep(self.pace.poll)
            states = list(self.states().values())
        if any(state.startswith("running") for state in states):
            say("some workers do not end: ending them")
            states = list(self.everywhere(commands.worker("end"), "ending the run", self.pace.install).values())
        if "stopped" in (end, *states):
            raise PodError(_STOPPED)
        codes = [int(state.split()[1]) for state in [end, *states] if state.startswith("ended")]
        failed = [code for code in codes if code not in (0, *RESTART_EXITS)]
        if failed:
            self._show_failure()
            return failed[0]
        is_done = len(codes) == self.workers + 1 and not any(codes)
        return 0 if is_done else None

    def _show_failure(self) -> None:
        """Prints the last lines of the workers that failed."""
        output = self._all(commands.worker("failure", "5"), "reading the logs", self.pace.answer)
        for text in output.splitlines():
            if text.startswith("|"):
                say(text[1:])

    # The whole

    def complete(self) -> int:
        """Creates, runs to the end over all preemptions, fetches, deletes; returns the run's exit code."""
        code = self._run_through()
        if code:
            say(
                f"the run failed with exit code {code}; the pod is kept, so that the same command goes on without waiting"
            )
            return code
        if self.request.only == "run":
            return 0
        if self.request.fetch:
            self.fetch()
        if self.request.keep:
            say("--keep: the pod is kept")
        elif not self.is_ours:
            say("the pod was not created by this launcher, and is kept")
        else:
            self.delete()
        return 0

    def _run_through(self) -> int:
        restarts, short = 0, 0
        while True:
            try:
                if self.request.only == "run":
                    self._require()
                else:
                    self.ensure()
                started = time.monotonic()
                code = self.attempt()
                if code is not None:
                    return code
                reason = "the run is to be resumed: a worker was lost or asked to end"
                short = short + 1 if time.monotonic() - started < self.pace.short else 0
            except PodLost as error:
                reason, short = str(error), 0
            if short >= _SHORT_RUNS and not self.is_lost():
                raise PodError(
                    f"the run ended {short} times in a row within {self.pace.short / 60:.0f} min, and the pod is healthy; "
                    "read its log above, or give the same command again"
                )
            if restarts >= self.request.restarts:
                raise PodError(f"{reason}; --restarts={self.request.restarts} are used up: give the same command again")
            restarts += 1
            say(f"restart {restarts} of {self.request.restarts} at most: {reason}")

    def fetch(self) -> None:
        """Copies the results here. Raises PodError, and leaves the pod, where that fails."""
        target = pathlib.Path(self.request.fetch)
        target.mkdir(parents=True, exist_ok=True)
        say(f"fetching {self.request.workdir} to {target}")
        done = shell.run(commands.fetch(self.request), self.pace.install, "fetching")
        if done.code:
            raise PodError(f"the results could not be fetched: {remedies.explain(done.text, self.request)}")

    def _require(self) -> None:
        """Finds an existing pod for a single step, and changes nothing; raises PodError without one that is ready."""
        state = self.find()
        if not state:
            raise PodError(f"{self.request.name} does not exist in {self.request.zone}; leave out --only to create it")
        if answers.is_lost(state) or state in (*remedies.WAITING, "PROVISIONING"):
            raise PodError(f"{self.request.name} is {state}; leave out --only to wait for it or create it again")
        self.await_ready()

    def step(self) -> int:
        """Does the one step that --only names."""
        if self.request.only == "run":
            return self.complete()
        if self.request.only == "delete":
            self.is_queued = self.describe() is not None
            if not self.is_queued and self.describe_node(self.request.nodes[0]) is None:
                raise PodError(f"{self.request.name} does not exist in {self.request.zone}: there is nothing to delete")
            self.delete()
            return 0
        if self.request.only == "create":
            self.ensure()
            return 0
        self._require()
        {"copy": self._copy_alone, "fetch": self.fetch, "stop": self._stop}[self.request.only]()
        return 0

    def _copy_alone(self) -> None:
        if any(state.startswith("running") for state in self.states().values()):
            raise PodError(
                f"a run is under way on {self.request.name}, and would go on with other files; wait for its end, or stop it "
                "with --only=stop"
            )
        self.copy()

    def _stop(self) -> None:
        states = self.everywhere(commands.worker("stop"), "stopping the run", self.pace.install)
        for host, state in sorted(states.items()):
            say(f"{host}: {state}")
        if any(state.startswith("running") for state in states.values()):
            raise PodError("a run has not ended: give --only=stop again, or delete the pod with --only=delete")

    def remainder(self) -> str:
        """Returns what exists now and how to delete it, "" if nothing does."""
        self.patience_s = 0.0
        state = self.state() if self.touched else ""
        return remedies.leftovers(self.request, state) if state else ""


def _last_words(output: str) -> str:
    """Returns the last line of the workers' output that is neither empty nor an answer."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith(commands.MARK)]
    errors_ = [line for line in lines if "rror" in line] or lines or ["they printed nothing"]
    return errors_[-1][:200]


def main(argv: list[str], pace: Pace | None = None) -> int:
    """Does what the command line says, and returns the run's exit code; 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        request = requests.parse(argv)
        if request is None:
            print(requests.help_text())
            return 0
        if request.gke or request.dry_run:
            print(gke.manifest(request) if request.gke else commands.script(request))
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {errors.one_line(error)}", file=sys.stderr)
        return 2
    if warning := requests.unused_chips(request):
        say(warning)
    launch = Launch(request, pace or Pace())
    try:
        return launch.step() if request.only else launch.complete()
    except (PodError, PodLost, OSError) as error:
        print(f"error: {errors.one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted; a run that has begun goes on")
        return 130
    finally:  # whatever ended it: a pod costs money
        if remainder := launch.remainder():
            print(remainder, file=sys.stderr)
