"""Live progress of a stage: a progress bar on a terminal, elsewhere a plain line every few seconds."""

import itertools
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from r1jax.core import hosts
from r1jax.core.say import say

PLAIN_INTERVAL_S = 15.0


class Progress:
    """Shows how far a counted piece of work has come, with its latest figures (process 0 only)."""

    def __init__(self, title: str, total: int, done: int = 0):
        self.title, self.total, self.done = title, total, done
        self._console = Console(stderr=True, quiet=not hosts.is_writer())
        self._rich = None
        self._last_line = time.monotonic()
        if self._console.is_terminal and not self._console.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._rich = RichProgress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
            self._task = self._rich.add_task(title, total=total, completed=done, figures="")

    def __enter__(self) -> "Progress":
        if self._rich:
            self._rich.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._rich:
            self._rich.stop()

    def update(self, done: int, **figures: float) -> None:
        """Shows `done` of the total and the figures."""
        self.done = done
        text = "  ".join(f"{name} {value:.3g}" for name, value in figures.items())
        if self._rich:
            self._rich.update(self._task, completed=done, figures=text)
        elif self._console.quiet:
            return
        elif time.monotonic() - self._last_line > PLAIN_INTERVAL_S or done == self.total:
            self._last_line = time.monotonic()
            say(f"{self.title} {done}/{self.total}  {text}")


def counter(title: str, total: int) -> Callable[[], None]:
    """Returns what counts one more of `total`, and prints a line every few seconds; also while a bar is shown."""
    done, last_line = itertools.count(1), time.monotonic()

    def count() -> None:
        nonlocal last_line
        number, now = next(done), time.monotonic()
        if now - last_line > PLAIN_INTERVAL_S:
            last_line = now
            say(f"{title} {number}/{total}")

    return count
