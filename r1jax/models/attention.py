"""Multi-head latent attention and grouped-query attention: full, prefill and decode in one function each.

Without a cache the keys are the row's own tokens, limited to the same segment and to the past. With a cache the Q new
tokens of each slot are written at their positions first and then attend to rows 0..position.
"""

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.core.sharding import ParamSpec, constrain, normal, zeros
from r1jax.kernels.packed_attention import packed_attention
from r1jax.models import cache as kv
from r1jax.models import flash, ring, rope
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
        q_a=ParamSpec((layers, c.hidden_size, c.q_lora_rank), (None, "embed", None), init) if low_rank else None,
        q_a_norm=norm_spec(c.q_lora_rank, layers) if low_rank else None,
        q_b=ParamSpec((layers, query_in, c.num_attention_heads, qk), (None, "embed", "heads", None), init),
        kv_a=ParamSpec((layers, c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim), (None, "embed", None), init),
        kv_a_norm=norm_spec(c.kv_lora_rank, layers),
        kv_b=ParamSpec(
            (layers, c.kv_lora_rank, c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim),
            (None, "embed", "heads", None),
            init,
        ),
        out=ParamSpec(
            (layers, c.num_attention_heads, c.v_head_dim, c.hidden_size), (None, "heads", None, "embed"), init
        ),
    )


def grouped_specs(c: ModelConfig, layers: int) -> GroupedAttention:
    init, n, k, h = normal(c.initializer_range), c.num_attention_heads, c.num_key_value_heads, c.head_dim

    def bias(heads: int) -> ParamSpec | None:
        return ParamSpec((layers, heads, h), (None, "heads", None), zeros) if c.attention_bias else None

    return GroupedAttention(
        query=ParamSpec((layers, c.hidden_size, n, h), (None, "embed", "heads", None), init),
        key=ParamSpec((layers, c.hidden_size, k, h), (None, "embed", "heads", None), init),
        value=ParamSpec((layers, c.hidden_size, k, h), (None, "embed", "heads", None), init),
        out=ParamSpec((layers, n, h, c.hidden_size), (None, "heads", None, "embed"), init),
        query_bias=bias(n),
        key_bias=bias(k),
        value_bias=bias(k),
        query_norm=norm_spec(h, layers) if c.qk_norm else None,
        key_norm=norm_spec(h, layers) if c.qk_norm else None,
    )


@struct.dataclass
class Context:
    """What every layer of one forward pass shares."""

    cos: jax.Array  # [B, T, rope / 2]
    sin: jax.Array
    mask: jax.Array  # [B, T, S] bool: query may see key
    write_positions: jax.Array | None  # [B, T] cache row of each new token, the scratch row for padding
    segments: jax.Array  # [B, T] document of each token, 0 is padding
    lengths: jax.Array | None = None  # [B] with a cache: rows of it that the last query sees, 0 for padding
    prefixes: jax.Array | None = None  # [B, T] segment of a shared prompt that a token sees beside its own, 0 for none


