import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.data.hashing import hash64, splitmix64
from r1jax.data.problems import Problem
from r1jax.data.prompts import CYCLE_DRAWS, PromptStream, mixture_counts


def prompts(count: int, task: str = "t") -> list[Problem]:
    return [Problem(f"{task}-{index}", task, f"text {index}", str(index)) for index in range(count)]


def ids(stream: PromptStream, draws) -> list[str]:
    return [stream[draw].id for draw in draws]


def test_splitmix64_matches_the_published_sequence_of_seed_1234567():
    states = np.full(3, 1234567, np.uint64) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_splitmix64_keeps_the_shape_of_a_scalar():
    assert splitmix64(np.uint64(1234567)).shape == () and int(splitmix64(np.uint64(1234567))) == 6457827717110365317


def test_hash64_is_the_same_in_another_process():
    code = "from r1jax.data.hashing import hash64; print(hash64('holdout', 3, -7, 'é'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) == hash64("holdout", 3, -7, "é") == 420727232332267061


def test_hash64_tells_apart_types_and_boundaries():
    values = [hash64(1), hash64("1"), hash64("ab", "c"), hash64("a", "bc"), hash64("abc"), hash64(), hash64("")]
    assert len(set(values)) == len(values)


def test_hash64_refuses_a_float():
    with pytest.raises(ValueError, match="1.5"):
        hash64(1.5)


@pytest.mark.parametrize("size", [1, 2, 37, 1500])
def test_stream_deals_every_prompt_exactly_once_an_epoch(size):
    stream = PromptStream([prompts(size)], seed=3, stage="s")
    for epoch in range(3):
        draws = range(epoch * size, (epoch + 1) * size)
        assert Counter(ids(stream, draws)) == Counter(prompt.id for prompt in prompts(size))
        assert {stream.epoch(draw) for draw in draws} == {epoch}


def test_stream_order_differs_by_epoch_seed_and_stage():
    first = PromptStream([prompts(100)], seed=0, stage="a")
    orders = [
        ids(first, range(100)),
        ids(first, range(100, 200)),
        ids(PromptStream([prompts(100)], seed=1, stage="a"), range(100)),
        ids(PromptStream([prompts(100)], seed=0, stage="b"), range(100)),
        [prompt.id for prompt in prompts(100)],
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_stream_order_is_fixed_across_versions():
    dealt = ids(PromptStream([prompts(6)], seed=1, stage="r1_zero"), range(8))
    assert dealt == ["t-4", "t-5", "t-2", "t-3", "t-1", "t-0", "t-1", "t-0"]


def test_mixture_realises_the_weights_exactly_in_every_cycle():
    stream = PromptStream([prompts(7, "a"), prompts(900, "b"), prompts(3, "c")], (0.5, 0.3, 0.2), seed=5, stage="s")
    for cycle in range(3):
        draws = range(cycle * CYCLE_DRAWS, (cycle + 1) * CYCLE_DRAWS)
        assert Counter(stream[draw].task for draw in draws) == {"a": 500, "b": 300, "c": 200}


def test_mixture_deals_each_source_evenly_across_cycles():
    stream = PromptStream([prompts(7, "a"), prompts(11, "b")], (2, 1), seed=5, stage="s")
    dealt = Counter(ids(stream, range(3 * CYCLE_DRAWS)))
    for task in "ab":
        counts = [count for name, count in dealt.items() if name.startswith(task)]
        assert max(counts) - min(counts) <= 1


def test_mixture_order_differs_by_cycle():
    stream = PromptStream([prompts(5, "a"), prompts(5, "b")], (1, 1), seed=0, stage="s")
    orders = {tuple(stream[c * CYCLE_DRAWS + i].task for i in range(CYCLE_DRAWS)) for c in range(3)}
    assert len(orders) == 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=30), st.integers(0, 2**40))
def test_random_access_equals_sequential_access(draws, seed):
    sources, weights = [prompts(13, "a"), prompts(40, "b"), prompts(1, "c")], (5, 3, 1)
    jumping = PromptStream(sources, weights, seed, "s")
    rising = PromptStream(sources, weights, seed, "s")
    expected = {draw: rising[draw].id for draw in sorted(draws)}
    assert ids(jumping, draws) == [expected[draw] for draw in draws]


def test_mixture_counts_give_the_largest_remainders_first():
    assert mixture_counts((1, 1, 1), 100) == [34, 33, 33]
    assert mixture_counts((0.506, 0.494), 100) == [51, 49]
    assert mixture_counts((1, 0), 100) == [100, 0]


@pytest.mark.parametrize("weights", [(), (0, 0), (-1, 2), (float("nan"), 1), (1, 1e-6)])
def test_mixture_counts_refuse_weights_that_cannot_be_realised(weights):
    with pytest.raises(ValueError, match="mixture_counts"):
        mixture_counts(weights)


def test_stream_refuses_an_empty_source_wrong_weights_and_negative_draws():
    with pytest.raises(ValueError, match="source 1 of stage 's' has no prompts"):
        PromptStream([prompts(2), []], (1, 1), 0, "s")
    with pytest.raises(ValueError, match="2 sources and 1 weights"):
        PromptStream([prompts(2), prompts(2)], (1,), 0, "s")
    with pytest.raises(ValueError, match="draw -1"):
        PromptStream([prompts(2)])[-1]
