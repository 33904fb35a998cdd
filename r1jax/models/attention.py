"""Multi-head latent attention and grouped-query attention: weights, and projections to what `forms` attends with.

Without a cache the keys are the row's own tokens, limited to the same segment and to the past. With a cache the Q new
tokens of each slot are written at their positions first and then attend to rows 0..position.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.core.sharding import constrain, gathered_rows, normal, own_rows, param, zeros
from r1jax.models import forms, rope
from r1jax.models.layers import norm_spec, rms_norm
from r1jax.schema import ModelConfig, Network

# Up to this many new tokens per slot the latent cache is attended to directly (absorbed); above, keys are expanded.
ABSORBED_MAX_QUERIES = 4
# Of the norms of both latents, whatever config.json's rms_norm_eps is. Source: DeepSeek-V3's released modeling code.
LATENT_NORM_EPS = 1e-6
ROWS, HEADS = ("batch", "sequence", None), ("batch", "sequence", "heads", None)  # axes of a latent, of keys and values


@struct.dataclass
class LatentAttention:
    """MLA weights (V3 report eq. 1-11). q_a and q_a_norm are None without a query low rank."""

    q_a: jax.Array | None  # [D, Rq]
    q_a_norm: jax.Array | None  # [Rq]
    q_b: jax.Array  # [Rq or D, N, nope + rope]
    kv_a: jax.Array  # [D, R + rope]
    kv_a_norm: jax.Array  # [R]
    kv_b: jax.Array  # [R, N, nope + v]
    out: jax.Array  # [N, v, D]


@struct.dataclass
class GroupedAttention:
    """GQA weights; biases (Qwen2) and head norms (Qwen3) are None unless the family has them."""

    query: jax.Array  # [D, N, H]
    key: jax.Array  # [D, K, H]
    value: jax.Array  # [D, K, H]
    out: jax.Array  # [N, H, D]
    query_bias: jax.Array | None = None  # [N, H]
    key_bias: jax.Array | None = None  # [K, H]
    value_bias: jax.Array | None = None  # [K, H]
    query_norm: jax.Array | None = None  # [H]
    key_norm: jax.Array | None = None  # [H]


def latent_specs(c: ModelConfig, layers: int) -> LatentAttention:
    init, qk = normal(c.initializer_range), c.qk_nope_head_dim + c.qk_rope_head_dim
    query_in = c.q_lora_rank or c.hidden_size
    low_rank = c.q_lora_rank > 0
    return LatentAttention(
        q_a=param((layers, c.hidden_size, c.q_lora_rank), (None, "embed", None), init) if low_rank else None,
        q_a_norm=norm_spec(c.q_lora_rank, layers) if low_rank else None,
        q_b=param((layers, query_in, c.num_attention_heads, qk), (None, "embed", "heads", None), init),
        kv_a=param((layers, c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim), (None, "embed", None), init),
        kv_a_norm=norm_spec(c.kv_lora_rank, layers),
        kv_b=param(
            (layers, c.kv_lora_rank, c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim),
            (None, "embed", "heads", None),
            init,
        ),
        out=param((layers, c.num_attention_heads, c.v_head_dim, c.hidden_size), (None, "heads", None, "embed"), init),
    )


def grouped_specs(c: ModelConfig, layers: int) -> GroupedAttention:
    init, n, k, h = normal(c.initializer_range), c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def bias(heads: int) -> Any:
        return param((layers, heads, h), (None, "heads", None), zeros) if c.attention_bias else None

    return GroupedAttention(
        query=param((layers, c.hidden_size, n, h), (None, "embed", "heads", None), init),
        key=param((layers, c.hidden_size, k, h), (None, "embed", "heads", None), init),
        value=param((layers, c.hidden_size, k, h), (None, "embed", "heads", None), init),
        out=param((layers, n, h, c.hidden_size), (None, "heads", None, "embed"), init),
        query_bias=bias(n),
        key_bias=bias(k),
        value_bias=bias(k),
        query_norm=norm_spec(h, layers) if c.qk_norm else None,
        key_norm=norm_spec(h, layers) if c.qk_norm else None,
    )


def latent_attention(p: LatentAttention, x_BTD, context: forms.Context, network: Network, cache, layer):
    """Returns (output [B, T, D], cache) of multi-head latent attention.

    A few new tokens on a cache attend to the latent itself, with W_UK and W_UV folded into queries and outputs
    (DeepSeek-V2, section 2.1.2). Otherwise keys and values are expanded from the latent.
    """
    c = network.model
    q_nope, q_rope = _latent_queries(p, x_BTD, context, c)
    latent = _latent(p, x_BTD, context, c)
    if cache is not None and x_BTD.shape[1] <= ABSORBED_MAX_QUERIES:
        w_k, w_v = p.kv_b[..., : c.qk_nope_head_dim], p.kv_b[..., c.qk_nope_head_dim :]
        q = own_rows(jnp.concatenate([jnp.einsum("BTNH,RNH->BTNR", q_nope, w_k), q_rope], axis=-1), *HEADS[1:])
        source = forms.Source((latent,), (ROWS,), functools.partial(_latent_itself, c=c), "N", "")
        o_BTNR, cache = forms.attend(q, source, context, network, cache, layer)
        o_BTNR = gathered_rows(o_BTNR.astype(x_BTD.dtype), *HEADS[1:])
        o_BTNV = jnp.einsum("BTNR,RNV->BTNV", o_BTNR, w_v)
    else:
        q = own_rows(jnp.concatenate([q_nope, q_rope], axis=-1), *HEADS[1:])
        expand, kv_b_axes = functools.partial(_expanded, c=c), (None, "heads", None)
        source = forms.Source((latent,), (ROWS,), expand, "N", "N", p.kv_b, kv_b_axes)
        o_BTNV, cache = forms.attend(q, source, context, network, cache, layer)
    o_BTNV = gathered_rows(o_BTNV.astype(x_BTD.dtype), *HEADS[1:])
    return own_rows(jnp.einsum("BTNV,NVD->BTD", o_BTNV, p.out)), cache


def _latent_queries(p: LatentAttention, x_BTD, context: forms.Context, c: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the parts of the queries without and with rotation, [B, T, N, nope] and [B, T, N, rope]."""
    if p.q_a is not None:
        assert p.q_a_norm is not None
        x_q = rms_norm(jnp.einsum("BTD,DR->BTR", x_BTD, p.q_a), p.q_a_norm, LATENT_NORM_EPS)
    else:
        x_q = x_BTD
    q_BTNH = jnp.einsum("BTR,RNH->BTNH", gathered_rows(x_q), p.q_b)
    q_BTNH = constrain(q_BTNH, "weight_rows", "sequence", "heads", None)
    q_nope, q_rope = q_BTNH[..., : c.qk_nope_head_dim], q_BTNH[..., c.qk_nope_head_dim :]
    return q_nope, rope.rotate(q_rope, *context.query_angles)


