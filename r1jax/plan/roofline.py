"""Bounds the time of each program from datasheet figures: no array is made, nothing is compiled, nothing is measured.

A bound is the longest of three times that a device needs at its peak rates: its operations, its bytes of HBM and the
bytes that it sends to others. It assumes that all three overlap perfectly, that devices have equal work, that fused
operations keep to registers and VMEM, and that a collective uses all links of a chip at once; so a program takes
longer. docs/plan.md says what is counted.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np

from r1jax.core import sharding
from r1jax.core.sharding import DECODE, TRAIN, Rules, dividing_axes
from r1jax.kernels.tpu import rounded
from r1jax.models import decoder, flops
from r1jax.models.flops import Flops, Work
from r1jax.plan.chips import Generation
from r1jax.plan.lengths import Occupancy
from r1jax.schema import MeshConfig, Network, OptimizerConfig
from r1jax.train.optimizer import matrix_axes

# Bounds are divided by this for the expected time. It is of MaxText's published pre-training of DeepSeek-V3 on 512 v5p
# chips (AI-Hypercomputer/tpu-recipes, 8,192 tokens a row, 25,165,824 a step): the time of its operations at the peak
# rate, those of recomputed blocks included, over its 90.668 s a step.
EFFICIENCY = 0.455
_SIZES = {"float32": 4, "bfloat16": 2}
_NEWTON_SCHULZ_STEPS = 5  # Muon's
_SCORES_BACKWARD = 2.5  # of a forward pass's scores: they are computed again, and there are four gradient products


@dataclass(frozen=True)
class Placed:
    """A model on a mesh of devices of one generation."""

    network: Network
    mesh: MeshConfig
    generation: Generation

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.shape)

    @property
    def chips(self) -> int:
        return self.generation.chips(self.devices)

    @property
    def peak(self) -> float:
        """Operations per second of all devices together."""
        return self.devices * self.generation.flops / self.generation.devices_per_chip

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each mesh axis."""
        return dict(zip(sharding.AXES, self.mesh.shape, strict=True))

    @property
    def compute_bytes(self) -> int:
        return _SIZES[self.network.compute.compute_dtype]


@dataclass(frozen=True)
class Bound:
    """What one device does in a program, and the least time for it at the datasheet's rates. Sums follow each other."""

    flops: float = 0.0
    hbm_bytes: float = 0.0  # read and written
    ici_bytes: float = 0.0  # sent over links, once for every link on the way
    dcn_bytes: float = 0.0  # sent to other slices
    compute_s: float = 0.0
    hbm_s: float = 0.0
    ici_s: float = 0.0  # of both networks
    bound_s: float = 0.0
    model_flops: float = 0.0  # of all devices together: what the model needs, without padding and recomputation

    def __add__(self, other: Self) -> Self:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return type(self)(*(a + b for a, b in pairs))

    def __mul__(self, times: float) -> Self:
        return type(self)(*(times * value for value in dataclasses.astuple(self)))

    @property
    def limit(self) -> str:
        """Which of the three times is the longest: compute, hbm or ici."""
        times = {"compute": self.compute_s, "hbm": self.hbm_s, "ici": self.ici_s}
        return max(times, key=lambda name: times[name])

    def figures(self, efficiency: float = EFFICIENCY) -> dict[str, Any]:
        """Returns all of it and the expected time as JSON values."""
        return dataclasses.asdict(self) | {"limit": self.limit, "expected_s": self.bound_s / efficiency}


def bound(placed: Placed, operations=0.0, hbm=0.0, ici=0.0, dcn=0.0, model_flops: float = 0.0, times=1.0) -> Bound:
    """Returns the bound of a program with these operations and bytes a device; numbers, or arrays [I] of intervals.

    `times` is how often it runs, a number or one for each interval.
    """
    chip, per_chip = placed.generation, placed.generation.devices_per_chip
    compute_s, hbm_s = operations / (chip.flops / per_chip), hbm / (chip.hbm / per_chip)
    ici_s = ici / (chip.ici / per_chip) + dcn / (chip.dcn / (chip.chips_per_host * per_chip))
    longest = np.maximum(np.maximum(compute_s, hbm_s), ici_s)
    values = (operations, hbm, ici, dcn, compute_s, hbm_s, ici_s, longest)
    return Bound(*(float(np.sum(times * value)) for value in values), model_flops)


