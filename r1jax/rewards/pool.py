"""Grades many samples with deadlines, in worker processes that are killed when they hang.

A sample that is compared with a reference first gets a short turn, and what that does not decide waits until the others had
theirs: it costs them a turn and not its deadline. What is not decided at all is wrong, if its reference can be graded by: the
pool asks that with an answer of its own, a probe.
"""

import dataclasses
import hashlib
import signal
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future, wait
from dataclasses import dataclass

from pebble import ProcessExpired, ProcessPool

from r1jax.rewards import compose, worker
from r1jax.rewards.sandbox import attack as sandbox_attack
from r1jax.rewards.score import RewardRequest, Score
from r1jax.rewards.worker import ScoreFunction
from r1jax.schema import RewardConfig

SECOND_TURN_S = 0.5  # of the processor
LONGER = 5.0  # each further turn is this many times the one before, up to the deadline
LOADING_TURN_S = {"reasoning_gym": 4.0}  # the first turn where each worker loads a library at its first sample
BUSY = 5.0  # a turn may last this many times its seconds of the processor, on a busy machine or asleep
KILL_AFTER_S = 0.3  # past that, or past the deadline, a grading that was not interrupted ends with its worker
AHEAD = 2  # later turns that are given to the workers at a time, for each of them
LOOK_S = 0.1  # from one look at the results and the workers to the next
ATTEMPTS = 3  # a sample is given to this many pools of workers, when the ones before broke down


@dataclass(frozen=True, eq=False)
class Grading:
    """Requests that are being graded: the scores there are, and what the workers still owe, by place."""

    requests: list[RewardRequest]
    scores: list[Score | None]
    keys: dict[int, bytes]  # place -> key of the content that a worker grades


@dataclass(frozen=True)
class _Failure:
    """Why a content has no score, and whether the answer may be the cause: it was graded, and its grader did not decide."""

    reason: str
    undecided: bool


Outcome = Score | _Failure


@dataclass(eq=False)
class _Job:
    """A content that the workers have been given."""

    request: RewardRequest
    limit_s: (
        float | None
    )  # this turn's seconds of the processor, 0: worker.FIRST_TURN_S; None: the deadline, without turns
    future: Future
    later: bool = False  # turns before did not decide it
    waits: bool = False  # for its next turn, which the workers have not been given yet
    attempts: int = 1  # pools of workers that it was given to, one after the other's breakdown

    def done(self) -> bool:
        """Returns whether its turn has ended and has not been looked at."""
        return self.future.done() and not self.waits


@dataclass(frozen=True)
class Usage:
    """What a pool has done since the last `RewardPool.take_usage`."""

    samples: int = 0
    cache_hits: int = 0  # samples whose content was graded before, or is graded for another sample
    workers_started: int = 0


