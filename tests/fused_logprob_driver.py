"""Tiled log-probabilities on meshes of eight devices against one device; prints figures as JSON.

Set XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.core import sharding
from r1jax.kernels import fused_logprob
from r1jax.models import logprobs
from r1jax.models.logprobs import token_logprobs
from r1jax.schema import MeshConfig

MESHES = {  # rows of 8 tokens, 4 of them; 60 words of width 16
    "tensor4": (MeshConfig(tensor=4), 60),
    "fsdp2_tensor2_context2": (MeshConfig(fsdp=2, tensor=2, context=2), 60),
    "data2_fsdp2_expert2": (MeshConfig(data=2, fsdp=2, expert=2), 60),
    "slice2_data2_context2": (MeshConfig(slice=2, data=2, context=2), 60),
    "fsdp8_rows_do_not_divide": (MeshConfig(fsdp=8), 60),
    "tensor4_vocabulary_does_not_divide": (MeshConfig(tensor=4), 59),
}
CHUNKS = {"tokens": (3, 0), "vocab": (0, 7), "both": (3, 7), "kernels": (0, 0, "pallas"), "forward": (3, 7, "pallas")}
CHUNKS |= {"used_whole": (0, 0, "auto", 37), "used": (3, 7, "auto", 37), "used_kernels": (0, 0, "pallas", 37)}
RUNS = [f"{mesh}/{kind}" for mesh in MESHES for kind in ("both", "kernels")] + [
    "tensor4/tokens",
    "tensor4/vocab",
    "tensor4/forward",
    "fsdp2_tensor2_context2/forward",
    *(f"tensor4/{kind}" for kind in ("used_whole", "used", "used_kernels")),  # of four parts one is cut, one left out
    *(f"fsdp2_tensor2_context2/{kind}" for kind in ("used", "used_kernels")),
    *(f"data2_fsdp2_expert2/{kind}" for kind in ("used", "used_kernels")),
]
fused_logprob.GATHERED_COLUMNS = 16  # so that the kernels are called on more columns than once


def run(config, vocab, chunks):
    """Returns (logp, entropy, gradients of hidden and unembedding) and the compiled program's text."""
    generator = np.random.default_rng(0)
    hidden, matrix = generator.normal(size=(4, 8, 16)) * 2, generator.normal(size=(16, vocab))
    targets = generator.integers(0, (*chunks, 0, 0)[3] or vocab, (4, 8)).astype(np.int32)
    weights = generator.normal(size=(2, 4, 8)).astype(np.float32)
    mesh = sharding.make_mesh(config)
    axes = (("batch", "sequence", None), ("embed", "vocab"), ("batch", "sequence"))
    arrays = (hidden.astype(np.float32), matrix.astype(np.float32), targets)
    placed = [jax.device_put(a, sharding.sharding(mesh, names, a.shape)) for a, names in zip(arrays, axes, strict=True)]

    def total(hidden, matrix, targets):
        logp, entropy = token_logprobs(hidden, matrix, targets, 0.7, *chunks)
        return jnp.sum(weights[0] * logp + weights[1] * entropy), (logp, entropy)

    with sharding.use_mesh(mesh):
        compiled = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True)).lower(*placed).compile()
    (_, values), gradients = jax.device_get(compiled(*placed))
    return [*values, *gradients], compiled.as_text()


def relative(a, b):
    """Returns the largest difference of two arrays, relative to the largest value or 1."""
    return float(np.abs(a - b).max() / max(1.0, np.abs(a).max()))


def main():
    single = {(vocab, False): run(MeshConfig(), vocab, CHUNKS["both"])[0] for vocab in (59, 60)}
    report, single[60, True] = {}, run(MeshConfig(), 60, CHUNKS["used"])[0]
    for name in RUNS:
        mesh, kind = name.split("/")
        config, vocab = MESHES[mesh]
        if kind == "forward":  # what `auto` is on a TPU: the kernel forward, XLA's tiles backward
            logprobs._kernel = lambda how: fused_logprob.KernelChoice("TPU v5", interpret=True, backward=False)
        found, text = run(config, vocab, CHUNKS[kind])
        floats = {int(n) for dims in re.findall(r"f32\[([\d,]+)\]", text) for n in dims.split(",")}
        report[name] = {
            "difference": max(
                relative(a, b) for a, b in zip(single[vocab, kind.startswith("used")], found, strict=True)
            ),
            "smallest": min(float(np.abs(a).max()) for a in found),
            "widths": sorted(floats & {15, 30, 59, 60}),
        }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
