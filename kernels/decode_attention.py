"""Decode attention over the cache as Pallas TPU kernels: one query per slot, for MLA's latent and for grouped heads.

In MLA the queries have the key matrix folded in (DeepSeek-V2, arXiv 2405.04434, section 2.1.2), so a row of the cache
is the key of every head, and its first part is the value. In GQA (arXiv 2305.13245) a key head serves its group of
query heads. Only the rows up to a slot's length are read, block by block, with a running softmax. The blocks of a slot
are distributed over several splits, so that two cores share a long context; the splits' outputs are combined at the
end.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from r1jax.kernels.tpu import LANES, LOWEST, dot, doubled

LATENT, GROUPED = NAMES = ("latent_decode", "grouped_decode")
MAX_ROW_WIDTHS = 512 * 1024  # rows of a block times the width of a row over all key heads; bounds VMEM


@dataclass(frozen=True)
class DecodeBlocks:
    """Cache rows that a grid step reads, and splits that the blocks of a slot are distributed over."""

    rows: int = 512
    splits: int = 1


BLOCKS = {
    "TPU v5": DecodeBlocks(splits=2),  # a v5p has two cores
    "TPU v5 lite": DecodeBlocks(),
    "TPU v6 lite": DecodeBlocks(),
}


def blocks_for(device_kind: str, rows: int, width: int) -> DecodeBlocks:
    """Returns the sizes for a TPU generation and a cache of `rows` rows, whose width over all key heads is `width`."""
    preferred = BLOCKS.get(device_kind, DecodeBlocks())
    fitting = max(MAX_ROW_WIDTHS // width // LANES * LANES, LANES)
    return DecodeBlocks(min(preferred.rows, fitting, doubled(LANES, rows)), preferred.splits)


def latent_decode(
    q_SNW, cache_LSTW, layer, lengths_S, value_width: int, scale: float, blocks=DecodeBlocks(), interpret=False
):
    """Returns the outputs, float32 [S, N, value_width], of queries [S, N, W] over the first lengths [S] rows of each
    slot in one layer of a cache [L, S, T, W]; 0 for a slot of length 0.

    Scores (multiplied by `scale`) and softmax are float32; the products' inputs have the cache's dtype. Rows past a
    slot's length may hold anything.
    """
    arrays = (q_SNW[:, None], cache_LSTW[:, :, None])
    return _call(LATENT, arrays, layer, lengths_S, value_width, scale, blocks, interpret)[:, 0]


def grouped_decode(
    q_SKGH, keys_LSKTH, values_LSKTH, layer, lengths_S, scale: float, blocks=DecodeBlocks(), interpret=False
):
    """Returns the outputs, float32 [S, K, G, H], of queries [S, K, G, H] over keys and values [L, S, K, T, H].

    All else is as in `latent_decode`.
    """
    arrays, width = (q_SKGH, keys_LSKTH, values_LSKTH), values_LSKTH.shape[-1]
    return _call(GROUPED, arrays, layer, lengths_S, width, scale, blocks, interpret)


def _call(name, arrays, layer, lengths_S, value_width, scale, blocks, interpret):
    """Returns the outputs, float32 [S, K, G, value_width].

    `arrays` are queries [S, K, G, W], keys [L, S, K, T, W], and values unless they are the first part of the keys.
    """
    (slots, heads, group, width), cached = arrays[0].shape, arrays[1:]
    steps = pl.cdiv(pl.cdiv(cached[0].shape[3], blocks.rows), blocks.splits)

    def at_rows(slot, split, step, layer, lengths):
        last = jnp.maximum(pl.cdiv(lengths[slot], blocks.rows) - 1, 0)
        return layer[0], slot, 0, jnp.minimum(step * blocks.splits + split, last), 0

    out, norm = pl.pallas_call(
        functools.partial(_kernel, blocks, value_width, scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(slots, blocks.splits, steps),
            in_specs=[
                pl.BlockSpec((None, heads, group, width), lambda slot, split, step, layer, lengths: (slot, 0, 0, 0)),
                *(pl.BlockSpec((None, None, heads, blocks.rows, rows.shape[-1]), at_rows) for rows in cached),
            ],
            out_specs=[
                pl.BlockSpec(
                    (None, None, heads, group, size),
                    lambda slot, split, step, layer, lengths: (slot, split, 0, 0, 0),
                )
                for size in (value_width, 1)
            ],
            scratch_shapes=[pltpu.VMEM((heads, group, size), jnp.float32) for size in (1, 1, value_width)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((slots, blocks.splits, heads, group, size), jnp.float32) for size in (value_width, 1)
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(jnp.reshape(layer, 1).astype(jnp.int32), lengths_S.astype(jnp.int32), *arrays)
    return jnp.sum(jax.nn.softmax(norm, axis=1) * out, axis=1)


def _kernel(blocks, value_width, scale, layer, lengths, q_ref, keys_ref, *refs):
    *values_ref, out_ref, norm_ref, top_ref, total_ref, sums_ref = refs
    slot, step = pl.program_id(0), pl.program_id(2)
    # Rows of the slot from the block's first row on.
    left = lengths[slot] - (step * blocks.splits + pl.program_id(1)) * blocks.rows

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, LOWEST)
        total_ref[...], sums_ref[...] = jnp.zeros_like(total_ref), jnp.zeros_like(sums_ref)

    def within(rows, edge: bool):
        """Returns rows with zeros past the length, where the cache may hold anything."""
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0) < left, rows, 0) if edge else rows

    def work(edge: bool):
        for head in range(q_ref.shape[0]):
            keys = within(keys_ref[head], edge)
            values = within(values_ref[0][head], edge) if values_ref else keys[:, :value_width]
            scores = dot(q_ref[head], keys, (1, 1)) * scale
            if edge:
                scores = jnp.where(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < left, scores, LOWEST)
            higher = jnp.maximum(top_ref[head], scores.max(axis=1, keepdims=True))
            exps, shrink = jnp.exp(scores - higher), jnp.exp(top_ref[head] - higher)
            top_ref[head] = higher
            total_ref[head] = total_ref[head] * shrink + exps.sum(axis=1, keepdims=True)
            sums_ref[head] = sums_ref[head] * shrink + dot(exps.astype(values.dtype), values, (1, 0))

    pl.when(left >= blocks.rows)(lambda: work(False))
    pl.when((left > 0) & (left < blocks.rows))(lambda: work(True))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        total = total_ref[...]
        out_ref[...] = sums_ref[...] / jnp.where(total > 0, total, 1)
        norm_ref[...] = top_ref[...] + jnp.log(jnp.where(total > 0, total, 1))