class RewardPool:
    """A context manager whose `score` grades samples under the deadlines of a RewardConfig.

    With `config.workers == 0` numbers and rules are graded in this process, and one worker starts when a sample first
    needs more than that. Otherwise that many workers grade everything.
    `score_function(request, config)` replaces `compose.score`; it must be importable by the workers, and then all samples
    go to them. What workers found is kept by content: all of a request but its id, on which no score may depend.
    Not for several threads at once.
    """

    def __init__(self, config: RewardConfig, score_function: ScoreFunction | None = None):
        """Raises ValueError when a grader of config.graders cannot be used."""
        compose.check(config)
        self._config = config
        self._quick = compose.quick if score_function is None and config.workers == 0 else None
        self._score_function = score_function or compose.score
        self._built_in = score_function is None
        self._pool: ProcessPool | None = None
        self._running: dict[bytes, _Job] = {}
        self._cache: OrderedDict[bytes, Score] = OrderedDict()
        self._context = worker.WorkerContext()
        self._samples = self._cache_hits = self._workers_told = 0

    @property
    def batch_deadline_s(self) -> float:
        """Seconds after which `score` returns, whatever is not graded by then."""
        return self._config.batch_deadline_s

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers. A later `score` starts new ones."""
        self._stop()
        self._running = {}

    def take_usage(self) -> Usage:
        """Returns what was done since the last call."""
        found = Usage(self._samples, self._cache_hits, self._context.started - self._workers_told)
        self._samples, self._cache_hits, self._workers_told = 0, 0, self._context.started
        return found

    def score(self, requests: Sequence[RewardRequest]) -> list[Score]:
        """Returns one Score per request, in order.

        A sample that reaches `deadline_s`, is unfinished at `batch_deadline_s`, ends its worker or makes its grader raise is
        wrong, with accuracy 0, if it is compared with a reference (compose.compares) that another answer can be graded by;
        else it gets scorable False and a detail with its id. The others are not affected. Raises ValueError if nothing
        grades a request's task.
        """
        return self.finish([self.begin(requests)])

    def begin(self, requests: Sequence[RewardRequest]) -> Grading:
        """Returns the grading of the requests, under way in the workers; what needs none is graded here and now.

        Raises ValueError if nothing grades a request's task.
        """
        if self._built_in:
            for request in requests:
                compose.check_task(request, self._config)
        self._samples += len(requests)
        scores = [self._quick(request, self._config) if self._quick else None for request in requests]
        keys = {place: _content_key(requests[place]) for place, score in enumerate(scores) if score is None}
        for place, key in keys.items():
            if key in self._cache or key in self._running:
                self._cache_hits += 1
                scores[place] = self._cached(key)
            else:
                self._schedule(key, requests[place])
        owed = {place: key for place, key in keys.items() if scores[place] is None}
        return Grading(list(requests), scores, owed)

    def finish(self, gradings: Sequence[Grading]) -> list[Score]:
        """Returns the scores of several gradings in order; the batch deadline counts from here, for all of them."""
        wanted = {key: grading.requests[place] for grading in gradings for place, key in grading.keys.items()}
        found, probes = self._settle(wanted)
        for grading in gradings:
            for place, key in grading.keys.items():
                probe = found.get(probes.get(key))
                grading.scores[place] = self._verdict(found[key], probe, grading.requests[place])
        self._keep({key: score for key, score in found.items() if isinstance(score, Score)})
        return [score for grading in gradings for score in grading.scores if score is not None]  # none is now

    def _settle(self, wanted: Mapping[bytes, RewardRequest]) -> tuple[dict[bytes, Outcome], dict[bytes, bytes]]:
        """Returns what was found of contents by the batch deadline, and the keys of the probes of those that were not decided."""
        ends = time.monotonic() + self._config.batch_deadline_s
        found: dict[bytes, Outcome] = {key: self._cache[key] for key in wanted if key in self._cache}
        probes: dict[bytes, bytes] = {}
        left = _left(wanted, found, probes)
        for key in left:
            if key not in self._running:  # it ended without a score for another grading
                self._schedule(key, wanted[key])
        while left and time.monotonic() < ends:
            self._look(left, ends)
            for key in [key for key in left if self._running[key].done()]:
                outcome = self._outcome(self._running[key])
                if key in wanted and not isinstance(outcome, Score) and self._compares(wanted[key]):
                    probes[key] = self._probe(wanted[key], found)
                if outcome is None:
                    self._again(self._running[key])
                else:
                    found[key] = outcome
            left = _left(wanted, found, probes)
            self._resume([self._running[key] for key in left])
        late = f"not graded within the batch deadline of {self._config.batch_deadline_s:g} s"
        found |= {key: _Failure(late, self._running[key].later) for key in left if key in wanted}
        self._drop([*found, *probes.values()], stop=bool(left))
        return found, probes

    def _look(self, keys: Iterable[bytes], ends: float) -> None:
        """Waits a little for the results of the keys; when the workers broke down, none is left without one."""
        timeout_s = max(0.0, min(LOOK_S, ends - time.monotonic()))
        left = wait([self._running[key].future for key in keys], timeout=timeout_s).not_done
        if left and not (self._pool and self._pool.active):
            self._stop()

    def _compares(self, request: RewardRequest) -> bool:
        return self._built_in and compose.compares(request.task, self._config)

    def _probe(self, request: RewardRequest, found: dict[bytes, Outcome]) -> bytes:
        """Returns the key of the request's probe, which from now on is in `found` or with the workers."""
        probe = compose.probe(request)
        key = _content_key(probe)
        if key in self._cache:
            found[key] = self._cache[key]
        elif key not in found and key not in self._running:
            self._schedule(key, probe)
        return key

    def _schedule(self, key: bytes, request: RewardRequest) -> None:
        limit_s = None
        if self._compares(request):
            limit_s = LOADING_TURN_S.get(request.task, 0.0)
            if self._config.deadline_s <= max(limit_s, *worker.FIRST_TURN_S):
                limit_s = self._config.deadline_s  # one turn
        self._running[key] = _Job(request, limit_s, self._submit(request, limit_s))

    def _again(self, job: _Job) -> None:
        """Lets a job wait for a longer turn; gives it to the workers as before when they broke down."""
        if _broke(job.future):
            job.attempts += 1
            job.future = self._submit(job.request, job.limit_s)
        else:
            job.limit_s = min(self._config.deadline_s, LONGER * (job.limit_s or 0.0) or SECOND_TURN_S)
            job.later = job.waits = True

    def _resume(self, jobs: Sequence[_Job]) -> None:
        """Gives the workers what waits when they run out of other jobs, the shortest turn first."""
        waiting = sorted((job for job in jobs if job.waits), key=lambda job: job.limit_s or 0.0)
        given = sum(not (job.waits or job.future.done()) for job in jobs)
        for job in waiting[: max(0, AHEAD * max(1, self._config.workers) - given)]:
            job.waits, job.future = False, self._submit(job.request, job.limit_s)

    def _submit(self, request: RewardRequest, limit_s: float | None) -> Future:
        timeout_s = self._config.deadline_s
        if limit_s is not None:
            timeout_s = min(timeout_s, BUSY * (limit_s or max(worker.FIRST_TURN_S))) + KILL_AFTER_S
        arguments = self._score_function, request, self._config, limit_s
        try:
            return self._running_pool().schedule(worker.grade, arguments, timeout=timeout_s)
        except RuntimeError:  # it broke down since it was looked at
            return self._running_pool().schedule(worker.grade, arguments, timeout=timeout_s)

    def _running_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self._stop()
        if self._pool is None:
            workers = max(1, self._config.workers)
            self._pool = ProcessPool(
                workers, initializer=worker.start, initargs=(tuple(sandbox_attack.withstood),), context=self._context
            )
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.stop()
            pool.join()
            for job in self._running.values():
                job.future.cancel()  # does nothing to one that is done

    def _drop(self, keys: Iterable[bytes], stop: bool) -> None:
        """Forgets contents that are done with, and ends those that still run; with `stop` all that runs or is queued ends."""
        if stop:
            self._stop()
        for key in keys:
            if key in self._running:
                self._running.pop(key).future.cancel()

    def _outcome(self, job: _Job) -> Outcome | None:
        """Returns what became of a job that is done, or None if it is to be given to the workers again."""
        again = job.limit_s is not None and job.limit_s < self._config.deadline_s
        undecided = True
        try:
            outcome = job.future.result()
        except TimeoutError:
            outcome = None
        except ProcessExpired as error:
            killed = error.exitcode == -signal.SIGVTALRM  # by itself, at its limit
            outcome = None if killed else f"the grader's process ended with code {error.exitcode}"
        except (BrokenExecutor, CancelledError):
            outcome, again = f"the workers broke down {ATTEMPTS} times", job.attempts < ATTEMPTS
            undecided = False
        if isinstance(outcome, Score):
            return outcome
        if again:  # whatever happened: memory that runs out may be a neighbour's doing
            return None
        return _Failure(outcome or f"grading passed the deadline of {self._config.deadline_s:g} s", undecided)

    def _verdict(self, outcome: Outcome, probe: Outcome | None, request: RewardRequest) -> Score:
        """Returns the Score of a request: wrong, if its answer was not decided and another one to its reference was."""
        if isinstance(outcome, Score):
            return outcome
        if outcome.undecided and isinstance(probe, Score) and probe.scorable:
            return compose.undecided(request, self._config, outcome.reason)
        return compose.failed(f"sample {request.id!r}: {outcome.reason}")

    def _cached(self, key: bytes) -> Score | None:
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def _keep(self, found: dict[bytes, Score]) -> None:
        self._cache |= found
        while len(self._cache) > self._config.cache_entries:
            self._cache.popitem(last=False)


def _content_key(request: RewardRequest) -> bytes:
    """Returns a digest of all that decides a sample's score, the grader and its settings being the pool's."""
    content = dataclasses.astuple(dataclasses.replace(request, id=""))
    return hashlib.blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _broke(future: Future) -> bool:
    """Returns whether a finished future ended with its pool and not by its own doing."""
    return future.cancelled() or isinstance(future.exception(), BrokenExecutor)


def _left(
    wanted: Mapping[bytes, RewardRequest], found: Mapping[bytes, Outcome], probes: Mapping[bytes, bytes]
) -> list[bytes]:
    """Returns the keys that are waited for: of contents, and of probes whose content has no score yet, or will have none."""
    asked = [probe for key, probe in probes.items() if not isinstance(found.get(key), Score)]
    return [key for key in dict.fromkeys([*wanted, *asked]) if key not in found]
