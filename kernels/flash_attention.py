"""Causal attention within the samples of packed rows as a Pallas TPU kernel, forward and fused backward.

A grid step takes one block of queries and one block of keys in which some query may attend to some key. The list of
these steps is computed from the segments before the kernel starts, so blocks of other samples cost nothing. Queries
and keys may be wider than values (MLA: 192 and 128); nothing is padded to the other's width. Scores are laid out as
[keys, queries]: the softmax's sums then run over sublanes, and a query's statistics (its largest score, its sum) are
one row of lanes. Exponentials have base 2, with log2(e) folded into the scale. Sources: Dao et al., arXiv 2205.14135
and 2307.08691 (the running softmax and its backward pass).
"""

import functools
import math
from dataclasses import astuple, dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from r1jax.kernels.tpu import LANES, LOWEST, dot, doubled, rounded

# Flags of a grid step: it computes something; it is the first step of its block; the last one; some pairs are masked.
LIVE, FIRST, LAST, MASKED = 1, 2, 4, 8
LOG2_E = math.log2(math.e)
VMEM_BYTES = 48 * 2**20  # that a kernel may use
ROW_BYTES = 40 * 2**20  # the part of VMEM_BYTES for the gradient of a row's queries


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


# By device kind and widest query: the sizes with the fewest static bundles for a causal row that keep spills low
# (docs/kernel_figures.md). v6e multiplies 256 wide.
_V5 = {64: Blocks(backward_part=256), 128: Blocks(key_part=128, backward_part=256), 256: Blocks()}
_V6 = {64: Blocks(backward_part=512), 128: Blocks(key_part=128, backward_part=512), 256: Blocks(backward_part=512)}
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
    whole = math.lcm(blocks.query, blocks.key, blocks.backward_query, blocks.backward_key)
    padding, rows = -length % whole, [segments] if prefixes is None else [segments, prefixes]
    if padding:
        q, k, v, *rows = (jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, *rows))
    ranges = key_ranges(*rows)
    q = q.reshape(batch, -1, kv_heads * groups, q.shape[-1]).swapaxes(1, 2)
    out = _attend(scale, blocks, interpret, q, k.swapaxes(1, 2), v.swapaxes(1, 2), ranges)
    return out.swapaxes(1, 2).reshape(batch, -1, kv_heads, groups, v.shape[-1])[:, :length]


def key_ranges(segments: jax.Array, prefixes: jax.Array | None = None) -> jax.Array:
    """Returns each query's visible key range, int32 [B, 1 or 3, T]: the first key of its sample; the last is itself.

    With prefixes also the first and last key of its shared prompt, T and -1 where it has none. Padding sees itself
    alone.
    """
    length = segments.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segments.shape)
    changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(changes, index, 0), axis=1)
    sample_start = jnp.where(segments > 0, starts, index)
    if prefixes is None:
        return sample_start[:, None]
    bounds = jax.vmap(
        lambda i, s: (
            jax.ops.segment_min(i, s, num_segments=length + 1),
            jax.ops.segment_max(i, s, num_segments=length + 1),
        )
    )(index, segments)
    first, last = (jnp.take_along_axis(bound, prefixes, axis=1) for bound in bounds)
    prompt = jnp.where(prefixes > 0, first, length), jnp.where(prefixes > 0, last, -1)
    return jnp.stack([sample_start, *prompt], axis=1)


