"""Decode attention over the latent cache of MLA as a Pallas TPU kernel: one query a slot, all heads share the keys.

Queries have the key matrix folded in (DeepSeek-V2, arXiv 2405.04434, section 2.1.2), so a row of the cache is the key of every
head and its first part the value. A slot's rows up to its length alone are read, block by block with a running softmax; the blocks of
a slot are dealt out to several splits, so that two cores share a long context, and the splits' outputs are put together afterwards.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from r1jax.kernels.tpu import LANES, LOWEST, dot, doubled

NAME = "latent_decode"


@dataclass(frozen=True)
class Blocks:
    """Cache rows of a step, and splits that the blocks of a slot are dealt out to."""

    rows: int = 512
    splits: int = 1


BLOCKS = {"TPU v5": Blocks(splits=2), "TPU v5 lite": Blocks(), "TPU v6 lite": Blocks()}  # a v5p has two cores


def blocks_for(device_kind: str, rows: int) -> Blocks:
    """Returns the sizes for a generation of TPUs and a cache of `rows` rows."""
    found = BLOCKS.get(device_kind, Blocks())
    return Blocks(min(found.rows, doubled(LANES, rows)), found.splits)


def latent_decode(
    q_SNW, cache_LSTW, layer, lengths_S, value_width: int, scale: float, blocks=Blocks(), interpret=False
):
    """Returns the outputs, float32 [S, N, value_width], of queries [S, N, W] over the first lengths [S] rows of
    their slot of one layer of a cache [L, S, T, W]; 0 for a slot without rows.

    Scores, times `scale`, and softmax are float32, products take the cache's dtype. Nothing past a slot's length counts.
    """
    slots, heads, width = q_SNW.shape
    steps = pl.cdiv(pl.cdiv(cache_LSTW.shape[2], blocks.rows), blocks.splits)

    def at_keys(slot, split, step, layer, lengths):
        last = jnp.maximum(pl.cdiv(lengths[slot], blocks.rows) - 1, 0)
        return layer[0], slot, jnp.minimum(step * blocks.splits + split, last), 0

    out, norm = pl.pallas_call(
        functools.partial(_kernel, blocks, value_width, scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(slots, blocks.splits, steps),
            in_specs=[
                pl.BlockSpec((None, heads, width), lambda slot, split, step, layer, lengths: (slot, 0, 0)),
                pl.BlockSpec((None, None, blocks.rows, width), at_keys),
            ],
            out_specs=[
                pl.BlockSpec((None, None, heads, size), lambda slot, split, step, layer, lengths: (slot, split, 0, 0))
                for size in (value_width, 1)
            ],
            scratch_shapes=[pltpu.VMEM((heads, size), jnp.float32) for size in (1, 1, value_width)],
        ),
        out_shape=[jax.ShapeDtypeStruct((slots, blocks.splits, heads, size), jnp.float32) for size in (value_width, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=NAME,
    )(jnp.reshape(layer, 1).astype(jnp.int32), lengths_S.astype(jnp.int32), q_SNW, cache_LSTW)
    return jnp.sum(jax.nn.softmax(norm, axis=1) * out, axis=1)


def _kernel(
    blocks, value_width, scale, layer, lengths, q_ref, keys_ref, out_ref, norm_ref, top_ref, total_ref, sums_ref
):
    slot, step = pl.program_id(0), pl.program_id(2)
    left = lengths[slot] - (step * blocks.splits + pl.program_id(1)) * blocks.rows  # rows from the block's first on

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, LOWEST)
        total_ref[...], sums_ref[...] = jnp.zeros_like(total_ref), jnp.zeros_like(sums_ref)

    def work(edge: bool):
        keys = keys_ref[...]
        if edge:  # what lies past the length may be anything
            keys = jnp.where(jax.lax.broadcasted_iota(jnp.int32, keys.shape, 0) < left, keys, 0)
        scores = dot(q_ref[...], keys, (1, 1)) * scale
        if edge:
            scores = jnp.where(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < left, scores, LOWEST)
        higher = jnp.maximum(top_ref[...], scores.max(axis=1, keepdims=True))
        exps, shrink = jnp.exp(scores - higher), jnp.exp(top_ref[...] - higher)
        top_ref[...] = higher
        total_ref[...] = total_ref[...] * shrink + exps.sum(axis=1, keepdims=True)
        sums_ref[...] = sums_ref[...] * shrink + dot(exps.astype(keys.dtype), keys[:, :value_width], (1, 0))

    pl.when(left >= blocks.rows)(lambda: work(False))
    pl.when((left > 0) & (left < blocks.rows))(lambda: work(True))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        total = total_ref[...]
        out_ref[...] = sums_ref[...] / jnp.where(total > 0, total, 1)
        norm_ref[...] = top_ref[...] + jnp.log(jnp.where(total > 0, total, 1))
