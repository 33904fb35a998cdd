"""The GRPO objective as a sum over tokens; aggregation is in each token's weight."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from r1jax.kernels.fused_logprob import token_logprobs
from r1jax.models import decoder
from r1jax.rl.logprobs import replayed_experts
from r1jax.schema import GRPOConfig, ModelConfig
from r1jax.train import step

FIELDS = ("advantage", "behaviour_logp", "reference_logp", "weight")  # per-token values of an RL batch


@struct.dataclass
class LossArguments:
    """What may change between rollouts without compiling again; float32 scalars."""

    clip_ratio: jax.Array  # epsilon; may exceed 1
    kl_coef: jax.Array  # beta
    temperature: jax.Array  # log-probs are of logits / temperature


def k3_kl(logp: jax.Array, reference_logp: jax.Array) -> jax.Array:
    """Returns the per-token K3 estimate of KL(policy || reference) in nats: u - ln u - 1 with u = reference / policy.

    Never negative, and unbiased for samples from the policy. Source: DeepSeek-R1, eq. 2 (arXiv 2402.03300, eq. 4).
    """
    log_ratio = reference_logp - logp
    return jnp.expm1(log_ratio) - log_ratio


def clipped_surrogate(ratio: jax.Array, advantage: jax.Array, clip_ratio: jax.Array) -> jax.Array:
    """Returns min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) per token. Source: DeepSeek-R1, eq. 1."""
    clipped = jnp.clip(ratio, 1 - clip_ratio, 1 + clip_ratio)
    return jnp.minimum(ratio * advantage, clipped * advantage)


def token_weights(lengths: Sequence[int], config: GRPOConfig, max_new_tokens: int) -> np.ndarray:
    """Returns the weight of every response token of each sample in a mini-batch, float32 [N].

    seq_mean_token_mean: 1 / (N * length) (DeepSeekMath eq. 3); token_mean: 1 / all tokens (DAPO eq. 8);
    seq_mean_token_sum: 1 / (N * a constant length) (Dr. GRPO).
    """
    sizes = np.maximum(np.asarray(lengths, np.float64), 1)
    if config.aggregation == "seq_mean_token_mean":
        weights = 1 / (len(sizes) * sizes)
    elif config.aggregation == "token_mean":
        weights = np.full(len(sizes), 1 / sizes.sum())
    else:
        weights = np.full(len(sizes), 1 / (len(sizes) * (config.length_divisor or max_new_tokens)))
    return weights.astype(np.float32)


def make_loss(model: ModelConfig, chunk_tokens: int = 0) -> step.Loss:
    """Returns the GRPO loss of a micro-batch: sum of weight * (k3 KL * beta - surrogate), and its statistics.

    With a multi-token prediction module in training, its loss moves that module alone.
    """

    def loss(params: decoder.Params, micro: dict[str, jax.Array], arguments: LossArguments):
        experts = replayed_experts(micro)
        hidden, _, auxiliary = decoder.forward(
            params, micro["tokens"], micro["positions"], micro["segments"], model, experts=experts
        )
        logp, entropy = token_logprobs(
            hidden, decoder.unembedding(params), micro["targets"], arguments.temperature, chunk_tokens
        )
        mask = micro["loss_mask"]
        difference = jnp.where(mask > 0, logp - micro["behaviour_logp"], 0)
        ratio = jnp.exp(difference)
        surrogate = clipped_surrogate(ratio, micro["advantage"], arguments.clip_ratio)
        kl = jnp.where(mask > 0, k3_kl(logp, micro["reference_logp"]), 0)
        total = jnp.sum(mask * micro["weight"] * (arguments.kl_coef * kl - surrogate))
        clipped = surrogate < ratio * micro["advantage"]
        stats = {
            "tokens": jnp.sum(mask),
            "packed_tokens": jnp.sum(micro["segments"] > 0).astype(jnp.float32),  # prompts included
            "kl": jnp.sum(mask * kl),
            "entropy": jnp.sum(mask * entropy),
            "clip_fraction": jnp.sum(mask * clipped),
            "importance_ratio": jnp.sum(mask * ratio),  # to the weights that drew the tokens
            "max_logprob_difference": jnp.max(jnp.abs(difference)),
            "mean_logprob_difference": jnp.sum(mask * jnp.abs(difference)),
            "max_ratio": jnp.max(jnp.where(mask > 0, ratio, 0)),
        }
        if experts is not None:
            stats["routing_disagreement"] = jnp.sum(mask * jnp.mean(auxiliary.differs, axis=0))
        extra, told = step.auxiliary_loss(
            params, hidden, auxiliary, micro, mask * micro["weight"], model, head_alone=True
        )
        return total + extra, stats | told

    return loss


TOKEN_MEANS = (  # statistics to divide by `tokens`
    "kl",
    "entropy",
    "clip_fraction",
    "importance_ratio",
    "mean_logprob_difference",
    "routing_disagreement",
)
