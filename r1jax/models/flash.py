"""The Pallas attention kernels on the mesh in force: over whole rows, and over the cache when decoding."""

import math

import jax
import jax.numpy as jnp

from r1jax.core import sharding
from r1jax.kernels import decode_attention
from r1jax.kernels.flash_attention import blocks_for, flash_attention
from r1jax.schema import ComputeConfig


def chosen(compute: ComputeConfig) -> bool:
    """Returns whether the kernels compute attention: as configured or, with `auto`, on a TPU."""
    return sharding.use_pallas("attention_implementation", compute.attention_implementation)


def attend(q_BTKGH, k_BTKH, v_BTKV, segments, prefixes, scale: float) -> jax.Array:
    """Returns causal attention within segments and to shared prompts, [B, T, K, G, V], as `flash_attention` does.

    Rows and key heads are sharded over the mesh; tokens are not. A CPU runs the kernel in interpret mode, which is
    slow. `segments` and `prefixes` get no gradient.
    """
    mesh, rows = sharding.current_mesh(), [segments] if prefixes is None else [segments, prefixes]
    device = sharding.device()

    def body(q, k, v, segments, *prefixes):
        blocks, interpret = blocks_for(device.device_kind, q.shape[1], q.shape[-1]), device.platform == "cpu"
        return flash_attention(q, k, v, segments, scale, blocks, *prefixes, interpret=interpret)

    if mesh is None or mesh.size == 1:
        return body(q_BTKGH, k_BTKH, v_BTKV, *rows)
    place = lambda array, *axes: sharding.partition(axes, array.shape, mesh)  # noqa: E731
    queries = place(q_BTKGH, "batch", None, "heads", None, None)
    keys = [place(array, "batch", None, "heads", None) for array in (k_BTKH, v_BTKV)]
    in_specs = (queries, *keys, *(place(array, "batch", None) for array in rows))
    function = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=queries, check_vma=False)
    return function(q_BTKGH, k_BTKH, v_BTKV, *rows)


def decode(q, cached: tuple[jax.Array, ...], layer, lengths_S, value_width: int, scale: float) -> jax.Array:
    """Returns the attention of one query per slot over its first lengths [S] rows, float32, value_width wide.

    `cached` is a latent [L, S, T, W] for q [S, N, R], or keys and values [L, S, K, T, W] for q [S, K, G, H]. Slots and
    heads are sharded over the mesh. Queries narrower than the cache's rows are padded with zeros, as the rows are.
    """
    mesh, device = sharding.current_mesh(), sharding.device()
    padding = [(0, 0)] * (q.ndim - 1) + [(0, cached[0].shape[-1] - q.shape[-1])]
    q = jnp.pad(q, padding).astype(cached[0].dtype)

    def body(q, layer, lengths, *cached):
        shape, interpret = cached[0].shape, device.platform == "cpu"
        blocks = decode_attention.blocks_for(device.device_kind, shape[-2], math.prod(shape[2:-2]) * shape[-1])
        if len(cached) == 1:
            return decode_attention.latent_decode(q, *cached, layer, lengths, value_width, scale, blocks, interpret)
        out = decode_attention.grouped_decode(q, *cached, layer, lengths, scale, blocks, interpret)
        return out[..., :value_width]

    arguments = q, jnp.int32(layer), lengths_S, *cached
    if mesh is None or mesh.size == 1:
        return body(*arguments)
    place = lambda array, *axes: sharding.partition(axes, array.shape, mesh)  # noqa: E731
    queries = place(q, "slots", "heads", *[None] * (q.ndim - 2))
    heads = ["heads"] * (len(cached) - 1)  # a latent has none
    rows = [place(array, None, "slots", *heads, None, None) for array in cached]
    in_specs = (queries, jax.sharding.PartitionSpec(), place(lengths_S, "slots"), *rows)
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=queries, check_vma=False)(*arguments)
