"""The worker's side of a pod: starts the run so that it outlives the connection, says how it is, prints its log.

`python -m r1jax.pod.worker start ID STOP_S -- ARGUMENTS | follow LINE | status | stop | end | failure LINES`. It needs
the standard library and modules of r1jax.core that need no more. Answers are `R1JAX HOST ANSWER`; see `follow` for its.

A supervisor in a session of its own runs `python -m r1jax.launch ARGUMENTS`, and writes its exit code. It and the run
hold a lock as long as they live: the kernel frees it when they end, whatever ended them, a reboot included.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from r1jax.core import files, preempt, watch

FOLDER = pathlib.Path.home() / "r1jax_run"
LOCK, LOG, EXIT, RUN = (FOLDER / name for name in ("lock", "log", "exit", "run.json"))  # RUN says what was started
STOPPED = FOLDER / "stopped"  # from the user's stop to the next start
POLL_S = 0.5  # between two looks at the log
ALIVE_S = 15.0  # a line at least so often, by which the other side knows that the connection lives
# Exit codes after which the same command resumes the run: another process was lost, this one was asked to end because its
# machine goes away (75, EX_TEMPFAIL), JAX aborted it because process 0 is gone (134), or it was killed from outside.
RESTART_EXITS = (watch.LOST_EXIT, preempt.PREEMPTED_EXIT, 134, 137, 143)


def _lock(kind: int, patience_s: float = 0.0) -> int | None:
    """Takes the lock, for itself or shared, and returns its file, or None while a run has it."""
    FOLDER.mkdir(exist_ok=True)
    handle, limit = os.open(LOCK, os.O_RDWR | os.O_CREAT), time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= limit:
                os.close(handle)
                return None
            time.sleep(0.05)


def state() -> str:
    """Returns `none`, `running ID`, `ended CODE`, `stopped`, or `gone`: a run that ended without an exit code.

    The last is what a reboot leaves; `stopped` is a run that ended after the user asked it to.
    """
    if not RUN.exists():
        return "stopped" if STOPPED.exists() else "none"
    if not EXIT.exists():
        handle = _lock(fcntl.LOCK_SH)
        if handle is None:
            return f"running {json.loads(RUN.read_text())['id']}"
        os.close(handle)
    if STOPPED.exists():
        return "stopped"
    return f"ended {EXIT.read_text()}" if EXIT.exists() else "gone"  # it may have ended since the first look


def start(run_id: str, stop_s: float, arguments: list[str]) -> str:
    """Starts the run in the background, unless one is running; returns the state after that.

    `stop_s` is the time that the run has from SIGTERM to SIGKILL when it is asked to end.
    """
    handle = _lock(fcntl.LOCK_EX, patience_s=2.0)  # a question for the state, or a run's last process, may have it
    if handle is None:
        return state()
    for path in (EXIT, STOPPED):
        path.unlink(missing_ok=True)
    if LOG.exists():
        files.move(LOG, FOLDER / "log.before")  # the disk may be full
    files.write_text(RUN, json.dumps({"id": run_id, "arguments": arguments, "stop_s": stop_s}))
    if os.fork() == 0:
        os.setsid()
        _supervise(handle, arguments)
    os.close(handle)
    return f"running {run_id}"


def _supervise(handle: int, arguments: list[str]) -> None:
    """Runs r1jax.launch with its output in the log, and writes its exit code; ends this process."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # the run ends by them, and its exit code is to be written
    output = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    command = [sys.executable, "-u", "-m", "r1jax.launch", *arguments]
    result, child = 127, None
    try:
        child = subprocess.Popen(command, pass_fds=(handle,), start_new_session=True)
        files.write_text(RUN, json.dumps(json.loads(RUN.read_text()) | {"group": child.pid}))
        result = child.wait()
        _signal(os.killpg, signal.SIGKILL)  # whatever the run left behind: it would keep the chips
    except Exception:
        traceback.print_exc()  # into the log
        if child is not None:  # a run that nothing knows of could not be stopped
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    with contextlib.suppress(OSError):  # of a full disk: the run is `gone`
        files.write_text(EXIT, str(result if result >= 0 else 128 - result))
    os._exit(0)


