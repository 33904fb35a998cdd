"""Causal attention within the samples of packed rows of any length as Pallas TPU kernels, forward and backward.

A grid step takes one block of queries and one block of keys in which some query may attend to some key. The list of
these steps is computed from the segments before the kernel starts, so blocks of other samples cost nothing. Queries
and keys may be wider than values (MLA: 192 and 128); nothing is padded to the other's width. Scores are laid out as
[keys, queries]: the softmax's sums then run over sublanes, and a query's statistics (its largest score, its sum) are
one row of lanes. Exponentials have base 2, with log2(e) folded into the scale. The queries may be a part of a row and
the keys another part, as they are around a ring. Sources: Dao et al., arXiv 2205.14135 and 2307.08691 (the running
softmax and its backward pass).
"""

import functools
import math
from dataclasses import astuple, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from r1jax.kernels.tpu import LANES, LOWEST, SUBLANES, dot, doubled, rounded

# Flags of a grid step: it computes something; it is the first step of its block; the last one; some pairs are masked.
LIVE, FIRST, LAST, MASKED = 1, 2, 4, 8
LOG2_E = math.log2(math.e)
VMEM_BYTES = 48 * 2**20  # that a kernel may use
ROW_BYTES = 40 * 2**20  # the part of VMEM_BYTES for the gradient of queries: longer rows take several calls


@dataclass(frozen=True)
class Blocks:
    """Tokens that a grid step takes, and the parts of them that are computed at a time."""

    query: int = 512
    key: int = 512
    query_part: int = 256
    key_part: int = 256
    backward_query: int = 512
    backward_key: int = 512
    backward_part: int = 128  # of the queries

    def __post_init__(self):
        pairs = ((self.query, self.query_part), (self.key, self.key_part), (self.backward_query, self.backward_part))
        for large, small in pairs:
            if small < 1 or large % small:
                raise ValueError(f"flash_attention: a part of {small} tokens does not divide a block of {large}")

    @property
    def whole(self) -> int:
        """The fewest tokens that all blocks divide."""
        return math.lcm(self.query, self.key, self.backward_query, self.backward_key)


# By device kind and widest query: the sizes with the fewest static bundles for a causal row that keep spills low
# (docs/kernel_figures.md). v6e multiplies 256 wide.
_V5 = {64: Blocks(), 128: Blocks(key_part=128), 256: Blocks()}
_V6 = {64: Blocks(backward_part=256), 128: Blocks(key_part=128, backward_part=256), 256: Blocks(backward_part=256)}
BLOCKS = {"TPU v5": _V5, "TPU v5 lite": _V5, "TPU v6 lite": _V6}


def blocks_for(device_kind: str, length: int, width: int) -> Blocks:
    """Returns sizes for a TPU generation, rows of `length` tokens and queries of `width`; a short row is one block."""
    table, whole = BLOCKS.get(device_kind, _V5), doubled(LANES, length)
    preferred = table[min((widest for widest in table if width <= widest), default=max(table))]
    return Blocks(*(min(size, whole) for size in astuple(preferred)))


def flash_attention(q, k, v, segments, scale: float, blocks: Blocks = Blocks(), prefixes=None, interpret=False):
    """Returns the attention outputs, [B, T, K, G, V], of queries q [B, T, K, G, H] over keys k [B, T, K, H] and values
    v [B, T, K, V].

    segments int32 [B, T] number the samples of a row, each contiguous; 0 is padding. A token attends to itself, to the
    earlier tokens of its sample and, where `prefixes` int32 [B, T] is not 0, to the segment with that number, which
    comes earlier in the row. The G query heads that share a key head are adjacent. Products are summed in float32 and
    the softmax is float32. The outputs at padding are finite but undefined. Rows are padded to whole blocks.
    """
    batch, length, kv_heads, groups, _ = q.shape
    padding, rows = -length % blocks.whole, [segments] if prefixes is None else [segments, prefixes]
    if padding:
        q, k, v, *rows = (jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, *rows))
    ranges = key_ranges(*rows)
    q = q.reshape(batch, -1, kv_heads * groups, q.shape[-1]).swapaxes(1, 2)
    out = _attend(scale, blocks, interpret, q, k.swapaxes(1, 2), v.swapaxes(1, 2), ranges)
    return out.swapaxes(1, 2).reshape(batch, -1, kv_heads, groups, v.shape[-1])[:, :length]


