"""Checkpoints of a run, saved with orbax: named trees of arrays and one JSON record, complete or absent."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from r1jax.core import files, hosts

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs every save, and warns of items that are not asked for


class CheckpointStore:
    """Numbered checkpoints in one folder, of which the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder).resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the number of the newest complete checkpoint that process 0 sees, or None."""
        return hosts.decide(self._manager.latest_step, name="the newest checkpoint")

    def save(self, number: int, items: dict[str, Any], record: dict[str, Any]) -> None:
        """Writes the items (pytrees of arrays) and the record; returns when they are on disk.

        Every process writes its part of the arrays that are divided between them.
        """
        arrays = {name: ocp.args.StandardSave(value) for name, value in items.items()}
        self._manager.save(number, args=ocp.args.Composite(**arrays, record=ocp.args.JsonSave(record)))
        self._manager.wait_until_finished()

    def restore(self, number: int, targets: dict[str, Any]) -> dict[str, Any]:
        """Returns the items named in `targets` (trees of shape structs with shardings).

        Raises ValueError when an array there has another shape or name than its target.
        """
        result = {}
        for name, target in targets.items():
            self._check(number, name, target)
            arguments = ocp.args.Composite(**{name: ocp.args.StandardRestore(target)})
            result[name] = self._manager.restore(number, args=arguments)[name]
        return result

    def record(self, number: int) -> dict[str, Any]:
        """Returns the JSON record of a checkpoint."""
        return self._manager.restore(number, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def close(self) -> None:
        self._manager.close()

    def _check(self, number: int, name: str, target: Any) -> None:
        item = self.folder / str(number) / name
        if not item.is_dir():
            raise ValueError(f"checkpoint {self.folder}/{number}: holds no {name}")
        with ocp.StandardCheckpointer() as reader:
            metadata = reader.metadata(item).item_metadata.tree
        stored = {_key(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(metadata)}
        wanted = {_key(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
        if problems := shape_problems(stored, wanted):
            raise ValueError(f"checkpoint {self.folder}/{number}: does not fit the model: {problems}")


def _key(path) -> str:
    return ".".join(str(getattr(p, "name", getattr(p, "key", getattr(p, "idx", p)))) for p in path)


def shape_problems(stored: dict[str, tuple], wanted: dict[str, tuple], most: int = 3) -> str:
    """Returns one clause naming missing, extra and wrongly shaped arrays, or '' when stored and wanted agree."""
    clauses = [f"{name} is missing" for name in wanted if name not in stored]
    clauses += [f"{name} is not in the model" for name in stored if name not in wanted]
    clauses += [
        f"{name} is {stored[name]}, the model needs {shape}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    more = f" and {len(clauses) - most} more" if len(clauses) > most else ""
    return "; ".join(clauses[:most]) + more


def write_json(path: Path, value: Any) -> None:
    """Writes a record of the run as JSON, whole or not at all; only in the process that writes the run's files."""
    if hosts.is_writer():
        files.write_text(path, json.dumps(value, indent=1, sort_keys=True))