def _signal(send: Callable[[int, int], None], number: int) -> bool:
    """Sends a signal to the run's process (os.kill) or to all that it started too (os.killpg); returns whether it began."""
    group = json.loads(RUN.read_text()).get("group")
    if group is not None:
        with contextlib.suppress(ProcessLookupError):
            send(group, number)
    return group is not None


def end() -> str:
    """Asks the run to end, makes it end where it does not in its time, and returns the state after that.

    SIGTERM goes to the run's process alone, which ends its graders itself; SIGKILL goes to all.
    """
    stop_s = json.loads(RUN.read_text())["stop_s"] if RUN.exists() else 0.0
    for send, number, patience_s in ((os.kill, signal.SIGTERM, stop_s), (os.killpg, signal.SIGKILL, 10.0)):
        limit, sent = time.monotonic() + patience_s, False
        while state().startswith("running") and time.monotonic() < limit:
            sent = sent or _signal(send, number)
            time.sleep(POLL_S)
    return state()


def stop() -> str:
    """Ends the run as the user's wish, so that no launcher starts it again; returns the state after that.

    It counts as well between two starts of a run, while a launcher copies and installs, but not for one that is done.
    """
    if state() != "ended 0":
        files.write_text(STOPPED, "")
    return end()


def follow(line: int) -> Iterator[str]:
    """Yields the log from a line on (1 is the first; -5 the fifth from the end), then the state at the end of the run.

    A line of the log has a | at either end, by which one that a broken connection cut off is known. `R1JAX alive` and the
    number of the next line come first, after an empty line, and in silence. The state is `R1JAX STATE`.
    """
    before = LOG.read_bytes().count(b"\n") if LOG.exists() and line < 0 else 0
    line = max(1, before + 1 + line) if line < 0 else line
    yield f"\nR1JAX alive {line}"
    spoke, number, rest, offset = time.monotonic(), 0, b"", 0
    while True:
        now = state()  # before the log is read: what was written until the end is printed
        data = b""
        if LOG.exists():
            with LOG.open("rb") as file:
                file.seek(offset)
                data = file.read(1 << 20)
        offset += len(data)
        ended = not now.startswith("running") and not data
        *lines, rest = (rest + data).split(b"\n")
        for text in [*lines, rest] if ended and rest else lines:
            number += 1
            if number >= line:
                shown = text.decode(errors="replace").rstrip("\r").replace("\r", " ")  # which would divide the line
                yield f"|{shown}|"
                spoke = time.monotonic()
        if ended:
            yield f"R1JAX {now}"
            return
        if time.monotonic() - spoke > ALIVE_S:
            yield f"R1JAX alive {max(line, number + 1)}"
            spoke = time.monotonic()
        if not data:
            time.sleep(POLL_S)


def failure(lines: int) -> Iterator[str]:
    """Yields the last lines of the log with this machine's name, if the run failed here and not elsewhere first."""
    words = state().split()
    if words[0] == "ended" and int(words[1]) not in (0, *RESTART_EXITS) and LOG.exists():
        yield from (
            f"|{socket.gethostname()}: {text}" for text in LOG.read_text(errors="replace").splitlines()[-lines:]
        )


def main(argv: list[str]) -> int:
    """Does what the words say, and prints the answer; returns the exit code, which says nothing of the run's."""
    verb, *words = argv
    if verb == "follow":
        answers: Iterator[str] = follow(int(words[0]))
    elif verb == "failure":
        answers = failure(int(words[0]))
    else:
        calls = {"status": state, "stop": stop, "end": end}
        calls["start"] = lambda: start(words[0], float(words[1]), words[3:])
        answers = iter([f"R1JAX {socket.gethostname()} {calls[verb]()}"])
    try:
        for text in answers:
            print(text, flush=True)
    except BrokenPipeError:  # the other side is gone; the run goes on
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
