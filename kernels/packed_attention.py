"""Causal attention within the samples of packed rows, block by block: blocks of other samples are not computed.

A row holds samples one after the other, so a block of queries attends to keys from the start of its earliest sample to
its own end, and to the shared prompts that its samples continue. The other blocks are skipped, forward and backward.
No [T, T] probabilities are stored: the backward pass recomputes each block from the logarithm of the softmax's sum.
Source of the running softmax and its backward: Dao et al., arXiv 2205.14135, algorithms 1 and 4.
"""

import functools

import jax
import jax.numpy as jnp

from r1jax.kernels.tpu import LOWEST


def packed_attention(q, k, v, segments, scale: float, block: int, prefixes=None) -> jax.Array:
    """Returns the attention outputs, [B, T, K, G, V], of queries q [B, T, K, G, H] over keys k [B, T, K, H] and values
    v [B, T, K, V].

    segments int32 [B, T] number the samples of a row; 0 is padding. A token attends to itself, to the earlier tokens of
    its sample and, where `prefixes` int32 [B, T] is not 0, to the segment with that number, which comes earlier in the
    row. The G query heads that share a key head are adjacent. `block` queries and keys are taken at a time; a block is
    computed when any of the B rows needs it. Products are summed in float32 and the softmax is float32. The outputs at
    padding are finite but undefined. Raises ValueError for a block below 1.
    """
    if block < 1:
        raise ValueError(f"packed_attention: block={block} must be at least 1")
    length = q.shape[1]
    padding, rows = -length % block, [segments] if prefixes is None else [segments, prefixes]
    if padding:
        q, k, v, *rows = (jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, *rows))
    out = _attend(scale, block, q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2), tuple(rows))
    return out.transpose(0, 3, 1, 2, 4)[:, :length]


