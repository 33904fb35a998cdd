"""The report of a run: at its end, and while it goes on, when a thread of process 0 writes the page from files alone."""

import contextlib
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

from r1jax.core import errors, hosts
from r1jax.core.metrics import METRICS_FILE
from r1jax.core.say import say
from r1jax.report import html

BUSY_SHARE = 0.05  # of the time at most goes into writing pages; a longer page is written less often
TAIL_BYTES = 1 << 16  # more than a row of metrics
Write = Callable[[str, int], None]  # writes the page with a line about the run; it reloads after so many seconds


@contextlib.contextmanager
def refreshed(write: Write, status: Callable[[], str], every_s: float) -> Generator[None]:
    """Surrounds work during which the page is written at once and every `every_s` seconds; 0: never.

    `status` returns how far the work has come. A page that cannot be written ends no run: it is mentioned once. Where
    the work ends with an error, the last page says so and reloads no more.
    """
    if not every_s or not hosts.is_writer():
        yield
        return
    ended, failed = threading.Event(), []

    def page(words: str, interval_s: float = 0.0) -> None:
        try:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            write(f"{words.format(status=status())}. Written at {now}.", math.ceil(interval_s))
        except Exception as error:
            if not failed:
                _mention(error)
            failed.append(error)

    def refresh() -> None:
        interval_s = every_s
        while True:
            begun = time.perf_counter()
            page(f"At work: {{status}}. A new page every {interval_s:.0f} s", interval_s)
            interval_s = max(every_s, (time.perf_counter() - begun) / BUSY_SHARE)
            if ended.wait(interval_s):
                return

    thread = threading.Thread(target=refresh, name="report", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        _end(thread, ended)
        page("Stopped: {status}. The same command goes on from here")
        raise
    _end(thread, ended)


def _end(thread: threading.Thread, ended: threading.Event) -> None:
    ended.set()
    thread.join()


def _mention(error: Exception) -> None:
    say(f"warning: the report could not be written, and the run goes on: {errors.one_line(error)}")


@dataclasses.dataclass
class StageWork:
    """What a stage at work does: it makes `updates` updates in all; 0: it prepares them; None: it evaluates after them."""

    updates: int | None = 0


@contextlib.contextmanager
def while_working(folder: Path, name: str, every_s: float, updates: int | None = 0) -> Generator[StageWork]:
    """Surrounds the work of a single stage, whose result is called `name`, with `refreshed` pages in its folder.

    Yields what the stage does, at first with these `updates`; the stage sets it anew when it does something else.
    """
    work = StageWork(updates)

    def write(subtitle: str, reload_s: int) -> None:
        stages = html.collect(folder.parent, {folder.name: name})
        html.write_run(folder / "report.html", {"checkpoints": {}}, stages, subtitle, reload_s)

    with refreshed(write, lambda: stage_status(folder, work.updates), every_s):
        yield work


def stage_status(folder: Path, updates: int | None) -> str:
    """Returns what a stage does now and how many of its updates are made, by its files; `updates` as in StageWork."""
    count = _last_update(folder / METRICS_FILE)
    if updates is None:
        return f"evaluation after {count} updates"
    if not updates:
        return "preparation of the updates"
    words = (folder / "phase").read_text().split() if (folder / "phase").exists() else []
    return f"training{f' ({words[0]})' if words else ''}, {count} of {updates} updates made"


def _last_update(path: Path) -> int:
    """Returns the update of the last whole row of a file of metrics, 0 without one, reading only the file's end."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
        *rows, _ = file.read().split(b"\n")
    return json.loads(rows[-1])["update"] if rows else 0


def write_final(folder: Path, name: str, summary: Mapping) -> None:
    """Writes report.html of a stage, whose result is called `name`, into its folder (process 0 only).

    `summary` as in `html.write_run`. A page that cannot be written is one line of warning.
    """
    if hosts.is_writer():
        write_or_warn(folder / "report.html", summary, folder.parent, {folder.name: name})


def write_or_warn(path: Path, summary: Mapping, workdir: Path, results: Mapping[str, str]) -> None:
    """Writes the last page of a run, of the stages {folder in workdir: name of its result}, or prints one warning."""
    try:
        html.write_run(path, summary, html.collect(workdir, results))
    except Exception as error:
        _mention(error)
