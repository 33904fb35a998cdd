"""The decode kernels in interpret mode: outputs by the formula in float64, what it may look at, and tokens drawn through it.

Tolerance: as for attention over whole rows (tests/test_flash_attention.py), 4e-6 in float32; bfloat16 rounds probabilities to 8 bits.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from r1jax.core import rng, sharding
from r1jax.kernels.decode_attention import DecodeBlocks, blocks_for, grouped_decode, latent_decode
from r1jax.kernels.tpu import rounded
from r1jax.models import cache, decoder
from r1jax.schema import MeshConfig

LAYER, VALUES, SCALE = 1, 16, 0.3


def reference(q, keys, values, lengths):
    """Returns softmax(scale * q k) v over each slot's first rows in float64, 0 where there is none."""
    q, keys, values = (np.asarray(array, np.float64) for array in (q, keys, values))
    out = np.zeros((*q.shape[:2], values.shape[-1]))
    for slot, length in enumerate(lengths):
        if length:
            scores = SCALE * q[slot] @ keys[slot, :length].T
            exps = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[slot] = exps / exps.sum(axis=1, keepdims=True) @ values[slot, :length]
    return out


def compare(lengths, rows, blocks, heads=3, width=24, dtype=jnp.float32, tolerance=4e-6, interpret=True, beyond=np.nan):
    """Compares with the formula; rows past a slot's length hold `beyond`."""
    generator = np.random.default_rng(0)
    keys = generator.normal(size=(3, len(lengths), rows, width))
    for slot, length in enumerate(lengths):
        keys[:, slot, length:] = beyond
    q, keys = (jnp.asarray(array, dtype) for array in (generator.normal(size=(len(lengths), heads, width)), keys))
    call = lambda layer, n: latent_decode(q, keys, layer, n, VALUES, SCALE, blocks, interpret)  # noqa: E731
    found = np.asarray(jax.jit(call)(jnp.int32(LAYER), jnp.asarray(lengths)))
    np.testing.assert_allclose(found, reference(q, keys[LAYER], keys[LAYER, ..., :VALUES], lengths), atol=tolerance)


def compare_grouped(
    lengths, rows, blocks, heads=2, group=3, width=24, dtype=jnp.float32, tolerance=4e-6, interpret=True
):
    """Compares every head's group with the formula; rows past a slot's length are NaN."""
    generator = np.random.default_rng(1)
    cached = generator.normal(size=(2, 3, len(lengths), heads, rows, width))
    for slot, length in enumerate(lengths):
        cached[:, :, slot, :, length:] = np.nan
    q = generator.normal(size=(len(lengths), heads, group, width))
    q, keys, values = (jnp.asarray(array, dtype) for array in (q, *cached))
    call = lambda layer, n: grouped_decode(q, keys, values, layer, n, SCALE, blocks, interpret)  # noqa: E731
    found = np.asarray(jax.jit(call)(jnp.int32(LAYER), jnp.asarray(lengths)))
    for head in range(heads):
        wanted = reference(q[:, head], keys[LAYER, :, head], values[LAYER, :, head], lengths)
        np.testing.assert_allclose(found[:, head], wanted, atol=tolerance)


@pytest.mark.parametrize("blocks", [DecodeBlocks(8, 1), DecodeBlocks(8, 2), DecodeBlocks(16, 3), DecodeBlocks(64, 2)])
def test_outputs_are_the_formula_and_rows_past_a_length_may_hold_anything(blocks):
    compare([1, 37, 8, 0, 20, 16], 37, blocks)


@pytest.mark.parametrize("blocks", [DecodeBlocks(8, 1), DecodeBlocks(16, 3), DecodeBlocks(64, 2)])
def test_a_key_head_serves_its_group_alone(blocks):
    compare_grouped([1, 37, 8, 0, 20, 16], 37, blocks)


@pytest.mark.parametrize(("heads", "group", "width"), [(1, 1, 16), (3, 3, 17), (4, 1, 8)])
def test_every_grouping_is_the_formula(heads, group, width):
    compare_grouped([9, 23], 24, DecodeBlocks(8, 2), heads, group, width)


