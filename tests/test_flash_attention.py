"""The attention kernel in interpret mode: values and gradients by the formula in float64, its steps, its bounds.

Tolerances: float32 products of at most 64 terms of size 1 and a softmax in base 2 differ from float64 by less than 4e-6;
bfloat16 inputs are exact in the reference, so what is left is the rounding of probabilities and outputs to 8 bits.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from r1jax.core import rng, sharding
from r1jax.kernels import flash_attention as flash_attention_module
from r1jax.kernels.flash_attention import (
    FIRST,
    LAST,
    LIVE,
    MASKED,
    Blocks,
    block_schedule,
    blocks_for,
    flash_attention,
    key_ranges,
)
from r1jax.models import decoder
from r1jax.rl import losses
from r1jax.schema import GRPOConfig, MeshConfig, Network, OptimizerConfig, replace
from r1jax.train import step

SMALL = Blocks(8, 8, 8, 8, 8, 8, 8)
UNEVEN = Blocks(16, 8, 8, 4, 8, 16, 4)


def reference(q, k, v, segments, scale, d_out, prefixes=None):
    """Returns (output, d_q, d_k, d_v) in float64: softmax over earlier tokens of the own sample and the shared prompt."""
    q, k, v, d_out = (np.asarray(array, np.float64) for array in (q, k, v, d_out))
    places = np.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    if prefixes is not None:
        same |= (prefixes[:, :, None] == segments[:, None, :]) & (prefixes > 0)[:, :, None]
    seen = ((places[:, None] >= places) & same)[:, None, None]
    scores = np.where(seen, np.einsum("btkgh,bskh->bkgts", q, k) * scale, -np.inf)
    exps = np.exp(scores - scores.max(-1, keepdims=True))
    probs = exps / exps.sum(-1, keepdims=True)
    d_probs = np.einsum("btkgv,bskv->bkgts", d_out, v)
    d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bkgts,bskv->btkgv", probs, v),
        np.einsum("bkgts,bskh->btkgh", d_scores, k),
        np.einsum("bkgts,btkgh->bskh", d_scores, q),
        np.einsum("bkgts,btkgv->bskv", probs, d_out),
    )


def drawn(segments, heads=(2, 3), widths=(24, 16), dtype=jnp.float32, seed=0):
    """Returns q, k, v and the gradient of the output, which is 0 at padding."""
    (batch, length), (keys, groups), (width, value) = segments.shape, heads, widths
    generator = np.random.default_rng(seed)
    shapes = ((keys, groups, width), (keys, width), (keys, value), (keys, groups, value))
    arrays = [jnp.asarray(generator.normal(size=(batch, length, *shape)), dtype) for shape in shapes]
    return *arrays[:3], arrays[3] * jnp.asarray(segments > 0, dtype)[:, :, None, None, None]


def kernel(q, k, v, segments, scale, d_out, blocks, prefixes=None, interpret=True):
    call = lambda q, k, v: flash_attention(q, k, v, segments, scale, blocks, prefixes, interpret)  # noqa: E731
    out, pull = jax.vjp(call, q, k, v)
    return out, *pull(d_out)


def compare(segments, blocks, prefixes=None, dtype=jnp.float32, tolerance=4e-6, **shape):
    segments = np.asarray(segments, np.int32)
    q, k, v, d_out = drawn(segments, dtype=dtype, **shape)
    given = None if prefixes is None else jnp.asarray(prefixes, jnp.int32)
    found = jax.jit(lambda q, k, v, d: kernel(q, k, v, jnp.asarray(segments), 0.3, d, blocks, given))(q, k, v, d_out)
    wanted = reference(q, k, v, segments, 0.3, d_out, None if prefixes is None else np.asarray(prefixes))
    valid = (segments > 0)[:, :, None, None, None]
    assert np.isfinite(np.asarray(found[0], np.float32)).all()
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), found, wanted, strict=True):
        a, mask = np.asarray(a, np.float64), valid if a.ndim == 5 else valid[..., 0]
        np.testing.assert_allclose(a * mask, b * mask, atol=tolerance * max(1, np.abs(b).max()), err_msg=name)


ROWS = {
    "odd length": [[1] * 11 + [2] * 20 + [0] * 6],
    "one token": [[1]],
    "a token a sample": [list(range(1, 20))],
    "all padding": [[0] * 9, [1] * 4 + [0] * 5],
    "one sample": [[1] * 33],
    "padding inside": [[1] * 5 + [0] * 7 + [2] * 12],
    "whole blocks": [[1] * 16 + [2] * 16],
}


@pytest.mark.parametrize("blocks", [SMALL, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", ROWS)
def test_values_and_gradients_are_the_formulas(name, blocks):
    compare(ROWS[name], blocks)


@pytest.mark.parametrize(("heads", "widths"), [((4, 1), (24, 16)), ((1, 4), (8, 8)), ((2, 2), (16, 32))])
def test_every_shape_of_heads_and_widths_is_the_formula(heads, widths):
    compare(ROWS["odd length"], SMALL, heads=heads, widths=widths)


def test_bfloat16_inputs_sum_in_float32():
    compare(ROWS["odd length"], SMALL, dtype=jnp.bfloat16, tolerance=0.02)


def test_a_shared_prompt_is_seen_by_its_samples_alone():
    segments = [[1] * 9 + [2] * 7 + [3] * 8 + [4] * 3 + [5] * 10 + [0] * 3]
    prefixes = [[0] * 9 + [1] * 7 + [1] * 8 + [0] * 3 + [4] * 10 + [0] * 3]
    for blocks in (SMALL, UNEVEN):
        compare(segments, blocks, prefixes)


@given(st.lists(st.integers(1, 14), min_size=1, max_size=6), st.integers(0, 9), st.integers(0, 3))
@settings(max_examples=12, deadline=None)
def test_any_row_of_samples_is_the_formula(lengths, padding, seed):
    row = [number for number, length in enumerate(lengths, 1) for _ in range(length)] + [0] * padding
    row += [0] * (48 - len(row)) if len(row) < 48 else []
    compare([row[:48]], SMALL, seed=seed, heads=(1, 2))


def live(segments, query, key, by_key, prefixes=None):
    given = [jnp.asarray(array, jnp.int32) for array in (segments, prefixes) if array is not None]
    ranges = key_ranges(*given)
    blocks = [np.asarray(array) for array in block_schedule(ranges, ranges.shape[2], query, key, by_key)]
    return [
        [tuple(step) for step in zip(*(array[row] for array in blocks), strict=True) if step[2]] for row in range(1)
    ][0]


def test_steps_are_the_blocks_that_hold_a_visible_pair_each_opened_and_closed_once():
    segments = [[1] * 10 + [2] * 6 + [3] * 16]
    assert live(segments, 8, 8, False) == [
        (0, 0, LIVE | FIRST | LAST | MASKED),
        (1, 0, LIVE | FIRST | MASKED),  # the sample that began in block 0
        (1, 1, LIVE | LAST | MASKED),
        (2, 2, LIVE | FIRST | LAST | MASKED),
        (3, 2, LIVE | FIRST),  # all of block 3 sees all of block 2
        (3, 3, LIVE | LAST | MASKED),
    ]
    assert [step[:2] for step in live(segments, 8, 8, True)] == [(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3)]
    prefixes = [[0] * 16 + [1] * 16]  # the third sample goes on from the first
    assert [step[:2] for step in live(segments, 8, 8, False, prefixes)][3:] == [
        (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2), (3, 3)
    ]  # fmt: skip


def test_a_part_of_a_row_without_a_visible_key_opens_and_closes_its_blocks_alone():
    later = key_ranges(jnp.asarray([[1] * 8 + [2] * 24], jnp.int32))[:, :, 16:]  # sees keys 8 to 31
    for fill, steps in ((True, [(0, 0, FIRST | LAST), (1, 0, FIRST | LAST)]), (False, [(0, 0, FIRST | LAST)])):
        found = zip(*block_schedule(later, 8, 8, 8, position=None, fill=fill), strict=True)
        assert [tuple(step) for step in np.stack(next(found), axis=1).tolist() if step[2]] == steps


def test_padding_costs_its_own_block_alone():
    assert [step[:2] for step in live([[1] * 4 + [0] * 28], 8, 8, False)] == [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("queries", [40, 16], ids=["one_call", "three_calls"])
def test_no_read_is_out_of_bounds_nothing_unwritten_is_read_and_no_two_accesses_race(queries, monkeypatch):
    takes(monkeypatch, queries)
    segments = np.asarray([[1] * 11 + [2] * 20 + [0] * 6, [1] * 37], np.int32)
    q, k, v, d_out = drawn(segments, heads=(1, 2))
    params = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    found = kernel(q, k, v, jnp.asarray(segments), 0.3, d_out, SMALL, interpret=params)
    wanted = reference(q, k, v, segments, 0.3, d_out)
    for a, b in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=4e-6 * max(1, np.abs(b).max()))
    assert not interpreter.races.races_found


def test_the_detector_of_races_sees_a_planted_one():
    def racy(x_ref, out_ref, buffer, semaphore):
        copy = pltpu.make_async_copy(x_ref, buffer, semaphore)
        copy.start()
        out_ref[...] = buffer[...]  # before the copy is waited for
        copy.wait()

    pl.pallas_call(
        racy,
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True),
    )(jnp.ones((8, 128))).block_until_ready()
    assert interpreter.races.races_found


def test_kernels_asked_for_on_a_gpu_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(sharding, "device", lambda: types.SimpleNamespace(platform="gpu"))
    assert not sharding.use_pallas("attention_implementation", "auto")
    with pytest.raises(
        ValueError, match="attention_implementation=flash needs a TPU.*a gpu needs attention_impl.*=xla"
    ):
        sharding.use_pallas("attention_implementation", "flash")


def test_parts_that_do_not_divide_a_block_are_refused():
    with pytest.raises(ValueError, match="a part of 3 tokens does not divide a block of 8"):
        replace(SMALL, query_part=3)


def takes(monkeypatch, queries: int, width: int = 24) -> None:
    """Lets the gradient of so many queries of this width stand in VMEM at a time."""
    monkeypatch.setattr(flash_attention_module, "ROW_BYTES", 2 * 4 * width * queries)


def calls(length: int, blocks: Blocks, width: int = 24) -> int:
    """Returns how many kernels the gradient of a row calls: one forward, the others backward."""
    shapes = [jax.ShapeDtypeStruct((1, length, 1, *rest), jnp.bfloat16) for rest in ((1, width), (width,), (16,))]
    call = lambda q, k, v: flash_attention(q, k, v, jnp.ones((1, length), jnp.int32), 1.0, blocks).sum()  # noqa: E731
    return str(jax.make_jaxpr(jax.grad(call, (0, 1, 2)))(*shapes)).count("name=flash_attention")


SHARED = (
    [[1] * 9 + [2] * 7 + [3] * 8 + [4] * 3 + [5] * 20 + [0] * 3],
    [[0] * 9 + [1] * 15 + [0] * 3 + [4] * 20 + [0] * 3],
)


@pytest.mark.parametrize(
    ("blocks", "rows"), [(SMALL, ([[1] * 11 + [2] * 33 + [0] * 6],)), (UNEVEN, SHARED)], ids=["samples", "shared"]
)
def test_a_row_whose_gradient_does_not_fit_is_summed_in_several_calls(blocks, rows, monkeypatch):
    assert calls(64, blocks) == 2
    takes(monkeypatch, 16)
    assert calls(64, blocks) == 5
    compare(rows[0], blocks, *rows[1:])


def test_rows_of_65536_tokens_of_192_take_three_calls_backward():
    assert [calls(tokens, Blocks(), 192) - 1 for tokens in (4096, 26624, 32768, 65536)] == [1, 1, 2, 3]


def long_reference(q, k, v, segments, scale, d_out, block=800):
    """Returns what `reference` does for one head of one long row, with the scores of a block of queries at a time."""
    q, k, v, d_out = (np.asarray(array, np.float64).reshape(segments.size, -1) for array in (q, k, v, d_out))
    out, d_q, d_k, d_v = (np.zeros_like(array) for array in (d_out, q, k, v))
    places = np.arange(segments.size)
    for start in range(0, segments.size, block):
        rows, end = slice(start, start + block), start + block
        seen = (places[rows, None] >= places[:end]) & (segments[0, rows, None] == segments[0, :end])
        scores = np.where(seen, q[rows] @ k[:end].T * scale, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        d_probs = d_out[rows] @ v[:end].T
        d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdims=True)) * scale
        out[rows], d_q[rows] = probs @ v[:end], d_scores @ k[:end]
        d_k[:end] += d_scores.T @ q[rows]
        d_v[:end] += probs.T @ d_out[rows]
    return out, d_q, d_k, d_v


@pytest.mark.slow
def test_a_row_of_40000_tokens_is_the_formula(monkeypatch):
    takes(monkeypatch, 20480)  # two calls, as 192 numbers a query need
    segments = np.repeat([1, 2, 3, 0], (1300, 37000, 1500, 200))[None].astype(np.int32)
    q, k, v, d_out = drawn(segments, heads=(1, 1))
    found = jax.jit(lambda *a: kernel(*a[:3], jnp.asarray(segments), 0.3, a[3], Blocks()))(q, k, v, d_out)
    wanted = long_reference(q, k, v, segments, 0.3, d_out)
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), found, wanted, strict=True):
        a, b = (np.asarray(array, np.float64).reshape(segments.size, -1)[:39800] for array in (a, b))
        print(f"{name}: largest difference {np.abs(a - b).max():.1e} of {np.abs(b).max():.1e}")
        np.testing.assert_allclose(a, b, atol=4e-6 * max(1, np.abs(b).max()), err_msg=name)


def test_blocks_of_short_rows_are_whole_registers():
    assert blocks_for("TPU v5", 100, 192) == Blocks(*[128] * 7)
    assert blocks_for("TPU v5", 4096, 192) == Blocks()
    assert blocks_for("TPU v6 lite", 300, 128) == Blocks(key_part=128, backward_part=256)
    assert blocks_for("unheard of", 4096, 300) == Blocks()


def trained(network: Network):
    """Returns the losses and the weights of three updates on packed rows."""
    grpo = GRPOConfig(kl_coef=0.0)
    mesh, generator = sharding.make_mesh(MeshConfig()), np.random.default_rng(0)
    optimizer = OptimizerConfig(
        learning_rate=1e-2, eps=1e-4
    )  # at 1e-8 Adam makes whole steps of gradients that are rounding
    trainer = step.Trainer(network, optimizer, mesh, losses.make_loss(network, grpo), 3)
    state = trainer.init(
        sharding.initialize(decoder.specs(network.model), rng.key(0, "flash", "init"), jnp.float32, mesh)
    )
    segments = np.asarray([[[1] * 9 + [2] * 14 + [0] * 3, [1] * 26]], np.int32)
    starts = np.maximum.accumulate(np.where(np.diff(segments, prepend=-1), np.arange(26), 0), axis=-1)
    batch = {name: generator.integers(0, 32, segments.shape).astype(np.int32) for name in ("tokens", "targets")}
    batch |= {"segments": segments, "positions": (np.arange(26) - starts).astype(np.int32)}
    batch |= {"loss_mask": (segments > 0).astype(np.float32)}
    batch |= {name: generator.normal(-3, 1, segments.shape).astype(np.float32) for name in losses.fields(grpo)}
    batch["weight"] = batch["loss_mask"] / batch["loss_mask"].sum()
    found = []
    for _ in range(3):
        state, stats = trainer.update(state, batch, 1, losses.arguments(grpo, 0.0, 1.0))
        found.append(float(stats["loss"]))
    return found, state.params


@pytest.mark.parametrize("network", [small.MIXTURE, small.GROUPED], ids=["latent", "grouped"])
def test_three_updates_through_the_kernel_are_those_of_xla(network):
    by_kernel = trained(small.changed(network, attention_implementation="flash", logprob_implementation="pallas"))
    by_xla = trained(small.changed(network, attention_implementation="xla", logprob_implementation="xla"))
    np.testing.assert_allclose(by_kernel[0], by_xla[0], rtol=1e-5)
    assert by_kernel[0][2] != by_kernel[0][0]
    for a, b in zip(jax.tree.leaves(by_kernel[1]), jax.tree.leaves(by_xla[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