@dataclass(frozen=True)
class _Weights:
    """The weights of one device under one table of rules, in numbers; `used` and `gathered` of those in a pass."""

    dense: float = 0.0  # held
    experts: float = 0.0  # held
    used: float = 0.0  # dense ones of the blocks in a pass, after the gathering of what `fsdp` divides
    used_experts: float = 0.0  # in a pass
    head: float = 0.0  # the output matrix or scalar head, after gathering
    gathered: float = 0.0  # received from others for one pass
    reduced: float = 0.0  # sent for one sum of the gradients over the devices of a slice that hold the same part
    across: float = 0.0  # the same over slices
    per_token: float = 0.0  # inputs and outputs of the dense products, by token
    per_row: float = 0.0  # inputs and outputs of the experts' products, by row that is sent to an expert
    muon: float = 0.0  # operations of Muon's orthogonalisation

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def _weights(placed: Placed, rules: Rules) -> _Weights:
    """Returns the sums over all parameters."""
    network, total = placed.network, _Weights()
    specs = decoder.specs(network.model, network.scalar_head)
    head = "scalar_head" if network.scalar_head else "embedding" if specs.unembedding is None else "unembedding"
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=sharding.is_spec):
        names = [getattr(key, "name", "") for key in path]
        idle = names[0] == "mtp" and not network.auxiliary.mtp_loss_weight
        idle |= names[0] == "unembedding" and network.scalar_head
        total += _parameter(placed, path, spec, rules, idle, names[0] == head, names[0] == "embedding")
    return total


def _parameter(placed: Placed, path: tuple, spec, rules: Rules, idle: bool, head: bool, table: bool) -> _Weights:
    sizes, count = placed.sizes, math.prod(spec.shape)
    dims = dividing_axes(spec.axes, spec.shape, placed.mesh, rules)
    ways = lambda *names: math.prod(sizes[name] for name in names)  # noqa: E731
    held = count / ways(*(name for names in dims for name in names))
    kept = [names for axis, names in zip(spec.axes, dims, strict=True) if axis != "embed"]
    whole = count / ways(*(name for names in kept for name in names))
    copies = ways(*(n for n in sizes if n != "slice" and not any(n in names for names in dims)))
    sums = {
        "reduced": 2 * (copies - 1) / copies * held,
        "across": 2 * (sizes["slice"] - 1) / sizes["slice"] * held,
        "muon": _orthogonalisation(path, spec) * held / count,
    }
    expert = "experts" in spec.axes
    parts = {"experts" if expert else "dense": held}
    if not idle:
        parts |= {"gathered": whole - held, "head": whole * head, "used_experts": held * expert}
        parts["used"] = whole * (not (expert or head or table))
        if axes := matrix_axes(path):
            sides = (
                math.prod(spec.shape[i] / ways(*(n for n in dims[i] if n == "tensor")) for i in side) for side in axes
            )
            parts["per_row" if expert else "per_token"] = spec.shape[0] * sum(sides)
    return _Weights(**parts, **sums)


def _orthogonalisation(path: tuple, spec) -> float:
    """Returns the operations of Muon's Newton-Schulz steps on all matrices of a parameter; 0 where AdamW updates it."""
    axes = matrix_axes(path)
    if axes is None:
        return 0.0
    wide, narrow = sorted((math.prod(spec.shape[i] for i in side) for side in axes), reverse=True)
    matrices = math.prod(spec.shape) / (wide * narrow)
    return _NEWTON_SCHULZ_STEPS * matrices * (4.0 * narrow**2 * wide + 2.0 * narrow**3)


@dataclass(frozen=True)
class _Pass:
    """What one device does in forward passes over `batches` batches of the same rows, by what a gradient repeats."""

    tokens: float  # of this device, in all batches
    dense_flops: float
    expert_flops: float
    scores: float  # operations
    head_flops: float
    dense_bytes: float  # weights of the blocks that are read
    expert_bytes: float
    head_bytes: float
    dense_moved: float  # bytes of activations read and written
    expert_moved: float
    gathered: float  # bytes received: weights
    routed: bool  # whether tokens are sent to the devices of their experts alone
    exchanged: float  # bytes sent: tokens to their experts and back
    summed: float  # bytes sent: activations summed over `tensor`
    ring: float  # bytes sent around `context`


