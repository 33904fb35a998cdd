"""What makes a run the run it is: a folder's config and a command's are compared field by field.

A field may change when a run goes on if it changes none of the run's bits, or only the order in which sums are rounded.
Every other field belongs to the run's identity. docs/resume.md has the same table for readers.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FreeField:
    """Why a field may change when a run goes on."""

    reason: str
    same_bits: bool = True  # False: the same up to the rounding of sums
    not_in: tuple[str, ...] = ()  # stages to whose identity it belongs nonetheless


_DEVICES = FreeField("more or fewer devices add up in another order", same_bits=False)
_REMAT = FreeField("values are computed again instead of kept", same_bits=False)
_SAMPLING = {
    "slots": FreeField("draws are keyed by sample and token; the logits of more slots are rounded apart", False),
    "steps_per_dispatch": FreeField("tokens decoded between two looks of the host", False),
    "windows": FreeField("cache lengths that decoding is compiled for", False),
    "prefill_buckets": FreeField("lengths that prompts are padded to", False),
    "stall_deadline_s": FreeField("when a run that hangs is ended"),
}
FREE: dict[str, FreeField] = {  # by the dotted name of a field, or of a part with all its fields
    "mesh": _DEVICES,
    "sampler_mesh": _DEVICES,
    **{f"sampler.{name}": field for name, field in _SAMPLING.items()},
    **{f"judge.sampler.{name}": field for name, field in _SAMPLING.items()},
    "compute.remat": _REMAT,
    "compute.remat_policy": _REMAT,
    "compute.moe_dispatch": FreeField("how tokens travel to their experts", same_bits=False),
    "compute.moe_buffer_factor": FreeField("tokens that the experts of a device take at once", same_bits=False),
    "pack.rows_per_micro_batch": FreeField(
        "gradients of micro-batches are added up in another order", False, ("reward_helpful", "reward_safety")
    ),
    "optimizer.offload": FreeField("where the moments are between updates"),
    "optimizer.max_skipped_updates": FreeField("when a run that diverges is ended"),
    "grpo.offload_reference": FreeField("where the reference is between uses"),
    "reward.workers": FreeField("processes that grade"),
    "reward.cache_entries": FreeField("scores kept in memory"),
    "reward.deadline_s": FreeField("scores that are in the journal stay as they are"),
    "reward.batch_deadline_s": FreeField("scores that are in the journal stay as they are"),
    "checkpointing": FreeField("when checkpoints are written, and which are kept"),
    "train_eval": FreeField("what is measured between updates, and which weights of them are kept"),
    "watch": FreeField("what is written for people who watch the run"),
    "gate": FreeField("what the graph asks of the result"),
}
# The lengths of runs: a run may become longer where the updates that it has made stay what they are.
UPDATES = ("grpo.updates", "pretrain.updates")
EPOCHS = {  # -> the field with the examples of an update
    "sft.epochs": "sft.examples_per_update",
    "reward_model.epochs": "reward_model.examples_per_update",
}


@dataclass(frozen=True)
class Difference:
    """A field of a folder's run that has another value in the command."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.before!r} there, {self.after!r} now"


@dataclass(frozen=True)
class Reached:
    """How far the run in a folder has come."""

    update: int  # of the newest checkpoint, 0 without one
    examples: int | None = None  # of an epoch of a supervised stage, known once its run has been finished


def differences(before: Mapping[str, Any], after: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Difference]:
    """Returns the fields whose values differ; one that `before` lacks, since it is newer, counts as its default."""
    changed = [name for name, value in after.items() if before.get(name, defaults[name]) != value]
    return [Difference(name, before.get(name), after[name]) for name in changed]


def digest(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Returns the sha256 (hex) of the fields of a run's identity that are not at their defaults."""
    kept = {name: value for name, value in fields.items() if value != defaults[name]}
    kept = {name: value for name, value in kept.items() if not is_free(name, fields["stage"])}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def is_free(name: str, stage: str) -> bool:
    """Returns whether a run of a stage may go on with another value of a field, whatever the value."""
    words = name.split(".")
    entries = (FREE.get(".".join(words[:count])) for count in range(1, len(words) + 1))
    return any(entry is not None and stage not in entry.not_in for entry in entries)


def lengthens(difference: Difference) -> bool:
    """Returns whether a difference is one of length, which `refusal` may allow."""
    return difference.name in UPDATES or difference.name in EPOCHS


def refusal(changed: list[Difference], fields: Mapping[str, Any], reached: Reached) -> str:
    """Returns why a run cannot go on with the changed fields of its identity, "" if it can.

    The text names a field with both values. `fields` are the fields of the command, flat. Fields of the identity that
    differ come before lengths that do.
    """
    for difference in changed:
        if not lengthens(difference) and not is_free(difference.name, fields["stage"]):
            return str(difference)
    for difference in filter(lengthens, changed):
        if reason := _why_not(difference, fields, reached):
            return f"{difference}, {reason}"
    return ""


def _why_not(length: Difference, fields: Mapping[str, Any], reached: Reached) -> str:
    """Returns why a run cannot have another length, "" if it can."""
    if length.after < length.before:
        return "and a run can only become longer"
    if fields["optimizer.schedule"] != "constant":
        return f"and optimizer.schedule={fields['optimizer.schedule']} spans them all: earlier rates would be others"
    if length.name in EPOCHS:
        size = fields[EPOCHS[length.name]]
        if reached.examples is None:
            return "and only a finished run can have more epochs"
        if reached.examples * length.before % min(size, reached.examples):
            return f"and its last update had fewer than {size} examples"
    if length.name == "grpo.updates":
        first = last_rollout(length.before, fields)
        if first < length.before and reached.update > first:
            most = fields["grpo.updates_per_rollout"]
            return f"and its last rollout, from update {first} on, is of {length.before - first} updates, not of {most}"
    return ""


def last_rollout(updates: int, fields: Mapping[str, Any]) -> int:
    """Returns the update at which the last rollout of a run starts if it is shorter than others, else `updates`."""
    return updates - updates % fields["grpo.updates_per_rollout"]
