"""Rotary position embedding with YaRN and Llama-3 scaling, in the half-split layout.

DeepSeek checkpoints store adjacent pairs. The importer permutes them once (recipe: rope_interleave), so all code here
uses the half-split layout.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.schema import ModelConfig, RopeScaling


def inverse_frequencies(dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Returns the angular frequency of each pair, float64 [dim / 2]."""
    freqs = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling.kind == "yarn":
        return _yarn(freqs, dim, theta, scaling)
    if scaling.kind == "llama3":
        return _llama3(freqs, scaling)
    return freqs


def _yarn(freqs: np.ndarray, dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Returns `freqs` with slow pairs interpolated by `factor`, fast ones kept. Source: YaRN, arXiv 2309.00071, 3.2."""

    def boundary(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(boundary(scaling.beta_fast)), 0)
    high = min(math.ceil(boundary(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return freqs / scaling.factor * ramp + freqs * (1 - ramp)


def _llama3(freqs: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Returns `freqs`, the slowest divided by `factor`, with a smooth transition. Source: Llama 3.1 config.json."""
    rotations = scaling.original_max_position_embeddings * freqs / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((rotations - low) / (high - low), 0, 1)
    return (1 - blend) * freqs / scaling.factor + blend * freqs


def yarn_mscale(factor: float, mscale: float) -> float:
    """Returns 0.1 * mscale * ln(factor) + 1, or 1 for a factor of at most 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Returns the factor on attention scores: head_dim^-1/2, times mscale_all_dim's square under YaRN (as in HF)."""
    if not config.is_mla:
        return config.head_dim**-0.5
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if config.rope_scaling.kind == "yarn" and config.rope_scaling.mscale_all_dim:
        scale *= yarn_mscale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim) ** 2
    return scale


def magnitude(scaling: RopeScaling) -> float:
    """Returns the factor on cos and sin: YaRN's attention factor, 1 for the other kinds of scaling.

    Source: YaRN, section 3.4, and DeepSeek's ratio of two factors when both mscales are set (as in HF).
    """
    if scaling.kind != "yarn":
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def angles(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin, float32 [B, T, dim / 2], of the rotation angles at integer positions [B, T]."""
    dim = config.qk_rope_head_dim if config.is_mla else config.head_dim
    scaling = config.rope_scaling
    freqs = jnp.asarray(inverse_frequencies(dim, config.rope_theta, scaling), jnp.float32)
    angle = positions.astype(jnp.float32)[..., None] * freqs
    multiplier = magnitude(scaling)
    return jnp.cos(angle) * multiplier, jnp.sin(angle) * multiplier


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Returns x [B, T, N, dim] rotated by angles [B, T, dim / 2], computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
