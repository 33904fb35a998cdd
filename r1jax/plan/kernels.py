"""Compiles r1jax's Pallas kernels and JAX's, each alone as a program for one chip, and reads the compiler's figures."""

import functools
import tempfile
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from r1jax.core import sharding
from r1jax.kernels import decode_attention, flash_attention, logprob_tile
from r1jax.kernels.tpu import CHIPS, rounded
from r1jax.plan import bundles, traffic
from r1jax.plan.compile import LoweredProgram, compile_program
from r1jax.schema import MeshConfig

MODULE = "r1jax.plan.kernels"
DEADLINE_S = 600.0
TOKENS, HEADS = 4096, 8
SHAPES = {  # heads of keys, width of queries and keys, width of values
    "mla_192_128": (8, 192, 128),
    "gqa_128": (2, 128, 128),
    "gqa_64": (2, 64, 64),
}
LOGPROB_TOKENS = 8192
# Width and vocabulary; qwen2's is not a whole number of blocks.
LOGPROB_SHAPES = {"v3": (7168, 129280), "llama3_70b": (8192, 128256), "qwen2_1.5b": (1536, 151936)}
# Decoding: cache rows and slots. MLA: heads, width of a row and of its values. GQA: key heads, queries of each, width.
DECODE_ROWS, DECODE_SLOTS = 8208, 8
LATENT_SHAPES = {"v3": (128, 576, 512), "v2_lite": (16, 576, 512)}
GROUPED_SHAPES = {"llama3_70b": (8, 8, 128), "qwen2_1.5b": (2, 6, 128), "qwen2_0.5b": (2, 7, 64)}
DECODE = decode_attention.NAMES
ATTENTION = ("flash_attention_forward", "flash_attention_backward")
LOGPROB = logprob_tile.NAMES
OURS = {name: SHAPES for name in ATTENTION} | {name: LOGPROB_SHAPES for name in LOGPROB}
OURS |= dict(zip(DECODE, (LATENT_SHAPES, GROUPED_SHAPES), strict=True))  # r1jax's kernels and their shapes
PRODUCTS = dict(zip(LOGPROB, (1, 2, 2), strict=True))  # per logit: for itself, and for its part of a gradient
GENERATIONS = {"v5p": "TPU v5", "v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}  # topologies and their device kinds
SPLASH = ("splash_mha_fwd_segmented", "splash_mha_dkv_segmented")  # JAX's kernels, with the same blocks


def figures(kernel: str, shape: str, topology: str) -> dict:
    """Returns bundles, vmem_bytes and regions of a kernel compiled in a separate process, and its temporary_bytes.

    For a log-prob kernel on a known chip also its `roofline`.
    """
    with tempfile.TemporaryDirectory(prefix="r1jax-kernel-") as folder:
        arguments = {"kernel": kernel, "shape": shape}
        plan = compile_program(
            topology, f"{MODULE}:program", arguments, "full", deadline_s=DEADLINE_S, keep=folder, bundles=True
        )
        (compiled,) = bundles.kernels(folder, [kernel]).values()
    regions = [vars(region) | {"spill_share": region.spill_share} for region in compiled.regions]
    result = {"bundles": compiled.bundles, "vmem_bytes": compiled.vmem_bytes, "regions": regions}
    result["temporary_bytes"] = plan.memory.temporaries
    generation = topology.partition(":")[0]
    if kernel in LOGPROB and generation in GENERATIONS:
        result["roofline"] = roofline(kernel, shape, generation)
    return result


def roofline(kernel: str, shape: str, generation: str) -> dict:
    """Returns a log-prob kernel's hbm_bytes, flops and memory time over product time at a chip's peak rates.

    hbm_bytes are counted by walking the grid (`plan.traffic`), not estimated. Below 1 the kernel is bound by products.
    """
    kind = GENERATIONS[generation]
    chip = CHIPS[kind]
    function, arrays = _logprob(kind, jax.ShapeDtypeStruct, kernel, shape)
    (moved,) = (one for one in traffic.kernels(function, *arrays) if one.name == kernel)
    width, vocab = LOGPROB_SHAPES[shape]
    flops = 2 * PRODUCTS[kernel] * LOGPROB_TOKENS * width * vocab
    return {
        "hbm_bytes": moved.bytes,
        "flops": flops,
        "memory_over_products": moved.bytes / chip.hbm / (flops / chip.operations),
    }


def program(devices: list, kernel: str, shape: str) -> LoweredProgram:
    """Returns a kernel lowered for the first device.

    Attention has a row of 4,096 tokens and 8 query heads; log-probs have 8,192 tokens.
    """
    make = _logprob if kernel in LOGPROB else _decode if kernel in DECODE else _attention
    array = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(devices[0]))
    return on_one(devices, *make(devices[0].device_kind, array, kernel, shape))


