"""Checkpoints of a run, written by orbax beside the work: named trees of arrays and one JSON record, whole or not."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from r1jax.core import files, hosts, preempt, remote

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax logs every save, and warns of items that are not asked for


class CheckpointStore:
    """Numbered checkpoints in one folder: the newest `keep` are kept, and for good the multiples of `keep_every`."""

    def __init__(self, folder: Path, keep: int = 2, keep_every: int = 0, read_only: bool = False):
        """With `read_only` nothing there is changed: a run may be writing. Otherwise half-written ones are removed."""
        self.folder = Path(folder).resolve()
        policies = ocp.checkpoint_managers
        kept: list[Any] = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the number of the newest complete checkpoint that process 0 sees, or None."""
        self.wait()
        return hosts.decide(self._manager.latest_step, name="the newest checkpoint")

    def save(self, number: int, items: dict[str, Any], record: dict[str, Any]) -> None:
        """Begins to write the items (pytrees of arrays) and the record; the arrays may be changed or donated after it.

        A checkpoint begun before is on disk when this returns: one is written at a time. A thread writes this one, and
        what goes wrong there is raised by the next call of `save`, `wait` or `close`. Every process writes its part of
        the arrays that are divided between them. Raises TypeError for a record that is no JSON.
        """
        json.dumps(record)  # raises here, not in the thread
        self.wait()
        remote.moment()
        arrays = {name: ocp.args.StandardSave(value) for name, value in items.items()}
        if not self._manager.save(number, args=ocp.args.Composite(**arrays, record=ocp.args.JsonSave(record))):
            raise RuntimeError(f"checkpoint {self.folder}/{number}: was not written; a newer one is there")
        remote.saving(lambda: not self._manager.is_saving_in_progress())

    def drop_after(self, number: int) -> None:
        """Removes the checkpoints with higher numbers, so that such can be written again."""
        for later in hosts.decide(self._manager.all_steps, name="the checkpoints to drop"):
            if later > number:
                self._manager.delete(later)

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is on disk."""
        self._manager.wait_until_finished()

    def restore(self, number: int, targets: dict[str, Any]) -> dict[str, Any]:
        """Returns the items named in `targets` (trees of shape structs with shardings).

        Raises ValueError when an array there has another shape or name than its target.
        """
        self.wait()
        result = {}
        for name, target in targets.items():
            self._check(number, name, target)
            arguments = ocp.args.Composite(**{name: ocp.args.StandardRestore(target)})
            result[name] = self._manager.restore(number, args=arguments)[name]
        return result

    def record(self, number: int) -> dict[str, Any]:
        """Returns the JSON record of a checkpoint."""
        self.wait()
        return self._manager.restore(number, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def close(self) -> None:
        """Waits for the checkpoint that is being written, also where the process was asked to end, and ends the threads."""
        with preempt.deferred():
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


def numbers(folder: Path) -> list[int]:
    """Returns the numbers of the complete checkpoints of a folder, rising; [] where there is none."""
    return sorted(int(path.name) for path in Path(folder).glob("[0-9]*") if path.name.isdigit())


def load(folder: Path, item: str, target: Any) -> Any:
    """Returns one item of the newest checkpoint of a folder that a run may be writing to; `target` as in `restore`.

    Raises ValueError, naming the folder above, where there is no checkpoint, and for one that does not fit.
    """
    if not hosts.decide(numbers, folder, name=f"the checkpoints of {folder}"):
        raise ValueError(f"{Path(folder).parent} holds no finished checkpoint; run that stage to its end first")
    with contextlib.closing(CheckpointStore(folder, read_only=True)) as store:
        number = store.latest()
        assert number is not None
        return store.restore(number, {item: target})[item]


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
    """Writes a record of the run as JSON, whole or not at all; only in the process that writes the run's files.

    URLs take the place of the local paths of what was fetched from them.
    """
    if hosts.is_writer():
        files.write_text(path, remote.shown(json.dumps(value, indent=1, sort_keys=True)))
