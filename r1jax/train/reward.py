"""The losses of reward models on packed rows: pairs by Bradley-Terry, labels by cross-entropy, read at end tokens.

The responses of a pair may be anywhere in the rows of one micro-batch. At a token where a score is read, `unit` is the
number of its unit (a pair or a labelled response), counted from 1 in each micro-batch, and `positive` is whether it is
the chosen or safe one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from r1jax.data.packing import PackedBatch, PackItem, pack, pack_batch, spread
from r1jax.models import decoder
from r1jax.schema import Network, PackConfig
from r1jax.train import step

UNIT, POSITIVE, FEATURES = "unit", "positive", "features"


@dataclass(frozen=True, eq=False)
class Unit:
    """The input of one term of the loss: (chosen, rejected), or one labelled response."""

    sequences: tuple[np.ndarray, ...]  # int32 [n] each, ending in the end token
    positive: tuple[bool, ...]  # chosen or safe
    features: tuple[np.ndarray, ...] = ()  # [n, D] each: outputs of frozen blocks, where there are any


@struct.dataclass
class RewardLossArguments:
    """Weights of the loss's terms, float32 scalars; all terms of a kind weigh the same."""

    per_unit: jax.Array | np.float32  # 1 / pairs or labelled responses of the update
    per_token: jax.Array | np.float32  # 1 / tokens of the update, for the balance loss


@jax.named_scope("loss")
def pairwise(margins: jax.Array) -> jax.Array:
    """Returns -log sigmoid(s_chosen - s_rejected) of score margins.

    Source: Bradley-Terry; DeepSeek-R1, appendix B.3 (pairwise, form not printed); the loss of TRL's RewardTrainer.
    """
    return jax.nn.softplus(-margins)


@jax.named_scope("loss")
def pointwise(scores: jax.Array, positive: jax.Array) -> jax.Array:
    """Returns the binary cross-entropy of sigmoid(score) with the label, in nats (DeepSeek-R1, B.3, pointwise)."""
    return jax.nn.softplus(jnp.where(positive, -scores, scores))


def make_loss(network: Network, kind: str) -> step.Loss:
    """Returns the loss of kind helpful (pairs) or safety (labels); its statistic `correct` is the accuracy."""

    def loss(params: decoder.Params, micro: dict[str, jax.Array], arguments: RewardLossArguments):
        tokens, positions, segments = (micro[name] for name in ("tokens", "positions", "segments"))
        features = micro.get(FEATURES)
        hidden, _, auxiliary = decoder.forward(params, tokens, positions, segments, network, features=features)
        scores, unit, positive = decoder.scalars(params, hidden), micro[UNIT], micro[POSITIVE] == 1
        if kind == "helpful":
            scores, counted = _margins(scores, unit, positive)
            terms = pairwise(scores)
        else:
            counted, terms = unit > 0, pointwise(scores, positive)
            scores = jnp.where(positive, scores, -scores)
        weights = (segments > 0) * arguments.per_token
        extra, stats = step.auxiliary_loss(params, hidden, auxiliary, micro, weights, network)
        stats["correct"] = jnp.sum(counted * (scores > 0)) * arguments.per_unit
        return extra + jnp.sum(counted * terms) * arguments.per_unit, stats

    return loss


@jax.named_scope("loss")
def _margins(scores: jax.Array, unit: jax.Array, positive: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (score of chosen - score of rejected, whether the pair exists), indexed by pair number - 1."""
    room = scores.size // 2 + 1  # a pair has at least two tokens
    number, signed = jnp.maximum(unit, 0).reshape(-1), jnp.where(positive, scores, -scores).reshape(-1)
    signed = jnp.where(number > 0, signed, 0)
    margins = jax.ops.segment_sum(signed, number, num_segments=room)[1:]
    return margins, jnp.arange(1, room) <= jnp.max(number)


def fits(unit: Unit, size: PackConfig) -> bool:
    """Returns whether a unit fits one micro-batch."""
    lengths = [len(ids) for ids in unit.sequences]
    return max(lengths) <= size.row_tokens and len(pack(lengths, size.row_tokens)) <= size.rows_per_micro_batch


def micro_batches(units: Sequence[Unit], size: PackConfig) -> list[list[int]]:
    """Returns the indices of the units of each micro-batch, in order; each takes as many whole units as fit."""
    groups: list[list[int]] = []
    lengths: list[int] = []
    for number, unit in enumerate(units):
        added = [len(ids) for ids in unit.sequences]
        if not groups or len(pack(lengths + added, size.row_tokens)) > size.rows_per_micro_batch:
            groups.append([])
            lengths = []
        groups[-1].append(number)
        lengths += added
    return groups


def make_batch(
    units: Sequence[Unit], size: PackConfig, room: int, shards: int = 1
) -> tuple[dict[str, np.ndarray], int, RewardLossArguments]:
    """Returns (arrays [M, R, T], filled micro-batches, arguments) of one update; `room` is M.

    `shards` is the result of `sharding.row_shards`.
    """
    groups = micro_batches(units, size)
    items: list[PackItem] = []
    rows: list[list[int]] = []
    for group in groups:
        first = len(items)
        for number, index in enumerate(group, 1):
            items += _items(units[index], number)
        lengths = [len(item.tokens) for item in items[first:]]
        placed = spread(pack(lengths, size.row_tokens), lengths, size.rows_per_micro_batch, shards)
        placed += [[]] * (size.rows_per_micro_batch - len(placed))
        rows += [[first + index for index in row] for row in placed]
    packed: PackedBatch = pack_batch(items, size.row_tokens, room * size.rows_per_micro_batch, rows)
    tokens = sum(len(item.tokens) for item in items)
    arguments = RewardLossArguments(np.float32(1 / len(units)), np.float32(1 / tokens))
    return step.batch_arrays(packed, size, room, ()), len(groups), arguments


def _items(unit: Unit, number: int) -> list[PackItem]:
    items = []
    for place, (ids, positive) in enumerate(zip(unit.sequences, unit.positive, strict=True)):
        read, side = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
        read[-1], side[-1] = number, positive
        inputs = {UNIT: read, POSITIVE: side} | ({FEATURES: unit.features[place]} if unit.features else {})
        items.append(PackItem(ids, np.zeros(len(ids), np.float32), inputs=inputs))
    return items