def build_context(
    positions: jax.Array,
    segments: jax.Array,
    config: ModelConfig,
    cache: kv.Cache | None,
    window: int,
    prefixes: jax.Array | None = None,
) -> Context:
    """Returns the context of one forward pass. With a cache, `window` rows of it are read.

    Without one, a token may also see the segment that `prefixes` [B, T] names for it, where that is not 0.
    """
    cos, sin = rope.angles(positions, config)
    if cache is None:
        causal = jnp.arange(positions.shape[1])[:, None] >= jnp.arange(positions.shape[1])
        same = segments[:, :, None] == segments[:, None, :]
        if prefixes is not None:
            same |= (prefixes[:, :, None] == segments[:, None, :]) & (prefixes > 0)[:, :, None]
        return Context(cos, sin, causal & same, None, segments, prefixes=prefixes)
    mask = jnp.arange(window)[None, None, :] <= positions[:, :, None]
    lengths = jnp.where(segments[:, -1] > 0, positions[:, -1] + 1, 0)
    return Context(cos, sin, mask, jnp.where(segments > 0, positions, cache.rows), segments, lengths)


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns probabilities over the last axis in float32; `mask` broadcasts against scores."""
    return jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), -1e30), axis=-1)


def latent_attention(p: LatentAttention, x_BTD, context: Context, network: Network, cache, layer, window: int):
    """Returns (output [B, T, D], cache). Absorbed form for few queries on a cache, expanded keys otherwise."""
    c = network.model
    if p.q_a is not None:
        x_q = rms_norm(jnp.einsum("BTD,DR->BTR", x_BTD, p.q_a), p.q_a_norm, LATENT_NORM_EPS)
    else:
        x_q = x_BTD
    q_BTNH = constrain(jnp.einsum("BTR,RNH->BTNH", x_q, p.q_b), "batch", "sequence", "heads", None)
    q_nope, q_rope = q_BTNH[..., : c.qk_nope_head_dim], q_BTNH[..., c.qk_nope_head_dim :]
    q_rope = rope.rotate(q_rope, context.cos, context.sin)
    latent = jnp.einsum("BTD,DR->BTR", x_BTD, p.kv_a)
    normed = rms_norm(latent[..., : c.kv_lora_rank], p.kv_a_norm, LATENT_NORM_EPS)
    k_rope = rope.rotate(latent[..., None, c.kv_lora_rank :], context.cos, context.sin)[:, :, 0]
    latent = jnp.concatenate([normed, k_rope], axis=-1)
    queries, width = x_BTD.shape[1], latent.shape[-1]
    if cache is not None:
        cache = cache.replace(keys=kv.write(cache.keys, layer, latent, context.write_positions))
    if cache is None and ring.devices(queries) > 1:
        q = jnp.concatenate([q_nope, q_rope], axis=-1)[:, :, :, None]
        expand = lambda latent, kv_b: _expand(kv_b, latent, c)  # noqa: E731
        o_BTNV = ring.attend(
            q, latent, ROWS, expand, p.kv_b, (None, "heads", None), context.segments, rope.softmax_scale(c)
        )[:, :, :, 0]
    elif cache is None and flash.chosen(network.compute):
        q, (k, v) = jnp.concatenate([q_nope, q_rope], axis=-1)[:, :, :, None], _expand(p.kv_b, latent, c)
        scale = rope.softmax_scale(c)
        o_BTNV = flash.attend(q, k, v, context.segments, context.prefixes, scale)[:, :, :, 0]
    elif cache is not None and queries == 1 and flash.chosen(network.compute):
        o_BTNV = _decoded(p.kv_b, q_nope, q_rope, cache.keys, layer, context.lengths, c)
    else:
        attend = _expanded
        if cache is not None:
            latent = kv.read(cache.keys, layer, window)[..., :width].astype(x_BTD.dtype)
            attend = _absorbed if queries <= ABSORBED_MAX_QUERIES else _expanded
        o_BTNV = attend(p.kv_b, q_nope, q_rope, latent, context.mask, c)
    return jnp.einsum("BTNV,NVD->BTD", o_BTNV.astype(x_BTD.dtype), p.out), cache


def _expand(kv_b, latent_BSR, c: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns keys [B, S, N, nope + rope] and values [B, S, N, v] of a latent."""
    c_kv, k_rope = latent_BSR[..., : c.kv_lora_rank], latent_BSR[..., c.kv_lora_rank :]
    expanded = jnp.einsum("BSR,RNH->BSNH", c_kv, kv_b)
    k_nope, v_BSNV = expanded[..., : c.qk_nope_head_dim], expanded[..., c.qk_nope_head_dim :]
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], c.qk_rope_head_dim))
    return jnp.concatenate([k_nope, k_rope], axis=-1), v_BSNV


def _expanded(kv_b, q_nope, q_rope, latent_BSR, mask, c: ModelConfig) -> jax.Array:
    """Returns attention outputs [B, T, N, v] with keys and values expanded from the latent."""
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    k, v_BSNV = _expand(kv_b, latent_BSR, c)
    k = constrain(k, "batch", "sequence", "heads", None)
    v_BSNV = constrain(v_BSNV, "batch", "sequence", "heads", None)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
    probs = _softmax(scores * rope.softmax_scale(c), mask[:, None])
    return jnp.einsum("BNTS,BSNV->BTNV", probs.astype(v_BSNV.dtype), v_BSNV)


