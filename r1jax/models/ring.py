"""Attention over rows whose tokens are divided over the mesh's `context` axis: keys travel around a ring of devices.

Every device keeps its queries, with running softmax sums, and passes the arrays that keys and values are made of to its
neighbour. A visiting part is attended to block by block, so no device holds a whole matrix of scores: by the kernels of
`flash_attention`, or by XLA's operations. Source: Ring Attention, arXiv 2310.01889, but sending the keys' source (MLA's
latent) instead of the keys.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r1jax.core import sharding
from r1jax.kernels.flash_attention import LOG2_E, backward_call, blocks_for, forward_call, key_ranges, scaled
from r1jax.kernels.tpu import LOWEST, rounded

RING = "context"
BLOCK = 1024  # queries and keys of which XLA computes all scores at once


def devices(tokens: int) -> int:
    """Returns how many devices a row of `tokens` is divided over on the mesh in force; 1 means no ring."""
    mesh = sharding.current_mesh()
    if mesh is None or RING not in sharding.mesh_axes(sharding.partition(("sequence",), (tokens,), mesh)[0]):
        return 1
    return mesh.shape[RING]


def attend(
    q_BTKGH: jax.Array,
    source: Any,
    source_axes: Any,
    expand: Callable[[Any, Any], tuple[jax.Array, jax.Array]],
    weights: Any,
    weight_axes: Any,
    segments: jax.Array,
    scale: float,
    by_kernel: bool,
) -> jax.Array:
    """Returns causal attention within segments, [B, T, K, G, V].

    `expand(source, weights)` returns keys [B, S, K, H] and values [B, S, K, V] of a part of `source`, a tree of
    [B, T, ...] arrays with logical axes `source_axes`. `weights`, with axes `weight_axes`, do not travel.
    """
    mesh = sharding.current_mesh()
    assert mesh is not None

    def place(arrays, axes):
        return jax.tree.map(lambda a, names: sharding.partition(names, a.shape, mesh), arrays, axes)

    queries = sharding.partition(("batch", "sequence", "heads", None, None), q_BTKGH.shape, mesh)
    rows = sharding.partition(("batch", "sequence"), segments.shape, mesh)
    in_specs = (queries, place(source, source_axes), place(weights, weight_axes), rows)
    by_xla = functools.partial(_by_xla, expand=expand, scale=scale, mesh=mesh)
    body = functools.partial(_by_kernel, expand, scale, mesh.shape[RING]) if by_kernel else by_xla
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=queries, check_vma=False)(
        q_BTKGH, source, weights, segments
    )


def _onward(arrays, size: int):
    """Returns what the neighbour before this device holds."""
    return jax.lax.ppermute(arrays, RING, [(device, (device + 1) % size) for device in range(size)])


def _by_xla(q, source, weights, segments, *, expand, scale: float, mesh: Mesh) -> jax.Array:
    size, me = mesh.shape[RING], jax.lax.axis_index(RING)
    length = q.shape[1]

    def part(carry, step):
        source, their_segments, sums = carry
        keys, values = expand(source, weights)
        first = (me - step) % size * length - me * length  # the received part's start, relative to this one's
        sums = _visited(q, segments, (keys, values, their_segments), first, sums, scale)
        return (*_onward((source, their_segments), size), sums), None

    batch, _, heads, groups, _ = q.shape
    value_width = jax.eval_shape(expand, source, weights)[1].shape[-1]
    zeros = jnp.zeros((batch, heads, groups, length), jnp.float32)
    start = (source, segments, (zeros + LOWEST, zeros, jnp.zeros((*zeros.shape, value_width), jnp.float32)))
    (_, _, (_, total, out)), _ = jax.lax.scan(jax.checkpoint(part), start, jnp.arange(size))
    return (out / total[..., None]).transpose(0, 3, 1, 2, 4).astype(q.dtype)


def _visited(q, segments, keys: tuple[jax.Array, jax.Array, jax.Array], first, sums, scale: float):
    """Returns the running (maximum, sum, output) of the queries after they have seen a visiting part.

    `keys` are its keys, values and segments, `first` its start relative to the queries'. Parts longer than BLOCK are
    taken in blocks, and the backward pass computes a block of queries' sums again.
    """
    length = q.shape[1]
    if length <= BLOCK:
        return _added(q, segments, keys, first, sums, scale)
    blocks, padding = -(-length // BLOCK), -length % BLOCK

    def split(array, axis: int, value=0):
        padded = jnp.pad(array, [(0, padding * (place == axis)) for place in range(array.ndim)], constant_values=value)
        return jnp.moveaxis(padded.reshape(*array.shape[:axis], blocks, BLOCK, *array.shape[axis + 1 :]), axis, 0)

    def joined(array, axis: int):
        whole = jnp.moveaxis(array, 0, axis)
        whole = whole.reshape(*whole.shape[:axis], blocks * BLOCK, *whole.shape[axis + 2 :])
        return jax.lax.slice_in_dim(whole, 0, length, axis=axis)

    key_blocks = *(split(array, 1) for array in keys[:2]), split(keys[2], 1, -1)  # no segment has the number -1
    starts = jnp.arange(blocks) * BLOCK

    @jax.checkpoint
    def queries(block):
        q, segments, start, sums = block
        add = lambda sums, one: (_added(q, segments, one[:3], first + one[3] - start, sums, scale), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(add), sums, (*key_blocks, starts))[0]

    sums = jax.lax.map(queries, (split(q, 1), split(segments, 1), starts, tuple(split(one, 3) for one in sums)))
    return tuple(joined(one, 3) for one in sums)


def _added(q, segments, keys, first, sums, scale: float):
    """Returns the running sums of a block of queries with one block of keys added, all of its scores at once."""
    (keys, values, their_segments), (top, total, out) = keys, sums
    causal = jnp.arange(q.shape[1])[:, None] >= first + jnp.arange(keys.shape[1])
    mask = causal & (segments[:, :, None] == their_segments[:, None, :])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, keys, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, None, None], scores, LOWEST)
    higher = jax.lax.stop_gradient(jnp.maximum(top, scores.max(axis=-1)))
    shrink, probs = jnp.exp(top - higher), jnp.exp(scores - higher[..., None])
    total = total * shrink + probs.sum(axis=-1)
    new = jnp.einsum("BKGTS,BSKV->BKGTV", probs.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return higher, total, out * shrink[..., None] + new


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _by_kernel(expand, scale: float, size: int, q_BTKGH, source, weights, segments):
    return _kernel_forward(expand, scale, size, q_BTKGH, source, weights, segments)[0]


def _kernel_forward(expand, scale, size, q_BTKGH, source, weights, segments):
    """Returns the outputs and what the backward pass needs; parts are weighed by the sums of their softmax."""
    blocks, interpret, ranges = _kernel(q_BTKGH, segments, size)
    q = scaled(_by_head(q_BTKGH, ranges.shape[2]), scale)

    def part(source, step, position):
        keys, values = (_by_head(array, ranges.shape[2]) for array in expand(source, weights))
        among = _among(ranges, q_BTKGH.shape[1], size, step)
        return forward_call(blocks, interpret, q, keys, values, among, position, jnp.float32)

    def visit(carry, step):
        source, out, norm = carry
        source = _onward(source, size)
        new, new_norm = part(source, step, None)
        top = jnp.maximum(norm, new_norm)
        old, added = jnp.exp2(norm - top), jnp.exp2(new_norm - top)
        share = lambda weight: jnp.swapaxes(weight / (old + added), 2, 3)  # noqa: E731
        return (source, out * share(old) + new * share(added), top + jnp.log2(old + added)), None

    start = (source, *part(source, 0, 0))
    (_, out, norm), _ = jax.lax.scan(visit, start, jnp.arange(1, size))
    out = out.astype(q.dtype)
    return _by_token(out, q_BTKGH.shape), (q_BTKGH, source, weights, segments, out, norm)


def _kernel_backward(expand, scale, size, saved, d_out):
    """Returns the gradients; that of the source travels with it, and takes one step more to be at home again."""
    q_BTKGH, source, weights, segments, out, norm = saved
    blocks, interpret, ranges = _kernel(q_BTKGH, segments, size)
    q, d_out = scaled(_by_head(q_BTKGH, ranges.shape[2]), scale), _by_head(d_out, ranges.shape[2]).astype(q_BTKGH.dtype)
    # The sum over keys of probability times its gradient (arXiv 2205.14135, appendix B.2).
    inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]

    def part(source, step, position):
        (keys, values), pull = jax.vjp(expand, source, weights)
        k, v = (_by_head(array, ranges.shape[2]) for array in (keys, values))
        among = _among(ranges, q_BTKGH.shape[1], size, step)
        d_q, d_k, d_v = backward_call(blocks, interpret, q, k, v, among, d_out, norm, inner, position)
        d_k, d_v = ((d, array.shape, array.dtype) for d, array in ((d_k / LOG2_E, keys), (d_v, values)))
        pulled = pull(tuple(_by_token(d, shape).astype(dtype) for d, shape, dtype in (d_k, d_v)))
        return d_q, *jax.tree.map(lambda d: d.astype(jnp.float32), pulled)

    def visit(carry, step):
        source, d_q, d_source, d_weights = carry
        source, d_source = _onward((source, d_source), size)
        sums = jax.tree.map(jnp.add, (d_q, d_source, d_weights), part(source, step, None))
        return (source, *sums), None

    start = (source, *part(source, 0, 0))
    (_, d_q, d_source, d_weights), _ = jax.lax.scan(visit, start, jnp.arange(1, size))
    d_q = _by_token(d_q.swapaxes(2, 3) * scale, q_BTKGH.shape)
    like = lambda d, array: d.astype(array.dtype)  # noqa: E731
    d_source, d_weights = jax.tree.map(like, (_onward(d_source, size), d_weights), (source, weights))
    return d_q.astype(q_BTKGH.dtype), d_source, d_weights, None


_by_kernel.defvjp(_kernel_forward, _kernel_backward)


def _kernel(q_BTKGH, segments, size: int):
    """Returns (the kernels' blocks, whether they are interpreted, ranges of this device's queries among the row's keys).

    The ranges [B, 2, T] are padded to whole blocks with queries that see no key.
    """
    device, length = sharding.device(), q_BTKGH.shape[1]
    blocks = blocks_for(device.device_kind, length, q_BTKGH.shape[-1])
    whole = rounded(length, blocks.whole)
    row = key_ranges(jax.lax.all_gather(segments, RING, axis=1, tiled=True))
    own = jax.lax.dynamic_slice_in_dim(row, jax.lax.axis_index(RING) * length, length, axis=2)
    unseen = jnp.broadcast_to(jnp.array([[size * length], [-1]], jnp.int32), (*own.shape[:2], whole - length))
    return blocks, device.platform == "cpu", jnp.concatenate([own, unseen], axis=2)


def _among(ranges, length: int, size: int, step):
    """Returns the ranges among the `length` keys of the part that visits in a step, without those that pad it."""
    first, last = jnp.moveaxis(ranges - (jax.lax.axis_index(RING) - step) % size * length, 1, 0)
    return jnp.stack([first, jnp.minimum(last, length - 1)], axis=1)


def _by_head(array, tokens: int) -> jax.Array:
    """Returns an array [B, T, heads..., W] as [B, N, tokens, W], padded with zeros."""
    batch, length, width = *array.shape[:2], array.shape[-1]
    padded = jnp.pad(array.reshape(batch, length, -1, width), ((0, 0), (0, tokens - length), (0, 0), (0, 0)))
    return padded.swapaxes(1, 2)


def _by_token(array_BNTW, shape: tuple[int, ...]) -> jax.Array:
    """Returns `_by_head`'s reverse for an array of this shape, whose last side may differ."""
    return array_BNTW[:, :, : shape[1]].swapaxes(1, 2).reshape(*shape[:-1], array_BNTW.shape[-1])
