"""The decoder: parameter specs and the one forward pass of trainer, reference, reward models and sampler."""

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.core.sharding import constrain, gathered_rows, normal, own_rows, param
from r1jax.models import block, cache, forms, mtp
from r1jax.models.block import Block
from r1jax.models.layers import embed, norm_spec, rms_norm
from r1jax.models.mtp import MTP
from r1jax.schema import ModelConfig, Network


@struct.dataclass
class Params:
    """All weights of a decoder. `dense` holds the leading dense layers (all layers of a dense model)."""

    embedding: jax.Array  # [V, D]
    dense: Block | None
    sparse: Block | None
    final_norm: jax.Array  # [D]
    unembedding: jax.Array | None  # [D, V]; None when tied
    scalar_head: jax.Array | None  # [D] value or reward head
    mtp: MTP | None = None  # multi-token prediction module


@struct.dataclass
class Auxiliary:
    """Extra outputs of a forward pass: chosen experts, balance loss, and hidden states before the final norm."""

    experts: jax.Array | None  # int32 [Lm, B, T, k] experts used by the mixture-of-experts layers, in layer order
    balance: jax.Array | None  # float32 [B, T] balance loss of each token's sequence, None where its weight is 0
    before_norm: jax.Array  # [B, T, D] hidden states before the final norm
    differs: jax.Array | None = None  # bool [Lm, B, T] forced experts differ from the router's; None if not forced


def specs(c: ModelConfig, scalar_head: bool = False) -> Params:
    """Returns the tree of ParamSpecs: the single source of shapes, axes, initial values and names."""
    init, width = normal(c.initializer_range), c.hidden_size
    tied = c.tie_word_embeddings
    return Params(
        embedding=param((c.vocab_size, width), ("vocab", "embed"), init),
        dense=block.specs(c, c.num_dense_layers, sparse=False),
        sparse=block.specs(c, c.num_moe_layers, sparse=True),
        final_norm=norm_spec(width),
        unembedding=None if tied else param((width, c.vocab_size), ("embed", "vocab"), init),
        scalar_head=param((width,), (None,), init) if scalar_head else None,
        mtp=mtp.specs(c),
    )


def unembedding(params: Params) -> jax.Array:
    """Returns the output matrix, [D, V], sharded as its parameter is."""
    return params.embedding.T if params.unembedding is None else params.unembedding


@jax.named_scope("head")
def logits(params: Params, hidden: jax.Array, vocab_used: int = 0) -> jax.Array:
    """Returns float32 logits [..., V] of final hidden states [..., D].

    With vocab_used > 0, logits of the ids from vocab_used on are -inf.
    """
    matrix = constrain(unembedding(params), None, "vocab")  # D is whole, so that devices need not sum logits
    if hidden.ndim == 2:
        out = jnp.einsum("...D,DV->...V", gathered_rows(hidden), matrix, preferred_element_type=jnp.float32)
        out = own_rows(gathered_rows(out, "vocab"), "vocab")
    else:
        out = jnp.einsum("...D,DV->...V", hidden, matrix, preferred_element_type=jnp.float32)
    out = out.astype(jnp.float32)
    return jnp.where(jnp.arange(out.shape[-1]) < vocab_used, out, -jnp.inf) if vocab_used else out


@jax.named_scope("head")
def scalars(params: Params, hidden: jax.Array) -> jax.Array:
    """Returns the scalar head's float32 value at each position, [...]. Raises ValueError for a model without one."""
    if params.scalar_head is None:
        raise ValueError("scalars: this model has no scalar head; only reward models and critics have one")
    return jnp.einsum("...D,D->...", hidden.astype(jnp.float32), params.scalar_head.astype(jnp.float32))


def forward(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    network: Network,
    kv: cache.Cache | None = None,
    window: int | None = None,
    experts: jax.Array | None = None,
    prefixes: jax.Array | None = None,
    features: jax.Array | None = None,
) -> tuple[jax.Array, cache.Cache | None, Auxiliary]:
    """Returns (final hidden states [B, T, D] after the last norm, cache, auxiliary).

    tokens, positions, segments are int32 [B, T]; segment 0 is padding. Without a cache, tokens attend to earlier
    tokens of the same segment in the row. With one, row b is slot b: its T new tokens are stored at `positions` and
    attend to rows 0..position of the first `window` cache rows (default all); tokens of segment 0 are not stored.

    `experts` int [Lm, B, T, k] replaces the routers' choices: entry m is for layer num_dense_layers + m, and a token
    with an id below 0 in a layer is routed by that layer's router. The prediction module always uses its own router.
    `prefixes` int32 [B, T] is the segment of a shared prompt that a token attends to beside its own, 0 for none.
    `features` [B, T, D] replaces the embedded tokens: it is the output of earlier blocks that were run separately.
    """
    window = kv.rows if kv is not None and window is None else window or 0
    x = embed(params.embedding, tokens) if features is None else features
    c, x = network.model, x.astype(jnp.dtype(network.compute.compute_dtype))
    context = forms.build_context(positions, segments, network, kv, window, prefixes)
    x, kv, _ = block.run_stack(params.dense, x, kv, context, network, 0)
    x, kv, routing = block.run_stack(params.sparse, x, kv, context, network, c.num_dense_layers, experts)
    auxiliary = Auxiliary(routing.experts, routing.balance, x, routing.differs)
    return rms_norm(x, params.final_norm, c.rms_norm_eps), kv, auxiliary


@jax.named_scope("prediction")
def predict_further(
    params: Params, hidden: jax.Array, auxiliary: Auxiliary, tokens, positions, segments, network: Network
) -> tuple[jax.Array, block.Routing]:
    """Returns (hidden states [B, T, D] whose logits predict token i + 2, routing) from a cacheless forward pass.

    Raises ValueError when the model has no multi-token prediction module.
    """
    if params.mtp is None:
        raise ValueError("predict_further: this model has no prediction module; set num_nextn_predict_layers=1")
    state = hidden if network.auxiliary.mtp_hidden == "post_norm" else auxiliary.before_norm
    return mtp.forward(params.mtp, params.embedding, state, tokens, positions, segments, network)
