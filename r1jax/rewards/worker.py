"""What runs in a grader process: its start, its limits, and the grading of one sample within a number of seconds."""

import contextlib
import ctypes
import multiprocessing.context
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing import forkserver
from types import FrameType
from typing import Any

from r1jax.core import errors
from r1jax.rewards.answers import math_answer
from r1jax.rewards.sandbox import attack as sandbox_attack
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

WORKER_MEMORY_BYTES = 4 << 30  # address space of one worker; a huge number ends in MemoryError, not in swap
RING_AGAIN_S = 0.1  # from one interruption to the next, while what is interrupted goes on
KILL_AFTER_S = 0.2  # past its limit, a grading that cannot be interrupted ends with its worker
FIRST_TURN_S = (0.03, 0.25)  # the fewest and the most seconds of the processor that a sample's first turn gets
LESS, MORE = 0.5, 1.1  # how that changes with a first turn that was not enough, and with one that was
ScoreFunction = Callable[[RewardRequest, RewardConfig], Score]
_main_lock = threading.Lock()


@contextlib.contextmanager
def _main_module_hidden() -> Generator[None]:
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


class WorkerContext(multiprocessing.context.ForkServerContext):
    """Workers fork from a small server process that has sympy loaded: never from the trainer, and quickly."""

    def __init__(self):
        super().__init__()
        self.started = 0  # worker processes until now
        self.set_forkserver_preload(["r1jax.rewards.pool", "r1jax.rewards.warm"])

    def Process(self, *arguments, **more) -> _WorkerProcess:  # ty: ignore[incompatible-attribute-override] a class there
        self.started += 1
        return _WorkerProcess(*arguments, **more)


def start(sandboxes: Sequence[str] = ()) -> None:
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
        server: Any = forkserver._forkserver
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux


class OutOfTime(BaseException):
    """Ends a grading at its limit. No `except Exception` of a library takes it for an error of its own."""


class _FirstTurn:
    """Seconds that a sample's first turn gets in this worker: few where many were not enough, so that those cost little."""

    seconds = max(FIRST_TURN_S)

    @classmethod
    def learn(cls, enough: bool) -> None:
        cls.seconds = min(max(cls.seconds * (MORE if enough else LESS), min(FIRST_TURN_S)), max(FIRST_TURN_S))


def grade(
    score_function: ScoreFunction, request: RewardRequest, config: RewardConfig, limit_s: float | None
) -> Score | str | None:
    """Returns the Score, made of plain values, or what went wrong, or None when `limit_s` seconds of the processor were not enough.

    A limit of 0 is that of a first turn, None is no limit. Whatever a grader raises or returns stays here: an exception or
    object of its own could be unreadable to the trainer, and SystemExit would end it.
    """
    try:
        if limit_s is None:
            return _plain(score_function, request, config)
        found = within(limit_s or _FirstTurn.seconds, _plain, score_function, request, config)
    except OutOfTime:
        found = None
    except BaseException as error:
        if isinstance(error, MemoryError):
            _forget()
        reason = errors.one_line(error, 200)
        found = f"the grader raised {type(error).__name__}: {reason}"
    if limit_s == 0.0:
        _FirstTurn.learn(found is not None)
    return found


def within(limit_s: float, function: Callable, *arguments):
    """Returns `function(*arguments)`. Raises OutOfTime if that takes this process more than `limit_s` seconds of the processor.

    Those are the same seconds on a busy machine. C code is not interrupted: the process is killed (SIGVTALRM) a little
    later. For a main thread only.
    """
    signal.signal(signal.SIGPROF, _ring)
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, limit_s, RING_AGAIN_S)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s + KILL_AFTER_S)
    try:
        return _interruptible(function, arguments)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _interruptible(function: Callable, arguments: tuple):
    return function(*arguments)


def _ring(signal_number: int, frame: FrameType | None) -> None:
    """Interrupts what runs below `_interruptible`, unless it imports: a module that is half there fails later samples."""
    while frame is not None and frame.f_code is not _interruptible.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_VIRTUAL, KILL_AFTER_S)
            return
        frame = frame.f_back
    if frame is not None:
        raise OutOfTime


def _plain(score_function: ScoreFunction, request: RewardRequest, config: RewardConfig) -> Score:
    found = score_function(request, config)
    parts = {str(name): float(value) for name, value in found.parts.items()}
    return Score(float(found.value), parts, bool(found.scorable), str(found.detail))


def _forget() -> None:
    """Frees what sympy keeps of earlier samples."""
    if "sympy" in sys.modules:
        from sympy.core.cache import clear_cache

        clear_cache()
