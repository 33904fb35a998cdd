"""Attention around rings of devices, by the kernels and by XLA, against the formulas in float64; prints figures as JSON.

Set XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from r1jax.core import sharding
from r1jax.models import ring
from r1jax.schema import MeshConfig

SCALE = 0.3
ROWS = {  # mesh, lengths of the samples of each row, of which the last is padding
    "long": (MeshConfig(context=4), [(1500, 5200, 1000, 492)]),
    "uneven": (MeshConfig(fsdp=2, context=2), [(11, 20, 33, 10), (74, 0)]),  # 37 tokens a device
}


def segments_of(rows) -> np.ndarray:
    numbered = [[*range(1, len(lengths)), 0] for lengths in rows]
    return np.stack([np.repeat(*pair) for pair in zip(numbered, rows, strict=True)]).astype(np.int32)


def expand(source, weights):
    """Returns a key head of 24 and a value head of 16 for each of two heads, made of a latent of 12."""
    both = jnp.einsum("BSR,RKH->BSKH", source[0], weights)
    return both[..., :24], both[..., 24:]


def formulas(q, latent, w, segments, d_out):
    """Returns (output, gradients of q, latent and w) of one row in float64, scores of a head and 1,024 queries at a time."""
    q, latent, w, d_out = (np.asarray(array, np.float64) for array in (q, latent, w, d_out))
    both, d_both, places = (
        np.einsum("SR,RKH->SKH", latent, w),
        np.zeros((segments.size, 2, 40)),
        np.arange(segments.size),
    )
    out, d_q = np.zeros_like(d_out), np.zeros_like(q)
    for start in range(0, segments.size, 1024):
        rows = slice(start, start + 1024)
        seen = (places[rows, None] >= places) & (segments[rows, None] == segments)
        for head, group in np.ndindex(q.shape[1:3]):
            k, v = both[:, head, :24], both[:, head, 24:]
            scores = np.where(seen, q[rows, head, group] @ k.T * SCALE, -np.inf)
            probs = np.exp(scores - scores.max(-1, keepdims=True))
            probs /= probs.sum(-1, keepdims=True)
            d_o = d_out[rows, head, group]
            d_probs = d_o @ v.T
            d_scores = probs * (d_probs - (probs * d_probs).sum(-1, keepdims=True)) * SCALE
            out[rows, head, group], d_q[rows, head, group] = probs @ v, d_scores @ k
            d_both[:, head] += np.concatenate([d_scores.T @ q[rows, head, group], probs.T @ d_o], axis=1)
    return out, d_q, np.einsum("SKH,RKH->SR", d_both, w), np.einsum("SKH,SR->RKH", d_both, latent)


def measured(mesh_config: MeshConfig, rows, by_kernel: bool) -> dict:
    """Returns how output and gradients differ from the formulas, relative to their largest value or 1."""
    segments, generator = segments_of(rows), np.random.default_rng(0)
    shapes = {"q": (2, 2, 24), "latent": (12,), "d_out": (2, 2, 16)}
    arrays = {name: generator.normal(size=(*segments.shape, *shape)) for name, shape in shapes.items()}
    arrays["d_out"] *= (segments > 0)[:, :, None, None, None]
    q, latent, d_out = (arrays[name].astype(np.float32) for name in shapes)
    w = generator.normal(size=(12, 2, 40)).astype(np.float32)
    mesh = sharding.make_mesh(mesh_config)

    def attend(q, latent, w):
        return ring.attend(
            q, (latent,), (("batch", "sequence", None),), expand, w, (None, "heads", None), segments, SCALE, by_kernel
        )

    def everything(q, latent, w, d_out):
        out, pull = jax.vjp(attend, q, latent, w)
        return out, *pull(d_out)

    with sharding.use_mesh(mesh):
        axes = (("batch", "sequence"), ("batch", "sequence"), (), ("batch", "sequence"))
        placed = [
            jax.device_put(
                array,
                NamedSharding(
                    mesh, sharding.partition((*names, *[None] * (array.ndim - len(names))), array.shape, mesh)
                ),
            )
            for array, names in zip((q, latent, w, d_out), axes, strict=True)
        ]
        compiled = jax.jit(everything).lower(*placed).compile()
        found = jax.device_get(compiled(*placed))
    by_row = [formulas(q[row], latent[row], w, segments[row], d_out[row]) for row in range(len(rows))]
    wanted = [np.stack(arrays) for arrays in zip(*by_row, strict=True)]
    wanted[3] = wanted[3].sum(axis=0)
    found = [found[0] * (segments > 0)[:, :, None, None, None], *found[1:]]
    wanted[0] *= (segments > 0)[:, :, None, None, None]
    report = {
        name: float(np.abs(a - b).max() / max(1, np.abs(b).max()))
        for name, a, b in zip(("out", "d_q", "d_latent", "d_w"), found, wanted, strict=True)
    }
    sides = [list(map(int, dims.split(","))) for dims in set(re.findall(r"f32\[([0-9,]+)\]", compiled.as_text()))]
    report["largest_square"] = max(sorted(one)[-2] for one in sides if len(one) > 1)  # of queries by keys
    return report


def main():
    report = {f"{name}/{way}": measured(*ROWS[name], way == "kernel") for name in ROWS for way in ("kernel", "xla")}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
