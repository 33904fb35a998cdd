"""The log-prob kernels in interpret mode: values and gradients by the formula in float64, their bounds and what they move.

Tolerances: those of the tiled loss (tests/test_fused_logprob.py), 1e-5 of values near 1 and of the largest gradient in float32; in
bfloat16 gradients are rounded to 8 binary digits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from test_fused_logprob import assert_equal, narrowed, problem, reference

from r1jax.kernels import logprob_tile
from r1jax.kernels.fused_logprob import KernelChoice, token_logprobs
from r1jax.kernels.logprob_tile import BlockSize, TileBlocks, backward_tile, blocks_for, forward_tile
from r1jax.kernels.trained_logprob import trained_logprobs
from r1jax.plan import kernels, traffic

EVEN = TileBlocks(*[BlockSize(16, 32, 8)] * 3)
UNEVEN = TileBlocks(BlockSize(32, 16, 8), BlockSize(8, 32, 8), BlockSize(16, 48, 16))
BOTH, FORWARD = KernelChoice("TPU v5", True), KernelChoice("TPU v5", True, backward=False)


@functools.partial(jax.jit, static_argnames=("blocks", "interpret", "parts"))
def scored(hidden, matrix, targets, temperature, d_logp, d_entropy, blocks=EVEN, interpret=True, parts=1):
    """Returns (logp, entropy, both gradients) of [N, D] by the kernels, the vocabulary in `parts` calls."""
    zeros, vocab = jnp.zeros(hidden.shape[0]), matrix.shape[1]
    bounds = [vocab * part // parts for part in range(parts + 1)]
    tiles = list(zip(bounds[:-1], bounds[1:], strict=True))
    sums = (zeros + logprob_tile.LOWEST, zeros, zeros, zeros)
    for first, end in tiles:
        sums = forward_tile(hidden, matrix[:, first:end], targets - first, temperature, sums, blocks, interpret)
    top, total, weighted, picked = sums
    log_sum = jnp.log(total)
    saved = top, log_sum, log_sum - weighted / total
    given, dtypes = (d_logp / temperature, d_entropy / temperature), (jnp.float32, matrix.dtype)
    found = [
        backward_tile(hidden, matrix[:, a:b], targets - a, temperature, saved, given, dtypes, blocks, interpret)
        for a, b in tiles
    ]
    d_hidden, d_matrix = sum(one for one, _ in found), jnp.concatenate([other for _, other in found], axis=1)
    return picked - top - log_sum, saved[2], d_hidden, d_matrix


def compare(tokens, width, vocab, temperature=0.7, seed=0, **how):
    hidden, matrix, targets, d_logp, d_entropy = problem(1, tokens, width, vocab, scale=2.0, seed=seed)
    found = scored(hidden[0], matrix, targets[0], temperature, d_logp[0], d_entropy[0], **how)
    wanted = reference(hidden, matrix, targets, temperature, d_logp, d_entropy)
    assert_equal(found, [value[0] for value in wanted[:3]] + [wanted[3]])


@pytest.mark.parametrize("blocks", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("shape", [(32, 16, 64), (37, 24, 70), (1, 8, 1), (5, 1, 33), (50, 12, 31)])
def test_values_and_gradients_are_the_formulas(shape, blocks):
    compare(*shape, blocks=blocks)


@pytest.mark.parametrize("parts", [2, 3])
def test_sums_go_on_from_columns_to_columns(parts):
    compare(21, 16, 75, parts=parts)


@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 3), st.floats(0.3, 3.0))
@settings(max_examples=10, deadline=None)
def test_any_number_of_tokens_and_columns_is_the_formula(tokens, vocab, seed, temperature):
    compare(tokens, 8, vocab, temperature, seed)


def test_tokens_that_do_not_count_give_no_gradient():
    hidden, matrix, targets, d_logp, _ = problem(1, 20, 8, 40)
    zeros = np.zeros(20, np.float32)
    *_, d_hidden, d_matrix = scored(hidden[0], matrix, targets[0], 1.0, zeros, zeros)
    assert not np.asarray(d_hidden).any()
    assert not np.asarray(d_matrix).any()


@pytest.mark.parametrize("target", [2, 1, 0])
def test_logits_of_ten_thousand_keep_their_digits(target):
    matrix = np.asarray([[-1e4, 9999.5, 1e4, -9998.25, 0.0, 9999.0, 1e4 - 0.75, -1e4, 3.0]], np.float32)
    given = np.ones((1, 1, 1), np.float32), matrix, np.full((1, 1), target, np.int32)
    d_logp, d_entropy = np.full((1, 1), 1.0, np.float32), np.full((1, 1), 0.25, np.float32)
    found = scored(given[0][0], matrix, given[2][0], 1.0, d_logp[0], d_entropy[0])
    wanted = reference(*given, 1.0, d_logp, d_entropy)
    names = ("logp", "entropy", "d_unembedding")
    assert_equal((*found[:2], found[3]), (wanted[0][0], wanted[1][0], wanted[3]), names=names)


@pytest.mark.parametrize("kernel", [BOTH, FORWARD], ids=["both", "forward"])
def test_the_loss_by_kernels_is_the_formula_whole_and_of_trained_tokens_alone(kernel):
    hidden, matrix, targets, d_logp, d_entropy = problem(3, 40, 8, 600)
    given = jnp.asarray(d_logp), jnp.asarray(d_entropy)
    found, pull = jax.vjp(lambda h, m: token_logprobs(h, m, targets, 0.7, kernel=kernel), hidden, matrix)
    assert_equal((*found, *pull(given)), reference(hidden, matrix, targets, 0.7, d_logp, d_entropy))
    mask = np.random.default_rng(1).random(targets.shape) < 0.4
    mask[1] = False
    trained = lambda h, m: trained_logprobs(h, m, jnp.asarray(targets), jnp.asarray(mask * 1.0), 0.7, 16, kernel)  # noqa: E731
    found, pull = jax.vjp(trained, hidden, matrix)
    logp, entropy, *gradients = reference(hidden, matrix, targets, 0.7, d_logp * mask, d_entropy * mask)
    assert_equal((*found, *pull(given)), (logp * mask, entropy * mask, *gradients))


@pytest.mark.parametrize("used", [3, 256, 511, 599])  # a block has 256 columns
@pytest.mark.parametrize("kernel", [BOTH, FORWARD, None], ids=["both", "forward", "xla"])
def test_columns_beyond_the_used_ones_neither_count_nor_move(kernel, used):
    hidden, matrix, targets, d_logp, d_entropy = problem(3, 40, 8, 600)
    matrix, targets = matrix.at[:, used:].mul(20.0), targets % used
    given = jnp.asarray(d_logp), jnp.asarray(d_entropy)
    found, pull = jax.vjp(lambda h, m: token_logprobs(h, m, targets, 0.7, kernel=kernel, used=used), hidden, matrix)
    assert_equal((*found, *pull(given)), narrowed(hidden, matrix, targets, 0.7, d_logp, d_entropy, used))
    mask = np.random.default_rng(1).random(targets.shape) < 0.4
    trained = lambda h, m: trained_logprobs(  # noqa: E731
        h, m, jnp.asarray(targets), jnp.asarray(mask * 1.0), 0.7, 16, kernel, used
    )
    found, pull = jax.vjp(trained, hidden, matrix)
    logp, entropy, *gradients = narrowed(hidden, matrix, targets, 0.7, d_logp * mask, d_entropy * mask, used)
    assert_equal((*found, *pull(given)), (logp * mask, entropy * mask, *gradients))


@pytest.mark.parametrize("kernel", [BOTH, FORWARD], ids=["both", "forward"])
def test_rows_without_a_trained_token_give_gradients_of_exactly_0(kernel):
    hidden, matrix, targets, d_logp, d_entropy = problem(2, 16, 8, 64)
    nothing = jnp.zeros(targets.shape)
    scored = lambda h, m: trained_logprobs(h, m, jnp.asarray(targets), nothing, 0.7, 16, kernel)  # noqa: E731
    found, pull = jax.vjp(scored, hidden, matrix)
    for value in (*found, *pull((jnp.asarray(d_logp), jnp.asarray(d_entropy)))):
        np.testing.assert_array_equal(np.asarray(value), 0)


def test_bfloat16_gradients_are_summed_in_float32_and_rounded_once():
    """4,096 tokens that each move a column by 1: a sum in bfloat16 stops at 256."""
    hidden, matrix = jnp.ones((1, 4096, 1), jnp.bfloat16), jnp.asarray([[-20.0, 20.0]], jnp.bfloat16)
    targets, ones = jnp.zeros((1, 4096), jnp.int32), jnp.ones((1, 4096))
    _, pull = jax.vjp(lambda m: token_logprobs(hidden, m, targets, kernel=BOTH)[0], matrix)
    (d_matrix,) = pull(ones)
    assert d_matrix.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(d_matrix, np.float32), [[4096, -4096]], rtol=2**-8)


@pytest.mark.parametrize("blocks", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_nothing_unwritten_counts_and_no_two_accesses_race(blocks):
    """Memory starts as NaN, and so is what a block reads past the vocabulary."""
    params = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="nan")
    compare(37, 24, 70, blocks=blocks, interpret=params)
    assert not interpreter.races.races_found


def test_blocks_of_whole_vocabularies_read_nothing_out_of_bounds():
    params = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
    compare(37, 24, 96, blocks=TileBlocks(*[BlockSize(16, 32, 8)] * 3), interpret=params)


def test_blocks_fit_their_tokens_and_vmem():
    assert blocks_for("TPU v5", 8192, 7168) == TileBlocks(
        BlockSize(512, 256, 128), BlockSize(512, 256, 256), BlockSize(512, 256, 256)
    )
    assert blocks_for("TPU v5", 8192, 8192).hidden == BlockSize(256, 256, 256)
    assert blocks_for("TPU v5", 8192, 7168, itemsize=4).columns == BlockSize(512, 128, 256)
    assert blocks_for("unheard of", 30, 64).forward == BlockSize(32, 256, 32)
    with pytest.raises(ValueError, match="a part of 12 tokens does not divide a block of 32"):
        BlockSize(32, 256, 12)


def test_a_block_is_moved_when_its_index_changes_and_in_whole_registers():
    def copied(x_ref, once_ref, out_ref):
        out_ref[...] = x_ref[...] + once_ref[...]

    call = pl.pallas_call(
        copied,
        grid=(3, 4),
        in_specs=[pl.BlockSpec((8, 128), lambda i, j: (i, j)), pl.BlockSpec((None, 8, 1), lambda i, j: (0, i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, j: (0, j)),
        out_shape=jax.ShapeDtypeStruct((8, 512), jnp.float32),
        name="copied",
    )
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((24, 512), (1, 24, 1))]
    (found,) = traffic.kernels(jax.jit(call), *shapes)
    block = 8 * 128 * 4
    assert (found.name, found.steps, found.read, found.written) == (
        "copied",
        12,
        (12 * block, 3 * block),
        (12 * block,),
    )
    counted = lambda n: pl.pallas_call(lambda x, o: None, grid=(n,), out_shape=shapes[0], name="counted")(jnp.ones(8))  # noqa: E731
    with pytest.raises(ValueError, match="the steps of counted depend on values"):
        traffic.kernels(counted, jax.ShapeDtypeStruct((), jnp.int32))


@pytest.mark.parametrize("generation", kernels.GENERATIONS)
@pytest.mark.parametrize("kernel", kernels.LOGPROB)
def test_products_at_the_policys_size_take_at_least_twice_the_time_of_memory(kernel, generation):
    """HBM bytes by walking the grid / the speed of HBM <= 0.5 * operations / the chip's best."""
    found = kernels.roofline(kernel, "v3", generation)
    assert found["memory_over_products"] <= 0.5
    assert found["hbm_bytes"] > 2 * 7168 * (129280 + 8192)