def _latent(p: LatentAttention, x_BTD, context: forms.Context, c: ModelConfig) -> jax.Array:
    """Returns the normalised latent and the rotated key that all heads share, [B, T, R + rope]."""
    latent = jnp.einsum("BTD,DR->BTR", x_BTD, p.kv_a)
    normed = rms_norm(latent[..., : c.kv_lora_rank], p.kv_a_norm, LATENT_NORM_EPS)
    k_rope = rope.rotate(latent[..., None, c.kv_lora_rank :], context.cos, context.sin)[:, :, 0]
    return jnp.concatenate([normed, k_rope], axis=-1)


def _latent_itself(arrays, weights, c: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the latent as the key that all heads share, [B, S, R + rope], and its normalised part as the value."""
    (latent_BSR,) = arrays
    return latent_BSR, latent_BSR[..., : c.kv_lora_rank]


def _expanded(arrays, kv_b: jax.Array, c: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns keys [B, S, N, nope + rope] and values [B, S, N, v] of a latent."""
    (latent_BSR,) = arrays
    c_kv, k_rope = latent_BSR[..., : c.kv_lora_rank], latent_BSR[..., c.kv_lora_rank :]
    expanded = jnp.einsum("BSR,RNH->BSNH", c_kv, kv_b)
    k_nope, v_BSNV = expanded[..., : c.qk_nope_head_dim], expanded[..., c.qk_nope_head_dim :]
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], c.qk_rope_head_dim))
    return jnp.concatenate([k_nope, k_rope], axis=-1), v_BSNV


def grouped_attention(p: GroupedAttention, x_BTD, context: forms.Context, network: Network, cache, layer):
    """Returns (output [B, T, D], cache) of grouped-query attention."""
    c = network.model
    x_BTD = gathered_rows(x_BTD)
    q = jnp.einsum("BTD,DNH->BTNH", x_BTD, p.query)
    k = jnp.einsum("BTD,DKH->BTKH", x_BTD, p.key)
    v = jnp.einsum("BTD,DKH->BTKH", x_BTD, p.value)
    q, k, v = (gathered_rows(array, *HEADS[1:]) for array in (q, k, v))
    if p.query_bias is not None:
        assert p.key_bias is not None and p.value_bias is not None
        q, k, v = q + p.query_bias, k + p.key_bias, v + p.value_bias
    if p.query_norm is not None:
        assert p.key_norm is not None
        q, k = rms_norm(q, p.query_norm, c.rms_norm_eps), rms_norm(k, p.key_norm, c.rms_norm_eps)
    q = rope.rotate(constrain(q, "batch", "sequence", "heads", None), context.cos, context.sin)
    k = rope.rotate(constrain(k, "batch", "sequence", "heads", None), context.cos, context.sin)
    source = forms.Source((k, own_rows(v, *HEADS[1:])), (HEADS, HEADS), lambda arrays, _: arrays, "KG", "K")
    groups = c.num_attention_heads // c.num_key_value_heads
    q_BTKGH = q.reshape(*q.shape[:2], c.num_key_value_heads, groups, c.head_dim)
    o, cache = forms.attend(q_BTKGH, source, context, network, cache, layer)
    o_BTNH = own_rows(o.reshape(q.shape).astype(x_BTD.dtype), *HEADS[1:])
    o_BTNH = gathered_rows(o_BTNH, *HEADS[1:])
    return own_rows(jnp.einsum("BTNH,NHD->BTD", o_BTNH, p.out)), cache
