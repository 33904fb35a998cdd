"""Grades many samples with deadlines, in worker processes that are killed when they hang.

A sample that is compared with a reference first gets a short turn. If that is not enough, it waits until all others
have had theirs, so that a slow sample costs the others one turn and not its whole deadline. A sample that is never
decided is wrong, provided that its reference is usable: the pool tests this by grading another answer to it, a probe.
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

SECOND_TURN_S = 0.5  # processor seconds
TURN_GROWTH = 5.0  # each further turn is this many times as long as the one before, up to the deadline
LOADING_TURN_S = {"reasoning_gym": 4.0}  # first turn of tasks for which a worker loads a library at its first sample
WALL_PER_CPU_S = 5.0  # wall seconds allowed per processor second of a turn: the machine may be busy, a grader may sleep
KILL_AFTER_S = 0.3  # a grading that could not be interrupted is killed with its worker so long after its wall limit
JOBS_AHEAD = 2  # later turns that are queued at a time, per worker
POLL_S = 0.1  # interval between looks at the results and the workers
ATTEMPTS = 3  # worker pools that a sample is given to before it fails, if each of them breaks down


@dataclass(frozen=True, eq=False)
class Grading:
    """Requests that are being graded: the scores known so far, and the contents that workers still grade."""

    requests: list[RewardRequest]
    scores: list[Score | None]
    keys: dict[int, bytes]  # index of the request -> key of its content, for those that a worker grades


@dataclass(frozen=True)
class _Failure:
    """Why a content has no score."""

    reason: str
    undecided: bool  # its grader ran and did not decide, so that the answer may be the cause


Outcome = Score | _Failure


@dataclass(eq=False)
class _Job:
    """A content that was submitted to the workers."""

    request: RewardRequest
    limit_s: float | None  # processor seconds of this turn; 0: worker.FIRST_TURN_S; None: no turns, only the deadline
    future: Future
    later: bool = False  # earlier turns did not decide it
    waits: bool = False  # its next turn has not been submitted yet
    attempts: int = 1  # worker pools that it was given to, each after the breakdown of the one before

    def done(self) -> bool:
        """Returns whether its turn has ended and its result has not been processed."""
        return self.future.done() and not self.waits


@dataclass(frozen=True)
class Usage:
    """Counts of a pool since the last `RewardPool.take_usage`."""

    samples: int = 0
    cache_hits: int = 0  # samples whose content was graded before, or is being graded for another sample
    workers_started: int = 0


class RewardPool:
    """A context manager whose `score` grades samples under the deadlines of a RewardConfig.

    With `config.workers == 0` numbers and rules are graded in this process, and one worker starts when a sample first
    needs more than that. Otherwise that many workers grade everything. `score_function(request, config)` replaces
    `compose.score`; it must be importable by the workers, and then all samples go to them. Scores from workers are
    cached by content, which is all of a request but its id; no score may depend on the id. The pool is not safe for
    use by several threads.
    """

    together = False  # of several processes of a run each grades its own share of the samples

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
        self._samples = self._cache_hits = self._workers_reported = 0

    @property
    def batch_deadline_s(self) -> float:
        """Seconds after which `score` returns, even if some samples are not graded by then."""
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
        """Returns the counts since the last call."""
        usage = Usage(self._samples, self._cache_hits, self._context.started - self._workers_reported)
        self._samples, self._cache_hits, self._workers_reported = 0, 0, self._context.started
        return usage

    def score(self, requests: Sequence[RewardRequest]) -> list[Score]:
        """Returns one Score per request, in order.

        A sample is undecided if it reaches `deadline_s`, is unfinished at `batch_deadline_s`, ends its worker or
        makes its grader raise. It is then wrong, with accuracy 0, if it is compared with a reference
        (compose.compares) for which a probe can be graded; else it gets scorable False and a detail with its id.
        Other samples are not affected. Raises ValueError if a request's task has no grader.
        """
        return self.finish([self.begin(requests)])

    def begin(self, requests: Sequence[RewardRequest]) -> Grading:
        """Returns the grading of the requests, which goes on in the workers; quick ones are graded before it returns.

        Raises ValueError if a request's task has no grader.
        """
        if self._built_in:
            for request in requests:
                compose.check_task(request, self._config)
        self._samples += len(requests)
        scores = [self._in_process(request) for request in requests]
        keys = {place: _content_key(requests[place]) for place, score in enumerate(scores) if score is None}
        for place, key in keys.items():
            if key in self._cache or key in self._running:
                self._cache_hits += 1
                scores[place] = self._cached(key)
            else:
                self._schedule(key, requests[place])
        owed = {place: key for place, key in keys.items() if scores[place] is None}
        return Grading(list(requests), scores, owed)

    def _in_process(self, request: RewardRequest) -> Score | None:
        """Returns the Score if this process can compute it. A grader that raises leaves it to a worker to say so."""
        if self._quick is None:
            return None
        try:
            return self._quick(request, self._config)
        except Exception:
            return None

    def finish(self, gradings: Sequence[Grading]) -> list[Score]:
        """Returns the scores of several gradings in order; one batch deadline for all of them starts with this call."""
        wanted = {key: grading.requests[place] for grading in gradings for place, key in grading.keys.items()}
        outcomes, probes = self._await_outcomes(wanted)
        for grading in gradings:
            for place, key in grading.keys.items():
                probe = outcomes.get(probes.get(key))
                grading.scores[place] = self._verdict(outcomes[key], probe, grading.requests[place])
        self._cache_scores({key: score for key, score in outcomes.items() if isinstance(score, Score)})
        scores = []
        for grading in gradings:
            for request, score in zip(grading.requests, grading.scores, strict=True):
                assert score is not None, f"sample {request.id!r} has no score"
                scores.append(score)
        return scores

    def _await_outcomes(self, wanted: Mapping[bytes, RewardRequest]) -> tuple[dict[bytes, Outcome], dict[bytes, bytes]]:
        """Returns ({key: outcome by the batch deadline}, {key of an undecided content: key of its probe})."""
        ends = time.monotonic() + self._config.batch_deadline_s
        outcomes: dict[bytes, Outcome] = {key: self._cache[key] for key in wanted if key in self._cache}
        probes: dict[bytes, bytes] = {}
        left = _awaited_keys(wanted, outcomes, probes)
        for key in left:
            if key not in self._running:  # it had ended without a score for another grading
                self._schedule(key, wanted[key])
        while left and time.monotonic() < ends:
            self._poll(left, ends)
            for key in [key for key in left if self._running[key].done()]:
                outcome = self._outcome(self._running[key])
                if key in wanted and not isinstance(outcome, Score) and self._compares(wanted[key]):
                    probes[key] = self._probe(wanted[key], outcomes)
                if outcome is None:
                    self._requeue(self._running[key])
                else:
                    outcomes[key] = outcome
            left = _awaited_keys(wanted, outcomes, probes)
            self._submit_waiting([self._running[key] for key in left])
        late = f"not graded within the batch deadline of {self._config.batch_deadline_s:g} s"
        outcomes |= {key: _Failure(late, self._running[key].later) for key in left if key in wanted}
        self._forget([*outcomes, *probes.values()], stop=bool(left))
        return outcomes, probes

    def _poll(self, keys: Iterable[bytes], ends: float) -> None:
        """Waits up to POLL_S for a result of the keys; cancels all jobs if the workers broke down."""
        timeout_s = max(0.0, min(POLL_S, ends - time.monotonic()))
        left = wait([self._running[key].future for key in keys], timeout=timeout_s).not_done
        if left and not (self._pool and self._pool.active):
            self._stop()

    def _compares(self, request: RewardRequest) -> bool:
        return self._built_in and compose.compares(request.task, self._config)

    def _probe(self, request: RewardRequest, outcomes: dict[bytes, Outcome]) -> bytes:
        """Returns the key of the request's probe, after putting its score into `outcomes` or submitting it."""
        probe = compose.probe(request)
        key = _content_key(probe)
        if key in self._cache:
            outcomes[key] = self._cache[key]
        elif key not in outcomes and key not in self._running:
            self._schedule(key, probe)
        return key

    def _schedule(self, key: bytes, request: RewardRequest) -> None:
        limit_s = None
        if self._compares(request):
            limit_s = LOADING_TURN_S.get(request.task, 0.0)
            if self._config.deadline_s <= max(limit_s, *worker.FIRST_TURN_S):
                limit_s = self._config.deadline_s  # one turn
        self._running[key] = _Job(request, limit_s, self._submit(request, limit_s))

    def _requeue(self, job: _Job) -> None:
        """Makes a job wait for a longer turn; submits it again unchanged if the workers broke down."""
        if _broke(job.future):
            job.attempts += 1
            job.future = self._submit(job.request, job.limit_s)
        else:
            job.limit_s = min(self._config.deadline_s, TURN_GROWTH * (job.limit_s or 0.0) or SECOND_TURN_S)
            job.later = job.waits = True

    def _submit_waiting(self, jobs: Sequence[_Job]) -> None:
        """Submits waiting jobs when the workers run out of others, the shortest turn first."""
        waiting = sorted((job for job in jobs if job.waits), key=lambda job: job.limit_s or 0.0)
        in_progress = sum(not (job.waits or job.future.done()) for job in jobs)
        for job in waiting[: max(0, JOBS_AHEAD * max(1, self._config.workers) - in_progress)]:
            job.waits, job.future = False, self._submit(job.request, job.limit_s)

    def _submit(self, request: RewardRequest, limit_s: float | None) -> Future:
        timeout_s = self._config.deadline_s
        if limit_s is not None:
            timeout_s = min(timeout_s, WALL_PER_CPU_S * (limit_s or max(worker.FIRST_TURN_S))) + KILL_AFTER_S
        arguments = self._score_function, request, self._config, limit_s
        try:
            return self._running_pool().schedule(worker.grade, arguments, timeout=timeout_s)
        except RuntimeError:  # the pool broke down since it was last checked
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

    def _forget(self, keys: Iterable[bytes], stop: bool) -> None:
        """Removes finished contents and cancels those that still run; with `stop` everything running or queued ends."""
        if stop:
            self._stop()
        for key in keys:
            if key in self._running:
                self._running.pop(key).future.cancel()

    def _outcome(self, job: _Job) -> Outcome | None:
        """Returns the outcome of a job that is done, or None if it must be submitted again."""
        again = job.limit_s is not None and job.limit_s < self._config.deadline_s
        undecided = True
        try:
            outcome = job.future.result()
        except TimeoutError:
            outcome = None
        except ProcessExpired as error:
            killed = error.exitcode == -signal.SIGVTALRM  # by its own timer, at its limit
            outcome = None if killed else f"the grader's process ended with code {error.exitcode}"
        except (BrokenExecutor, CancelledError):
            outcome, again = f"the workers broke down {ATTEMPTS} times", job.attempts < ATTEMPTS
            undecided = False
        if isinstance(outcome, Score):
            return outcome
        if again:  # whatever happened: another process may have used up the memory
            return None
        return _Failure(outcome or f"grading passed the deadline of {self._config.deadline_s:g} s", undecided)

    def _verdict(self, outcome: Outcome, probe: Outcome | None, request: RewardRequest) -> Score:
        """Returns the Score of a request: wrong if its answer was undecided and the probe of its reference graded."""
        if isinstance(outcome, Score):
            return outcome
        if outcome.undecided and isinstance(probe, Score) and probe.scorable:
            return compose.undecided(request, self._config, outcome.reason)
        return compose.failed(f"sample {request.id!r}: {outcome.reason}")

    def _cached(self, key: bytes) -> Score | None:
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def _cache_scores(self, scores: dict[bytes, Score]) -> None:
        self._cache |= scores
        while len(self._cache) > self._config.cache_entries:
            self._cache.popitem(last=False)


def _content_key(request: RewardRequest) -> bytes:
    """Returns a digest of everything in a request that its score depends on; grader and settings belong to the pool."""
    content = dataclasses.astuple(dataclasses.replace(request, id=""))
    return hashlib.blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _broke(future: Future) -> bool:
    """Returns whether a finished future ended because its pool did."""
    return future.cancelled() or isinstance(future.exception(), BrokenExecutor)


def _awaited_keys(
    wanted: Mapping[bytes, RewardRequest], outcomes: Mapping[bytes, Outcome], probes: Mapping[bytes, bytes]
) -> list[bytes]:
    """Returns the keys without an outcome: of contents, and of probes whose content has no score yet or has failed."""
    asked = [probe for key, probe in probes.items() if not isinstance(outcomes.get(key), Score)]
    return [key for key in dict.fromkeys([*wanted, *asked]) if key not in outcomes]
