"""The forms of attention behind one signature, and the choice among them, made once for a whole forward pass.

A layer hands over its queries and the `Source` of its keys and values. Every form returns the same outputs: around a
ring of devices, by the flash kernels, block by block, by the decode kernels, or plainly with all scores at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.core.sharding import constrain, gathered_rows
from r1jax.kernels.packed_attention import packed_attention
from r1jax.kernels.tpu import LOWEST
from r1jax.models import cache as kv
from r1jax.models import flash, ring, rope
from r1jax.schema import Network

Axes = tuple[str | None, ...]  # logical axes of one array


@dataclass(frozen=True, eq=False)
class Source:
    """What the keys and values of a layer are made of: the arrays that a cache stores and that travel around a ring.

    The head axes follow one of three patterns. Grouped: queries [B, T, K, G, H], keys [B, S, K, H]. A key head for each
    query head: [B, T, N, H] and [B, S, N, H]. One key shared by all query heads: [B, T, N, H] and [B, S, H].
    """

    arrays: tuple[jax.Array, ...]  # [B, S, ...] each
    axes: tuple[Axes, ...]  # of each array
    expand: Callable[[Any, Any], tuple[jax.Array, jax.Array]]  # (arrays, weights) -> keys and values
    query_heads: str  # letters of the head axes of queries and outputs: KG or N
    key_heads: str  # of keys and values: K, N or none
    weights: Any = ()
    weight_axes: Axes = ()

    def keys_and_values(self) -> tuple[jax.Array, jax.Array]:
        return self.expand(self.arrays, self.weights)

    @property
    def value_width(self) -> int:
        return jax.eval_shape(self.expand, self.arrays, self.weights)[1].shape[-1]


@struct.dataclass
class Context:
    """What every layer of one forward pass shares."""

    cos: jax.Array  # [B, T, rope / 2]
    sin: jax.Array
    query_angles: tuple[jax.Array, jax.Array]  # the same for queries that have not left the rows of their weights
    mask: jax.Array  # [B, T, S] bool: query may see key
    write_positions: jax.Array | None  # [B, T] cache row of each new token, the scratch row for padding
    segments: jax.Array  # [B, T] document of each token, 0 is padding
    lengths: jax.Array | None = None  # [B] with a cache: rows of it that the last query sees, 0 for padding
    prefixes: jax.Array | None = None  # [B, T] segment of a shared prompt that a token sees beside its own, 0 for none
    window: int = struct.field(pytree_node=False, default=0)  # cache rows that are read
    form: "Form" = struct.field(pytree_node=False, default=None)  # how every layer attends, by `choose`


# (queries [B, T, heads, H], source, context, network, cache, layer) -> outputs [B, T, heads, V]
Form = Callable[[jax.Array, Source, Context, Network, kv.Cache | None, Any], jax.Array]


def build_context(
    positions: jax.Array,
    segments: jax.Array,
    network: Network,
    cache: kv.Cache | None = None,
    window: int = 0,
    prefixes: jax.Array | None = None,
) -> Context:
    """Returns the context of one forward pass on the mesh in force. With a cache, `window` rows of it are read.

    Without one, a token may also see the segment that `prefixes` [B, T] names for it, where that is not 0.
    """
    cos, sin = rope.angles(positions, network.model)
    query_angles = gathered_rows(cos), gathered_rows(sin)
    form = choose(network, positions.shape[1], cache is not None)
    if cache is None:
        causal = jnp.arange(positions.shape[1])[:, None] >= jnp.arange(positions.shape[1])
        same = segments[:, :, None] == segments[:, None, :]
        if prefixes is not None:
            same |= (prefixes[:, :, None] == segments[:, None, :]) & (prefixes > 0)[:, :, None]
        return Context(cos, sin, query_angles, causal & same, None, segments, prefixes=prefixes, form=form)
    mask = jnp.arange(window)[None, None, :] <= positions[:, :, None]
    lengths = jnp.where(segments[:, -1] > 0, positions[:, -1] + 1, 0)
    write_positions = jnp.where(segments > 0, positions, cache.rows)
    return Context(cos, sin, query_angles, mask, write_positions, segments, lengths, window=window, form=form)


def choose(network: Network, tokens: int, cached: bool) -> Form:
    """Returns the form for rows of `tokens` new tokens, with a cache or without, on the mesh in force.

    Raises ValueError where the config asks for kernels that the device cannot run.
    """
    if cached:
        return decoded if tokens == 1 and flash.chosen(network.compute) else plain
    if ring.devices(tokens) > 1:
        return around_ring_by_kernel if flash.chosen(network.compute) else around_ring
    if flash.chosen(network.compute):
        return by_kernel
    return in_blocks if network.compute.attention_block and not network.model.is_mla else plain


def attend(q, source: Source, context: Context, network: Network, cache: kv.Cache | None, layer):
    """Returns (outputs [B, T, heads, V] of queries q [B, T, heads, H], cache) in the form that the context carries.

    A cache takes the new rows first.
    """
    if cache is not None:
        assert context.write_positions is not None
        cache = kv.stored(cache, layer, source.arrays, context.write_positions)
    return context.form(q, source, context, network, cache, layer), cache


def around_ring(q, source: Source, context: Context, network: Network, cache, layer) -> jax.Array:
    """Rows divided over the mesh's `context` axis: the source travels, keys are expanded where it arrives."""
    return _ring(q, source, context, network, by_kernel=False)


