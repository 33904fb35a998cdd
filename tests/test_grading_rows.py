"""Right and wrong answers of many kinds, most of them written without sight of the grader, each with the verdict of a teacher."""

import json
import pathlib

import pytest

from r1jax.bench import grading_cases
from r1jax.schema import RewardConfig

ROWS = [
    json.loads(line)
    for line in (pathlib.Path(__file__).parent / "grading_rows.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def figures() -> dict:
    return grading_cases.measure(ROWS, RewardConfig(workers=2, deadline_s=30.0))


@pytest.mark.parametrize("kind", sorted({grading_cases.kind(row) for row in ROWS}))
def test_every_row_of_a_kind_has_its_verdict(figures, kind):
    assert [miss for miss in figures["misses"] if miss["kind"] == kind] == []


def test_no_wrong_answer_is_paid_among_the_rows_of_which_half_are_wrong(figures):
    assert figures["false_accept"] == 0
    assert figures["rows"] == len(ROWS) == len({row["id"] for row in ROWS}) > 3000
    assert 0.4 < sum(row["expected"] is False for row in ROWS) / len(ROWS) < 0.6
