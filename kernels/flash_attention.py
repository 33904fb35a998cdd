"""Causal attention within the samples of packed rows as a Pallas TPU kernel, forward and fused backward.

A step of the grid is one block of queries and one of keys that holds a pair which may look: the list of such steps is
made from the segments before the kernel starts, so blocks of other samples cost nothing. Queries and keys may be wider than values
(MLA: 192 and 128), nothing is padded to the other's width. Scores lie as [keys, queries]: the softmax's
sums then run over sublanes, and a query's numbers (its largest score, its sum) are one row of lanes. Sources: Dao et
al., arXiv 2205.14135 and 2307.08691 (the running softmax and its backward); exponents are of base 2, with log2(e) in the
scale.
"""

import functools
import math
from dataclasses import astuple, dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from r1jax.kernels.tpu import LANES, LOWEST, dot, doubled, rounded

LIVE, FIRST, LAST, MASKED = (
    1,
    2,
    4,
    8,
)  # what a step does: anything; opens a block; closes it; has pairs that may not look
LOG2_E = math.log2(math.e)
VMEM_BYTES = 48 * 2**20  # that a kernel may use
ROW_BYTES = 40 * 2**20  # of it, for the gradient of a row's queries


@dataclass(frozen=True)
class Blocks:
    """Tokens that a step takes, and parts of them that are worked on at a time."""

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
# (docs/kernels.md). v6e multiplies 256 wide.
_V5 = {64: Blocks(backward_part=256), 128: Blocks(key_part=128, backward_part=256), 256: Blocks()}
_V6 = {64: Blocks(backward_part=512), 128: Blocks(key_part=128, backward_part=512), 256: Blocks(backward_part=512)}
BLOCKS = {"TPU v5": _V5, "TPU v5 lite": _V5, "TPU v6 lite": _V6}


def blocks_for(device_kind: str, length: int, width: int) -> Blocks:
    """Returns the sizes for a generation of TPUs, rows of `length` tokens and queries of `width`; short rows are one block."""
    table, whole = BLOCKS.get(device_kind, _V5), doubled(LANES, length)
    found = table[min((widest for widest in table if width <= widest), default=max(table))]
    return Blocks(*(min(size, whole) for size in astuple(found)))


def flash_attention(q, k, v, segments, scale: float, blocks: Blocks = Blocks(), prefixes=None, interpret=False):
    """Returns the attention outputs, [B, T, K, G, V], of queries q [B, T, K, G, H] over keys k [B, T, K, H] and values
    v [B, T, K, V].

    segments int32 [B, T] number the samples of a row, each in one piece, 0 is padding; a token sees itself, the earlier tokens
    of its sample and, where `prefixes` int32 [B, T] is not 0, the segment it names, which stands earlier in the row. The G
    query heads of a key head stand together. Products sum in float32, the softmax is float32. The outputs at padding are
    finite and mean nothing. Rows are padded to whole blocks.
    """
    batch, length, kv_heads, groups, _ = q.shape
    whole = math.lcm(blocks.query, blocks.key, blocks.backward_query, blocks.backward_key)
    padding, rows = -length % whole, [segments] if prefixes is None else [segments, prefixes]
    if padding:
        q, k, v, *rows = (jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, *rows))
    reach = reaches(*rows)
    q = q.reshape(batch, -1, kv_heads * groups, q.shape[-1]).swapaxes(1, 2)
    out = _attend(scale, blocks, interpret, q, k.swapaxes(1, 2), v.swapaxes(1, 2), reach)
    return out.swapaxes(1, 2).reshape(batch, -1, kv_heads, groups, v.shape[-1])[:, :length]


def reaches(segments: jax.Array, prefixes: jax.Array | None = None) -> jax.Array:
    """Returns the keys that each token sees beside those between, int32 [B, 1 or 3, T]: its sample's first; with prefixes also
    the first and last key of its shared prompt (T and -1 where there is none). Padding sees itself."""
    length = segments.shape[1]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segments.shape)
    changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jax.lax.cummax(jnp.where(changes, index, 0), axis=1)
    own = jnp.where(segments > 0, starts, index)
    if prefixes is None:
        return own[:, None]
    bounds = jax.vmap(
        lambda i, s: (
            jax.ops.segment_min(i, s, num_segments=length + 1),
            jax.ops.segment_max(i, s, num_segments=length + 1),
        )
    )(index, segments)
    first, last = (jnp.take_along_axis(bound, prefixes, axis=1) for bound in bounds)
    return jnp.stack([own, jnp.where(prefixes > 0, first, length), jnp.where(prefixes > 0, last, -1)], axis=1)


