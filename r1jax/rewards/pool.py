"""Grades many samples with deadlines, in worker processes that are killed when they hang."""

import contextlib
import ctypes
import dataclasses
import hashlib
import multiprocessing.context
import os
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Future, wait
from dataclasses import dataclass
from multiprocessing import forkserver

from pebble import ProcessExpired, ProcessPool

from r1jax.rewards import compose, math_answer, sandbox_attack
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

WORKER_MEMORY_BYTES = 4 << 30  # address space of one worker; a huge number ends in MemoryError, not in swap
BREAKDOWN_CHECK_S = 1.0  # from one look at the state of the workers to the next
ATTEMPTS = 3  # a sample is given to this many pools of workers, when the ones before broke down
_main_lock = threading.Lock()


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keeps a new worker from importing the user's __main__ (slow, may import jax, needs a guard): it uses nothing of it."""
    main = sys.modules["__main__"]
    with _main_lock:
        saved = {name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)}
        vars(main).update(dict.fromkeys(saved))
        try:
            yield
        finally:
            vars(main).update(saved)


class _WorkerProcess(multiprocessing.context.ForkServerProcess):
    def start(self) -> None:
        with _main_module_hidden():
            super().start()


class _WorkerContext(multiprocessing.context.ForkServerContext):
    """Workers fork from a small server process that has sympy loaded: never from the trainer, and quickly."""

    def __init__(self):
        super().__init__()
        self.started = 0  # worker processes until now

    def Process(self, *arguments, **more) -> _WorkerProcess:
        self.started += 1
        return _WorkerProcess(*arguments, **more)


def _start_worker(sandboxes: Sequence[str] = ()) -> None:
    """Runs first in each worker. `sandboxes`: backends that the trainer has attacked already."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler would wait for C code that never returns
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _end_with_trainer()
    math_answer.load()
    sandbox_attack.withstood.update(sandboxes)


def _end_with_trainer() -> None:
    """Makes the kernel kill this worker when the trainer ends, even while C code holds the interpreter.

    The fork server ends when nobody holds its alive pipe, and a worker inherits one end: closing it leaves the trainer's.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        os.close(forkserver._forkserver._forkserver_alive_fd)
        forkserver._forkserver._forkserver_alive_fd = None
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux


def _grade(score_function: "ScoreFunction", request: RewardRequest, config: RewardConfig) -> Score | str:
    """Runs in a worker and returns the Score, made of plain values, or what went wrong.

    Whatever a grader raises or returns stays here: an exception or object of its own could be unreadable to the trainer,
    and SystemExit would end it.
    """
    try:
        found = score_function(request, config)
        parts = {str(name): float(value) for name, value in found.parts.items()}
        return Score(float(found.value), parts, bool(found.scorable), str(found.detail))
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        return f"the grader raised {type(error).__name__}: {reason}"


ScoreFunction = Callable[[RewardRequest, RewardConfig], Score]


@dataclass(frozen=True, eq=False)
class Grading:
    """Requests that are being graded: the scores there are, and what the workers still owe, by place."""

    requests: list[RewardRequest]
    scores: list[Score | None]
    keys: dict[int, bytes]  # place -> key of the content that a worker grades


@dataclass(frozen=True)
class Usage:
    """What a pool has done since the last `RewardPool.take_usage`."""

    samples: int = 0
    cache_hits: int = 0  # samples whose content was graded before, or is graded for another sample
    workers_started: int = 0


