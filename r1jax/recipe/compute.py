"""Compute spent by a stage in floating-point operations, counted from tokens: 2 per parameter forward, 6 for training.

Attention scores are left out, as is usual in the field (arXiv 2001.08361, section 2.1). Counts depend on tokens alone,
so they are the same on every machine.
"""

import dataclasses
from collections.abc import Sequence

from r1jax.core import sharding, tree
from r1jax.models import decoder
from r1jax.schema import GRPOConfig, Network


def active_parameters(network: Network) -> int:
    """Returns the number of parameters that one token uses: without unchosen experts and an idle prediction module."""
    model = network.model
    specs, layers = decoder.specs(model), model.num_moe_layers
    if not network.auxiliary.mtp_loss_weight:
        specs = dataclasses.replace(specs, mtp=None)
    elif layers:
        layers += model.num_nextn_predict_layers
    total = tree.count(sharding.abstract(specs, "float32"))
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    return total - max(model.n_routed_experts - model.num_experts_per_tok, 0) * expert * layers


def of_policy_training(rows: Sequence[dict], network: Network, grpo: GRPOConfig) -> float:
    """Returns the FLOPs of an RL run, from its metrics rows.

    Per parameter these are 2 for a sampled token, 6 for a trained one, and 2 for one scored by the reference or by the
    policy before its updates; prompts count in all but the first. A critic scores and is trained on the same tokens.
    """
    sampled = sum(row.get("sampled_tokens", row["tokens"]) for row in rows)
    packed = sum(row["packed_tokens"] for row in rows)
    scored = grpo.uses_reference + (grpo.old_logp == "recomputed")
    critic = 8.0 if grpo.advantage == "gae" else 0.0
    return active_parameters(network) * (2.0 * sampled + (6.0 + 2.0 * scored + critic) * packed)


def of_fine_tuning(tokens: int, network: Network) -> float:
    """Returns the FLOPs of training on `tokens` tokens."""
    return 6.0 * active_parameters(network) * tokens
