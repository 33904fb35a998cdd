"""Attention over rows whose tokens are divided over the mesh's `context` axis: keys travel around a ring of devices.

Every device keeps its queries, with running softmax sums, and passes the arrays that keys and values are made of to its
neighbour. Source: Ring Attention, arXiv 2310.01889, but sending the keys' source (MLA's latent) instead of the keys.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r1jax.core import sharding
from r1jax.kernels.tpu import LOWEST

RING = "context"


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
    body = functools.partial(_on_device, expand=expand, scale=scale, mesh=mesh)
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=queries, check_vma=False)(
        q_BTKGH, source, weights, segments
    )


def _on_device(q, source, weights, segments, *, expand, scale: float, mesh: Mesh) -> jax.Array:
    size, me = mesh.shape[RING], jax.lax.axis_index(RING)
    length = q.shape[1]
    onward = [(device, (device + 1) % size) for device in range(size)]

    def part(carry, step):
        source, their_segments, top, total, out = carry
        keys, values = expand(source, weights)
        first = (me - step) % size * length - me * length  # the received part's start, relative to this one's
        causal = jnp.arange(length)[:, None] >= first + jnp.arange(length)
        mask = causal & (segments[:, :, None] == their_segments[:, None, :])
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, keys, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(mask[:, None, None], scores, LOWEST)
        higher = jax.lax.stop_gradient(jnp.maximum(top, scores.max(axis=-1)))
        shrink, probs = jnp.exp(top - higher), jnp.exp(scores - higher[..., None])
        total = total * shrink + probs.sum(axis=-1)
        new = jnp.einsum("BKGTS,BSKV->BKGTV", probs.astype(values.dtype), values, preferred_element_type=jnp.float32)
        source, their_segments = jax.lax.ppermute((source, their_segments), RING, onward)
        return (source, their_segments, higher, total, out * shrink[..., None] + new), None

    batch, _, heads, groups, _ = q.shape
    value_width = jax.eval_shape(expand, source, weights)[1].shape[-1]
    sums = jnp.zeros((batch, heads, groups, length), jnp.float32)
    start = (source, segments, sums + LOWEST, sums, jnp.zeros((*sums.shape, value_width), jnp.float32))
    (_, _, _, total, out), _ = jax.lax.scan(jax.checkpoint(part), start, jnp.arange(size))
    return (out / total[..., None]).transpose(0, 3, 1, 2, 4).astype(q.dtype)
