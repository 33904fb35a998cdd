"""Multi-token prediction, depth 1: one more layer that predicts the token after next (V3 report, section 2.2).

Position i concatenates the main model's hidden state with the embedding of token i + 1 and predicts token i + 2.
Embedding and output matrix are the main model's. The report's eq. 21 prints the hidden state first; the released
weights have the embedding's half first, and this module follows them.
"""

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.core.sharding import constrain, normal, param
from r1jax.models import block, forms
from r1jax.models.layers import embed, norm_spec, rms_norm
from r1jax.schema import ModelConfig, Network


@struct.dataclass
class MTP:
    """Weights of the prediction module, with a leading dimension of 1 like a stack's."""

    embedding_norm: jax.Array  # [1, D]
    hidden_norm: jax.Array  # [1, D]
    projection: jax.Array  # [1, 2 * D, D], the embedding's rows first
    block: block.Block
    final_norm: jax.Array  # [1, D]


def specs(c: ModelConfig) -> MTP | None:
    """Returns the module's ParamSpecs, None for a model without one."""
    depth = c.num_nextn_predict_layers
    if not depth:
        return None
    width, layer = c.hidden_size, block.specs(c, depth, sparse=c.num_moe_layers > 0)
    assert layer is not None
    return MTP(
        embedding_norm=norm_spec(width, depth),
        hidden_norm=norm_spec(width, depth),
        projection=param((depth, 2 * width, width), (None, None, "embed"), normal(c.initializer_range)),
        block=layer,
        final_norm=norm_spec(width, depth),
    )


def following(values: jax.Array, segments: jax.Array, fill=0) -> jax.Array:
    """Returns [B, T]: at each position the next one's value, or `fill` where that belongs to another document."""
    shifted = jnp.pad(values[:, 1:], ((0, 0), (0, 1)), constant_values=fill)
    return jnp.where(_continues(segments), shifted, fill)


def _continues(segments: jax.Array) -> jax.Array:
    """Returns bool [B, T]: whether the next position belongs to the same document, False at padding."""
    same = segments[:, 1:] == segments[:, :-1]
    return jnp.pad(same, ((0, 0), (0, 1))) & (segments > 0)


def forward(
    p: MTP,
    embedding: jax.Array,
    hidden: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    network: Network,
) -> tuple[jax.Array, block.Routing]:
    """Returns (hidden states [B, T, D] whose logits predict token i + 2, routing).

    `embedding` is the main model's [V, D], `hidden` [B, T, D] its output after or before the final norm
    (auxiliary.mtp_hidden). The last position of a document has no next token: its result is undefined, and no other
    position attends to it.
    """
    c, following_tokens = network.model, following(tokens, segments)
    embedded = embed(embedding, following_tokens).astype(hidden.dtype)
    embedded = rms_norm(embedded, p.embedding_norm[0], c.rms_norm_eps)
    joined = jnp.concatenate([embedded, rms_norm(hidden, p.hidden_norm[0], c.rms_norm_eps)], axis=-1)
    x = constrain(jnp.einsum("BTC,CD->BTD", joined, p.projection[0]), "batch", "sequence", None)
    context = forms.build_context(positions, segments, network)
    x, _, routing = block.run_stack(p.block, x, None, context, network, 0)
    return rms_norm(x, p.final_norm[0], c.rms_norm_eps), routing
