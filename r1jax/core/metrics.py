"""The metrics of a stage: metrics.jsonl holds deterministic rows, which a resumed run repeats bit for bit.

Wall-clock times go to timing.jsonl, the figures of evaluations between updates to evaluation.jsonl; TensorBoard gets
all of them, and Weights & Biases where a project is named.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import BinaryIO, Self

from r1jax.core import files, hosts, remote
from r1jax.core.wandb_log import WandbLog

METRICS_FILE = "metrics.jsonl"  # deterministic values only
TIMING_FILE = "timing.jsonl"  # wall-clock values
EVALUATION_FILE = "evaluation.jsonl"  # deterministic values only
TENSORBOARD_FOLDER = "tensorboard"


def _rows(path: Path) -> list[dict]:
    """Returns the rows of a file of this log, as `files.read_jsonl`. Raises ValueError for one without `update`."""
    rows = files.read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if "update" not in row:
            raise ValueError(f"{path}, line {number}: not a row of metrics, needs the field 'update'")
    return rows


def _encode(update: int, values: Mapping[str, float]) -> bytes:
    """Returns a row as one line, with sorted keys and floats as the shortest text that reads back the same."""
    row: dict[str, int | float] = {"update": int(update)}
    for name, value in values.items():
        if name == "update":
            raise ValueError("MetricsLog: a value is named 'update', which is the row's own number")
        try:
            row[name] = int(value) if isinstance(value, Integral) else float(value)
        except (TypeError, ValueError):
            raise ValueError(f"MetricsLog: {name} is {value!r}, needs a number") from None
    return (json.dumps(row, sort_keys=True) + "\n").encode()


def _named(file_name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{Path(file_name).stem}/{name}": float(value) for name, value in values.items()}


class Timer:
    """Seconds by phase, and other sums, since the last `take`; threads may share it."""

    def __init__(self):
        self._sums: dict[str, float] = {}
        self._lock = threading.Lock()

    def run(self, name: str, function: Callable, *arguments):
        started = time.perf_counter()
        result = function(*arguments)
        self.add(**{f"{name}_s": time.perf_counter() - started})
        return result

    def add(self, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        with self._lock:
            sums, self._sums = self._sums, {}
        return sums


class MetricsLog:
    """Appends to metrics.jsonl and timing.jsonl in a folder; a row is on disk when `write` returns.

    Of several processes only process 0 touches the files; in the others nothing happens.
    """

    names: tuple[str, ...] = (METRICS_FILE, TIMING_FILE)
    events = TENSORBOARD_FOLDER  # each log has one of its own: a restart there drops the later steps of all in it

    def __init__(self, folder: Path, tensorboard: bool = True, wandb_project: str = ""):
        """Opens the files of a folder, which is made if missing; a last line that a crash cut off is removed."""
        self.folder = Path(folder)
        self._wandb = WandbLog(self.folder, wandb_project, self._scalars_on_disk) if wandb_project else None
        self._tensorboard, self._writer, self._purge_step = tensorboard, None, None
        self._files: dict[str, BinaryIO] = {}
        self._writing = hosts.is_writer()
        if not self._writing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.names:
            path = self.folder / name
            data = path.read_bytes() if path.exists() else b""
            if data and not data.endswith(b"\n"):
                files.write_bytes(path, data[: data.rfind(b"\n") + 1])
        self._open()

    def _open(self) -> None:
        self._files = {name: open(self.folder / name, "ab") for name in self.names}

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    def write(self, update: int, *rows: Mapping[str, float]) -> None:
        """Appends the rows of an update, one to each file; NaN and infinities are written as JSON's usual extensions.

        Raises ValueError, and writes nothing, when a value is not a number or is named `update`.
        """
        self._write(update, dict(zip(self.names, rows, strict=True)))

    def write_timing(self, update: int, row: Mapping[str, float]) -> None:
        """Appends to timing.jsonl a row of its own, as `write`: the seconds of what comes after an update."""
        self._write(update, {TIMING_FILE: row})

    def _write(self, update: int, rows: Mapping[str, Mapping[str, float]]) -> None:
        """Appends a row to each of the files that `rows` names."""
        lines = {name: _encode(update, row) for name, row in rows.items()}
        if not self._writing:
            return
        for name, line in lines.items():
            file = self._files[name]
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        scalars: dict[str, float] = {}
        for name, row in rows.items():
            scalars |= _named(name, row)
        if self._tensorboard:
            for name, value in scalars.items():
                self._scalars().add_scalar(name, value, int(update))
        if self._wandb is not None:
            self._wandb.write(int(update), scalars)
        remote.moment()

    def send_evaluation(self, update: int, row: Mapping[str, float]) -> None:
        """Sends a row that is on disk in evaluation.jsonl to Weights & Biases, if this log sends its rows there."""
        if self._writing and self._wandb is not None:
            self._wandb.write(int(update), _named(EVALUATION_FILE, row))

    def _scalars_on_disk(self) -> dict[int, dict[str, float]]:
        """Returns the named scalars of every update whose row is on disk, those of evaluations among them."""
        scalars: dict[int, dict[str, float]] = {}
        for name in (*self.names, EVALUATION_FILE):
            for row in _rows(self.folder / name):
                scalars.setdefault(row.pop("update"), {}).update(_named(name, row))
        return scalars

    def _scalars(self):
        if self._writer is None:
            from tensorboardX import SummaryWriter  # slow to import, and only runs that write need it

            self._writer = SummaryWriter(
                str(self.folder / self.events),
                purge_step=self._purge_step,
                flush_secs=10,
                filename_suffix=f".{os.getpid()}",  # two runs that start within a second get two files
            )
        return self._writer

    def truncate(self, update: int) -> None:
        """Drops the rows of later updates, as a run that resumes after `update` will write them again.

        TensorBoard forgets those steps as well. Raises ValueError with file and line for a damaged row before the last.
        """
        if not self._writing:
            return
        kept = {name: [row for row in _rows(self.folder / name) if row["update"] <= update] for name in self.names}
        self._close_local()
        for name, rows in kept.items():
            files.write_text(self.folder / name, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
        self._purge_step = int(update) + 1
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        """Closes the log; where something was raised, its run of W&B stays open: it is to go on, and its end may wait."""
        if kind is None:
            self.close()
        else:
            self._close_local()

    def close(self) -> None:
        """Closes the files and what else gets the rows."""
        self._close_local()
        if self._wandb is not None:
            self._wandb.close()

    def _close_local(self) -> None:
        self._close_files()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class EvaluationLog(MetricsLog):
    """The same for evaluation.jsonl, and for a TensorBoard run beside the other."""

    names = (EVALUATION_FILE,)
    events = f"{TENSORBOARD_FOLDER}/evaluation"


def read(folder: Path) -> list[dict]:
    """Returns the rows of a folder's metrics.jsonl in order, [] without one; a half-written last line is left out."""
    return _rows(Path(folder) / METRICS_FILE)


def read_timing(folder: Path) -> list[dict]:
    """Returns the rows of a folder's timing.jsonl, as `read`."""
    return _rows(Path(folder) / TIMING_FILE)


def read_evaluation(folder: Path) -> list[dict]:
    """Returns the rows of a folder's evaluation.jsonl, as `read`."""
    return _rows(Path(folder) / EVALUATION_FILE)
