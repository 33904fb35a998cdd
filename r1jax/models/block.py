"""One decoder layer, attention then feed-forward, and stacks of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.core.sharding import constrain
from r1jax.models import attention, forms, moe
from r1jax.models.layers import SwiGLU, norm_spec, rms_norm, swiglu, swiglu_specs
from r1jax.schema import ModelConfig, Network

# What a recomputed block saves for the backward pass, by ComputeConfig.remat_policy. Products in attention have batch
# dimensions and those with weights have none, except the experts' weights, whose batch dimension is the expert.
_KEPT = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}


@struct.dataclass
class Block:
    """The weights of a stack of L layers of one shape; every leaf is [L, ...]."""

    attention_norm: jax.Array
    attention: attention.LatentAttention | attention.GroupedAttention
    ffw_norm: jax.Array
    ffw: SwiGLU | moe.MoE


@struct.dataclass
class Routing:
    """Extra outputs of a stack's mixture-of-experts layers; None where it has none or the output is not requested."""

    experts: jax.Array | None = None  # int32 [L, B, T, k] experts used, in layer order
    balance: jax.Array | None = None  # float32 [B, T] balance loss of each token's sequence, summed over the layers
    differs: jax.Array | None = None  # bool [L, B, T] whether forced experts differ from the router's choice


def specs(c: ModelConfig, layers: int, sparse: bool) -> Block | None:
    """Returns the ParamSpecs of a stack of `layers` layers, None for an empty stack."""
    if layers == 0:
        return None
    attend = attention.latent_specs if c.is_mla else attention.grouped_specs
    ffw = moe.moe_specs(c, layers) if sparse else swiglu_specs(c, c.intermediate_size, layers)
    return Block(norm_spec(c.hidden_size, layers), attend(c, layers), norm_spec(c.hidden_size, layers), ffw)


def run_stack(stack: Block | None, x, kv, context: forms.Context, network: Network, first: int, forced=None):
    """Returns (x [B, T, D], cache, Routing) after one stack, scanned or unrolled.

    `first` is the cache layer of the stack's first layer. `forced` int [L, B, T, k] are the experts of each layer of
    the stack, as in `moe.route`.
    """
    if stack is None:
        return x, kv, Routing()

    def body(carry, inputs):
        layer, index, forced = inputs
        x, kv, routing = _block(layer, *carry, context, network, index, forced)
        return (x, kv), routing

    compute = network.compute
    run_layer = jax.checkpoint(body, policy=_KEPT[compute.remat_policy]) if compute.remat else body
    layers = stack.attention_norm.shape[0]
    if compute.scan_layers:
        (x, kv), routing = jax.lax.scan(run_layer, (x, kv), (stack, jnp.arange(first, first + layers), forced))
    else:
        by_layer = []
        for offset in range(layers):
            layer, forced_here = jax.tree.map(lambda leaf, i=offset: leaf[i], (stack, forced))
            (x, kv), layer_routing = run_layer((x, kv), (layer, first + offset, forced_here))
            by_layer.append(layer_routing)
        routing = jax.tree.map(lambda *leaves: jnp.stack(leaves), *by_layer)
    return x, kv, dataclasses.replace(routing, balance=None if routing.balance is None else routing.balance.sum(axis=0))


def _block(p: Block, x, kv, context: forms.Context, network: Network, layer, forced):
    """Returns (x, cache, Routing) after one layer."""
    c = network.model
    attend: Any = attention.latent_attention if c.is_mla else attention.grouped_attention  # of the weights' kind
    with jax.named_scope("attention"):
        normed = rms_norm(x, p.attention_norm, c.rms_norm_eps)
        out, kv = attend(p.attention, normed, context, network, kv, layer)
        x = constrain(x + out, "batch", "sequence", None)
    with jax.named_scope("ffw"):
        normed = rms_norm(x, p.ffw_norm, c.rms_norm_eps)
        routing = Routing()
        if isinstance(p.ffw, moe.MoE):
            out, experts, differs = moe.moe(p.ffw, normed, network, forced)
            wanted = kv is None and network.auxiliary.aux_loss_alpha > 0
            balance = moe.sequence_balance(p.ffw.router, normed, context.segments, c) if wanted else None
            routing = Routing(experts, balance, differs)
        else:
            out = swiglu(p.ffw, normed)
        return constrain(x + out, "batch", "sequence", None), kv, routing
