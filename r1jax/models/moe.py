"""Mixture of experts: sigmoid router with a selection bias, group-limited top-k, dropless expert computation.

The router runs in float32 outside of shard_map; the rest runs in a shard_map over the mesh. Experts are divided over a
group of devices that hold different tokens, and tokens travel to them, so expert weights never move. On TPUs every
token is sent only where it was routed (`dispatch`). Elsewhere every device gathers the tokens of its group and
scatters the sums back. Both give every token all its experts, however uneven the load.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from r1jax.core import sharding
from r1jax.core.sharding import normal, param, zeros
from r1jax.kernels.grouped_matmul import grouped_matmul
from r1jax.models import dispatch
from r1jax.models.layers import SwiGLU, swiglu, swiglu_specs
from r1jax.schema import ComputeConfig, ModelConfig, Network

WIDE_BLOCK, NARROW_BLOCK = 64, 8  # rows of a block in the blocked form, for many and for few rows


@struct.dataclass
class MoE:
    """Weights of one mixture-of-experts layer; stacked layers add a leading axis."""

    KEEPS_DTYPE: ClassVar = ("bias",)  # in bfloat16 a bias of 14 would swallow differences of scores between 0 and 1

    router: jax.Array  # [D, E]
    bias: jax.Array  # [E] float32, used for selection only and never in the gradient
    gate: jax.Array  # [E, D, F]
    up: jax.Array  # [E, D, F]
    down: jax.Array  # [E, F, D]
    shared: SwiGLU | None


def moe_specs(c: ModelConfig, layers: int) -> MoE:
    init = normal(c.initializer_range)
    e, d, f = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
    return MoE(
        router=param((layers, d, e), (None, None, None), init),
        bias=param((layers, e), (None, None), zeros, jnp.float32),
        gate=param((layers, e, d, f), (None, "experts", None, "expert_ffw"), init),
        up=param((layers, e, d, f), (None, "experts", None, "expert_ffw"), init),
        down=param((layers, e, f, d), (None, "experts", "expert_ffw", None), init),
        shared=swiglu_specs(c, f * c.n_shared_experts, layers) if c.n_shared_experts else None,
    )


def _scores(router: jax.Array, x_BTD: jax.Array, c: ModelConfig) -> jax.Array:
    """Returns the affinity of each token to each expert, float32 [B, T, E]."""
    logits = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), router.astype(jnp.float32))
    return jax.nn.sigmoid(logits) if c.scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)


@jax.named_scope("router")
def route(
    router: jax.Array, bias: jax.Array, x_BTD: jax.Array, c: ModelConfig, forced: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns (experts int32 [B, T, k], weights float32 [B, T, k]). Source: V3 report eq. 12-16.

    `forced` [B, T, k] replaces the choice, token by token; a token with an id below 0 keeps the router's choice.
    Weights are always this router's scores of the experts used, so that the router gets its gradient.

    The bias affects the choice only; weights are the unbiased scores. Experts of dropped groups are masked with -inf
    (Hugging Face's 0.0 lets a forbidden expert win when all kept ones are negative). Softmax scores (DeepSeek-V2) have
    no bias, and a group's score is that of its best expert instead of the sum of its two best.
    """
    scores = _scores(router, x_BTD, c)
    choice = jax.lax.stop_gradient(scores)
    if c.scoring_func == "sigmoid":
        choice = choice + jax.lax.stop_gradient(bias)
    if c.n_group > 1:
        grouped = choice.reshape(*choice.shape[:-1], c.n_group, -1)
        best = 2 if c.scoring_func == "sigmoid" else 1
        group_scores = jax.lax.top_k(grouped, min(best, grouped.shape[-1]))[0].sum(axis=-1)
        kept = jax.lax.top_k(group_scores, c.topk_group)[1]
        is_kept = jax.nn.one_hot(kept, c.n_group, dtype=bool).any(axis=-2)
        choice = jnp.where(is_kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
    experts = jax.lax.top_k(choice, c.num_experts_per_tok)[1]
    if forced is not None:
        experts = jnp.where(jnp.all(forced >= 0, axis=-1, keepdims=True), forced.astype(experts.dtype), experts)
    picked = jax.nn.one_hot(experts, c.n_routed_experts, dtype=scores.dtype)
    weights = jnp.einsum("BTKE,BTE->BTK", picked, scores)
    if c.norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return experts, weights * c.routed_scaling_factor


def _dense(x_ND, gates_NE, gate, up, down) -> jax.Array:
    """Returns the weighted sum of all experts run on every token: one wide product, cheap for small E * F."""
    experts, width, inner = gate.shape
    gate, up = (w.transpose(1, 0, 2).reshape(width, experts * inner) for w in (gate, up))
    hidden = jax.nn.silu(x_ND @ gate) * (x_ND @ up)
    hidden = hidden * jnp.repeat(gates_NE.astype(hidden.dtype), inner, axis=1)
    return hidden @ down.reshape(experts * inner, width)


@jax.custom_vjp
def _permute(rows, forward_index, backward_index):
    """Returns rows[forward_index], 0 where the index is out of range; the gradient gathers by backward_index.

    The two indices are each other's inverse where they are in range, so neither direction needs a scatter.
    """
    return rows.at[forward_index].get(mode="fill", fill_value=0)


def _permute_forward(rows, forward_index, backward_index):
    return _permute(rows, forward_index, backward_index), backward_index


def _permute_backward(backward_index, grad):
    return grad.at[backward_index].get(mode="fill", fill_value=0), None, None


_permute.defvjp(_permute_forward, _permute_backward)


def _places(experts_N: jax.Array, first: jax.Array | int, count: int, block: int):
    """Returns (place of each assignment [N], assignment of each place [M], sizes [count], padded sizes [count]).

    Assignments are sorted by local expert, with each expert's rows padded to a multiple of `block`. Assignments to
    other devices' experts get place M, which is out of range; unused places get assignment N.
    """
    total = experts_N.shape[0]
    local = experts_N - first
    mine = (local >= 0) & (local < count)
    chosen = jax.nn.one_hot(jnp.where(mine, local, count), count, dtype=jnp.int32)
    sizes = chosen.sum(axis=0)
    padded = -(-sizes // block) * block
    start = jnp.cumsum(padded) - padded
    rank = jnp.cumsum(chosen, axis=0) - chosen
    places = (-(-total // block) + count) * block if block > 1 else total  # the most that padding can need
    place = jnp.where(mine, jnp.sum(chosen * (start + rank), axis=1), places)
    assignment = jnp.full(places, total, jnp.int32).at[place].set(jnp.arange(total, dtype=jnp.int32), mode="drop")
    return place, assignment, sizes, padded


def _run_experts(rows_ND, experts_N, gate, up, down, first, *, kind: str) -> jax.Array:
    """Returns each row's output of its expert, [N, D], 0 for an expert outside first..first + count - 1.

    Rows are sorted by expert. `ragged` uses grouped products; `blocked` pads groups to whole blocks and uses one
    batched product.
    """
    count, block = gate.shape[0], 1
    if kind == "blocked":
        block = WIDE_BLOCK if experts_N.size >= WIDE_BLOCK * count else NARROW_BLOCK
    place, assignment, sizes, padded = _places(experts_N, first, count, block)
    rows = _permute(rows_ND, assignment, place)
    if kind == "ragged":
        product = functools.partial(grouped_matmul, device_kind=sharding.device().device_kind)
        hidden = jax.nn.silu(product(rows, gate, sizes)) * product(rows, up, sizes)
        out = product(hidden, down, sizes)
    else:
        blocks = rows.shape[0] // block
        ends = jnp.cumsum(padded) // block
        owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(blocks), side="right"), count - 1)
        rows = rows.reshape(blocks, block, -1)
        hidden = jax.nn.silu(jnp.einsum("GMD,GDF->GMF", rows, gate[owner]))
        hidden = hidden * jnp.einsum("GMD,GDF->GMF", rows, up[owner])
        out = jnp.einsum("GMF,GFD->GMD", hidden, down[owner]).reshape(blocks * block, -1)
    return _permute(out, place, assignment)


def _grouped(x_ND, experts_NK, weights_NK, gate, up, down, first, *, kind: str) -> jax.Array:
    """Returns the weighted sum over those of each token's experts that this device holds."""
    k = experts_NK.shape[1]
    rows = _run_experts(jnp.repeat(x_ND, k, axis=0), experts_NK.reshape(-1), gate, up, down, first, kind=kind)
    return jnp.einsum("NKD,NK->ND", rows.reshape(-1, k, x_ND.shape[1]), weights_NK.astype(rows.dtype))


def implementation(compute: ComputeConfig) -> str:
    """Returns the form of the experts' products: as configured or, with `auto`, `blocked` on a CPU, else `ragged`."""
    if compute.moe_implementation != "auto":
        return compute.moe_implementation
    return "blocked" if sharding.device().platform == "cpu" else "ragged"


@dataclass(frozen=True)
class _Axes:
    """The mesh axes of one mixture layer, by what their devices hold.

    `experts`: different experts, in the order in which they are divided. Of these, `shared` hold different tokens too,
    and `copies` the same tokens. `width`: different parts of every expert's inner width.
    """

    mesh: Mesh | None  # None outside a mesh, where there are no axes
    experts: tuple[str, ...]
    shared: tuple[str, ...]
    copies: tuple[str, ...]
    width: tuple[str, ...]


@jax.named_scope("experts")
def _gathered(x_BTD, experts_BTK, weights_BTK, gate, up, down, *, kind: str, axes: _Axes):
    """Returns the expert sums of this device's tokens, gathering those of the whole group; runs inside shard_map."""
    if axes.shared:
        gather = functools.partial(jax.lax.all_gather, axis_name=axes.shared, axis=0, tiled=True)
        x_BTD, experts_BTK, weights_BTK = gather(x_BTD), gather(experts_BTK), gather(weights_BTK)
    first = jax.lax.axis_index(axes.experts) * gate.shape[0] if axes.experts else 0
    flat = x_BTD.reshape(-1, x_BTD.shape[-1])
    experts, weights = (a.reshape(flat.shape[0], -1) for a in (experts_BTK, weights_BTK))
    if kind == "dense":
        local = jnp.arange(gate.shape[0]) + first
        gates_NE = jnp.einsum("NKE,NK->NE", (experts[..., None] == local).astype(weights.dtype), weights)
        out = _dense(flat, gates_NE, gate, up, down)
    else:
        out = _grouped(flat, experts, weights, gate, up, down, first, kind=kind)
    out = out.reshape(x_BTD.shape)
    if summed := (*axes.copies, *axes.width):
        out = jax.lax.psum(out, summed)
    if axes.shared:
        out = jax.lax.psum_scatter(out, axes.shared, scatter_dimension=0, tiled=True)
    return out


@jax.named_scope("experts")
def _dispatched(x_BTD, experts_BTK, weights_BTK, gate, up, down, *, kind: str, axes: _Axes, factor: float):
    """Returns the same as `_gathered`, sending each token only to its experts' devices; runs inside shard_map."""
    k, flat = experts_BTK.shape[-1], x_BTD.reshape(-1, x_BTD.shape[-1])
    assert axes.mesh is not None
    n_experts = gate.shape[0] * math.prod(axes.mesh.shape[name] for name in axes.shared)
    place, assignment, counts, _ = _places(experts_BTK.reshape(-1), 0, n_experts, 1)
    rows = _permute(jnp.repeat(flat, k, axis=0), assignment, place)
    capacity = max(
        dispatch.ROW_MULTIPLE, math.ceil(factor * rows.shape[0] / dispatch.ROW_MULTIPLE) * dispatch.ROW_MULTIPLE
    )

    def run(rows, experts, weights):
        return _run_experts(rows, experts, *weights, 0, kind="ragged" if kind == "ragged" else "blocked")

    out = dispatch.exchange_and_run(rows, counts, (gate, up, down), run, axes.mesh, axes.shared, capacity)
    out = _permute(out, place, assignment).reshape(-1, k, flat.shape[1])
    out = jnp.einsum("NKD,NK->ND", out, weights_BTK.reshape(-1, k).astype(out.dtype)).reshape(x_BTD.shape)
    return jax.lax.psum(out, axes.width) if axes.width else out


def moe(
    p: MoE, x_BTD: jax.Array, network: Network, forced: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns (output [B, T, D], experts used int32 [B, T, k], whether the router's choice differs, bool [B, T]).

    `forced` is as in `route`. Experts are compared as sets; the last result is None when nothing is forced.
    """
    c, compute = network.model, network.compute
    experts, weights = route(p.router, p.bias, x_BTD, c, forced)
    differs = None
    if forced is not None:
        choice, _ = route(p.router, p.bias, x_BTD, c)
        differs = jnp.any(jnp.sort(choice, axis=-1) != jnp.sort(experts, axis=-1), axis=-1)
    mesh, kind = sharding.current_mesh(), implementation(compute)
    if mesh is None or mesh.size == 1:
        axes = _Axes(mesh, (), (), (), ())
        out = _gathered(x_BTD, experts, weights, p.gate, p.up, p.down, kind=kind, axes=axes)
    else:
        tokens = sharding.partition(("batch", "sequence", None), x_BTD.shape, mesh)
        wide = sharding.partition(("experts", None, "expert_ffw"), p.gate.shape, mesh)
        deep = sharding.partition(("experts", "expert_ffw", None), p.down.shape, mesh)
        apart = (*sharding.mesh_axes(tokens[0]), *sharding.mesh_axes(tokens[1]))
        parts = sharding.mesh_axes(wide[0])
        shared = tuple(name for name in parts if name in apart)
        copies = tuple(name for name in parts if name not in apart)
        axes = _Axes(mesh, parts, shared, copies, sharding.mesh_axes(wide[2]))
        auto = compute.moe_dispatch == "auto" and sharding.device().platform == "tpu"
        if (compute.moe_dispatch == "routed" or auto) and axes.shared and not axes.copies:
            body = functools.partial(_dispatched, kind=kind, axes=axes, factor=compute.moe_buffer_factor)
        else:
            body = functools.partial(_gathered, kind=kind, axes=axes)
        out = jax.shard_map(
            body, mesh=mesh, in_specs=(tokens, tokens, tokens, wide, wide, deep), out_specs=tokens, check_vma=False
        )(x_BTD, experts, weights, p.gate, p.up, p.down)
    if p.shared is not None:
        with jax.named_scope("shared_expert"):
            out = out + swiglu(p.shared, x_BTD)
    return out, experts, differs


@jax.named_scope("router")
def sequence_balance(router: jax.Array, x_BTD: jax.Array, segments_BT: jax.Array, c: ModelConfig) -> jax.Array:
    """Returns the balance loss of each token's sequence, sum_i f_i P_i, float32 [B, T]; 0 at padding.

    Over the T tokens of one sequence (the tokens of one segment of a row): f_i = E / (k T) * the number of tokens that
    have expert i among their k best by the scores without bias, P_i = the mean of their normalised scores. It is 1
    under perfect balance. The gradient passes through P only. Source: V3 report eq. 17-20.
    """
    scores = _scores(router, x_BTD, c)
    shares = scores / scores.sum(axis=-1, keepdims=True)
    best = jax.lax.top_k(jax.lax.stop_gradient(scores), c.num_experts_per_tok)[1]
    chosen = jax.nn.one_hot(best, c.n_routed_experts, dtype=jnp.float32).sum(axis=-2)
    bound = segments_BT.shape[1] + 1  # a row of T tokens has at most T segments, numbered from 1
    per_segment = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=bound))
    tokens = jnp.maximum(per_segment(jnp.ones_like(shares[..., 0]), segments_BT), 1)
    chosen, shares = per_segment(chosen, segments_BT), per_segment(shares, segments_BT)
    scale = c.n_routed_experts / c.num_experts_per_tok
    loss = scale * jnp.sum(chosen * shares, axis=-1) / jnp.square(tokens)
    return jnp.where(segments_BT > 0, jnp.take_along_axis(loss, segments_BT, axis=1), 0)


def load(experts_LBTK: jax.Array, valid_BT: jax.Array, n_experts: int) -> jax.Array:
    """Returns how many valid tokens chose each expert, float32 [L, E]."""
    chosen = jax.nn.one_hot(experts_LBTK, n_experts, dtype=jnp.float32)
    return jnp.einsum("LBTKE,BT->LE", chosen, valid_BT.astype(jnp.float32))


def updated_bias(bias_LE: jax.Array, load_LE: jax.Array, rate: float) -> jax.Array:
    """Returns b + rate * sign(mean load - load): the V3 report's auxiliary-loss-free load balancing."""
    return bias_LE + rate * jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
