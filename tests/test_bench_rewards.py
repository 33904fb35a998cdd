"""Claims about the reward benchmark, at a size of seconds; performance itself is measured by running it."""

import pytest

from r1jax import config as configs
from r1jax.bench import rewards as bench_rewards


def test_one_hang_costs_one_sample_and_the_batch_again_costs_only_it():
    fields = [("bench.samples", "8"), ("reward.deadline_s", "3")]
    figures = bench_rewards.run(configs.load("bench_rewards", fields), "")
    plain, hanging, again = (figures[name] for name in ("plain", "hanging", "again"))
    assert (plain["right"], plain["unscorable"], plain["workers_started"]) == (8, [], 0)
    assert hanging["right"] == again["right"] == 7
    assert hanging["unscorable"] == ["sample 'sample 0': grading passed the deadline of 3 s"] == again["unscorable"]
    assert (hanging["cache_hits"], again["cache_hits"]) == (0, 7)


def test_a_batch_of_one_is_an_error():
    with pytest.raises(ValueError, match="config.bench.samples=1 must be 2 or more"):
        bench_rewards.run(configs.load("bench_rewards", [("bench.samples", "1")]), "")
