"""The decoder: parameter specs and the one forward pass of trainer, reference, reward models and sampler."""

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.core.sharding import ParamSpec, constrain, normal
from r1jax.models import attention, cache, moe
from r1jax.models.layers import SwiGLU, norm_spec, rms_norm, swiglu, swiglu_specs
from r1jax.schema import ModelConfig


@struct.dataclass
class Block:
    """One stack of equal layers, `[L, ...]` leaves."""

    attention_norm: jax.Array
    attention: attention.LatentAttention | attention.GroupedAttention
    ffw_norm: jax.Array
    ffw: SwiGLU | moe.MoE


@struct.dataclass
class Params:
    """All weights of a decoder. `dense` holds the leading dense layers (all layers of a dense model)."""

    embedding: jax.Array  # [V, D]
    dense: Block | None
    sparse: Block | None
    final_norm: jax.Array  # [D]
    unembedding: jax.Array | None  # [D, V]; None when tied
    scalar_head: jax.Array | None  # [D] value or reward head


@struct.dataclass
class Auxiliary:
    """What a forward pass tells beside the hidden states."""

    experts: jax.Array | None  # int32 [Lm, B, T, k] chosen experts of the mixture-of-experts layers, in layer order


def specs(c: ModelConfig) -> Params:
    """Returns the tree of ParamSpecs: the single source of shapes, axes, initial values and names."""
    init, embed = normal(c.initializer_range), c.hidden_size

    def block(layers: int, sparse: bool) -> Block | None:
        if layers == 0:
            return None
        attend = attention.latent_specs if c.is_mla else attention.grouped_specs
        ffw = moe.moe_specs(c, layers) if sparse else swiglu_specs(c, c.intermediate_size, layers)
        return Block(norm_spec(embed, layers), attend(c, layers), norm_spec(embed, layers), ffw)

    tied = c.tie_word_embeddings
    return Params(
        embedding=ParamSpec((c.vocab_size, embed), ("vocab", "embed"), init),
        dense=block(c.num_dense_layers, sparse=False),
        sparse=block(c.num_moe_layers, sparse=True),
        final_norm=norm_spec(embed),
        unembedding=None if tied else ParamSpec((embed, c.vocab_size), ("embed", "vocab"), init),
        scalar_head=ParamSpec((embed,), (None,), init) if c.scalar_head else None,
    )


def unembedding(params: Params) -> jax.Array:
    """Returns the output matrix, [D, V]."""
    return params.embedding.T if params.unembedding is None else params.unembedding


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of final hidden states [..., D]."""
    out = jnp.einsum("...D,DV->...V", hidden, unembedding(params), preferred_element_type=jnp.float32)
    return out.astype(jnp.float32)


def scalars(params: Params, hidden: jax.Array) -> jax.Array:
    """Returns the scalar head's float32 value of each position, [...]. Raises ValueError when the model has none."""
    if params.scalar_head is None:
        raise ValueError("scalars: this model has no scalar head; set config.model.scalar_head=true")
    return jnp.einsum("...D,D->...", hidden.astype(jnp.float32), params.scalar_head.astype(jnp.float32))


def forward(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    c: ModelConfig,
    kv: cache.Cache | None = None,
    window: int | None = None,
) -> tuple[jax.Array, cache.Cache | None, Auxiliary]:
    """Returns (final hidden states [B, T, D] after the last norm, cache, auxiliary).

    tokens, positions, segments are int32 [B, T]; segment 0 is padding. Without a cache, tokens see earlier tokens of the
    same segment in the row. With one, row b is slot b: its T new tokens are stored at `positions` and see rows
    0..position of the first `window` cache rows (default all); tokens of segment 0 leave no trace.
    """
    window = kv.rows if kv is not None and window is None else window or 0
    x = constrain(params.embedding[tokens].astype(jnp.dtype(c.compute_dtype)), "batch", None, None)
    context = attention.build_context(positions, segments, c, kv, window)
    x, kv, _ = _run_stack(params.dense, x, kv, context, c, 0, c.num_dense_layers, window)
    x, kv, experts = _run_stack(params.sparse, x, kv, context, c, c.num_dense_layers, c.num_moe_layers, window)
    return rms_norm(x, params.final_norm, c.rms_norm_eps), kv, Auxiliary(experts)


def _run_stack(stack: Block | None, x, kv, context, c: ModelConfig, first: int, layers: int, window: int):
    """Returns (x, cache, chosen experts [L, B, T, k] or None) after one stack, scanned or unrolled."""
    if stack is None:
        return x, kv, None

    def body(carry, layer_and_index):
        layer, index = layer_and_index
        x, kv, experts = _block(layer, *carry, context, c, index, window)
        return (x, kv), experts

    if c.remat:
        body = jax.checkpoint(body)
    indices = jnp.arange(first, first + layers)
    if c.scan_layers:
        (x, kv), experts = jax.lax.scan(body, (x, kv), (stack, indices))
        return x, kv, experts
    chosen = []
    for offset in range(layers):
        layer = jax.tree.map(lambda leaf, i=offset: leaf[i], stack)
        (x, kv), experts = body((x, kv), (layer, first + offset))
        chosen.append(experts)
    return x, kv, None if chosen[0] is None else jnp.stack(chosen)


def _block(p: Block, x, kv, context, c: ModelConfig, layer, window: int):
    """Returns (x, cache, chosen experts or None) after one layer."""
    attend = attention.latent_attention if c.is_mla else attention.grouped_attention
    with jax.named_scope("attention"):
        normed = rms_norm(x, p.attention_norm, c.rms_norm_eps)
        out, kv = attend(p.attention, normed, context, c, kv, layer, window)
        x = constrain(x + out, "batch", None, None)
    with jax.named_scope("ffw"):
        normed = rms_norm(x, p.ffw_norm, c.rms_norm_eps)
        if isinstance(p.ffw, moe.MoE):
            out, experts = moe.moe(p.ffw, normed, c)
        else:
            out, experts = swiglu(p.ffw, normed), None
        return constrain(x + out, "batch", None, None), kv, experts