def needed_blocks(segments: jax.Array, block: int, prefixes: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns (blocks of keys, int32 [T / block, T / block]; how many are needed, int32 [T / block]).

    Row i lists the earlier blocks of keys that block i of queries needs, in rising order, followed by the other blocks.
    Padding needs none.
    """
    batch, length = segments.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segments.shape)
    bounds = jax.vmap(
        lambda i, s: (
            jax.ops.segment_min(i, s, num_segments=length + 1),
            jax.ops.segment_max(i, s, num_segments=length + 1),
        )
    )(index, segments)
    numbers = jnp.arange(length // block)

    def touched(named, end):
        """Returns bool [T / block, T / block]: whether block i names a segment with keys, up to `end`, in block j."""
        first, last = (jnp.take_along_axis(bound, named, axis=1)[..., None] // block for bound in bounds)
        inside = (named > 0)[..., None] & (first <= numbers) & (numbers <= jnp.minimum(last, end[..., None] // block))
        return inside.reshape(batch, -1, block, numbers.size).any(axis=(0, 2))

    needed = touched(segments, index)
    if prefixes is not None:
        needed |= touched(prefixes, index)
    needed &= numbers < numbers[:, None]
    order = jnp.argsort(jnp.where(needed, numbers, numbers.size + numbers), axis=1).astype(jnp.int32)
    return order, needed.sum(axis=1, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, block, q_BKGTH, k_BKTH, v_BKTV, rows):
    return _forward(scale, block, q_BKGTH, k_BKTH, v_BKTV, rows)[0]


def _forward(scale, block, q_BKGTH, k_BKTH, v_BKTV, rows):
    (order, counts), blocks = needed_blocks(rows[0], block, *rows[1:]), q_BKGTH.shape[3] // block

    def queries(number):
        q = _part(q_BKGTH, number, block, 3)

        def keys(other, sums):
            top, total, weighted = sums
            scores = _scores(q, _part(k_BKTH, other, block, 2), rows, number, other, scale, block)
            higher = jnp.maximum(top, scores.max(axis=-1))
            exps, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            value = _part(v_BKTV, other, block, 2)
            added = jnp.einsum("BKGTS,BKSV->BKGTV", exps.astype(value.dtype), value, preferred_element_type=jnp.float32)
            return higher, total * shrink + exps.sum(axis=-1), weighted * shrink[..., None] + added

        zeros = jnp.zeros(q.shape[:-1], jnp.float32)
        start = (zeros + LOWEST, zeros, jnp.zeros((*q.shape[:-1], v_BKTV.shape[-1]), jnp.float32))
        # The diagonal block comes first: after it every query has seen at least one key, itself.
        others = lambda place, sums: keys(order[number, place], sums)  # noqa: E731
        top, total, weighted = jax.lax.fori_loop(0, counts[number], others, keys(number, start))
        return (weighted / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, norm = jax.lax.map(queries, jnp.arange(blocks))  # [blocks, B, K, G, block, V], [blocks, B, K, G, block]
    out = jnp.moveaxis(out, 0, 3).reshape(*q_BKGTH.shape[:-1], v_BKTV.shape[-1])
    norm = jnp.moveaxis(norm, 0, 3).reshape(q_BKGTH.shape[:-1])
    return out, (q_BKGTH, k_BKTH, v_BKTV, rows, order, counts, out, norm)


def _backward(scale, block, saved, d_out):
    q_BKGTH, k_BKTH, v_BKTV, rows, order, counts, out, norm = saved
    # The sum over keys of probability times its gradient (arXiv 2205.14135, appendix B.2).
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def queries(number, gradients):
        q, d_o, block_norm, block_inner = (_part(x, number, block, 3) for x in (q_BKGTH, d_out, norm, inner))

        def keys(other, gradients):
            d_q, d_k, d_v = gradients
            key, value = _part(k_BKTH, other, block, 2), _part(v_BKTV, other, block, 2)
            probs = jnp.exp(_scores(q, key, rows, number, other, scale, block) - block_norm[..., None])
            d_probs = jnp.einsum("BKGTV,BKSV->BKGTS", d_o, value, preferred_element_type=jnp.float32)
            d_scores = (probs * (d_probs - block_inner[..., None]) * scale).astype(q.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_v = _add(d_v, product("BKGTS,BKGTV->BKSV", probs.astype(d_o.dtype), d_o), other, block)
            d_k = _add(d_k, product("BKGTS,BKGTH->BKSH", d_scores, q), other, block)
            return d_q + product("BKGTS,BKSH->BKGTH", d_scores, key), d_k, d_v

        d_q, d_k, d_v = gradients
        others = lambda place, gradients: keys(order[number, place], gradients)  # noqa: E731
        start = keys(number, (jnp.zeros(q.shape, jnp.float32), d_k, d_v))
        block_d_q, d_k, d_v = jax.lax.fori_loop(0, counts[number], others, start)
        return jax.lax.dynamic_update_slice_in_dim(d_q, block_d_q, number * block, 3), d_k, d_v

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_BKGTH, k_BKTH, v_BKTV))
    d_q, d_k, d_v = jax.lax.fori_loop(0, q_BKGTH.shape[3] // block, queries, start)
    return d_q.astype(q_BKGTH.dtype), d_k.astype(k_BKTH.dtype), d_v.astype(v_BKTV.dtype), None


_attend.defvjp(_forward, _backward)


def _scores(q_BKGTH, k_BKSH, rows, number, other, scale, block):
    """Returns the scores of a block of queries and one of keys, float32, LOWEST where a query may not attend."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32) * scale
    places = jnp.arange(block)
    seen = (number * block + places)[:, None] >= other * block + places
    keys = _part(rows[0], other, block, 1)[:, None, :]
    same = _part(rows[0], number, block, 1)[:, :, None] == keys
    for prefixes in rows[1:]:
        named = _part(prefixes, number, block, 1)[:, :, None]
        same |= (named == keys) & (named > 0)
    return jnp.where((seen & same)[:, None, None], scores.astype(jnp.float32), LOWEST)


def _part(array, number, block: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(array, number * block, block, axis)


def _add(array_BKTH, part, number, block: int):
    return jax.lax.dynamic_update_slice_in_dim(
        array_BKTH, _part(array_BKTH, number, block, 2) + part, number * block, 2
    )
