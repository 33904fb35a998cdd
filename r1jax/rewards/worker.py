"""The code of a grader process: its start, its limits, and the grading of one sample within a time limit."""

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

WORKER_MEMORY_BYTES = 4 << 30  # address space of one worker, so that a huge number ends in MemoryError, not in swap
INTERRUPT_AGAIN_S = 0.1  # interval between interruptions, while the interrupted code goes on
KILL_AFTER_S = 0.2  # a grading that cannot be interrupted is killed with its worker so long after its limit
FIRST_TURN_S = (0.03, 0.25)  # least and most processor seconds of a sample's first turn
SHRINK, GROW = 0.5, 1.1  # factors on those seconds after a first turn that was too short, and after one that was not
ScoreFunction = Callable[[RewardRequest, RewardConfig], Score]
_main_lock = threading.Lock()


@contextlib.contextmanager
def main_module_hidden() -> Generator[None]:
    """Keeps a new worker from importing the user's __main__, which it does not need and which may import jax."""
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
        with main_module_hidden():
            super().start()


class WorkerContext(multiprocessing.context.ForkServerContext):
    """Makes workers fork from a small server process that has sympy loaded, and never from the trainer."""

    def __init__(self):
        super().__init__()
        self.started = 0  # worker processes started so far
        self.set_forkserver_preload(["r1jax.rewards.pool", "r1jax.rewards.warm"])

    def Process(self, *arguments, **more) -> _WorkerProcess:  # ty: ignore[incompatible-attribute-override] a class there
        self.started += 1
        return _WorkerProcess(*arguments, **more)


def start(sandboxes: Sequence[str] = ()) -> None:
    """Sets up a worker; runs once in each. `sandboxes` are the backends that withstood the trainer's attack."""
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

    The fork server ends when no process holds its alive pipe. A worker inherits one end; closing it leaves only the
    trainer's.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        server: Any = forkserver._forkserver
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, Linux


class OutOfTime(BaseException):
    """Ends a grading at its limit. It is no Exception, so that no `except Exception` of a library catches it."""


class _FirstTurn:
    """Seconds of a sample's first turn in this worker; they shrink while first turns time out."""

    seconds = max(FIRST_TURN_S)

    @classmethod
    def learn(cls, enough: bool) -> None:
        cls.seconds = min(max(cls.seconds * (GROW if enough else SHRINK), min(FIRST_TURN_S)), max(FIRST_TURN_S))


def grade(
    score_function: ScoreFunction, request: RewardRequest, config: RewardConfig, limit_s: float | None
) -> Score | str | None:
    """Returns the Score, made of plain values; a text if the grader raised; None after `limit_s` processor seconds.

    A limit of 0 means that of a first turn, None means no limit. Exceptions and objects of a grader never leave this
    process: the trainer might be unable to unpickle them, and SystemExit would end it.
    """
    try:
        if limit_s is None:
            return _plain(score_function, request, config)
        outcome = within(limit_s or _FirstTurn.seconds, _plain, score_function, request, config)
    except OutOfTime:
        outcome = None
    except BaseException as error:
        if isinstance(error, MemoryError):
            _forget()
        outcome = f"the grader raised {errors.named(error, 200)}"
    if limit_s == 0.0:
        _FirstTurn.learn(outcome is not None)
    return outcome


def within(limit_s: float, function: Callable, *arguments):
    """Returns `function(*arguments)`. Raises OutOfTime if that takes more than `limit_s` seconds of processor time.

    Processor time does not depend on the machine's load. C code is not interrupted: the process is killed (SIGVTALRM) a
    little later. Works in the main thread only.
    """
    signal.signal(signal.SIGPROF, _interrupt)
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, limit_s, INTERRUPT_AGAIN_S)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s + KILL_AFTER_S)
    try:
        return _interruptible(function, arguments)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _interruptible(function: Callable, arguments: tuple):
    return function(*arguments)


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Interrupts the code below `_interruptible`, unless it is importing: half-imported modules break later samples."""
    while frame is not None and frame.f_code is not _interruptible.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            signal.setitimer(signal.ITIMER_VIRTUAL, KILL_AFTER_S)
            return
        frame = frame.f_back
    if frame is not None:
        raise OutOfTime


def _plain(score_function: ScoreFunction, request: RewardRequest, config: RewardConfig) -> Score:
    score = score_function(request, config)
    reward_terms = {str(name): float(value) for name, value in score.parts.items()}
    return Score(float(score.value), reward_terms, bool(score.scorable), str(score.detail))


def _forget() -> None:
    """Clears sympy's cache of earlier samples."""
    if "sympy" in sys.modules:
        from sympy.core.cache import clear_cache

        clear_cache()