def _absorbed(kv_b, q_nope, q_rope, latent_BSR, mask, c: ModelConfig) -> jax.Array:
    """Returns the same as `_expanded` with W_UK and W_UV folded into query and output (DeepSeek-V2, section 2.1.2)."""
    q_latent, w_v = _folded(kv_b, q_nope, q_rope, c)
    scores = jnp.einsum("BTNR,BSR->BNTS", q_latent, latent_BSR, preferred_element_type=jnp.float32)
    probs = _softmax(scores * rope.softmax_scale(c), mask[:, None]).astype(latent_BSR.dtype)
    context = jnp.einsum("BNTS,BSR->BTNR", probs, latent_BSR[..., : c.kv_lora_rank])
    return jnp.einsum("BTNR,RNV->BTNV", context, w_v)


def _folded(kv_b, q_nope, q_rope, c: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns queries against the latent, [B, T, N, R + rope], and W_UV [R, N, v]."""
    w_k, w_v = kv_b[..., : c.qk_nope_head_dim], kv_b[..., c.qk_nope_head_dim :]
    return jnp.concatenate([jnp.einsum("BTNH,RNH->BTNR", q_nope, w_k), q_rope], axis=-1), w_v


def _decoded(kv_b, q_nope, q_rope, cache_LSTW, layer, lengths, c: ModelConfig) -> jax.Array:
    """Returns the same as `_absorbed` for one query a slot, by the kernel; 0 for a slot with no length."""
    q_latent, w_v = _folded(kv_b, q_nope, q_rope, c)
    context = flash.decode(q_latent[:, 0], (cache_LSTW,), layer, lengths, c.kv_lora_rank, rope.softmax_scale(c))
    return jnp.einsum("BNR,RNV->BNV", context.astype(q_nope.dtype), w_v)[:, None]


def grouped_attention(p: GroupedAttention, x_BTD, context: Context, network: Network, cache, layer, window: int):
    """Returns (output [B, T, D], cache) of grouped-query attention."""
    c, block = network.model, network.compute.attention_block
    q = jnp.einsum("BTD,DNH->BTNH", x_BTD, p.query)
    k = jnp.einsum("BTD,DKH->BTKH", x_BTD, p.key)
    v = jnp.einsum("BTD,DKH->BTKH", x_BTD, p.value)
    if p.query_bias is not None:
        q, k, v = q + p.query_bias, k + p.key_bias, v + p.value_bias
    if p.query_norm is not None:
        q, k = rms_norm(q, p.query_norm, c.rms_norm_eps), rms_norm(k, p.key_norm, c.rms_norm_eps)
    q = rope.rotate(constrain(q, "batch", "sequence", "heads", None), context.cos, context.sin)
    k = rope.rotate(constrain(k, "batch", "sequence", "heads", None), context.cos, context.sin)
    if cache is not None:
        keys = kv.write(cache.keys, layer, k, context.write_positions, cache.row_axis)
        values = kv.write(cache.values, layer, v, context.write_positions, cache.row_axis)
        cache = cache.replace(keys=keys, values=values)
    batch, queries = q.shape[:2]
    groups = c.num_attention_heads // c.num_key_value_heads
    q = q.reshape(batch, queries, c.num_key_value_heads, groups, c.head_dim)  # [B, T, K, N / K, H]
    if cache is None and ring.devices(queries) > 1:
        o = ring.attend(q, (k, v), (HEADS, HEADS), lambda kv, _: kv, (), (), context.segments, rope.softmax_scale(c))
    elif cache is None and flash.chosen(network.compute):
        o = flash.attend(q, k, v, context.segments, context.prefixes, rope.softmax_scale(c))
    elif cache is None and block:
        scale = rope.softmax_scale(c)
        o = packed_attention(q, k, v, context.segments, scale, block, context.prefixes)
    elif cache is not None and queries == 1 and flash.chosen(network.compute):
        scale = rope.softmax_scale(c)
        o = flash.decode(q[:, 0], (cache.keys, cache.values), layer, context.lengths, c.head_dim, scale)
    else:
        if cache is not None:
            k, v = (
                kv.read(array, layer, window, cache.row_axis)[..., : c.head_dim].astype(q.dtype)
                for array in (cache.keys, cache.values)
            )
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
        probs = _softmax(scores * rope.softmax_scale(c), context.mask[:, None, None]).astype(v.dtype)
        o = jnp.einsum("BKGTS,BSKH->BTKGH", probs, v)
    o = o.reshape(batch, queries, c.num_attention_heads, c.head_dim)
    return jnp.einsum("BTNH,NHD->BTD", o.astype(x_BTD.dtype), p.out), cache