def _pass(
    placed: Placed, rules: Rules, weights: _Weights, rows: int, row_tokens: int, batches: float, parts: Flops
) -> _Pass:
    """Returns the pass of batches of rows x row_tokens, whose operations over all devices are `parts`."""
    c, sizes, width = placed.network.model, placed.sizes, placed.compute_bytes
    row_axes, token_axes = dividing_axes(("batch", "sequence"), (rows, row_tokens), placed.mesh, rules)
    over = (*row_axes, *token_axes)
    ways = math.prod(sizes[name] for name in over)
    tokens = batches * rows * row_tokens / ways
    tensor, trained = sizes["tensor"], bool(placed.network.auxiliary.mtp_loss_weight) and rules is TRAIN
    sparse = c.num_moe_layers + (c.num_nextn_predict_layers if trained and c.num_moe_layers else 0)
    layers = c.num_hidden_layers + (c.num_nextn_predict_layers if trained else 0)
    copies, shared = _expert_groups(placed, rules, over)
    group = math.prod(sizes[name] for name in shared)
    routed = bool(sparse) and copies == 1 and placed.network.compute.moe_dispatch != "gathered"
    sent = tokens * c.num_experts_per_tok / copies if sparse else 0.0  # rows of this device's experts in one layer
    seen = group * tokens / batches
    touched = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** seen if sparse else 0.0
    act = layers * (_attention_width(placed) / tensor + 4 * c.hidden_size) + weights.per_token
    rows_moved = sent * (weights.per_row + sparse * 4 * c.hidden_size)
    sums = layers + (layers - sparse) + sparse * (1 + (c.n_shared_experts > 0))
    part = 2 * (tensor - 1) / tensor * tokens * c.hidden_size * width
    ring = sizes["context"] if "context" in token_axes else 1
    source = c.kv_lora_rank + c.qk_rope_head_dim if c.is_mla else 2 * c.num_key_value_heads * c.head_dim / tensor
    return _Pass(
        tokens=tokens,
        dense_flops=(parts.projections + parts.dense + parts.shared) / (ways * tensor) + parts.router / ways,
        expert_flops=parts.experts / (ways * copies * tensor),
        scores=parts.scores / (ways * tensor),
        head_flops=parts.head / (ways * tensor),
        dense_bytes=batches * weights.used * width,
        expert_bytes=batches * weights.used_experts * touched * width,
        head_bytes=batches * weights.head * width,
        dense_moved=tokens * act * width,
        expert_moved=rows_moved * width,
        gathered=batches * weights.gathered * width,
        routed=routed and group > 1,
        exchanged=sparse * _exchange(placed, tokens, copies, group, width, routed),
        summed=sums * part,
        ring=layers * (ring - 1) * tokens * source * width,
    )


