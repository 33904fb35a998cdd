"""Causal attention within the samples of packed rows, block by block: what lies in other samples is not computed.

A row holds samples one after the other, so a block of queries sees keys from the start of its earliest sample to its own
end. The blocks before that start are passed over, forward and backward, and no [T, T] probabilities are kept: the
backward pass computes each block again from the logarithm of the softmax's sum. Source of the running softmax and its
backward: Dao et al., arXiv 2205.14135, algorithms 1 and 4.
"""

import functools

import jax
import jax.numpy as jnp

LOWEST = -1e30  # below any score


def packed_attention(q, k, v, segments, scale: float, block: int) -> jax.Array:
    """Returns the attention outputs, [B, T, K, G, V], of queries q [B, T, K, G, H] over keys k [B, T, K, H] and values
    v [B, T, K, V].

    segments int32 [B, T] number the samples of a row, 0 is padding; a token sees itself and the earlier tokens of its
    sample. The G query heads of a key head stand together. `block` queries and keys are taken at a time; the work is
    that of the blocks that any of the B rows needs. Products sum in float32, the softmax is float32. The outputs at padding
    are finite and mean nothing. Raises ValueError for a block below 1.
    """
    if block < 1:
        raise ValueError(f"packed_attention: block={block} must be at least 1")
    length = q.shape[1]
    padding = -length % block
    if padding:
        q, k, v, segments = (jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, segments))
    out = _attend(scale, block, q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2), segments)
    return out.transpose(0, 3, 1, 2, 4)[:, :length]


def first_blocks(segments: jax.Array, block: int) -> jax.Array:
    """Returns the first block of keys that each block of queries needs, int32 [T / block]; padding needs none but itself."""
    batch, length = segments.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segments.shape)
    starts = jax.vmap(lambda i, s: jax.ops.segment_min(i, s, num_segments=length + 1)[s])(index, segments)
    starts = jnp.where(segments > 0, starts, index)
    return starts.reshape(batch, -1, block).min(axis=(0, 2)) // block


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, block, q_BKGTH, k_BKTH, v_BKTV, segments):
    return _forward(scale, block, q_BKGTH, k_BKTH, v_BKTV, segments)[0]


def _forward(scale, block, q_BKGTH, k_BKTH, v_BKTV, segments):
    first, blocks = first_blocks(segments, block), q_BKGTH.shape[3] // block

    def queries(number):
        q = _part(q_BKGTH, number, block, 3)

        def keys(other, sums):
            top, total, weighted = sums
            scores = _scores(q, _part(k_BKTH, other, block, 2), segments, number, other, scale, block)
            higher = jnp.maximum(top, scores.max(axis=-1))
            exps, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            value = _part(v_BKTV, other, block, 2)
            found = jnp.einsum("BKGTS,BKSV->BKGTV", exps.astype(value.dtype), value, preferred_element_type=jnp.float32)
            return higher, total * shrink + exps.sum(axis=-1), weighted * shrink[..., None] + found

        zeros = jnp.zeros(q.shape[:-1], jnp.float32)
        start = (zeros + LOWEST, zeros, jnp.zeros((*q.shape[:-1], v_BKTV.shape[-1]), jnp.float32))
        # The own block comes first: after it every query has seen a key, itself.
        top, total, weighted = jax.lax.fori_loop(first[number], number, keys, keys(number, start))
        return (weighted / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, norm = jax.lax.map(queries, jnp.arange(blocks))  # [blocks, B, K, G, block, V], [blocks, B, K, G, block]
    out = jnp.moveaxis(out, 0, 3).reshape(*q_BKGTH.shape[:-1], v_BKTV.shape[-1])
    norm = jnp.moveaxis(norm, 0, 3).reshape(q_BKGTH.shape[:-1])
    return out, (q_BKGTH, k_BKTH, v_BKTV, segments, first, out, norm)


def _backward(scale, block, saved, d_out):
    q_BKGTH, k_BKTH, v_BKTV, segments, first, out, norm = saved
    # The sum over keys of probability times its gradient (arXiv 2205.14135, appendix B.2).
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def queries(number, gradients):
        q, d_o, own_norm, own_inner = (_part(x, number, block, 3) for x in (q_BKGTH, d_out, norm, inner))

        def keys(other, gradients):
            d_q, d_k, d_v = gradients
            key, value = _part(k_BKTH, other, block, 2), _part(v_BKTV, other, block, 2)
            probs = jnp.exp(_scores(q, key, segments, number, other, scale, block) - own_norm[..., None])
            d_probs = jnp.einsum("BKGTV,BKSV->BKGTS", d_o, value, preferred_element_type=jnp.float32)
            d_scores = (probs * (d_probs - own_inner[..., None]) * scale).astype(q.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_v = _add(d_v, product("BKGTS,BKGTV->BKSV", probs.astype(d_o.dtype), d_o), other, block)
            d_k = _add(d_k, product("BKGTS,BKGTH->BKSH", d_scores, q), other, block)
            return d_q + product("BKGTS,BKSH->BKGTH", d_scores, key), d_k, d_v

        d_q, d_k, d_v = gradients
        own, d_k, d_v = jax.lax.fori_loop(first[number], number + 1, keys, (jnp.zeros(q.shape, jnp.float32), d_k, d_v))
        return jax.lax.dynamic_update_slice_in_dim(d_q, own, number * block, 3), d_k, d_v

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_BKGTH, k_BKTH, v_BKTV))
    d_q, d_k, d_v = jax.lax.fori_loop(0, q_BKGTH.shape[3] // block, queries, start)
    return d_q.astype(q_BKGTH.dtype), d_k.astype(k_BKTH.dtype), d_v.astype(v_BKTV.dtype), None


_attend.defvjp(_forward, _backward)


def _scores(q_BKGTH, k_BKSH, segments, number, other, scale, block):
    """Returns the scores of a block of queries and one of keys, float32, LOWEST where a query may not look."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32) * scale
    places = jnp.arange(block)
    seen = (number * block + places)[:, None] >= other * block + places
    same = _part(segments, number, block, 1)[:, :, None] == _part(segments, other, block, 1)[:, None, :]
    return jnp.where((seen & same)[:, None, None], scores.astype(jnp.float32), LOWEST)


def _part(array, number, block: int, axis: int):
    return jax.lax.dynamic_slice_in_dim(array, number * block, block, axis)


def _add(array_BKTH, part, number, block: int):
    return jax.lax.dynamic_update_slice_in_dim(
        array_BKTH, _part(array_BKTH, number, block, 2) + part, number * block, 2
    )