def key_ranges(segments: jax.Array, prefixes: jax.Array | None = None) -> jax.Array:
    """Returns the keys that each query sees, int32 [B, 2 or 4, T]: the first one of its sample and the last, itself.

    With prefixes also the first and last key of its shared prompt, T and -1 where it has none. Padding sees itself
    alone.
    """
    length = segments.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segments.shape)
    changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(changes, index, 0), axis=1)
    own = jnp.where(segments > 0, starts, index), index
    if prefixes is None:
        return jnp.stack(own, axis=1)
    bounds = jax.vmap(
        lambda i, s: (
            jax.ops.segment_min(i, s, num_segments=length + 1),
            jax.ops.segment_max(i, s, num_segments=length + 1),
        )
    )(index, segments)
    first, last = (jnp.take_along_axis(bound, prefixes, axis=1) for bound in bounds)
    prompt = jnp.where(prefixes > 0, first, length), jnp.where(prefixes > 0, last, -1)
    return jnp.stack([*own, *prompt], axis=1)


def block_schedule(
    ranges: jax.Array, keys: int, query: int, key: int, by_key=False, position: int | None = 0, fill=True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the grid steps of every row as (block of queries, block of keys, flags), int32 [B, steps] each.

    `ranges` are those of the queries among `keys` keys, `query` and `key` the blocks' sizes in tokens. Steps are
    ordered by block of queries or, with `by_key`, by block of keys. With `fill` a block that no step would compute gets
    one step all the same, which only opens and closes it. Idle steps (flags 0) follow and name the blocks of the last
    step. `position` is the first query's place among the keys, which bounds the steps; None allows all pairs.
    """
    batch, _, queries = ranges.shape
    first, last = ranges.reshape(batch, -1, 2, queries // query, query, 1).swapaxes(0, 2)
    begin = jnp.arange(0, keys, key, dtype=jnp.int32)  # first key of each block of keys
    live = ((first < begin + key) & (last >= begin)).any(axis=(0, 3))
    masked = (begin < first[0].max(axis=2)) | (begin + key - 1 > last[0].min(axis=2))
    top = np.arange(query, queries + 1, query)[:, None] - 1  # last query of each block
    possible = np.arange(0, keys, key) <= top + (keys if position is None else position)
    if by_key:
        live, masked, possible = live.swapaxes(1, 2), masked.swapaxes(1, 2), possible.T
    outer, inner = possible.shape
    if fill:
        bound = int(possible.sum() + (~possible.any(axis=1)).sum())
        listed = live | (~live.any(axis=2, keepdims=True) & (np.arange(inner) == 0))
    else:  # every row has at least one step
        bound = max(int(possible.sum()), 1)
        listed = live | (~live.any(axis=(1, 2), keepdims=True) & (np.arange(possible.size) == 0).reshape(outer, inner))
    flat, live, masked = (array.reshape(batch, -1) for array in (listed, live, masked))
    order = jnp.argsort(~flat, axis=1, stable=True)[:, :bound].astype(jnp.int32)
    count = flat.sum(axis=1, dtype=jnp.int32)[:, None]
    place = jnp.arange(bound, dtype=jnp.int32)
    order = jnp.where(place < count, order, jnp.take_along_axis(order, count - 1, axis=1))
    block, (live, masked) = order // inner, (jnp.take_along_axis(array, order, axis=1) for array in (live, masked))
    opens = jnp.pad(block[:, 1:] != block[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    closes = jnp.pad(block[:, 1:] != block[:, :-1], ((0, 0), (0, 1)), constant_values=True) | (place == count - 1)
    flags = jnp.where(place < count, LIVE * live + FIRST * opens + LAST * closes + MASKED * (live & masked), 0)
    pair = (block, order % inner)
    return (*(pair[::-1] if by_key else pair), flags.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, blocks, interpret, q_BNTH, k_BKSH, v_BKSV, ranges):
    return _forward(scale, blocks, interpret, q_BNTH, k_BKSH, v_BKSV, ranges)[0]


def _forward(scale, blocks, interpret, q_BNTH, k_BKSH, v_BKSV, ranges):
    out, norm = forward_call(blocks, interpret, scaled(q_BNTH, scale), k_BKSH, v_BKSV, ranges)
    return out, (q_BNTH, k_BKSH, v_BKSV, ranges, out, norm)


def scaled(q, scale: float):
    """Returns queries with the factor that makes their products with keys exponents of 2."""
    return (q.astype(jnp.float32) * (scale * LOG2_E)).astype(q.dtype)


def forward_call(blocks: Blocks, interpret, q_BNTH, k_BKSH, v_BKSV, ranges, position: int | None = 0, dtype=None):
    """Returns (outputs [B, N, T, V], base-2 logarithm of the softmax's sum, float32 [B, N, 1, T]) of scaled queries.

    `ranges` int32 [B, 2 or 4, T] are the first and last of the S keys that each query sees (`key_ranges`). Where a
    query sees none, the logarithm is at most LOWEST / 2. `position` is as in `block_schedule`; `dtype` that of the
    outputs.
    """
    batch, heads, length, width = q_BNTH.shape
    groups, out_width = heads // k_BKSH.shape[1], v_BKSV.shape[-1]
    table = block_schedule(ranges, k_BKSH.shape[2], blocks.query, blocks.key, position=position)
    at_query = lambda b, n, s, query, key, flags: (b, n, query[b, s], 0)  # noqa: E731
    at_key = lambda b, n, s, query, key, flags: (b, n // groups, key[b, s], 0)  # noqa: E731
    lanes = lambda b, n, s, query, key, flags: (b, n, 0, query[b, s])  # noqa: E731
    return pl.pallas_call(
        functools.partial(_forward_kernel, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, table[0].shape[1]),
            in_specs=[
                pl.BlockSpec((None, None, blocks.query, width), at_query),
                pl.BlockSpec((None, None, blocks.key, width), at_key),
                pl.BlockSpec((None, None, blocks.key, out_width), at_key),
                pl.BlockSpec(
                    (None, ranges.shape[1], blocks.query), lambda b, n, s, query, key, flags: (b, 0, query[b, s])
                ),
            ],
            out_specs=[
                pl.BlockSpec((None, None, blocks.query, out_width), at_query),
                pl.BlockSpec((None, None, 1, blocks.query), lanes),
            ],
            scratch_shapes=[
                pltpu.VMEM((1, blocks.query), jnp.float32),
                pltpu.VMEM((1, blocks.query), jnp.float32),
                pltpu.VMEM((out_width, blocks.query), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, length, out_width), dtype or q_BNTH.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="flash_attention_forward",
    )(*table, q_BNTH, k_BKSH, v_BKSV, ranges)


def _visible(ranges_ref, part: pl.Slice | slice, key, shape: tuple[int, ...]) -> jax.Array:
    """Returns bool [keys, queries]: whether query j of the part may attend to key number `key` + i."""
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    own = ranges_ref[0:2, part] - key
    seen = (index >= own[0:1]) & (index <= own[1:2])
    if ranges_ref.shape[0] > 2:
        prompt = ranges_ref[2:4, part] - key
        seen |= (index >= prompt[0:1]) & (index <= prompt[1:2])
    return seen


def _forward_kernel(query, key, flags, q_ref, k_ref, v_ref, ranges_ref, out_ref, norm_ref, top, total, sums, *, blocks):
    row, step = pl.program_id(0), pl.program_id(2)
    todo = flags[row, step]

    @pl.when(todo & FIRST > 0)
    def _():
        top[...], total[...], sums[...] = (jnp.full_like(top, LOWEST), jnp.zeros_like(total), jnp.zeros_like(sums))

    def scored(place: tuple[int, int], masked: bool):
        """Returns the scores of one part of the keys and one part of the queries, [keys, queries]."""
        first_key, first_query = place
        part = pl.ds(first_query, blocks.query_part)
        scores = dot(k_ref[pl.ds(first_key, blocks.key_part), :], q_ref[part, :], (1, 1))
        if masked:
            first_key += key[row, step] * blocks.key
            scores = jnp.where(_visible(ranges_ref, part, first_key, scores.shape), scores, LOWEST)
        return scores

    places = [(i, j) for j in range(0, blocks.query, blocks.query_part) for i in range(0, blocks.key, blocks.key_part)]

    def work(masked: bool):
        following = scored(places[0], masked)
        for number, (first_key, first_query) in enumerate(places, 1):
            part, scores = pl.ds(first_query, blocks.query_part), following
            if number < len(places):  # the next product overlaps with this softmax
                following = scored(places[number], masked)
            before = top[:, part]
            higher = jnp.maximum(before, scores.max(axis=0, keepdims=True))
            exps, shrink = jnp.exp2(scores - higher), jnp.exp2(before - higher)
            top[:, part] = higher
            total[:, part] = total[:, part] * shrink + exps.sum(axis=0, keepdims=True)
            weighted = dot(v_ref[pl.ds(first_key, blocks.key_part), :], exps.astype(v_ref.dtype), (0, 0))
            sums[:, part] = sums[:, part] * shrink + weighted

    pl.when(todo & (LIVE | MASKED) == LIVE)(lambda: work(False))
    pl.when(todo & (LIVE | MASKED) == LIVE | MASKED)(lambda: work(True))

    @pl.when(todo & LAST > 0)
    def _():
        whole = jnp.maximum(total[...], 1)  # below 1 only where nothing was computed: the largest score adds 1
        out_ref[...] = (sums[...] / whole).T.astype(out_ref.dtype)
        norm_ref[...] = top[...] + jnp.log2(whole)


def _backward(scale, blocks, interpret, saved, d_out):
    q_BNTH, k_BKSH, v_BKSV, ranges, out, norm = saved
    # The sum over keys of probability times its gradient (arXiv 2205.14135, appendix B.2).
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    d_q, d_k, d_v = backward_call(
        blocks, interpret, scaled(q_BNTH, scale), k_BKSH, v_BKSV, ranges, d_out.astype(q_BNTH.dtype), norm, inner
    )
    d_q = (d_q.swapaxes(2, 3) * scale).astype(q_BNTH.dtype)
    return d_q, (d_k / LOG2_E).astype(k_BKSH.dtype), d_v.astype(v_BKSV.dtype), None


_attend.defvjp(_forward, _backward)


def backward_call(
    blocks: Blocks, interpret, q_BNTH, k_BKSH, v_BKSV, ranges, d_out, norm, inner, position: int | None = 0
):
    """Returns float32 gradients of queries [B, N, H, T], tokens last, keys [B, K, S, H] and values [B, K, S, V].

    Those of queries still lack the factor `scale`, and those of keys are log2(e) times too large. norm and inner are
    float32 [B, N, 1, T]: the base-2 logarithm of the softmax's sum, and the sum of d_out times output. ranges and
    position are as in `forward_call`. The gradient of as many queries as fit ROW_BYTES is summed in VMEM at a time;
    each further call adds to the gradients of keys and values.
    """
    width, length, size = q_BNTH.shape[-1], q_BNTH.shape[2], blocks.backward_query
    fitting = max(ROW_BYTES // (2 * 4 * rounded(width, SUBLANES)) // size, 1)  # blocks in float32, in two buffers
    calls = -(-length // size // fitting)
    tokens = -(-length // size // calls) * size
    d_q: list[jax.Array] = []
    sums: list[jax.Array] = []
    for start in range(0, length, tokens):
        part = start, min(tokens, length - start)
        arrays = q_BNTH, k_BKSH, v_BKSV, ranges, d_out, norm, inner
        part_d_q, *sums = _backward_part(blocks, interpret, part, position, arrays, sums)
        d_q.append(part_d_q)
    grouped = lambda d, like: d.reshape(*like.shape[:2], -1, *d.shape[2:]).sum(axis=2)  # noqa: E731
    return jnp.concatenate(d_q, axis=3), grouped(sums[0], k_BKSH), grouped(sums[1], v_BKSV)


def _backward_part(blocks: Blocks, interpret, part: tuple[int, int], position: int | None, arrays, sums):
    """Returns the gradients of the (first, number) queries of `part`, and of all keys and values per query head.

    The latter are added to `sums`, which are theirs of earlier parts, () for none.
    """
    q_BNTH, k_BKSH, v_BKSV, ranges, *_ = arrays
    (batch, heads, _, width), (start, length) = q_BNTH.shape, part
    (kv_heads, keys), out_width = k_BKSH.shape[1:3], v_BKSV.shape[-1]
    groups, size, key_size = heads // kv_heads, blocks.backward_query, blocks.backward_key
    table = block_schedule(
        jax.lax.slice_in_dim(ranges, start, start + length, axis=2),
        keys,
        size,
        key_size,
        by_key=True,
        position=None if position is None else position + start,
        fill=not sums,
    )
    at_query = lambda b, n, s, query, key, flags: (b, n, query[b, s] + start // size, 0)  # noqa: E731
    at_key = lambda b, n, s, query, key, flags: (b, n // groups, key[b, s], 0)  # noqa: E731
    own_key = lambda b, n, s, query, key, flags: (b, n, key[b, s], 0)  # noqa: E731
    lanes = lambda b, n, s, query, key, flags: (b, n, 0, query[b, s] + start // size)  # noqa: E731
    sum_specs = [pl.BlockSpec((None, None, key_size, w), own_key) for w in (width, out_width)]
    gradients = [jax.ShapeDtypeStruct((batch, heads, keys, w), jnp.float32) for w in (width, out_width)]
    first_sum = len(table) + len(arrays)
    return pl.pallas_call(
        functools.partial(_backward_kernel, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, table[0].shape[1]),
            in_specs=[
                pl.BlockSpec((None, None, size, width), at_query),
                pl.BlockSpec((None, None, key_size, width), at_key),
                pl.BlockSpec((None, None, key_size, out_width), at_key),
                pl.BlockSpec(
                    (None, ranges.shape[1], size),
                    lambda b, n, s, query, key, flags: (b, 0, query[b, s] + start // size),
                ),
                pl.BlockSpec((None, None, size, out_width), at_query),
                pl.BlockSpec((None, None, 1, size), lanes),
                pl.BlockSpec((None, None, 1, size), lanes),
                *(sum_specs if sums else []),
            ],
            out_specs=[
                pl.BlockSpec((None, None, width, length), lambda b, n, s, query, key, flags: (b, n, 0, 0)),
                *sum_specs,
            ],
            scratch_shapes=[pltpu.VMEM((width, key_size), k_BKSH.dtype)],
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, heads, width, length), jnp.float32), *gradients],
        input_output_aliases={first_sum + number: 1 + number for number in range(len(sums))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="flash_attention_backward",
    )(*table, *arrays, *sums)


def _backward_kernel(query, key, flags, q_ref, k_ref, v_ref, ranges_ref, d_out_ref, norm_ref, inner_ref, *refs, blocks):
    *sums, d_q_ref, d_k_ref, d_v_ref, keys_turned = refs
    row, step = pl.program_id(0), pl.program_id(2)
    todo, size = flags[row, step], blocks.backward_part

    @pl.when(step == 0)
    def _():
        d_q_ref[...] = jnp.zeros_like(d_q_ref)

    @pl.when(todo & FIRST > 0)
    def _():
        keys_turned[...] = k_ref[...].T
        d_k_ref[...], d_v_ref[...] = (ref[...] for ref in sums) if sums else map(jnp.zeros_like, (d_k_ref, d_v_ref))

    def work(masked: bool):
        for start in range(0, blocks.backward_query, size):
            part = pl.ds(start, size)
            q, d_out = q_ref[part, :], d_out_ref[part, :]
            scores = dot(k_ref[...], q, (1, 1))  # [keys, queries]
            probs = jnp.exp2(scores - norm_ref[:, part])
            if masked:
                first_key = key[row, step] * blocks.backward_key
                probs = jnp.where(_visible(ranges_ref, part, first_key, scores.shape), probs, 0)
            d_probs = dot(v_ref[...], d_out, (1, 1))
            d_v_ref[...] += dot(probs.astype(d_out.dtype), d_out, (1, 0))
            d_scores = (probs * (d_probs - inner_ref[:, part])).astype(q.dtype)
            d_k_ref[...] += dot(d_scores, q, (1, 0))
            # With queries last nothing but the keys is turned, once a block, and 192 numbers are not padded to 256.
            columns = pl.ds(pl.multiple_of(query[row, step] * blocks.backward_query + start, size), size)
            d_q_ref[:, columns] += dot(keys_turned[...], d_scores, (1, 0))

    pl.when(todo & (LIVE | MASKED) == LIVE)(lambda: work(False))
    pl.when(todo & (LIVE | MASKED) == LIVE | MASKED)(lambda: work(True))
