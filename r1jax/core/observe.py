"""What a run is asked to measure besides its results: a trace of some updates, and the peak of its devices.

The launcher asks, once a process. Nothing here is part of a config, since no result depends on it.
"""

import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from r1jax.core import hosts
from r1jax.core.say import say

FOLDER = "profile"  # in a stage's folder


@dataclass(frozen=True)
class MeasurementRequest:
    """The flags --profile and --peak_tflops."""

    profile: tuple[int, int] | None = None  # the first update to trace and the first after it, numbered from 1
    peak_tflops: float | None = None  # of one device, in place of the peak of its kind


_request, _mentioned = MeasurementRequest(), False
_PINNED = re.compile(r"libtpu==([\d.]*\d)")  # in the requirements of JAX


def ask(request: MeasurementRequest) -> None:
    """Sets what the runs of this process measure. Raises ValueError where a trace would end the process."""
    global _request, _mentioned
    if request.profile:
        _require_matching_libtpu(*request.profile)
    _request, _mentioned = request, False


def peak_tflops() -> float | None:
    """Returns the peak that was asked for, TFLOP/s of one device; None: that of its kind counts."""
    return _request.peak_tflops


def mention_missing_trace() -> None:
    """Prints that a trace was asked for and that no update was made that could have been in it, if so."""
    if _request.profile and not _mentioned:
        say(f"{_flag(*_request.profile)}: no update was made, so there is no trace")


class UpdateTrace:
    """Traces the updates that were asked for into FOLDER of a run's folder, in the process that writes its files.

    A trace begins before everything that leads to its first update, the rollout included, and ends after its last. What
    is between an update's end and the next one's beginning, such as an evaluation, is in no step of the trace.
    """

    def __init__(self, run: str, folder: Path):
        """`run` is the start of the lines that say where a trace is, or why there is none."""
        self._run, self._folder = run, Path(folder) / FOLDER
        self._window = _request.profile if hosts.is_writer() else None
        self._active, self._step = False, None

    @contextmanager
    def running(self, done: int) -> Generator[None]:
        """Surrounds the updates of a run, of which `done` were made before, with their `begin` and `end`."""
        if self._window and done + 1 >= self._window[1]:
            self._mention(f"the run is at update {done} already, nothing is traced")
            self._window = None
        try:
            yield
        finally:
            self._end_step()
            if self._active:
                self._stop()
            elif self._window:
                self._mention("the run ended before, nothing was traced")

    def begin(self, update: int) -> None:
        """Begins an update's step, and the trace before it where that is due."""
        if not self._window or not self._window[0] <= update < self._window[1]:
            return
        import jax

        if not self._active:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would fill the trace and slow the run down
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._active = True
        self._step = jax.profiler.StepTraceAnnotation("update", step_num=update)
        self._step.__enter__()

    def end(self, update: int, results: Any = None) -> None:
        """Ends an update's step, and after the last one the trace; first it waits for the arrays of `results`."""
        last = self._active and self._window is not None and update + 1 == self._window[1]
        if last or (self._window and update + 1 == self._window[0]):
            import jax

            jax.block_until_ready(results)  # else work of this update would be in the trace of later ones, or missing
        self._end_step()
        if last:
            self._stop()

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _stop(self) -> None:
        import jax

        jax.profiler.stop_trace()
        self._active, window, self._window = False, self._window, None
        self._mention(f"a trace is in {self._folder}", window)

    def _mention(self, text: str, window: tuple[int, int] | None = None) -> None:
        global _mentioned
        _mentioned = True
        window = window or self._window
        assert window is not None
        say(f"{self._run}: {_flag(*window)}: {text}")


def _require_matching_libtpu(first: int, end: int) -> None:
    """Raises ValueError when JAX would trace through a libtpu of another version than it is built for: that crashes.

    Such a libtpu is installed with the extras plan and test, and JAX loads it on a machine without a TPU too.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return
    try:
        installed = metadata.version("libtpu")
    except metadata.PackageNotFoundError:
        return
    for needed in (match[1] for entry in metadata.requires("jax") or () if (match := _PINNED.match(entry))):
        if not f"{installed}.".startswith(f"{needed}."):
            raise ValueError(
                f"{_flag(first, end)}: libtpu {installed} crashes when JAX {metadata.version('jax')} traces through it; "
                f"on a TPU install libtpu=={needed}.*, elsewhere set JAX_PLATFORMS=cpu"
            )


def _flag(first: int, end: int) -> str:
    return f"--profile={first}:{end}"