@pytest.mark.parametrize(("heads", "width"), [(1, 16), (5, 17), (16, 40)])
def test_every_number_of_heads_and_width_is_the_formula(heads, width):
    compare([9, 23], 24, DecodeBlocks(8, 2), heads, width)


def test_bfloat16_sums_in_float32():
    compare([40, 13], 48, DecodeBlocks(16, 2), dtype=jnp.bfloat16, tolerance=0.02)
    compare_grouped([40, 13], 48, DecodeBlocks(16, 2), dtype=jnp.bfloat16, tolerance=0.02)


@given(st.lists(st.integers(0, 29), min_size=1, max_size=4), st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_any_lengths_are_the_formula(lengths, splits):
    compare(lengths, 29, DecodeBlocks(8, splits))
    compare_grouped(lengths, 29, DecodeBlocks(8, splits))


@pytest.mark.parametrize("kind", [compare, compare_grouped])
def test_nothing_unwritten_counts_and_no_two_accesses_race(kind):
    params = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="nan")
    kind([1, 37, 0, 20], 37, DecodeBlocks(8, 2), interpret=params)
    assert not interpreter.races.races_found


def test_blocks_of_short_caches_are_whole_registers_and_a_v5p_has_two_cores():
    assert blocks_for("TPU v5", 8193, 640) == DecodeBlocks(512, 2)
    assert blocks_for("TPU v5 lite", 100, 640) == DecodeBlocks(128, 1)
    assert blocks_for("TPU v5", 8193, 32 * 128) == DecodeBlocks(128, 2)
    assert (rounded(576), rounded(640), rounded(1)) == (640, 640, 128)


def test_a_cache_for_the_kernel_is_padded_to_whole_registers_and_others_are_not():
    network = small.MIXTURE
    width = network.model.kv_lora_rank + network.model.qk_rope_head_dim
    assert cache.CacheSpec(network, 2, 8).row_shape == (width,)
    spec = cache.CacheSpec(small.changed(network, attention_implementation="flash"), 2, 20)
    assert spec.row_shape == (rounded(width),)
    assert spec.shape[2] == 32
    assert spec.zeros().rows == 31
    grouped = cache.CacheSpec(small.changed(small.GROUPED, attention_implementation="flash"), 2, 20)
    assert grouped.shape[2:] == (small.GROUPED.model.num_key_value_heads, 32, rounded(small.GROUPED.model.head_dim))
    assert grouped.axes == (None, "slots", "heads", None, None)
    assert grouped.zeros().rows == 31


def decoded(network, params):
    """Returns hidden states of two slots of a prompt and four tokens fed one by one, the second idle in the third step."""
    store = cache.CacheSpec(network, 2, 16).zeros()
    tokens = np.random.default_rng(3).integers(1, network.model.vocab_size, (2, 10))
    places, running = np.broadcast_to(np.arange(6), (2, 6)), np.ones((2, 6), np.int32)
    step = jax.jit(lambda t, at, on, store: decoder.forward(params, t, at, on, network, store)[:2])
    found = []
    out, store = step(tokens[:, :6], places, running, store)
    for number in range(4):
        active = np.asarray([[1], [number != 2]], np.int32)
        out, store = step(tokens[:, 6 + number : 7 + number], np.full((2, 1), 6 + number), active, store)
        found.append(np.asarray(out) * active[..., None])
    return np.stack(found)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("shape", [small.MIXTURE, small.GROUPED], ids=["latent", "grouped"])
def test_steps_through_the_kernel_are_those_of_xla(shape, scan):
    network = small.changed(shape, scan_layers=scan, attention_implementation="xla")
    mesh = sharding.make_mesh(MeshConfig())
    params = sharding.initialize(decoder.specs(network.model), rng.key(0, "decode", "init"), "float32", mesh)
    by_xla, by_kernel = (
        decoded(small.changed(network, attention_implementation=how), params) for how in ("xla", "flash")
    )
    np.testing.assert_allclose(by_kernel, by_xla, atol=2e-5 * np.abs(by_xla).max())
    assert np.abs(by_xla[2, 0]).max() > 0