def _expert_groups(placed: Placed, rules: Rules, over: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    """Returns (devices that hold different experts and the same tokens, axes of different experts and tokens)."""
    sizes, experts = placed.sizes, placed.network.model.n_routed_experts
    if not experts:
        return 1, ()
    (axes,) = dividing_axes(("experts",), (experts,), placed.mesh, rules)
    return math.prod(sizes[name] for name in axes if name not in over), tuple(name for name in axes if name in over)


def _exchange(placed: Placed, tokens: float, copies: int, group: int, width: int, routed: bool) -> float:
    """Returns the bytes that a device sends in one mixture layer, there and back.

    Routed tokens go to the devices of their experts, over all links on the way. Otherwise, as where devices of
    different experts hold the same tokens, the group's tokens are gathered, and the sums of the experts are added up.
    """
    c = placed.network.model
    row = c.hidden_size * width
    if routed:
        links = max(_mean_links(placed.generation, group), (group - 1) / group)
        return 2 * tokens * c.num_experts_per_tok * row * links
    gather = (group - 1) * tokens * row
    return 2 * gather + 2 * (copies - 1) / copies * group * tokens * row


def _mean_links(generation: Generation, devices: int) -> float:
    """Returns the least mean number of links between two devices of a group, one and the same included.

    A ring of s chips has s / 4, so a torus of equal sides has the fewest, or one of sides 2 where the group is smaller.
    """
    chips, dimensions = generation.chips(devices), generation.dimensions
    return dimensions * chips ** (1 / dimensions) / 4 if chips >= 2**dimensions else math.log2(chips) / 2


def _attention_width(placed: Placed) -> float:
    """Returns the numbers of queries, keys, values and outputs of a token in one layer, over all heads."""
    c = placed.network.model
    if c.is_mla:
        return 2 * c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim


def update(
    placed: Placed,
    rows: int,
    row_tokens: int,
    micro_batches: float,
    work: Work,
    optimizer: OptimizerConfig,
) -> Bound:
    """Returns the bound of one update of `micro_batches` micro-batches of rows x row_tokens, then the optimiser's step.

    `micro_batches` may be a mean. `work` is what the samples in the rows come to; padding goes through the layers, and
    has no scores.
    """
    network, weights, width = placed.network, _weights(placed, TRAIN), placed.compute_bytes
    tokens = float(micro_batches * rows * row_tokens)
    padded = Work(tokens, work.pairs, tokens)
    parts = flops.forward(network, padded)
    if network.auxiliary.mtp_loss_weight:
        parts += flops.prediction(network, padded)
    one = _pass(placed, TRAIN, weights, rows, row_tokens, micro_batches, parts)
    # Recomputed in the backward pass: whole blocks, or with a policy that stores products what kernels compute.
    again = int(network.compute.remat)
    dense_again = again * (network.compute.remat_policy == "nothing")
    held = weights.dense + weights.experts
    trip = int(one.routed)  # a gradient sends the tokens of a routed exchange again, and runs their experts again
    gradients = (weights.used + weights.head + weights.used_experts) * micro_batches
    inputs = again * 2 * one.tokens * network.model.num_hidden_layers * network.model.hidden_size * width
    hbm = (
        one.dense_bytes * (2 + dense_again)
        + one.expert_bytes * (2 + again + trip)
        + 3 * one.head_bytes
        + one.dense_moved * (3 + dense_again)
        + one.expert_moved * (3 + again + trip)
        + inputs  # of the blocks, stored and read again
        + 2 * one.gathered  # written, forward and backward
        + 2 * gradients * width  # written and read
        + 8 * held * micro_batches  # float32 sums, read and written
        + held * (_SIZES[optimizer.param_dtype] + width)  # the copy in the compute type
    )
    ici = (
        3 * one.gathered + one.exchanged * (2 + again + trip / 2) + one.summed * (2 + again)
    )  # two gathers, one scatter of the gradients
    ici += one.ring * (2 + again) + one.ring * 4 / width  # the gradient of the source travels in float32
    operations = one.dense_flops * (3 + dense_again) + one.expert_flops * (3 + again + trip)
    operations += one.scores * (1 + _SCORES_BACKWARD + again) + one.head_flops * 4
    micro = bound(placed, operations, hbm, ici, model_flops=flops.update(network, work).total)
    return micro + _optimizer_step(placed, weights, optimizer)


def _optimizer_step(placed: Placed, weights: _Weights, optimizer: OptimizerConfig) -> Bound:
    """Returns the bound of the gradients' sum over devices and slices, and of reading and writing the state."""
    held, muon = weights.dense + weights.experts, optimizer.kind == "muon"
    moments = _SIZES[optimizer.moment_dtype] * (1 if muon else 2)
    hbm = held * (8 + 2 * _SIZES[optimizer.param_dtype] + 2 * moments)  # gradients twice: for their norm, for the step
    return bound(placed, weights.muon * muon, hbm, 4 * weights.reduced, 4 * weights.across)


def scoring(placed: Placed, rows: int, row_tokens: int, micro_batches: int, work: Work) -> Bound:
    """Returns the bound of log-probs of `micro_batches` micro-batches of rows x row_tokens, without gradients."""
    network, weights = placed.network, _weights(placed, TRAIN)
    tokens = float(micro_batches * rows * row_tokens)
    parts = flops.forward(network, Work(tokens, work.pairs, tokens))
    one = _pass(placed, TRAIN, weights, rows, row_tokens, micro_batches, parts)
    return _forward_bound(placed, one, flops.forward(network, work).total)


def _forward_bound(placed: Placed, one: _Pass, model_flops: float, more_bytes: float = 0.0) -> Bound:
    operations = one.dense_flops + one.expert_flops + one.scores + one.head_flops
    weights = one.dense_bytes + one.expert_bytes + one.head_bytes
    hbm = weights + one.dense_moved + one.expert_moved + one.gathered + more_bytes
    return bound(placed, operations, hbm, one.gathered + one.exchanged + one.summed + one.ring, 0.0, model_flops)


def prefill(placed: Placed, prompt_tokens: float, bucket: int) -> Bound:
    """Returns the bound of one prompt of `prompt_tokens`, padded to `bucket`, which is run alone.

    One row cannot be divided over devices that hold rows: each computes all of it, except what `tensor` and the
    experts divide. Scores are those of the whole square, in float32, and go through HBM.
    """
    c = placed.network.model
    parts = flops.forward(placed.network, Work(bucket, bucket**2, 1))
    one = _pass(placed, DECODE, _weights(placed, DECODE), 1, bucket, 1, parts)
    scores = 8.0 * bucket**2 * c.num_attention_heads * c.num_hidden_layers / placed.sizes["tensor"]
    work = dataclasses.replace(flops.of_samples([prompt_tokens]), read=1)
    return _forward_bound(placed, one, flops.forward(placed.network, work).total, scores)


def decode_step(placed: Placed, slots: int, context: float) -> Bound:
    """Returns the bound of one token in each of `slots` slots, of which the busy ones see `context` rows in all."""
    return rollout(placed, Occupancy(slots, slots, *(np.array([value]) for value in (1, slots, context))))


def rollout(placed: Placed, occupancy: Occupancy) -> Bound:
    """Returns the bound of all decode steps of a rollout. Idle slots are computed too, and see nothing."""
    network, slots = placed.network, occupancy.slots
    width, c = placed.compute_bytes, network.model
    weights = _weights(placed, DECODE)
    step, one = (
        _pass(placed, DECODE, weights, slots, 1, 1, flops.forward(network, Work(slots, pairs, slots), absorbed=True))
        for pairs in (0, 1)
    )
    ways = slots / step.tokens  # devices over which the slots are divided
    row = rounded(c.kv_lora_rank + c.qk_rope_head_dim) if c.is_mla else 2 * c.num_key_value_heads * rounded(c.head_dim)
    (heads,) = dividing_axes(("heads",), (1 if c.is_mla else c.num_key_value_heads,), placed.mesh, DECODE)
    row_bytes = c.num_hidden_layers * row * width / math.prod(placed.sizes[name] for name in heads)
    logits = 8.0 * step.tokens * (network.compute.vocab_used or c.vocab_size) / placed.sizes["tensor"]
    base = _forward_bound(placed, step, 0.0, logits + step.tokens * row_bytes)  # the new rows are written
    busy = float((occupancy.steps * occupancy.busy).sum())
    seen = float((occupancy.steps * occupancy.context).sum())
    needed = flops.forward(network, Work(busy, seen, busy)).total  # absorbed scores take more than the model needs
    return bound(
        placed,
        base.flops + (one.scores - step.scores) * occupancy.context,
        base.hbm_bytes + row_bytes / ways * occupancy.context,
        base.ici_bytes + 0.0 * occupancy.context,
        model_flops=needed,
        times=occupancy.steps,
    )


def reshard(placed: Placed, param_dtype: str) -> Bound:
    """Returns the bound of the copy of the trainer's weights in the sampler's layout, on the same devices."""
    sizes, width, read, written, received = placed.sizes, placed.compute_bytes, 0.0, 0.0, 0.0
    specs = decoder.specs(placed.network.model, placed.network.scalar_head)
    for spec in jax.tree.leaves(specs, is_leaf=sharding.is_spec):
        held, wanted = (
            math.prod(spec.shape)
            / math.prod(sizes[n] for names in dividing_axes(spec.axes, spec.shape, placed.mesh, rules) for n in names)
            for rules in (TRAIN, DECODE)
        )
        read, written = read + held * _SIZES[param_dtype], written + wanted * width
        received += max(wanted - held, 0.0) * width
    return bound(placed, 0.0, read + written, received)
