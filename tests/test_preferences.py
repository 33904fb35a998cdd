"""Preference pairs: the mean margin, and sets in which length does not tell chosen from rejected."""

import random

import hypothesis
import hypothesis.strategies as st

from r1jax.data import preferences


def pair(number: int, chosen: int, rejected: int) -> dict:
    return {"id": str(number), "chosen": "c" * chosen, "rejected": "r" * rejected}


def test_mean_margin_is_of_the_readable_judgements():
    assert preferences.mean_margin([2, 1, None, 0]) == 1.0
    assert preferences.mean_margin([None, 2, None, None], least=2) is None
    assert preferences.mean_margin([None, None]) is None


def test_balanced_pairs_have_as_many_longer_chosen_as_longer_rejected_ones():
    draw = random.Random(0)
    pairs = [
        pair(n, length := draw.randrange(20, 400), int(length * draw.choice([0.5, 0.8, 1, 0.7]))) for n in range(400)
    ]
    assert preferences.length_bias(pairs)["longer_chosen"] > 0.8
    more = [pair(1000 + n, 50, draw.randrange(60, 200)) for n in range(150)]
    balanced = preferences.balance_lengths(pairs + more)
    bias = preferences.length_bias(balanced)
    assert len(balanced) > 150
    assert bias["longer_chosen"] == 0.5 and abs(bias["mean_log2_length_ratio"]) < preferences.LENGTH_TOLERANCE / 4


@hypothesis.given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=40), st.randoms())
@hypothesis.settings(deadline=None)
def test_balance_is_symmetric_and_independent_of_order(lengths, draw):
    pairs = [pair(number, *both) for number, both in enumerate(lengths)]
    balanced = preferences.balance_lengths(pairs)
    assert [p for p in pairs if p in balanced] == balanced
    differences = sorted(map(preferences.length_difference, balanced))
    mirrored = sorted(-difference for difference in differences)
    gaps = [abs(one - other) for one, other in zip(differences, mirrored, strict=True)]
    assert max(gaps, default=0) <= preferences.LENGTH_TOLERANCE
    shuffled = list(pairs)
    draw.shuffle(shuffled)
    again = preferences.balance_lengths(shuffled)
    assert sorted(p["id"] for p in again) == sorted(p["id"] for p in balanced)


def test_length_is_that_of_the_summary():
    thinking = {"id": "1", "chosen": "<think>" + "x" * 500 + "</think>yes", "rejected": "no!"}
    assert preferences.length_difference(thinking) == 0.0


def test_pairs_of_equal_length_stay_and_one_of_another_length_has_none_to_balance_it():
    assert len(preferences.balance_lengths([pair(1, 100, 100)])) == 1
    assert preferences.balance_lengths([pair(1, 200, 100)]) == []
    assert len(preferences.balance_lengths([pair(1, 200, 100), pair(2, 100, 190)])) == 2
    assert preferences.balance_lengths([pair(1, 200, 100), pair(2, 100, 130)]) == []
