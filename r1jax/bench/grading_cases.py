"""Measures the graders on cases with a known verdict, by kind of case."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from r1jax.data import jsonl
from r1jax.report import table
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import Score
from r1jax.schema import RewardConfig
from r1jax.tools import graded_rows

FIELDS = ("id", "task", "reference", "response", "expected")
UNSCORABLE = "unscorable"  # `expected` of a case whose reference cannot be graded
OUTCOMES = {  # possible outcomes of a case, in the order of the table's columns
    "right": "as expected",
    "false_accept": "accepted although wrong",
    "false_reject": "rejected although right",
    "unscorable": "not graded although it can be",
    "not_unscorable": "graded, and rejected, although the reference cannot be graded",
}
MISSES_SHOWN = 20
_NUMBER = re.compile(r"[-_/ ]*\d+$")


def holds(path: Path) -> bool:
    """Returns whether a file's first row is a case. Raises ValueError for a file that cannot be read."""
    _, row = jsonl.read_numbered(path, limit=1)[0]
    return "expected" in row


def read(path: Path) -> list[dict]:
    """Returns the cases of a JSONL file. Raises ValueError for a row that lacks one of FIELDS or a valid `expected`."""
    rows = jsonl.read(path, FIELDS)
    for row in rows:
        if not isinstance(row["expected"], bool) and row["expected"] != UNSCORABLE:
            raise ValueError(
                f"{path}: row {row['id']!r}: field 'expected' is {row['expected']!r}, must be true, false or "
                f"{UNSCORABLE!r}"
            )
    return rows


def kind(row: dict) -> str:
    """Returns the kind of a case: its field `kind`, or its id without the number at the end."""
    return str(row.get("kind") or _NUMBER.sub("", str(row["id"])) or row["id"])


def outcome(expected: bool | str, score: Score) -> str:
    """Returns the outcome, one of OUTCOMES, of a case with this score."""
    if not score.scorable:
        return "right" if expected == UNSCORABLE else "unscorable"
    if score.parts["accuracy"] == 1.0:
        return "right" if expected is True else "false_accept"
    return {True: "false_reject", False: "right"}.get(expected, "not_unscorable")


def measure(rows: Sequence[dict], reward: RewardConfig) -> dict:
    """Returns counts of rows and of each outcome, by_kind (the same counts), misses (with details), samples_per_s."""
    started = time.monotonic()
    scores: dict[int, Score] = {}
    for places, config in graded_rows.by_extraction(rows, reward):
        with RewardPool(config) as pool:
            pool_scores = pool.score([graded_rows.request(rows[place]) for place in places])
        scores |= zip(places, pool_scores, strict=True)
    seconds = time.monotonic() - started
    by_kind: dict[str, dict[str, int]] = {}
    misses = []
    for place, row in enumerate(rows):
        result = outcome(row["expected"], scores[place])
        counts = by_kind.setdefault(kind(row), dict.fromkeys(("rows", *OUTCOMES), 0))
        counts["rows"] += 1
        counts[result] += 1
        if result != "right":
            misses.append({"id": row["id"], "kind": kind(row), "outcome": result, "detail": scores[place].detail})
    overall = {name: sum(counts[name] for counts in by_kind.values()) for name in ("rows", *OUTCOMES)}
    return overall | {"samples_per_s": len(rows) / seconds, "by_kind": by_kind, "misses": misses}


def show(figures: dict) -> None:
    """Prints the table of kinds, the worst first, and the misses."""
    kinds = figures["by_kind"]
    worst = sorted(
        kinds, key=lambda name: (-kinds[name]["false_accept"], kinds[name]["right"] - kinds[name]["rows"], name)
    )
    rows = [{"kind": name} | kinds[name] for name in worst] + [{"kind": "all"} | figures]
    table.render(rows, ("kind", "rows", *OUTCOMES), "cases by kind")
    for miss in figures["misses"][:MISSES_SHOWN]:
        print(f"{miss['id']}: {OUTCOMES[miss['outcome']]}: {miss['detail']}")
    if len(figures["misses"]) > MISSES_SHOWN:
        print(f"{len(figures['misses']) - MISSES_SHOWN} more, all of them with --json=PATH")
