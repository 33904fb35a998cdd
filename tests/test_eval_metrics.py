import math
from itertools import combinations

import numpy as np
import pytest

from r1jax.evals.metrics import majority, pass_at_1, pass_at_k

NAN = math.nan


def test_pass_at_1_clusters_its_error_by_problem():
    mean, error = pass_at_1([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    assert mean == 0.5
    assert error == pytest.approx(0.5 / math.sqrt(3), abs=1e-15)  # problem means 1, 0, .5: deviation .5


def test_pass_at_1_error_does_not_shrink_when_samples_are_only_repeated():
    scores = np.array([[1.0], [0.0], [1.0], [1.0]])
    assert pass_at_1(scores) == pass_at_1(np.repeat(scores, 8, axis=1))


def test_pass_at_1_leaves_out_unscorable_samples_and_problems():
    assert pass_at_1([[1, NAN], [0, 1], [NAN, NAN]]) == pass_at_1([[1, 1], [0, 1]])


def test_pass_at_1_is_nan_where_nothing_can_be_said():
    assert all(math.isnan(value) for value in pass_at_1([[NAN]]))
    mean, error = pass_at_1([[1, 0]])
    assert mean == 0.5 and math.isnan(error)


@pytest.mark.parametrize("scores", [[], [1, 0], np.zeros((0, 4))])
def test_pass_at_1_refuses_scores_without_problems(scores):
    with pytest.raises(ValueError, match="pass_at_1"):
        pass_at_1(scores)


def test_pass_at_k_equals_the_average_over_all_subsets():
    scores = np.array([[1, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    for k in range(1, 6):
        subsets = [max(row[list(chosen)]) for row in scores for chosen in combinations(range(5), k)]
        assert pass_at_k(scores, k) == pytest.approx(np.mean(subsets), abs=1e-12)


def test_pass_at_k_of_two_right_among_four_is_five_sixths_at_two():
    assert pass_at_k([[1, 1, 0, 0]], 2) == pytest.approx(5 / 6, abs=1e-15)


def test_pass_at_k_counts_only_scorable_samples():
    assert pass_at_k([[1, 0, NAN], [NAN, NAN, 1]], 2) == 1.0
    assert math.isnan(pass_at_k([[NAN, 1]], 2))


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_k_outside_the_samples(k):
    with pytest.raises(ValueError, match=f"k={k} with 4 samples"):
        pass_at_k([[1, 0, 0, 0]], k)


def test_pass_at_k_refuses_partial_scores():
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        pass_at_k([[0.5, 1.0]], 1)


def same_number(first: str, other: str) -> bool:
    return float(first) == float(other)


def test_majority_votes_over_classes_of_equal_answers():
    assert majority(["7", "3", "7.0", None], same_number) == "7"
    assert majority(["1", "2", "2.0", "1.0"], same_number) == "1"  # a tie goes to the class seen first
    assert majority(["5", "4", "4"], same_number) == "4"
    assert majority([None, None], same_number) is None


def test_majority_counts_an_identical_answer_that_equal_does_not_accept():
    assert majority(["?", "?", "1"], lambda first, other: False) == "?"
