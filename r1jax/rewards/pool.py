"""Grades many samples with deadlines, in worker processes that are killed when they hang."""

import contextlib
import ctypes
import multiprocessing.context
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from multiprocessing import forkserver

from pebble import ProcessExpired, ProcessPool

from r1jax.rewards import compose, math_answer
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

WORKER_MEMORY_BYTES = 4 << 30  # address space of one worker; a huge number ends in MemoryError, not in swap
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

    Process = _WorkerProcess


def _start_worker() -> None:
    """Runs first in each worker."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler would wait for C code that never returns
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, WORKER_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _end_with_trainer()
    math_answer.load()


def _end_with_trainer() -> None:
    """Makes the kernel kill this worker when the trainer ends, even while C code holds the interpreter.

    The fork server ends when nobody holds its alive pipe, and a worker inherits one end: closing it leaves the trainer's.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        os.close(forkserver._forkserver._forkserver_alive_fd)
        forkserver._forkserver._forkserver_alive_fd = None
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux


@dataclass(frozen=True, eq=False)
class Grading:
    """Requests that are being graded: the scores there are, and what the workers still owe, by place."""

    requests: list[RewardRequest]
    scores: list[Score | None]
    futures: dict[int, Future]


class RewardPool:
    """A context manager whose `score` grades samples under the deadlines of a RewardConfig.

    With `config.workers == 0` numbers and rules are graded in this process, and one worker starts when a sample first
    needs math-verify. Otherwise that many workers grade everything. `score_function(request, config)` replaces
    `compose.score`; it must be importable by the workers, and then all samples go to them.
    """

    def __init__(
        self, config: RewardConfig, score_function: Callable[[RewardRequest, RewardConfig], Score] | None = None
    ):
        if config.workers < 0 or config.deadline_s <= 0 or config.batch_deadline_s <= 0:
            raise ValueError(
                f"RewardPool: workers={config.workers} must be 0 or more, deadline_s={config.deadline_s} and "
                f"batch_deadline_s={config.batch_deadline_s} more than 0 seconds"
            )
        self._config = config
        self._quick = compose.quick if score_function is None and config.workers == 0 else None
        self._score_function = score_function or compose.score
        self._checked = score_function is None
        self._pool: ProcessPool | None = None

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
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.stop()
            pool.join()

    def score(self, requests: Sequence[RewardRequest]) -> list[Score]:
        """Returns one Score per request, in order.

        A sample that reaches `deadline_s`, is unfinished at `batch_deadline_s`, or ends its worker, gets scorable False and a
        detail with its id; the others are not affected. Raises ValueError if nothing grades a request's task.
        """
        return self.finish([self.begin(requests)])

    def begin(self, requests: Sequence[RewardRequest]) -> "Grading":
        """Returns the grading of the requests, under way in the workers; what needs none is graded here and now.

        Raises ValueError if nothing grades a request's task.
        """
        if self._checked:
            for request in requests:
                compose.check_task(request)
        scores = [self._quick(request, self._config) if self._quick else None for request in requests]
        slow = [index for index, score in enumerate(scores) if score is None]
        pool = self._running_pool() if slow else None
        futures = {
            index: pool.schedule(
                self._score_function, args=(requests[index], self._config), timeout=self._config.deadline_s
            )
            for index in slow
        }
        return Grading(list(requests), scores, futures)

    def finish(self, gradings: Sequence["Grading"]) -> list[Score]:
        """Returns the scores of several gradings in order; the batch deadline counts from here, for all of them."""
        futures = [future for grading in gradings for future in grading.futures.values()]
        left = wait(futures, timeout=self._config.batch_deadline_s).not_done
        for grading in gradings:
            for index, future in grading.futures.items():
                grading.scores[index] = self._collect(grading.requests[index], future, finished=future not in left)
        if left or (futures and not self._pool.active):
            self.close()  # drops what is still queued or running
        return [score for grading in gradings for score in grading.scores]

    def _running_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            context = _WorkerContext()
            context.set_forkserver_preload(["r1jax.rewards.pool", "math_verify"])
            self._pool = ProcessPool(max(1, self._config.workers), initializer=_start_worker, context=context)
        return self._pool

    def _collect(self, request: RewardRequest, future: Future, finished: bool) -> Score:
        if not finished:
            limit = self._config.batch_deadline_s
            return compose.failed(f"sample {request.id!r}: not graded within the batch deadline of {limit:g} s")
        try:
            return future.result()
        except TimeoutError:
            limit = self._config.deadline_s
            return compose.failed(f"sample {request.id!r}: grading passed the deadline of {limit:g} s")
        except ProcessExpired as error:
            return compose.failed(f"sample {request.id!r}: the grader's process ended with code {error.exitcode}")
        except Exception as error:  # whatever a grader raises concerns its sample only
            reason = " ".join(str(error).split())[:200]
            return compose.failed(f"sample {request.id!r}: the grader raised {type(error).__name__}: {reason}")
