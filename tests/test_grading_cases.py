"""Every mathematical case of grading_cases.jsonl has the verdict that it says, by kind; and what bench_grading says of cases."""

import dataclasses
import json

import pytest
from conftest import shared_folder, unavailable

from r1jax.bench import grading as bench_grading
from r1jax.bench import grading_cases
from r1jax.configs import bench_grading as bench_grading_config
from r1jax.data import jsonl
from r1jax.rewards.score import Score
from r1jax.schema import DataConfig, RewardConfig

PATH = shared_folder() / "cases" / "grading_cases.jsonl"
ABSENT = "absent"


def cases() -> list[dict]:
    """Returns the cases of task math, none where the file is absent."""
    if not PATH.is_file():
        return []
    rows = map(json.loads, PATH.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["task"] == "math"]


@pytest.fixture(scope="module")
def figures() -> dict:
    if not PATH.is_file():
        unavailable(f"no cases in {PATH}; set R1JAX_SHARED to the folder that holds cases/")
    return grading_cases.measure(cases(), RewardConfig(workers=2))


@pytest.mark.parametrize("kind", sorted({grading_cases.kind(row) for row in cases()}) or [ABSENT])
def test_every_case_of_a_kind_has_its_verdict(figures, kind):
    assert [miss for miss in figures["misses"] if miss["kind"] == kind] == []
    assert figures["by_kind"][kind]["right"] == figures["by_kind"][kind]["rows"] > 0


def test_no_case_is_paid_although_wrong_and_there_are_cases_of_every_verdict(figures):
    assert figures["false_accept"] == 0
    assert {str(row["expected"]) for row in cases()} == {"True", "False", "unscorable"}
    assert figures["rows"] == len(cases()) >= 500


# What bench_grading says of cases

ROWS = [
    {"id": "sum-1", "task": "math", "reference": "5", "response": "\\boxed{5}", "expected": True},
    {"id": "sum-2", "task": "math", "reference": "5", "response": "\\boxed{6}", "expected": True},
    {"id": "sum-3", "task": "math", "reference": "5", "response": "\\boxed{5.0}", "expected": False},
    {"id": "sum-4", "task": "math", "reference": "see the graph above it", "response": "5", "expected": True},
    {
        "id": "x",
        "kind": "prose",
        "task": "math",
        "reference": "see the graph above it",
        "response": "5",
        "expected": "unscorable",
    },
    {"id": "y", "kind": "prose", "task": "math", "reference": "5", "response": "6", "expected": "unscorable"},
    {
        "id": "tag-1",
        "task": "math",
        "reference": "5",
        "response": "\\boxed{5}",
        "expected": False,
        "extraction": "answer_tag",
    },
]


def bench(tmp_path, rows) -> dict:
    jsonl.write(tmp_path / "cases.jsonl", rows)
    config = bench_grading_config.config("tiny")
    return bench_grading.run(dataclasses.replace(config, data=DataConfig(path=str(tmp_path / "cases.jsonl"))), "")[
        "cases"
    ]


def test_cases_are_counted_by_kind_and_outcome_and_misses_are_listed(tmp_path, capsys):
    found = bench(tmp_path, ROWS)
    assert found["by_kind"]["sum"] == dict(
        rows=4, right=1, false_accept=1, false_reject=1, unscorable=1, not_unscorable=0
    )
    assert found["by_kind"]["prose"] == dict(
        rows=2, right=1, false_accept=0, false_reject=0, unscorable=0, not_unscorable=1
    )
    assert found["by_kind"]["tag"]["right"] == 1  # its own extraction finds no answer
    assert {name: found[name] for name in ("rows", "right", "false_accept")} == dict(rows=7, right=3, false_accept=1)
    outcomes = {miss["id"]: miss["outcome"] for miss in found["misses"]}
    assert outcomes == {"sum-2": "false_reject", "sum-3": "false_accept", "sum-4": "unscorable", "y": "not_unscorable"}
    printed = capsys.readouterr().out
    assert "sum-3: accepted although wrong: answer '5.0', reference '5': " in printed and "false_accept" in printed


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"expected": 1}, "row 'sum-1': field 'expected' is 1, must be true, false or 'unscorable'"),
        ({"expected": None}, "line 1: field 'expected' is missing"),
        ({"extraction": "last"}, "row 'sum-1': field 'extraction' is 'last', must be one of auto, boxed"),
    ],
)
def test_a_case_that_expects_no_verdict_is_refused(tmp_path, change, expected):
    with pytest.raises(ValueError, match=expected):
        bench(tmp_path, [{**ROWS[0], **change}])


@pytest.mark.parametrize(
    ("expected", "accuracy", "scorable", "outcome"),
    [
        (True, 1.0, True, "right"),
        (True, 0.0, True, "false_reject"),
        (True, 0.0, False, "unscorable"),
        (False, 1.0, True, "false_accept"),
        (False, 0.0, True, "right"),
        (False, 0.0, False, "unscorable"),
        ("unscorable", 1.0, True, "false_accept"),
        ("unscorable", 0.0, True, "not_unscorable"),
        ("unscorable", 0.0, False, "right"),
    ],
)
def test_an_outcome_is_what_a_verdict_is_beside_the_expected_one(expected, accuracy, scorable, outcome):
    assert grading_cases.outcome(expected, Score(accuracy, {"accuracy": accuracy}, scorable, "")) == outcome


@pytest.mark.parametrize(
    ("row", "kind"),
    [({"id": "a-b-12"}, "a-b"), ({"id": "a", "kind": "k"}, "k"), ({"id": 12}, "12"), ({"id": "a2b"}, "a2b")],
)
def test_a_kind_is_named_by_its_field_or_by_the_id_without_its_number(row, kind):
    assert grading_cases.kind(row) == kind
