import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.data.packing import PackItem, pack, pack_batch, rows_needed, spread, unpack

lengths_and_row = st.integers(1, 60).flatmap(
    lambda row: st.tuples(st.lists(st.integers(1, row), max_size=60), st.just(row))
)


def make_item(length: int, seed: int) -> PackItem:
    rng = np.random.default_rng(seed)
    return PackItem(
        tokens=rng.integers(1, 1000, length).astype(np.int32),
        loss_mask=rng.integers(0, 2, length).astype(np.float32),
        values={"advantage": rng.normal(size=length).astype(np.float32)},
    )


def test_pack_puts_each_sample_into_the_fullest_row_that_holds_it():
    assert pack([3, 9, 5, 7, 1, 2], 10) == [[1, 4], [3, 0], [2, 5]]


@settings(max_examples=60, deadline=None)
@given(lengths_and_row)
def test_pack_places_every_sample_once_within_its_row(case):
    lengths, row_tokens = case
    rows = pack(lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= row_tokens for row in rows)


@settings(max_examples=60, deadline=None)
@given(lengths_and_row)
def test_pack_needs_fewer_than_twice_the_rows_of_the_lower_bound(case):
    lengths, row_tokens = case
    total, rows = sum(lengths), rows_needed(lengths, row_tokens)
    assert -(-total // row_tokens) <= rows
    assert rows <= 1 or rows * row_tokens < 2 * total


def test_pack_fills_short_samples_to_within_one_row_of_the_lower_bound():
    lengths = np.random.default_rng(0).integers(8, 40, 512).tolist()
    assert rows_needed(lengths, 96) <= -(-sum(lengths) // 96) + 1


@pytest.mark.parametrize(("lengths", "message"), [([3, 11], "sample 1 has 11 tokens"), ([0], "sample 0 has 0 tokens")])
def test_pack_names_the_sample_and_both_numbers_when_one_does_not_fit(lengths, message):
    with pytest.raises(ValueError, match=f"{message}, needs 1 to row_tokens=10"):
        pack(lengths, 10)


def test_pack_batch_lays_out_two_samples_as_documented():
    items = [
        PackItem(np.array([5, 6]), np.array([0, 1.0]), {"weight": np.array([0.1, 0.2])}),
        PackItem(np.array([7, 8, 9]), np.array([1.0, 0, 1.0]), {"weight": np.array([0.3, 0.4, 0.5])}),
    ]
    batch = pack_batch(items, row_tokens=6, rows=2)
    assert batch.slots == [(0, 3, 2), (0, 0, 3)]
    assert batch.tokens.tolist() == [[7, 8, 9, 5, 6, 0], [0] * 6]
    assert batch.targets.tolist() == [[8, 9, 0, 6, 0, 0], [0] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6]
    assert batch.loss_mask.tolist() == [[0, 1, 0, 1, 0, 0], [0] * 6]
    assert np.array_equal(batch.values["weight"][0], np.array([0.4, 0.5, 0, 0.2, 0, 0], np.float32))
    integers = (batch.tokens, batch.targets, batch.positions, batch.segments)
    assert {array.dtype for array in integers} == {np.dtype(np.int32)}
    assert batch.loss_mask.dtype == batch.values["weight"].dtype == np.float32


@settings(max_examples=60, deadline=None)
@given(lengths_and_row, st.integers(0, 3))
def test_pack_batch_round_trips_through_unpack(case, spare_rows):
    lengths, row_tokens = case
    items = [make_item(length, seed) for seed, length in enumerate(lengths)]
    batch = pack_batch(items, row_tokens, rows_needed(lengths, row_tokens) + spare_rows)
    for array, expected in (
        (batch.targets, [item.tokens[1:] for item in items]),
        (batch.tokens, [item.tokens[:-1] for item in items]),
        (batch.loss_mask, [item.loss_mask[1:] for item in items]),
        (batch.values.get("advantage", batch.loss_mask), [item.values["advantage"][1:] for item in items]),
    ):
        assert all(np.array_equal(got, want) for got, want in zip(unpack(array, batch), expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(lengths_and_row)
def test_pack_batch_loses_no_token_and_crosses_no_sample(case):
    lengths, row_tokens = case
    items = [make_item(length, seed) for seed, length in enumerate(lengths)]
    batch = pack_batch(items, row_tokens, rows_needed(lengths, row_tokens))
    real = batch.segments > 0
    packed = sorted(batch.tokens[real].tolist())
    assert packed == sorted(token for item in items for token in item.tokens.tolist())
    assert not batch.tokens[~real].any() and not batch.loss_mask[~real].any()
    following = np.pad(batch.segments, ((0, 0), (0, 1)))[:, 1:]
    last = real & (following != batch.segments)
    assert last.sum() == len(items)
    assert not batch.loss_mask[last].any() and not batch.targets[last].any()
    assert (batch.positions[real] == 0).sum() == len(items)
    inside = real & ~last
    assert np.array_equal(batch.targets[inside], np.pad(batch.tokens, ((0, 0), (0, 1)))[:, 1:][inside])


def test_unpack_keeps_trailing_axes_and_refuses_other_rows():
    batch = pack_batch([make_item(4, 0)], 8, 2)
    assert unpack(np.zeros((2, 8, 3)), batch)[0].shape == (3, 3)
    with pytest.raises(ValueError, match=r"\(2, 7\)"):
        unpack(np.zeros((2, 7)), batch)


def test_pack_batch_of_nothing_is_padding_only():
    batch = pack_batch([], 8, 2)
    assert batch.slots == [] and batch.tokens.shape == (2, 8) and not batch.segments.any()


def test_pack_batch_refuses_too_few_rows_and_unequal_values():
    with pytest.raises(ValueError, match="2 samples need 2 rows of 8 tokens, given 1"):
        pack_batch([make_item(5, 0), make_item(5, 1)], 8, 1)
    bare = PackItem(np.array([1, 2]), np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"sample 1 has values \[\], needs \['advantage'\]"):
        pack_batch([make_item(2, 0), bare], 8, 1)


def test_pack_item_refuses_arrays_of_another_length():
    with pytest.raises(ValueError, match=r"loss_mask of shape \(1,\)"):
        PackItem(np.array([1, 2]), np.array([1.0]))
    with pytest.raises(ValueError, match="at least 1 token"):
        PackItem(np.array([], np.int32), np.array([]))


def test_pack_batch_takes_little_time_for_512_samples():
    lengths = np.random.default_rng(0).integers(8, 90, 512).tolist()
    items = [make_item(length, seed) for seed, length in enumerate(lengths)]
    rows = rows_needed(lengths, 96)
    times = []
    for _ in range(10):
        started = time.process_time()
        pack_batch(items, 96, rows)
        times.append(time.process_time() - started)
    assert min(times) < 0.015


def test_pack_batch_refuses_given_rows_that_overflow_or_miss_an_item():
    items = [PackItem(np.ones(n, np.int32), np.ones(n, np.float32)) for n in (5, 4, 3)]
    assert pack_batch(items, 9, 2, [[0, 1], [2]]).slots == [(0, 0, 5), (0, 5, 4), (1, 0, 3)]
    with pytest.raises(ValueError, match="row 0 holds 12 tokens"):
        pack_batch(items, 9, 2, [[0, 1, 2]])
    with pytest.raises(ValueError, match="each of 3 items once"):
        pack_batch(items, 9, 2, [[0, 1], [1]])


def imbalance(rows, lengths, size, shards):
    """Returns the mean over micro-batches of (tokens of the fullest device) / (tokens of a device on average)."""
    found = []
    for first in range(0, len(rows), size):
        tokens = np.zeros(size)
        for place, row in enumerate(rows[first : first + size]):
            tokens[place] = sum(lengths[index] for index in row)
        loads = tokens.reshape(shards, -1).sum(axis=1)
        found.append(loads.max() / loads.mean())
    return float(np.mean(found))


def test_spread_gives_devices_about_equal_tokens_where_best_fit_gives_the_first_the_most():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(48), 1.0, 512).astype(int) + 64, 1, 640).tolist()
    packed = pack(lengths, 640)
    before, after = (imbalance(rows, lengths, 32, 8) for rows in (packed, spread(packed, lengths, 32, 8)))
    print(f"{len(packed)} rows; fullest device over the mean: {before:.3f} before, {after:.3f} after")
    assert after < 1.1 < 1.2 < before


@settings(max_examples=60, deadline=None)
@given(lengths_and_row, st.sampled_from([(4, 1), (4, 2), (4, 4), (8, 4)]))
def test_spread_moves_no_row_to_another_micro_batch_and_loses_none(case, division):
    (lengths, row_tokens), (size, shards) = case, division
    packed = pack(lengths, row_tokens)
    rows = spread(packed, lengths, size, shards)
    if shards == 1:
        assert rows == packed
    for first in range(0, len(packed), size):
        assert sorted(row for row in rows[first : first + size] if row) == sorted(packed[first : first + size])
    if shards > 1:
        assert len(rows) == -(-len(packed) // size) * size
    for first in range(0, len(packed) if shards > 1 else 0, size):
        runs = [rows[i : i + size // shards] for i in range(first, first + size, size // shards)]
        assert sum(any(run) for run in runs) == min(len(packed) - first, shards)  # no device idles before it must
