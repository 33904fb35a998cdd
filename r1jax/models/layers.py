"""Norms and the SwiGLU feed-forward layer.

Dimension letters of the whole package: B batch, T query position, S key position, N heads, K key/value heads,
H head dim, D embed, F ffw width, E experts, L layers, V vocabulary, R latent rank.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.core.sharding import constrain, gathered_rows, normal, ones, own_rows, param
from r1jax.schema import ModelConfig


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Returns x / rms(x) * weight, computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * weight.astype(jnp.float32)).astype(x.dtype)


@jax.named_scope("embedding")
def embed(table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the embeddings of tokens [B, T], [B, T, D].

    D of the table is gathered first: where the axes that divide it also divide the batch, rows cannot be looked up in
    place.
    """
    return constrain(constrain(table_VD, "vocab", None)[gathered_rows(tokens)], "batch", "sequence", None)


def norm_spec(width: int, layers: int | None = None) -> Any:
    if layers is None:
        return param((width,), (None,), ones)
    return param((layers, width), (None, None), ones)


@struct.dataclass
class SwiGLU:
    """Weights of W_down(silu(W_gate x) * W_up x); leading dimensions (layers) are stacked."""

    gate: jax.Array  # [D, F]
    up: jax.Array  # [D, F]
    down: jax.Array  # [F, D]


def swiglu_specs(config: ModelConfig, width: int, layers: int) -> SwiGLU:
    init = normal(config.initializer_range)
    wide = param((layers, config.hidden_size, width), (None, "embed", "ffw"), init)
    return SwiGLU(
        gate=wide,
        up=wide,
        down=param((layers, width, config.hidden_size), (None, "ffw", "embed"), init),
    )


def swiglu(params: SwiGLU, x_BTD: jax.Array) -> jax.Array:
    """Returns the feed-forward output, [B, T, D]."""
    x_BTD = gathered_rows(x_BTD)
    gate = jnp.einsum("BTD,DF->BTF", x_BTD, params.gate)
    up = jnp.einsum("BTD,DF->BTF", x_BTD, params.up)
    hidden = constrain(jax.nn.silu(gate) * up, "weight_rows", "sequence", "ffw")
    return own_rows(jnp.einsum("BTF,FD->BTD", hidden, params.down))