def around_ring_by_kernel(q, source: Source, context: Context, network: Network, cache, layer) -> jax.Array:
    """The same, with the flash attention kernels on every part that arrives."""
    return _ring(q, source, context, network, by_kernel=True)


def _ring(q, source: Source, context: Context, network: Network, by_kernel: bool) -> jax.Array:
    out = ring.attend(
        _grouped(q),
        source.arrays,
        source.axes,
        source.expand,
        source.weights,
        source.weight_axes,
        context.segments,
        rope.softmax_scale(network.model),
        by_kernel,
    )
    return _as_queries(out, q)


def by_kernel(q, source: Source, context: Context, network: Network, cache, layer) -> jax.Array:
    """Whole rows by the flash attention kernels."""
    k, v = source.keys_and_values()
    out = flash.attend(_grouped(q), k, v, context.segments, context.prefixes, rope.softmax_scale(network.model))
    return _as_queries(out, q)


def in_blocks(q_BTKGH, source: Source, context: Context, network: Network, cache, layer) -> jax.Array:
    """Whole rows of grouped queries, config.compute.attention_block tokens at a time, without blocks of other samples."""
    k, v = source.keys_and_values()
    scale, block = rope.softmax_scale(network.model), network.compute.attention_block
    return packed_attention(q_BTKGH, k, v, context.segments, scale, block, context.prefixes)


def decoded(q, source: Source, context: Context, network: Network, cache: kv.Cache | None, layer) -> jax.Array:
    """One query per slot over its cached rows by the decode kernels, in float32; 0 for a slot of length 0."""
    width, scale = source.value_width, rope.softmax_scale(network.model)
    assert cache is not None
    return flash.decode(q[:, 0], cache.arrays, layer, context.lengths, width, scale)[:, None]


def plain(q, source: Source, context: Context, network: Network, cache: kv.Cache | None, layer) -> jax.Array:
    """All scores at once, over the row itself or over the first rows of the cache."""
    arrays, heads, key_heads = source.arrays, source.query_heads, source.key_heads
    if cache is not None:
        arrays = kv.loaded(cache, layer, context.window, like=arrays)
    k, v = source.expand(arrays, source.weights)
    if source.weight_axes:  # expanded by weights just now; other keys and values are constrained by their projections
        k, v = (constrain(array, "batch", "sequence", "heads", None) for array in (k, v))
    scores = jnp.einsum(f"BT{heads}H,BS{key_heads}H->B{heads}TS", q, k, preferred_element_type=jnp.float32)
    mask = jnp.expand_dims(context.mask, range(1, 1 + len(heads)))
    probs = jax.nn.softmax(
        jnp.where(mask, (scores * rope.softmax_scale(network.model)).astype(jnp.float32), LOWEST), axis=-1
    )
    return jnp.einsum(f"B{heads}TS,BS{key_heads}V->BT{heads}V", probs.astype(v.dtype), v)


def _grouped(q: jax.Array) -> jax.Array:
    """Returns queries as [B, T, K, G, H]: those with a key head each as groups of one."""
    return q if q.ndim == 5 else q[:, :, :, None]


def _as_queries(out_BTKGV: jax.Array, q: jax.Array) -> jax.Array:
    """Returns outputs with the head axes of the queries q."""
    return out_BTKGV if q.ndim == 5 else out_BTKGV[:, :, :, 0]