class RewardPool:
    """A context manager whose `score` grades samples under the deadlines of a RewardConfig.

    With `config.workers == 0` numbers and rules are graded in this process, and one worker starts when a sample first
    needs math-verify or a grader of one's own. Otherwise that many workers grade everything.
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
        self._checked = score_function is None
        self._pool: ProcessPool | None = None
        self._running: dict[bytes, tuple[RewardRequest, Future]] = {}
        self._cache: OrderedDict[bytes, Score] = OrderedDict()
        self._context = _WorkerContext()
        self._context.set_forkserver_preload(["r1jax.rewards.pool", "math_verify"])
        self._samples = self._cache_hits = self._workers_told = 0

    @property
    def batch_deadline_s(self) -> float:
        """Seconds after which `score` returns whatever is not graded by then as unscorable."""
        return self._config.batch_deadline_s

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers. A later `score` starts new ones."""
        self._running = {}
        self._stop()

    def take_usage(self) -> Usage:
        """Returns what was done since the last call."""
        found = Usage(self._samples, self._cache_hits, self._context.started - self._workers_told)
        self._samples, self._cache_hits, self._workers_told = 0, 0, self._context.started
        return found

    def score(self, requests: Sequence[RewardRequest]) -> list[Score]:
        """Returns one Score per request, in order.

        A sample that reaches `deadline_s`, is unfinished at `batch_deadline_s`, or ends its worker, gets scorable False and a
        detail with its id; the others are not affected. Raises ValueError if nothing grades a request's task.
        """
        return self.finish([self.begin(requests)])

    def begin(self, requests: Sequence[RewardRequest]) -> Grading:
        """Returns the grading of the requests, under way in the workers; what needs none is graded here and now.

        Raises ValueError if nothing grades a request's task.
        """
        if self._checked:
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
        found: dict[bytes, Score | str] = {key: self._cache[key] for key in wanted if key in self._cache}
        keys = [key for key in wanted if key not in found]
        for key in keys:
            if key not in self._running:  # it ended without a score for another grading
                self._schedule(key, wanted[key])
        late = self._await(keys)
        found |= {key: self._result(key, late) for key in keys}
        for grading in gradings:
            for place, key in grading.keys.items():
                grading.scores[place] = _named(found[key], grading.requests[place])
        self._running = {key: entry for key, entry in self._running.items() if key not in found}
        self._keep({key: score for key, score in found.items() if isinstance(score, Score)})
        if late:
            self._stop()  # drops what is still queued or running
        return [score for grading in gradings for score in grading.scores]

    def _await(self, keys: Sequence[bytes]) -> set[Future]:
        """Waits for the results of the keys and returns the futures that are late for the batch deadline.

        When the workers break down (one is killed while none grades, or their server ends), what they left goes to new ones.
        """
        ends = time.monotonic() + self._config.batch_deadline_s
        for attempt in range(1, ATTEMPTS + 1):
            late = self._wait([self._running[key][1] for key in keys], ends)
            broken = [key for key in keys if self._running[key][1] not in late and _broke(self._running[key][1])]
            if late or not broken or attempt == ATTEMPTS:
                break
            self._stop()
            for key in broken:
                self._schedule(key, self._running[key][0])
        return late

    def _wait(self, futures: Sequence[Future], ends: float) -> set[Future]:
        """Returns those that are not done at a time; when the pool breaks down, none is left undone."""
        left = set(futures)
        while left and time.monotonic() < ends:
            left = wait(left, timeout=min(BREAKDOWN_CHECK_S, max(0.0, ends - time.monotonic()))).not_done
            if left and not self._pool.active:
                self._stop()
                left = {future for future in left if not (future.done() or future.cancel())}
        return left

    def _schedule(self, key: bytes, request: RewardRequest) -> None:
        task = dict(args=(self._score_function, request, self._config), timeout=self._config.deadline_s)
        try:
            future = self._running_pool().schedule(_grade, **task)
        except RuntimeError:  # it broke down since it was looked at
            future = self._running_pool().schedule(_grade, **task)
        self._running[key] = request, future

    def _running_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self._stop()
        if self._pool is None:
            workers = max(1, self._config.workers)
            self._pool = ProcessPool(
                workers, initializer=_start_worker, initargs=(tuple(sandbox_attack.withstood),), context=self._context
            )
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.stop()
            pool.join()

    def _result(self, key: bytes, late: set[Future]) -> Score | str:
        """Returns the Score of a content, or why there is none."""
        future = self._running[key][1]
        if future in late:
            return f"not graded within the batch deadline of {self._config.batch_deadline_s:g} s"
        try:
            return future.result()
        except TimeoutError:
            return f"grading passed the deadline of {self._config.deadline_s:g} s"
        except ProcessExpired as error:
            return f"the grader's process ended with code {error.exitcode}"
        except (BrokenExecutor, CancelledError):
            return f"the workers broke down {ATTEMPTS} times"

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


def _named(found: Score | str, request: RewardRequest) -> Score:
    return found if isinstance(found, Score) else compose.failed(f"sample {request.id!r}: {found}")