def block_schedule(ranges: jax.Array, query: int, key: int, by_key: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the grid steps of every row as (block of queries, block of keys, flags), int32 [B, steps] each.

    The steps that compute something come first, ordered by block of queries or, with `by_key`, by block of keys. Idle
    steps (flags 0) follow and name the blocks of the last live step. `query` and `key` are the blocks' sizes in tokens.
    """
    batch, kinds, length = ranges.shape
    tokens = ranges.reshape(batch, kinds, length // query, query)
    begin = jnp.arange(0, length, key, dtype=jnp.int32)  # first key of each block of keys
    sample_first, sample_last = tokens[:, 0].min(axis=-1)[..., None], tokens[:, 0].max(axis=-1)[..., None]
    top = jnp.arange(query, length + 1, query, dtype=jnp.int32)[:, None] - 1  # last token of each block of queries
    causal = begin <= top
    live = causal & (begin + key > sample_first)
    masked = (begin < sample_last) | (begin + key > top - query + 2)
    if kinds > 1:
        meets = (tokens[:, 1, :, :, None] < begin + key) & (tokens[:, 2, :, :, None] >= begin)
        live |= causal & meets.any(axis=2)
    live = jnp.broadcast_to(live, (batch, length // query, begin.size))
    masked = jnp.broadcast_to(masked, live.shape)
    if by_key:
        live, masked = live.swapaxes(1, 2), masked.swapaxes(1, 2)
    outer, inner = live.shape[1:]
    bound = sum(  # the most live steps that causality allows
        min((place + 1) * query - 1, length - 1) // key + 1 for place in range(length // query)
    )
    flat, masked = live.reshape(batch, -1), masked.reshape(batch, -1)
    order = jnp.argsort(~flat, axis=1, stable=True)[:, :bound].astype(jnp.int32)
    count = flat.sum(axis=1, dtype=jnp.int32)[:, None]
    place = jnp.arange(bound, dtype=jnp.int32)
    order = jnp.where(place < count, order, jnp.take_along_axis(order, count - 1, axis=1))
    block = order // inner
    first = jnp.pad(block[:, 1:] != block[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(block[:, 1:] != block[:, :-1], ((0, 0), (0, 1)), constant_values=True) | (place == count - 1)
    flags = LIVE + FIRST * first + LAST * last + MASKED * jnp.take_along_axis(masked, order, axis=1)
    flags = jnp.where(place < count, flags, 0).astype(jnp.int32)
    pair = (block, order % inner)
    return (*(pair[::-1] if by_key else pair), flags)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, blocks, interpret, q_BNTH, k_BKSH, v_BKSV, ranges):
    return _forward(scale, blocks, interpret, q_BNTH, k_BKSH, v_BKSV, ranges)[0]


def _forward(scale, blocks, interpret, q_BNTH, k_BKSH, v_BKSV, ranges):
    out, norm = forward_call(blocks, interpret, _scaled(q_BNTH, scale), k_BKSH, v_BKSV, ranges)
    return out, (q_BNTH, k_BKSH, v_BKSV, ranges, out, norm)


def _scaled(q, scale: float):
    return (q.astype(jnp.float32) * (scale * LOG2_E)).astype(q.dtype)


def forward_call(blocks: Blocks, interpret, q_BNTH, k_BKSH, v_BKSV, ranges):
    """Returns (outputs [B, N, T, V], base-2 logarithm of the softmax's sum, float32 [B, N, 1, T]) of scaled queries."""
    batch, heads, length, width = q_BNTH.shape
    groups, out_width = heads // k_BKSH.shape[1], v_BKSV.shape[-1]
    table = block_schedule(ranges, blocks.query, blocks.key, by_key=False)
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
            jax.ShapeDtypeStruct((batch, heads, length, out_width), q_BNTH.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="flash_attention_forward",
    )(*table, q_BNTH, k_BKSH, v_BKSV, ranges)


def _visible(ranges_ref, part: pl.Slice | slice, query, key, shape: tuple[int, ...]) -> jax.Array:
    """Returns bool [keys, queries]: whether query number `query` + j may attend to key number `key` + i of the row."""
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1) + (query - key)
    seen = (index >= ranges_ref[0:1, part] - key) & (index <= column)
    if ranges_ref.shape[0] > 1:
        seen |= (index >= ranges_ref[1:2, part] - key) & (index <= ranges_ref[2:3, part] - key)
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
            first_query += query[row, step] * blocks.query
            first_key += key[row, step] * blocks.key
            scores = jnp.where(_visible(ranges_ref, part, first_query, first_key, scores.shape), scores, LOWEST)
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
        out_ref[...] = (sums[...] / total[...]).T.astype(out_ref.dtype)
        norm_ref[...] = top[...] + jnp.log2(total[...])


def _backward(scale, blocks, interpret, saved, d_out):
    q_BNTH, k_BKSH, v_BKSV, ranges, out, norm = saved
    # The sum over keys of probability times its gradient (arXiv 2205.14135, appendix B.2).
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    d_q, d_k, d_v = backward_call(
        blocks, interpret, _scaled(q_BNTH, scale), k_BKSH, v_BKSV, ranges, d_out.astype(q_BNTH.dtype), norm, inner
    )
    grouped = lambda d, like: d.reshape(*like.shape[:2], -1, *d.shape[2:]).sum(axis=2)  # noqa: E731
    d_k, d_v = grouped(d_k, k_BKSH), grouped(d_v, v_BKSV)
    return (d_q * scale).astype(q_BNTH.dtype), (d_k / LOG2_E).astype(k_BKSH.dtype), d_v.astype(v_BKSV.dtype), None


_attend.defvjp(_forward, _backward)


def backward_call(blocks: Blocks, interpret, q_BNTH, k_BKSH, v_BKSV, ranges, d_out, norm, inner):
    """Returns float32 gradients of queries [B, N, T, H], keys [B, N, S, H] and values [B, N, S, V], all per query head.

    Those of queries still lack the factor `scale`, and those of keys are log2(e) times too large. norm and inner are
    float32 [B, N, 1, T]: the base-2 logarithm of the softmax's sum, and the sum of d_out times output. Raises
    ValueError for rows whose gradient of a head's queries does not fit VMEM.
    """
    batch, heads, length, width = q_BNTH.shape
    row = 2 * 4 * length * rounded(width)  # float32, in two buffers
    if row > ROW_BYTES:
        raise ValueError(
            f"flash_attention: a row of {length} tokens needs {row / 2**20:.0f} MiB of VMEM for the gradient of its "
            f"queries, {ROW_BYTES // 2**20} are there; divide rows (mesh.context) or set "
            "compute.attention_implementation=xla"
        )
    groups, out_width = heads // k_BKSH.shape[1], v_BKSV.shape[-1]
    size, key_size = blocks.backward_query, blocks.backward_key
    table = block_schedule(ranges, size, key_size, by_key=True)
    at_query = lambda b, n, s, query, key, flags: (b, n, query[b, s], 0)  # noqa: E731
    at_key = lambda b, n, s, query, key, flags: (b, n // groups, key[b, s], 0)  # noqa: E731
    own_key = lambda b, n, s, query, key, flags: (b, n, key[b, s], 0)  # noqa: E731
    lanes = lambda b, n, s, query, key, flags: (b, n, 0, query[b, s])  # noqa: E731
    return pl.pallas_call(
        functools.partial(_backward_kernel, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, table[0].shape[1]),
            in_specs=[
                pl.BlockSpec((None, None, size, width), at_query),
                pl.BlockSpec((None, None, key_size, width), at_key),
                pl.BlockSpec((None, None, key_size, out_width), at_key),
                pl.BlockSpec((None, ranges.shape[1], size), lambda b, n, s, query, key, flags: (b, 0, query[b, s])),
                pl.BlockSpec((None, None, size, out_width), at_query),
                pl.BlockSpec((None, None, 1, size), lanes),
                pl.BlockSpec((None, None, 1, size), lanes),
            ],
            out_specs=[
                pl.BlockSpec((None, None, length, width), lambda b, n, s, query, key, flags: (b, n, 0, 0)),
                pl.BlockSpec((None, None, key_size, width), own_key),
                pl.BlockSpec((None, None, key_size, out_width), own_key),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, length, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, length, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, length, out_width), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="flash_attention_backward",
    )(*table, q_BNTH, k_BKSH, v_BKSV, ranges, d_out, norm, inner)


def _backward_kernel(
    query,
    key,
    flags,
    q_ref,
    k_ref,
    v_ref,
    ranges_ref,
    d_out_ref,
    norm_ref,
    inner_ref,
    d_q_ref,
    d_k_ref,
    d_v_ref,
    *,
    blocks,
):
    row, step = pl.program_id(0), pl.program_id(2)
    todo, size = flags[row, step], blocks.backward_part

    @pl.when(step == 0)
    def _():
        d_q_ref[...] = jnp.zeros_like(d_q_ref)

    @pl.when(todo & FIRST > 0)
    def _():
        d_k_ref[...], d_v_ref[...] = jnp.zeros_like(d_k_ref), jnp.zeros_like(d_v_ref)

    def work(masked: bool):
        for start in range(0, blocks.backward_query, size):
            part = pl.ds(start, size)
            q, d_out = q_ref[part, :], d_out_ref[part, :]
            scores = dot(k_ref[...], q, (1, 1))  # [keys, queries]
            probs = jnp.exp2(scores - norm_ref[:, part])
            first_query = query[row, step] * blocks.backward_query + start
            if masked:
                first_key = key[row, step] * blocks.backward_key
                probs = jnp.where(_visible(ranges_ref, part, first_query, first_key, scores.shape), probs, 0)
            d_v_ref[...] += dot(probs.astype(d_out.dtype), d_out, (1, 0))
            d_probs = dot(v_ref[...], d_out, (1, 1))
            d_scores = (probs * (d_probs - inner_ref[:, part])).astype(q.dtype)
            d_k_ref[...] += dot(d_scores, q, (1, 0))
            d_q_ref[pl.ds(pl.multiple_of(first_query, size), size), :] += dot(d_scores, k_ref[...], (0, 0))

    pl.when(todo & (LIVE | MASKED) == LIVE)(lambda: work(False))
    pl.when(todo & (LIVE | MASKED) == LIVE | MASKED)(lambda: work(True))
