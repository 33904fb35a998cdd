"""Reads what the package wandb has written offline: files in the log format of LevelDB whose records are protobufs."""

import json
import pathlib
import struct
from collections.abc import Iterator

import wandb

BLOCK, HEADER = 32768, struct.Struct("<IHB")  # checksum, length, kind: 1 whole, 2 first, 3 middle, 4 last
FILE_HEADER = 7  # ":W&B", a magic number and a version


def records(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the records of a file, whose process this one ends first; the zeros that fill a block up are left out."""
    wandb.teardown()  # until then the last records may not be on disk
    data, place, parts = path.read_bytes(), FILE_HEADER, b""
    while place + HEADER.size <= len(data):
        if BLOCK - place % BLOCK < HEADER.size:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        place += HEADER.size
        parts += data[place : place + length]
        place += length
        if kind in (1, 4):
            yield parts
            parts = b""


def runs(folder: pathlib.Path) -> list[dict]:
    """Returns {"id", "project", "name", "config", "rows"} of every run in a folder's wandb/, in the order of their
    beginnings; `rows` are {"update": step, name: value}."""
    from wandb.proto import wandb_internal_pb2

    result = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_ctime_ns):
        rows, run = [], None
        for data in records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "run" and run is None:
                run = record.run
            if record.WhichOneof("record_type") == "history":
                values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                values = {name: json.loads(text) for name, text in values.items() if not name.startswith("_")}
                rows.append({"update": record.history.step.num, **values})
        if run is None:  # of a process that was killed before anything was on disk
            continue
        config = {update.key: json.loads(update.value_json) for update in run.config.update}
        result.append(
            {"id": run.run_id, "project": run.project, "name": run.display_name, "config": config, "rows": rows}
        )
    return result
