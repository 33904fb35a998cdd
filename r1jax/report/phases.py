"""The phases of an update of RL, whose seconds are the fields PHASE_s of timing.jsonl."""

from collections.abc import Iterable, Mapping

PHASES = ("rollout", "rewards", "reference", "update", "checkpoint")
EVALUATION = "evaluation"  # between updates: a phase of runs that have any


def seconds_by_phase(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Returns the sum of each phase over rows of timing.jsonl; of EVALUATION where it is not 0."""
    rows = list(rows)
    seconds = {phase: sum(row.get(f"{phase}_s", 0.0) for row in rows) for phase in (*PHASES, EVALUATION)}
    return seconds if seconds[EVALUATION] else {phase: seconds[phase] for phase in PHASES}


def mfu_by_phase(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Returns the MFU of each phase over the rows of timing.jsonl that have one, weighted by their seconds."""
    rows, result = list(rows), {}
    for phase in PHASES:
        measured = [row for row in rows if f"{phase}_mfu" in row]
        if seconds := sum(row[f"{phase}_s"] for row in measured):
            result[phase] = sum(row[f"{phase}_mfu"] * row[f"{phase}_s"] for row in measured) / seconds
    return result
