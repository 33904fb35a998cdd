"""Run the points of a sweep one after another, each in its own process and its own folder. Imports no JAX.

Point SLUG lives in WORKDIR/sweep/SLUG: the run's output, log.txt, figures.json and, written last, DONE with the
config's hash. A point whose DONE holds the hash of its resolved config is not run again. WORKDIR/sweep/table.json is
the table as rows.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import rich.box
import rich.console
import rich.table

import r1jax
from r1jax import config, flags, paths, schema, stage_table
from r1jax.core import preempt

_TABLE_FIGURES = 8  # columns of figures in the printed table; table.json has them all
_LOG_WIDTH = 160  # characters, where the output is not a terminal


@dataclass(frozen=True)
class PointResult:
    """One point's outcome; `error` is the last line of its log when it failed."""

    point: str
    overrides: dict[str, str]
    status: str  # done | skipped | failed
    exit_code: int
    seconds: float
    figures: dict
    error: str = ""


def run(arguments: flags.Arguments, base: schema.Config) -> int:
    """Runs the points that are not finished, prints one table and returns 0, or 1 when a point failed.

    SIGTERM goes to the point that runs; when that has ended because of it, so does the sweep, with the same code. With
    `sweep_index` only that point runs, and table.json is not written, since other jobs may be running other points.
    """
    points = config.sweep(base, arguments.sweep, arguments.overrides)
    for point in points:
        stage_table.check(point.config, config.keys(arguments.overrides + point.overrides))
    index = arguments.sweep_index
    if index is not None and not 0 <= index < len(points):
        raise ValueError(f"--sweep_index={index}: the sweep has {len(points)} points, 0 to {len(points) - 1}")
    if arguments.dry_run:
        print(config.dump(base), end="")
        print("".join(f"point {number}: {point.slug}\n" for number, point in enumerate(points)), end="")
        return 0
    if isinstance(arguments.workdir, str):
        raise ValueError(
            f"--workdir={arguments.workdir}: --sweep needs a local folder; give one, and copy it at the end"
        )
    folder = arguments.workdir / "sweep"
    rows = []
    for number, point in enumerate(points):
        if index in (None, number):
            rows.append(_run_point(point, arguments, folder / point.slug, f"[{number + 1}/{len(points)}]"))
            if rows[-1].exit_code == preempt.PREEMPTED_EXIT:
                return preempt.PREEMPTED_EXIT
    _print_table(rows)
    for path in [folder / "table.json" if index is None else None, arguments.json]:
        if path is not None:
            paths.write_json(path, [asdict(row) for row in rows])
    return int(any(row.status == "failed" for row in rows))


def _run_point(point: config.Point, arguments: flags.Arguments, folder: pathlib.Path, label: str) -> PointResult:
    done, figures = folder / "DONE", folder / "figures.json"
    wanted = config.config_hash(point.config)
    if _read(done).get("config_hash") == wanted and figures.exists():
        print(f"{label} {point.slug}: finished before, skipped", flush=True)
        return PointResult(point.slug, dict(point.overrides), "skipped", 0, _read(done)["seconds"], _read(figures))
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    figures.unlink(missing_ok=True)
    print(f"{label} {point.slug}: running, log in {folder / 'log.txt'}", flush=True)
    start = time.monotonic()
    code = _call(_command(point, arguments, folder, figures), folder / "log.txt")
    seconds = round(time.monotonic() - start, 3)
    if code == 0:
        config.write_json(done, {"config_hash": wanted, "seconds": seconds})
        row = PointResult(point.slug, dict(point.overrides), "done", 0, seconds, _read(figures))
    else:
        error = _last_line(folder / "log.txt")
        row = PointResult(point.slug, dict(point.overrides), "failed", code, seconds, {}, error)
    print(f"{label} {point.slug}: {row.status} in {seconds:.1f} s{': ' if row.error else ''}{row.error}", flush=True)
    return row


def _command(point: config.Point, arguments: flags.Arguments, folder: pathlib.Path, figures: pathlib.Path) -> list[str]:
    overrides = [f"--config.{key}={text}" for key, text in arguments.overrides + point.overrides]
    more = [f"--workdir={folder}", f"--json={figures}"]
    if arguments.profile is not None:
        more.append("--profile={}:{}".format(*arguments.profile))
    if arguments.peak_tflops is not None:
        more.append(f"--peak_tflops={arguments.peak_tflops}")
    if arguments.grace_s is not None:
        more.append(f"--grace_s={arguments.grace_s}")
    if arguments.debug:
        more.append("--debug")
    return [sys.executable, "-m", "r1jax.launch", f"--config={arguments.spec}", *overrides, *more]


def _call(command: list[str], log: pathlib.Path) -> int:
    """Runs `command` with this same package on its path and its output in `log`; returns its exit code."""
    root = str(pathlib.Path(r1jax.__file__).resolve().parents[1])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment, asked, process = {**os.environ, "PYTHONPATH": search}, [], None

    def end(number: int, frame: object) -> None:
        asked.append(number)
        if process is not None:
            process.terminate()

    before = signal.signal(signal.SIGTERM, end)
    try:
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)
        if asked:  # while the process was started
            process.terminate()
        return process.wait()
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _read(path: pathlib.Path) -> dict:
    """Returns the JSON object in `path`, or {} when there is none or it is incomplete."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _last_line(log: pathlib.Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def _print_table(rows: list[PointResult]) -> None:
    numbers = {
        key: None
        for row in rows
        for key, value in row.figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    shown = list(numbers)[:_TABLE_FIGURES]
    table = rich.table.Table(box=rich.box.SIMPLE, title=f"sweep of {len(rows)} points")
    table.add_column("point", overflow="fold", min_width=24)
    for heading in ["status", "seconds", *shown]:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        status = row.status if row.status != "failed" else f"failed (exit {row.exit_code})"
        cells = [_cell(row.figures.get(key)) for key in shown]
        table.add_row(row.point, status, f"{row.seconds:.1f}", *cells)
    rich.console.Console(width=None if sys.stdout.isatty() else _LOG_WIDTH).print(table, markup=False)


def _cell(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
