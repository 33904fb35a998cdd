"""Next-token cross-entropy on packed rows, over the tokens the mask selects."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.data.packing import PackItem, pack, pack_batch, spread
from r1jax.models import decoder, logprobs
from r1jax.schema import Network, PackConfig
from r1jax.train import step


def make_loss(network: Network, trained_chunk: int = 0) -> step.Loss:
    """Returns the loss: minus the sum of weight * log p, weight 1 / (all trained tokens of the update).

    The balance and multi-token prediction losses of config.auxiliary are added. `trained_chunk` is that of
    `logprobs.scored_logprobs`.
    """

    def loss(params: decoder.Params, micro: dict[str, jax.Array], inverse_tokens: jax.Array):
        hidden, _, auxiliary = decoder.forward(params, micro["tokens"], micro["positions"], micro["segments"], network)
        matrix, mask = decoder.unembedding(params), micro["loss_mask"]
        how = logprobs.settings(network.compute)
        logp, _ = logprobs.scored_logprobs(hidden, matrix, micro["targets"], mask, trained_chunk=trained_chunk, **how)
        weights = micro["loss_mask"] * inverse_tokens
        extra, stats = step.auxiliary_loss(params, hidden, auxiliary, micro, weights, network)
        with jax.named_scope("loss"):
            return extra - jnp.sum(logp * micro["loss_mask"]) * inverse_tokens, stats

    return loss


def example(prompt_ids: Sequence[int] | np.ndarray, response_ids: Sequence[int] | np.ndarray) -> PackItem:
    """Returns one training example of which only the response tokens are trained."""
    tokens = np.asarray([*prompt_ids, *response_ids], np.int32)
    mask = np.zeros(len(tokens), np.float32)
    mask[len(prompt_ids) :] = 1.0
    return PackItem(tokens, mask)


def make_batch(
    items: Sequence[PackItem],
    size: PackConfig,
    micro_batches: int,
    rows: list[list[int]] | None = None,
    shards: int = 1,
) -> tuple[dict, int, np.float32]:
    """Returns (arrays [M, R, T], filled micro-batches, 1 / trained tokens) of one update.

    `rows` are the items of each row, packed here by default; `shards` is the result of `sharding.row_shards`.
    """
    lengths = [len(item.tokens) for item in items]
    rows = pack(lengths, size.row_tokens) if rows is None else rows
    rows = spread(rows, lengths, size.rows_per_micro_batch, shards)
    packed = pack_batch(items, size.row_tokens, micro_batches * size.rows_per_micro_batch, rows)
    arrays = step.batch_arrays(packed, size, micro_batches, ())
    inverse = np.float32(1.0 / max(float(packed.loss_mask.sum()), 1.0))
    return arrays, step.filled_micro_batches(packed, size), inverse
