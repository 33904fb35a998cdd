"""The length law and the use of slots, against sums over quantiles and a simulation step by step."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from r1jax.plan import lengths
from r1jax.plan.lengths import LengthLaw

LAW = LengthLaw(mean=800, p99=4000, longest=3000)


def test_the_law_has_the_mean_and_the_99th_percentile_that_it_is_given():
    uncut = LengthLaw(800, 4000, 10**9)
    assert uncut.lengths(50000).mean() == pytest.approx(800, rel=2e-3)
    assert uncut.quantile(0.99) == pytest.approx(4000)


def test_a_percentile_at_the_mean_gives_one_length():
    assert set(LengthLaw(1024, 1024, 2000).lengths(7).tolist()) == {1024}


def test_lengths_are_one_of_each_equal_share_in_an_order_without_a_trend():
    drawn = LAW.lengths(1000)
    assert sorted(drawn) == [max(round(LAW.quantile((i + 0.5) / 1000)), 1) for i in range(1000)]
    cut = 1 - NormalDist(LAW.mu, LAW.sigma).cdf(math.log(3000))
    assert (drawn == 3000).mean() == pytest.approx(cut, abs=1e-3)
    parts = drawn.reshape(10, 100).mean(axis=1)
    assert parts.max() / parts.min() < 1.1


def test_the_longest_of_many_is_passed_in_half_of_the_cases():
    law = LengthLaw(800, 4000, 10**9)
    generator = np.random.default_rng(0)
    longest = np.exp(law.mu + law.sigma * generator.standard_normal((4000, 16))).max(axis=1)
    assert (longest > law.longest_of(16)).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("mean, p99, longest", [(800, 700, 900), (800, 12000, 900), (0, 0, 9), (5, 9, 0)])
def test_laws_that_cannot_be_are_refused(mean, p99, longest):
    with pytest.raises(ValueError, match="LengthLaw"):
        LengthLaw(mean, p99, longest)


def by_step(sizes, slots: int, prompt: int, dispatch: int) -> tuple[int, int, int]:
    """Returns (steps, slot steps that emit, rows seen) of a scheduler that is run token by token."""
    queue, left, seen = list(sizes), [0] * slots, [0] * slots
    steps = busy = rows = 0
    while queue or any(left):
        for slot in range(slots):
            if not left[slot] and queue:
                left[slot], seen[slot] = queue.pop(0), prompt
        for _ in range(dispatch):
            if not any(left):
                break
            steps += 1
            for slot in range(slots):
                if left[slot]:
                    left[slot], seen[slot], busy = left[slot] - 1, seen[slot] + 1, busy + 1
                    rows += seen[slot]
    return steps, busy, rows


@pytest.mark.parametrize("slots, dispatch", [(1, 1), (3, 1), (4, 8), (50, 4)])
def test_occupancy_is_that_of_a_scheduler_run_step_by_step(slots, dispatch):
    sizes = LengthLaw(20, 90, 60).lengths(30)
    used = lengths.occupancy(sizes, slots, 7, dispatch)
    steps, busy, rows = by_step(sizes.tolist(), slots, 7, dispatch)
    assert used.total_steps == steps
    assert (used.steps * used.busy).sum() == busy == used.tokens
    assert (used.steps * used.context).sum() == pytest.approx(rows)
    assert used.share == busy / (slots * steps)
    assert used.mean_context == pytest.approx(rows / busy)


def test_the_tail_runs_with_few_slots():
    used = lengths.occupancy(np.array([10, 10, 10, 100]), 4, 0)
    assert used.tail_share == 0.9
    assert used.busy.tolist() == [4, 1]