def steps(reach: jax.Array, query: int, key: int, by_key: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (block of queries, block of keys, what to do), int32 [B, steps] each: the live steps of every row by block of
    queries, or of keys, then idle ones at the last live step's place."""
    batch, _, length = reach.shape
    tokens = reach.reshape(batch, reach.shape[1], length // query, query)
    begin = jnp.arange(0, length, key, dtype=jnp.int32)  # of the blocks of keys
    own_first, own_last = tokens[:, 0].min(axis=-1)[..., None], tokens[:, 0].max(axis=-1)[..., None]
    top = jnp.arange(query, length + 1, query, dtype=jnp.int32)[:, None] - 1  # last token of the blocks of queries
    causal = begin <= top
    live = causal & (begin + key > own_first)
    masked = (begin < own_last) | (begin + key > top - query + 2)
    if reach.shape[1] > 1:
        meets = (tokens[:, 1, :, :, None] < begin + key) & (tokens[:, 2, :, :, None] >= begin)
        live |= causal & meets.any(axis=2)
    live = jnp.broadcast_to(live, (batch, length // query, begin.size))
    masked = jnp.broadcast_to(masked, live.shape)
    if by_key:
        live, masked = live.swapaxes(1, 2), masked.swapaxes(1, 2)
    outer, inner = live.shape[1:]
    bound = sum(  # of the live steps: all that causality leaves
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
    todo = LIVE + FIRST * first + LAST * last + MASKED * jnp.take_along_axis(masked, order, axis=1)
    todo = jnp.where(place < count, todo, 0).astype(jnp.int32)
    pair = (block, order % inner)
    return (*(pair[::-1] if by_key else pair), todo)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(scale, blocks, interpret, q_BNTH, k_BKSH, v_BKSV, reach):
    return _forward(scale, blocks, interpret, q_BNTH, k_BKSH, v_BKSV, reach)[0]


def _forward(scale, blocks, interpret, q_BNTH, k_BKSH, v_BKSV, reach):
    out, norm = forward_call(blocks, interpret, _scaled(q_BNTH, scale), k_BKSH, v_BKSV, reach)
    return out, (q_BNTH, k_BKSH, v_BKSV, reach, out, norm)


def _scaled(q, scale: float):
    return (q.astype(jnp.float32) * (scale * LOG2_E)).astype(q.dtype)


def forward_call(blocks: Blocks, interpret, q_BNTH, k_BKSH, v_BKSV, reach):
    """Returns (outputs [B, N, T, V], base-2 logarithm of the softmax's sum, float32 [B, N, 1, T]) of scaled queries."""
    batch, heads, length, width = q_BNTH.shape
    groups, out_width = heads // k_BKSH.shape[1], v_BKSV.shape[-1]
    table = steps(reach, blocks.query, blocks.key, by_key=False)
    at_query = lambda b, n, s, query, key, todo: (b, n, query[b, s], 0)  # noqa: E731
    at_key = lambda b, n, s, query, key, todo: (b, n // groups, key[b, s], 0)  # noqa: E731
    lanes = lambda b, n, s, query, key, todo: (b, n, 0, query[b, s])  # noqa: E731
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
                    (None, reach.shape[1], blocks.query), lambda b, n, s, query, key, todo: (b, 0, query[b, s])
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
    )(*table, q_BNTH, k_BKSH, v_BKSV, reach)


def _visible(reach_ref, part: pl.Slice, query, key, shape: tuple[int, int]) -> jax.Array:
    """Returns bool [keys, queries]: whether the query at column `query` + j may look at the key at `key` + i."""
    own = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1) + (query - key)
    seen = (own >= reach_ref[0:1, part] - key) & (own <= column)
    if reach_ref.shape[0] > 1:
        seen |= (own >= reach_ref[1:2, part] - key) & (own <= reach_ref[2:3, part] - key)
    return seen


def _forward_kernel(query, key, todo, q_ref, k_ref, v_ref, reach_ref, out_ref, norm_ref, top, total, sums, *, blocks):
    row, step = pl.program_id(0), pl.program_id(2)
    do = todo[row, step]

    @pl.when(do & FIRST > 0)
    def _():
        top[...], total[...], sums[...] = (jnp.full_like(top, LOWEST), jnp.zeros_like(total), jnp.zeros_like(sums))

    def scored(place: tuple[int, int], masked: bool):
        """Returns the scores of a part of the keys and one of the queries, [keys, queries]."""
        first_key, first_query = place
        part = pl.ds(first_query, blocks.query_part)
        scores = dot(k_ref[pl.ds(first_key, blocks.key_part), :], q_ref[part, :], (1, 1))
        if masked:
            first_query += query[row, step] * blocks.query
            first_key += key[row, step] * blocks.key
            scores = jnp.where(_visible(reach_ref, part, first_query, first_key, scores.shape), scores, LOWEST)
        return scores

    places = [(i, j) for j in range(0, blocks.query, blocks.query_part) for i in range(0, blocks.key, blocks.key_part)]

    def work(masked: bool):
        following = scored(places[0], masked)
        for number, (first_key, first_query) in enumerate(places, 1):
            part, scores = pl.ds(first_query, blocks.query_part), following
            if number < len(places):  # the next product runs beside this one's softmax
                following = scored(places[number], masked)
            before = top[:, part]
            higher = jnp.maximum(before, scores.max(axis=0, keepdims=True))
            exps, shrink = jnp.exp2(scores - higher), jnp.exp2(before - higher)
            top[:, part] = higher
            total[:, part] = total[:, part] * shrink + exps.sum(axis=0, keepdims=True)
            weighted = dot(v_ref[pl.ds(first_key, blocks.key_part), :], exps.astype(v_ref.dtype), (0, 0))
            sums[:, part] = sums[:, part] * shrink + weighted

    pl.when(do & (LIVE | MASKED) == LIVE)(lambda: work(False))
    pl.when(do & (LIVE | MASKED) == LIVE | MASKED)(lambda: work(True))

    @pl.when(do & LAST > 0)
    def _():
        out_ref[...] = (sums[...] / total[...]).T.astype(out_ref.dtype)
        norm_ref[...] = top[...] + jnp.log2(total[...])


def _backward(scale, blocks, interpret, saved, d_out):
    q_BNTH, k_BKSH, v_BKSV, reach, out, norm = saved
    # The sum over keys of probability times its gradient (arXiv 2205.14135, appendix B.2).
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    d_q, d_k, d_v = backward_call(
        blocks, interpret, _scaled(q_BNTH, scale), k_BKSH, v_BKSV, reach, d_out.astype(q_BNTH.dtype), norm, inner
    )
    grouped = lambda d, like: d.reshape(*like.shape[:2], -1, *d.shape[2:]).sum(axis=2)  # noqa: E731
    d_k, d_v = grouped(d_k, k_BKSH), grouped(d_v, v_BKSV)
    return (d_q * scale).astype(q_BNTH.dtype), (d_k / LOG2_E).astype(k_BKSH.dtype), d_v.astype(v_BKSV.dtype), None


_attend.defvjp(_forward, _backward)


def backward_call(blocks: Blocks, interpret, q_BNTH, k_BKSH, v_BKSV, reach, d_out, norm, inner):
    """Returns float32 gradients: of the natural scores through keys [B, N, T, H], of keys through scaled queries
    [B, N, S, H] and of values [B, N, S, V], the latter two for each query head.

    norm and inner are float32 [B, N, 1, T]: the base-2 logarithm of the softmax's sum, and d_out times the output, summed.
    Raises ValueError for rows whose gradient of a head's queries does not fit VMEM.
    """
    batch, heads, length, width = q_BNTH.shape
    row = 2 * 4 * length * rounded(width)  # float32, two buffers
    if row > ROW_BYTES:
        raise ValueError(
            f"flash_attention: a row of {length} tokens needs {row / 2**20:.0f} MiB of VMEM for the gradient of its queries, "
            f"{ROW_BYTES // 2**20} are there; divide rows (mesh.context) or set compute.attention_implementation=xla"
        )
    groups, out_width = heads // k_BKSH.shape[1], v_BKSV.shape[-1]
    size, key_size = blocks.backward_query, blocks.backward_key
    table = steps(reach, size, key_size, by_key=True)
    at_query = lambda b, n, s, query, key, todo: (b, n, query[b, s], 0)  # noqa: E731
    at_key = lambda b, n, s, query, key, todo: (b, n // groups, key[b, s], 0)  # noqa: E731
    own_key = lambda b, n, s, query, key, todo: (b, n, key[b, s], 0)  # noqa: E731
    lanes = lambda b, n, s, query, key, todo: (b, n, 0, query[b, s])  # noqa: E731
    return pl.pallas_call(
        functools.partial(_backward_kernel, blocks=blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads, table[0].shape[1]),
            in_specs=[
                pl.BlockSpec((None, None, size, width), at_query),
                pl.BlockSpec((None, None, key_size, width), at_key),
                pl.BlockSpec((None, None, key_size, out_width), at_key),
                pl.BlockSpec((None, reach.shape[1], size), lambda b, n, s, query, key, todo: (b, 0, query[b, s])),
                pl.BlockSpec((None, None, size, out_width), at_query),
                pl.BlockSpec((None, None, 1, size), lanes),
                pl.BlockSpec((None, None, 1, size), lanes),
            ],
            out_specs=[
                pl.BlockSpec((None, None, length, width), lambda b, n, s, query, key, todo: (b, n, 0, 0)),
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
    )(*table, q_BNTH, k_BKSH, v_BKSV, reach, d_out, norm, inner)


def _backward_kernel(
    query,
    key,
    todo,
    q_ref,
    k_ref,
    v_ref,
    reach_ref,
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
    do, size = todo[row, step], blocks.backward_part

    @pl.when(step == 0)
    def _():
        d_q_ref[...] = jnp.zeros_like(d_q_ref)

    @pl.when(do & FIRST > 0)
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
                probs = jnp.where(_visible(reach_ref, part, first_query, first_key, scores.shape), probs, 0)
            d_v_ref[...] += dot(probs.astype(d_out.dtype), d_out, (1, 0))
            d_probs = dot(v_ref[...], d_out, (1, 1))
            d_scores = (probs * (d_probs - inner_ref[:, part])).astype(q.dtype)
            d_k_ref[...] += dot(d_scores, q, (1, 0))
            d_q_ref[pl.ds(pl.multiple_of(first_query, size), size), :] += dot(d_scores, k_ref[...], (0, 0))

    pl.when(do & (LIVE | MASKED) == LIVE)(lambda: work(False))
    pl.when(do & (LIVE | MASKED) == LIVE | MASKED)(lambda: work(True))
