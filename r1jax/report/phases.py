"""The phases of an update of RL, whose seconds are the fields PHASE_s of timing.jsonl."""

from collections.abc import Iterable, Mapping

PHASES = ("rollout", "rewards", "reference", "update", "checkpoint")


def seconds_by_phase(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Returns the sum of each phase over rows of timing.jsonl."""
    rows = list(rows)
    return {phase: sum(row.get(f"{phase}_s", 0.0) for row in rows) for phase in PHASES}
