"""The Pallas kernels and JAX's own, each alone as a program for one chip, and what the compiler makes of them."""

import tempfile

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from r1jax.core import sharding
from r1jax.kernels import flash_attention
from r1jax.plan import bundles
from r1jax.plan.compile import Program, compile_program
from r1jax.schema import MeshConfig

MODULE = "r1jax.plan.kernels"
DEADLINE_S = 600.0
TOKENS, HEADS = 4096, 8
SHAPES = {  # heads of keys, width of queries and keys, width of values
    "mla_192_128": (8, 192, 128),
    "gqa_128": (2, 128, 128),
    "gqa_64": (2, 64, 64),
}
OURS = ("flash_attention_forward", "flash_attention_backward")
SPLASH = ("splash_mha_fwd_segmented", "splash_mha_dkv_segmented")  # JAX's own, with the same blocks


def figures(kernel: str, shape: str, topology: str) -> dict:
    """Returns bundles, vmem_bytes and the regions of a kernel compiled in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="r1jax-kernel-") as folder:
        arguments = {"kernel": kernel, "shape": shape}
        compile_program(
            topology, f"{MODULE}:program", arguments, "full", deadline_s=DEADLINE_S, keep=folder, bundles=True
        )
        (found,) = bundles.kernels(folder, [kernel]).values()
    regions = [vars(region) | {"spill_share": region.spill_share} for region in found.regions]
    return {"bundles": found.bundles, "vmem_bytes": found.vmem_bytes, "regions": regions}


def program(devices: list, kernel: str, shape: str) -> Program:
    """Returns a kernel on a row of 4,096 tokens and 8 query heads, lowered for the first device."""
    keys, width, out_width = SHAPES[shape]
    place, blocks = SingleDeviceSharding(devices[0]), flash_attention.blocks_for(devices[0].device_kind, TOKENS, width)
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype, sharding=place)  # noqa: E731
    sums = array(1, HEADS, 1, TOKENS, dtype=jnp.float32)
    q, k, v = array(1, HEADS, TOKENS, width), array(1, keys, TOKENS, width), array(1, keys, TOKENS, out_width)
    reach, d_out = array(1, 1, TOKENS, dtype=jnp.int32), array(1, HEADS, TOKENS, out_width)
    functions = {
        OURS[0]: (lambda *a: flash_attention.forward_call(blocks, False, *a), (q, k, v, reach)),
        OURS[1]: (lambda *a: flash_attention.backward_call(blocks, False, *a), (q, k, v, reach, d_out, sums, sums)),
    }
    row = [array(HEADS, TOKENS, w) for w in (width, width, out_width)] + [array(TOKENS, dtype=jnp.int32)]
    total = lambda *a: _splash(*a).astype(jnp.float32).sum()  # noqa: E731
    functions |= {SPLASH[0]: (_splash, row), SPLASH[1]: (jax.grad(total, (0, 1, 2)), row)}
    function, given = functions[kernel]
    with jax.default_device(devices[0]):
        lowered = jax.jit(function).lower(*given)
    return Program(lowered, sharding.make_mesh(MeshConfig(), devices[:1]))


def _splash(q, k, v, segments):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sizes = splash.BlockSizes(*[512] * 6, use_fused_bwd_kernel=True)
    mask = masks.MultiHeadMask([masks.CausalMask((TOKENS, TOKENS)) for _ in range(HEADS)])
    with jax.default_device(jax.devices("cpu")[0]):
        kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    return kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments))