def on_one(devices: list, function, arrays) -> LoweredProgram:
    """Returns the function lowered for the first device and arrays of these shapes."""
    with jax.default_device(devices[0]):
        lowered = jax.jit(function).lower(*arrays)
    return LoweredProgram(lowered, sharding.make_mesh(MeshConfig(), devices[:1]))


def _attention(kind: str, make, kernel: str, shape: str):
    keys, width, out_width = SHAPES[shape]
    array = lambda *dims, dtype=jnp.bfloat16: make(dims, dtype)  # noqa: E731
    blocks = flash_attention.blocks_for(kind, TOKENS, width)
    sums = array(1, HEADS, 1, TOKENS, dtype=jnp.float32)
    q, k, v = array(1, HEADS, TOKENS, width), array(1, keys, TOKENS, width), array(1, keys, TOKENS, out_width)
    ranges, d_out = array(1, 2, TOKENS, dtype=jnp.int32), array(1, HEADS, TOKENS, out_width)
    functions: dict[str, tuple[Callable, Sequence]] = {
        ATTENTION[0]: (lambda *a: flash_attention.forward_call(blocks, False, *a), (q, k, v, ranges)),
        ATTENTION[1]: (
            lambda *a: flash_attention.backward_call(blocks, False, *a),
            (q, k, v, ranges, d_out, sums, sums),
        ),
    }
    row = [array(HEADS, TOKENS, w) for w in (width, width, out_width)] + [array(TOKENS, dtype=jnp.int32)]
    total = lambda *a: _splash(*a).astype(jnp.float32).sum()  # noqa: E731
    functions |= {SPLASH[0]: (_splash, row), SPLASH[1]: (jax.grad(total, (0, 1, 2)), row)}
    return functions[kernel]


def _logprob(kind: str, make, kernel: str, shape: str):
    """Returns (function, arguments): the forward pass, or the gradient that a kernel of the backward pass computes."""
    width, vocab = LOGPROB_SHAPES[shape]
    blocks = logprob_tile.blocks_for(kind, LOGPROB_TOKENS, width)
    arrays = make((LOGPROB_TOKENS, width), jnp.bfloat16), make((width, vocab), jnp.bfloat16)
    arguments = *arrays, make((LOGPROB_TOKENS,), jnp.int32), [make((LOGPROB_TOKENS,), jnp.float32)] * 5

    def forward(states, w, targets, numbers):
        return logprob_tile.forward_tile(states, w, targets, 1.0, numbers[:4], blocks)

    def backward(states, w, targets, numbers):
        dtypes = states.dtype, w.dtype
        gradients = logprob_tile.backward_tile(states, w, targets, 1.0, numbers[:3], numbers[3:], dtypes, blocks)
        return gradients[LOGPROB.index(kernel) - 1]

    return forward if kernel == LOGPROB[0] else backward, arguments


def _decode(kind: str, make, kernel: str, shape: str):
    """Returns (function, arguments) of decode attention on the second layer of a cache of two."""
    latent, layer = kernel == decode_attention.LATENT, jnp.int32(1)
    heads, group, width = (1, *LATENT_SHAPES[shape][:2]) if latent else GROUPED_SHAPES[shape]
    row, scale, between = rounded(width), width**-0.5, () if latent else (heads,)
    blocks = decode_attention.blocks_for(kind, DECODE_ROWS, heads * row)
    q = make((DECODE_SLOTS, *between, group, row), jnp.bfloat16)
    cached = make((2, DECODE_SLOTS, *between, DECODE_ROWS, row), jnp.bfloat16)
    lengths = make((DECODE_SLOTS,), jnp.int32)

    def latent_decode(q, cache, lengths):
        return decode_attention.latent_decode(q, cache, layer, lengths, LATENT_SHAPES[shape][2], scale, blocks)

    def grouped_decode(q, keys, values, lengths):
        return decode_attention.grouped_decode(q, keys, values, layer, lengths, scale, blocks)

    return (latent_decode, (q, cached, lengths)) if latent else (grouped_decode, (q, cached, cached, lengths))


def _splash(q, k, v, segments):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sizes = splash.BlockSizes(*[512] * 6, use_fused_bwd_kernel=True)
    mask = masks.MultiHeadMask([masks.CausalMask((TOKENS, TOKENS)) for _ in range(HEADS)])
    with jax.default_device(jax.devices("cpu")[0]):
        kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    return kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments))
