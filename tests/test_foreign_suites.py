"""Cases that other graders' authors wrote: graded as they say, or listed in foreign_disputes.jsonl with the reason."""

import collections
import json
import pathlib

import foreign_suites
import pytest

from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig

REMADE = pathlib.Path(__file__).parent / "foreign_pairs.jsonl"
LEAST_RIGHT = 0.95
DEADLINE_S = 5.0


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def misses(rows):
    """Returns a line for each of the rows (extraction, reference, response, expected) that is graded otherwise."""
    found = []
    for extraction in sorted({row["extraction"] for row in rows}):
        asked = [row for row in rows if row["extraction"] == extraction]
        requests = [RewardRequest(row["id"], "math", "", row["response"], row["reference"]) for row in asked]
        with RewardPool(RewardConfig(workers=2, deadline_s=DEADLINE_S, extraction=extraction)) as pool:
            scores = pool.score(requests)
        for row, score in zip(asked, scores, strict=True):
            if not score.scorable or (score.parts["accuracy"] == 1.0) != row["expected"]:
                found.append(f"{row['id']}: should be {'right' if row['expected'] else 'wrong'}: {score.detail}")
    return found


@pytest.mark.parametrize("suite", foreign_suites.SUITES, ids=lambda suite: suite.name)
def test_a_foreign_suite_is_graded_as_it_says_in_95_percent_of_its_undisputed_cases(suite):
    assert len(suite.pairs()) >= suite.fewest
    rows = [row for row in foreign_suites.rows(suite)]
    missed = misses(rows)
    assert len(missed) <= (1.0 - LEAST_RIGHT) * len(rows), f"{len(missed)} of {len(rows)}:\n" + "\n".join(missed)


@pytest.mark.parametrize("suite", foreign_suites.SUITES, ids=lambda suite: suite.name)
def test_every_dispute_names_a_case_that_is_there_and_says_why(suite):
    disputes = [row for row in read(foreign_suites.DISPUTES) if row["suite"] == suite.name]
    keys = [row["key"] for row in disputes]
    assert set(keys) <= {pair.key for pair in suite.pairs()} and len(keys) == len(set(keys))
    assert all(row["right"] in ("here", "open") and row["why"] for row in disputes)
    assert len(disputes) <= 0.1 * len(suite.pairs()) + 8


def test_cases_of_suites_that_do_not_ship_are_graded_right_and_none_is_paid_wrongly():
    rows = read(REMADE)
    missed = misses(rows)
    paid = [line for line in missed if ": should be wrong: " in line]
    assert paid == []
    assert len(missed) <= (1.0 - LEAST_RIGHT) * len(rows), f"{len(missed)} of {len(rows)}:\n" + "\n".join(missed)


def test_remade_cases_have_a_reason_and_several_of_each_kind():
    rows = read(REMADE)
    assert len({row["id"] for row in rows}) == len(rows)
    assert min(collections.Counter(row["kind"] for row in rows).values()) >= 5
    assert sum(not row["expected"] for row in rows) >= 0.25 * len(rows)
    assert all(row["why"] and row["suite"] for row in rows)
