"""Attention over whole rows by the Pallas kernel, on the mesh in force."""

import jax

from r1jax.core import sharding
from r1jax.kernels.flash_attention import blocks_for, flash_attention
from r1jax.schema import ModelConfig


def chosen(c: ModelConfig) -> bool:
    """Returns whether the kernel computes attention: as configured, or on a TPU."""
    if c.attention_implementation != "auto":
        return c.attention_implementation == "flash"
    return sharding.device().platform == "tpu"


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
