"""Attention by the Pallas kernels, on the mesh in force: over whole rows, and over the latent cache in decoding."""

import jax
import jax.numpy as jnp

from r1jax.core import sharding
from r1jax.kernels import latent_decode
from r1jax.kernels.flash_attention import blocks_for, flash_attention
from r1jax.schema import ModelConfig


def chosen(c: ModelConfig) -> bool:
    """Returns whether the kernels compute attention: as configured, or on a TPU."""
    return sharding.by_kernels("attention_implementation", c.attention_implementation)


def attend(q_BTKGH, k_BTKH, v_BTKV, segments, prefixes, scale: float) -> jax.Array:
    """Returns causal attention within segments and to shared prompts, [B, T, K, G, V], as `flash_attention` does.

    Rows and key heads lie where the mesh has them; tokens are whole. A CPU runs the kernel in interpret mode, which is
    slow. No gradient passes to `segments` and `prefixes`.
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


def decode(q_SNR, cache_LSTW, layer, lengths_S, value_width: int, scale: float) -> jax.Array:
    """Returns one query's attention over the first lengths [S] rows of each slot, float32 [S, N, value_width].

    Slots and heads lie where the mesh has them. Queries narrower than the cache's rows are padded, as those are.
    """
    mesh, device = sharding.current_mesh(), sharding.device()
    q = jnp.pad(q_SNR, ((0, 0), (0, 0), (0, cache_LSTW.shape[-1] - q_SNR.shape[-1]))).astype(cache_LSTW.dtype)

    def body(q, cache, layer, lengths):
        blocks = latent_decode.blocks_for(device.device_kind, cache.shape[2])
        interpret = device.platform == "cpu"
        return latent_decode.latent_decode(q, cache, layer, lengths, value_width, scale, blocks, interpret)

    given = q, cache_LSTW, jnp.int32(layer), lengths_S
    if mesh is None or mesh.size == 1:
        return body(*given)
    place = lambda array, *axes: sharding.partition(axes, array.shape, mesh)  # noqa: E731
    queries = place(q, "slots", "heads", None)
    rows = place(cache_LSTW, None, "slots", None, None)
    in_specs = (queries, rows, jax.sharding.PartitionSpec(), place(lengths_S, "slots"))
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=queries, check_vma=False)(*given)
