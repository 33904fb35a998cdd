"""The policy objective as a sum over tokens, in the named variants of the field; aggregation is in each token's weight.

Every function is pure: arrays [rows, tokens] in, arrays out. `segments` number the samples of a packed row from 1, so a
row may hold one sample (padded form) or many. `mask` is 1 at the response tokens that are trained.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from r1jax.data.packing import PREFIXES
from r1jax.models import decoder, logprobs
from r1jax.rl.logprobs import replayed_experts
from r1jax.schema import GRPOConfig, Network
from r1jax.train import step

LARGEST_LOG_RATIO = 80.0  # nats; float32 holds exp(88)
K1_WARNING = (
    "grpo.kl_estimator=k1 in the loss does not pull towards the reference: on samples of the policy the expected "
    "gradient of log p - log p_ref is 0; k3 (r1_paper) or k2 do, and k1 does in the reward"
)


@struct.dataclass
class PolicyLossArguments:
    """Numbers of the policy's loss that may change between rollouts without compiling again; float32 scalars."""

    clip_ratio: jax.Array | np.float32  # epsilon, of the lower bound; may exceed 1
    clip_ratio_high: jax.Array | np.float32  # epsilon of the upper bound
    kl_coef: jax.Array | np.float32  # beta
    temperature: jax.Array | np.float32  # log-probs are of logits / temperature


def arguments(config: GRPOConfig, kl_coef: float, temperature: float) -> PolicyLossArguments:
    """Returns the arguments of a rollout; temperature 0 (greedy) counts as 1."""
    values = (config.clip_ratio, config.clip_ratio_high or config.clip_ratio, kl_coef, temperature or 1.0)
    return PolicyLossArguments(*(np.float32(value) for value in values))


def k1_in_loss(config: GRPOConfig) -> bool:
    """Returns whether K1_WARNING is due."""
    return config.uses_reference and config.kl_estimator == "k1" and config.kl_placement == "loss"


def fields(config: GRPOConfig) -> tuple[str, ...]:
    """Returns the names of the per-token values of an RL batch."""
    recomputed = ("old_logp",) if config.old_logp == "recomputed" else ()
    reference = ("reference_logp",) if config.uses_reference else ()
    return ("advantage", "behaviour_logp", *recomputed, *reference, "weight")


def over_samples(values: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns at each token the sum of `values` over the tokens of its sample, [rows, tokens]; 0 at padding."""
    bound = segments.shape[-1] + 1  # a row of T tokens holds at most T samples
    sums = jax.vmap(lambda value, segment: jax.ops.segment_sum(value, segment, num_segments=bound))(values, segments)
    return jnp.where(segments > 0, jnp.take_along_axis(sums, segments, axis=-1), 0)


def sample_means(values: jax.Array, mask: jax.Array, segments: jax.Array) -> jax.Array:
    """Returns at each token the mean of `values` over the trained tokens of its sample, [rows, tokens]."""
    return over_samples(mask * values, segments) / jnp.maximum(over_samples(mask, segments), 1)


def kl_divergence(
    logp: jax.Array, reference_logp: jax.Array, estimator: str, ratio: jax.Array | None = None, clamp: float = 0.0
) -> jax.Array:
    """Returns the per-token estimate of KL(policy || reference) in nats, [rows, tokens].

    With d = reference - policy log-prob: k1 is -d, k2 d^2 / 2, k3 exp(d) - 1 - d, which is never negative and unbiased
    for samples of the policy (DeepSeek-R1, eq. 2; arXiv 2402.03300, eq. 4). k3_clamped bounds d to 20 and the value to
    10 either way (verl's low_var_kl); k3_weighted multiplies by the `ratio`, which keeps it unbiased for samples of an
    older policy (DeepSeek-V3.2, arXiv 2512.02556); k3_straight_through has k3's value and k2's gradient (verl's k3+).
    In k3 a d above `clamp` counts as `clamp` and has no gradient, so that exp(d) cannot overflow; 0 is off.
    """
    difference = reference_logp - logp
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return jnp.square(difference) / 2
    if estimator == "k3_clamped":
        difference = jnp.clip(difference, -20.0, 20.0)
        return jnp.clip(jnp.expm1(difference) - difference, -10.0, 10.0)
    held = jnp.minimum(difference, clamp) if clamp else difference
    k3 = jnp.expm1(held) - held
    if estimator == "k3_weighted":
        assert ratio is not None
        return ratio * k3
    if estimator == "k3_straight_through":
        k2 = jnp.square(difference) / 2
        return k2 + jax.lax.stop_gradient(k3 - k2)
    return k3


def kl_clamped(logp: jax.Array, reference_logp: jax.Array, config: GRPOConfig) -> jax.Array:
    """Returns the tokens at which `kl_divergence` bounds the log-ratio, bool [rows, tokens]."""
    difference = reference_logp - logp
    if config.kl_estimator == "k3_clamped":
        return jnp.abs(difference) > 20.0
    return difference > (config.kl_log_ratio_clamp or np.inf)


def importance_ratio(log_ratio: jax.Array, mask: jax.Array, segments: jax.Array, config: GRPOConfig) -> jax.Array:
    """Returns policy / old policy at each token, [rows, tokens]: of the token or of its whole sample.

    sequence is exp(mean log-ratio of the sample) (GSPO, arXiv 2507.18071, eq. 7); sequence_token has its value, and
    the gradient of each token's own log-prob (eq. 14). Where config.log_ratio_clamp is off the log-ratio is still
    bounded so that exp of it fits into float32: an infinite ratio times an advantage, or a gradient, of 0 is not a
    number.
    """
    bound = config.log_ratio_clamp or LARGEST_LOG_RATIO
    log_ratio = jnp.clip(log_ratio, -bound, bound)
    if config.ratio == "token":
        return jnp.exp(log_ratio)
    mean = sample_means(log_ratio, mask, segments)
    if config.ratio == "sequence":
        return jnp.exp(mean)
    return jnp.exp(jax.lax.stop_gradient(mean) + log_ratio - jax.lax.stop_gradient(log_ratio))


def clipped_surrogate(ratio: jax.Array, advantage: jax.Array, low, high) -> jax.Array:
    """Returns min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) per token. Source: DeepSeek-R1, eq. 1."""
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    return jnp.minimum(ratio * advantage, clipped * advantage)


def surrogate(ratio: jax.Array, logp: jax.Array, advantage: jax.Array, low, high, config: GRPOConfig) -> jax.Array:
    """Returns the per-token objective to maximise, [rows, tokens], of `config.surrogate`.

    - clip: `clipped_surrogate`; ratio_cap bounds the unclipped ratio (two-sided clipping, INTELLECT-2, arXiv
      2505.07291), dual_clip the objective from below at dual_clip * A where A < 0 (arXiv 1912.09729, eq. 5)
    - cispo: stop_gradient(clip(ratio, 1 - low, 1 + high)) * A * logp (MiniMax-M1, arXiv 2506.13585, eq. 4-5)
    - sapo: A * 4 / tau * sigmoid(tau * (ratio - 1)), tau by the sign of A (arXiv 2511.20347, eq. 5)
    """
    if config.surrogate == "cispo":
        return jax.lax.stop_gradient(jnp.clip(ratio, 1 - low, 1 + high)) * advantage * logp
    if config.surrogate == "sapo":
        tau = jnp.where(advantage > 0, config.sapo_temperatures[0], config.sapo_temperatures[1])
        return advantage * jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau
    if config.ratio_cap:
        capped = jnp.minimum(ratio, config.ratio_cap)
        value = jnp.minimum(capped * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)
    else:
        value = clipped_surrogate(ratio, advantage, low, high)
    if config.dual_clip:
        value = jnp.where(advantage < 0, jnp.maximum(value, config.dual_clip * advantage), value)
    return value


def _clipped(value, ratio, advantage, arguments: PolicyLossArguments, config: GRPOConfig) -> jax.Array:
    """Returns the tokens at which a bound took effect: the objective's, or for cispo and sapo the ratio's."""
    if config.surrogate == "clip":
        return value != ratio * advantage
    return (ratio < 1 - arguments.clip_ratio) | (ratio > 1 + arguments.clip_ratio_high)


def mismatch_weights(old_logp: jax.Array, behaviour_logp: jax.Array, mask, segments, config: GRPOConfig) -> jax.Array:
    """Returns the weight of each token for trainer / sampler probabilities that differ, [rows, tokens], no gradient.

    The weight is exp(trainer's - sampler's log-prob) of the token, or of the sum over its sample; truncate bounds it by
    mismatch_threshold, mask sets it to 0 above (TRL's vllm_importance_sampling_mode; verl's rollout correction).
    """
    gap = jax.lax.stop_gradient(mask * (old_logp - behaviour_logp))
    if config.mismatch.startswith("sequence"):
        gap = over_samples(gap, segments)
    weight = jnp.exp(jnp.clip(gap, -20.0, 20.0))
    if config.mismatch.endswith("truncate"):
        return jnp.minimum(weight, config.mismatch_threshold)
    return jnp.where(weight <= config.mismatch_threshold, weight, 0.0)


def on_policy_enough(logp, behaviour_logp, advantage, mask, segments, config: GRPOConfig) -> jax.Array:
    """Returns 0 for samples of A < 0 whose mean log(sampler / policy) is above the bound, 1 for all others.

    Source: DeepSeek-V3.2, arXiv 2512.02556, section 3.1; as TRL's get_off_policy_mask.
    """
    drift = sample_means(jax.lax.stop_gradient(behaviour_logp - logp), mask, segments)
    return ((advantage >= 0) | (drift <= config.off_policy_threshold)).astype(jnp.float32)


def kl_term(
    logp, reference_logp, ratio, mask, arguments: PolicyLossArguments, config: GRPOConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (KL of each trained token, [rows, tokens], its statistics).

    Tokens that the loss leaves out (those not trained, and every token while beta is 0) are replaced before the
    estimate is made, so that they reach no gradient. The statistic `kl` covers the trained tokens whatever beta is.
    """
    kind, clamp = config.kl_estimator, config.kl_log_ratio_clamp
    fixed = jax.lax.stop_gradient(logp)
    trained = jnp.where(mask > 0, reference_logp, fixed)
    value = kl_divergence(fixed, trained, kind, jax.lax.stop_gradient(ratio), clamp)
    stats = {"kl": jnp.sum(mask * value)}
    if kind.startswith("k3"):
        stats["kl_clamped"] = jnp.sum(mask * kl_clamped(fixed, trained, config))
    used = (mask > 0) & (arguments.kl_coef > 0)
    return kl_divergence(jnp.where(used, logp, fixed), jnp.where(used, trained, fixed), kind, ratio, clamp), stats


@jax.named_scope("loss")
def policy_loss(
    logp: jax.Array,
    entropy: jax.Array,
    batch: dict[str, jax.Array],
    arguments: PolicyLossArguments,
    config: GRPOConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (sum over tokens of weight * loss, statistics) from the policy's log-probs and entropies [rows, tokens].

    `batch` has loss_mask, segments and `fields(config)`, [rows, tokens] each. The loss of a token is
    beta * KL - mismatch weight * surrogate - entropy_coef * entropy; the KL term is not weighted for the mismatch, and
    is left out with kl_placement=reward.
    Statistics are sums over the trained tokens, to be divided by `tokens`, and maxima (`max_...`).
    """
    mask, segments, advantage = batch["loss_mask"], batch["segments"], batch["advantage"]
    old = batch["old_logp"] if config.old_logp == "recomputed" else batch["behaviour_logp"]
    difference = jnp.where(mask > 0, logp - old, 0)
    ratio = importance_ratio(difference, mask, segments, config)
    value = surrogate(ratio, logp, advantage, arguments.clip_ratio, arguments.clip_ratio_high, config)
    clipped = _clipped(value, ratio, advantage, arguments, config)
    kl, stats = jnp.zeros_like(logp), {}
    if config.uses_reference:
        kl, kl_stats = kl_term(logp, batch["reference_logp"], ratio, mask, arguments, config)
        stats |= kl_stats
    if config.off_policy_threshold:
        kept = on_policy_enough(logp, batch["behaviour_logp"], advantage, mask, segments, config)
        value, stats["off_policy_kept"] = value * kept, jnp.sum(mask * kept)
    if config.mismatch != "none":
        weight = mismatch_weights(old, batch["behaviour_logp"], mask, segments, config)
        value, stats["mismatch_weight"] = value * weight, jnp.sum(mask * weight)
    per_token = arguments.kl_coef * kl - value if config.kl_placement == "loss" else -value
    if config.entropy_coef:
        per_token -= config.entropy_coef * entropy
    total = jnp.sum(mask * batch["weight"] * jnp.where(mask > 0, per_token, 0))
    to_sampler = (
        difference if config.old_logp != "recomputed" else jnp.where(mask > 0, logp - batch["behaviour_logp"], 0)
    )
    return total, stats | {
        "tokens": jnp.sum(mask),
        "entropy": jnp.sum(mask * jax.lax.stop_gradient(entropy)),
        "clip_fraction": jnp.sum(mask * clipped),
        "importance_ratio": jnp.sum(mask * ratio),  # to the old policy of `old_logp`
        "max_logprob_difference": jnp.max(jnp.abs(to_sampler)),
        "mean_logprob_difference": jnp.sum(mask * jnp.abs(to_sampler)),
        "max_ratio": jnp.max(jnp.where(mask > 0, ratio, 0)),
    }


TOKEN_MEANS = (  # statistics to divide by `tokens`
    *("kl", "kl_clamped", "entropy", "clip_fraction", "importance_ratio", "mismatch_weight", "off_policy_kept"),
    *("mean_logprob_difference", "routing_disagreement"),
)


def token_weights(
    lengths: Sequence[int] | np.ndarray, config: GRPOConfig, max_new_tokens: int, in_mean: Sequence[bool] | None = None
) -> np.ndarray:
    """Returns the weight of every response token of each sample in a mini-batch, float32 [N].

    seq_mean_token_mean: 1 / (N * length) (DeepSeekMath eq. 3); token_mean: 1 / all tokens (DAPO eq. 8);
    seq_mean_token_sum: 1 / (N * a constant length) (Dr. GRPO); token_sum: 1. N and all tokens are over the whole
    mini-batch, whatever devices and micro-batches it is cut into, and count the samples in `in_mean` (default all).
    """
    sizes = np.maximum(np.asarray(lengths, np.float64), 1)
    counts = np.ones(len(sizes), bool) if in_mean is None else np.asarray(in_mean, bool)
    number, tokens = max(int(counts.sum()), 1), max(float(sizes[counts].sum()), 1.0)
    if config.aggregation == "seq_mean_token_mean":
        weights = 1 / (number * sizes)
    elif config.aggregation == "token_mean":
        weights = np.full(len(sizes), 1 / tokens)
    elif config.aggregation == "token_sum":
        weights = np.ones(len(sizes))
    else:
        weights = np.full(len(sizes), 1 / (number * (config.length_divisor or max_new_tokens)))
    return weights.astype(np.float32)


def overlong_penalty(lengths: Sequence[int], config: GRPOConfig, max_new_tokens: int) -> np.ndarray:
    """Returns the length penalty that is added to each sample's reward, float32 [N] in [-1, 0].

    0 up to max_new_tokens - buffer, then falling linearly to -1 at max_new_tokens. Source: DAPO, eq. 13 (arXiv
    2503.14476).
    """
    buffer = round(config.overlong_buffer_fraction * max_new_tokens)
    if not buffer:
        return np.zeros(len(lengths), np.float32)
    over = np.asarray(lengths, np.float64) - (max_new_tokens - buffer)
    return -np.clip(over / buffer, 0, 1).astype(np.float32)


def make_loss(network: Network, config: GRPOConfig, chunk_tokens: int = 0, trained_chunk: int = 0) -> step.Loss:
    """Returns the loss of a micro-batch, `policy_loss` of the model's log-probs, and its statistics.

    With a multi-token prediction module in training, its loss moves that module alone. Chunks as in `scored_logprobs`.
    """

    def loss(params: decoder.Params, micro: dict[str, jax.Array], arguments: PolicyLossArguments):
        experts = replayed_experts(micro)
        hidden, _, auxiliary = decoder.forward(
            params,
            micro["tokens"],
            micro["positions"],
            micro["segments"],
            network,
            experts=experts,
            prefixes=micro.get(PREFIXES),
        )
        matrix, mask = decoder.unembedding(params), micro["loss_mask"]
        how = logprobs.settings(network.compute)
        logp, entropy = logprobs.scored_logprobs(
            hidden, matrix, micro["targets"], mask, arguments.temperature, chunk_tokens, trained_chunk, **how
        )
        total, stats = policy_loss(logp, entropy, micro, arguments, config)
        if experts is not None:
            assert auxiliary.differs is not None
            stats["routing_disagreement"] = jnp.sum(mask * jnp.mean(auxiliary.differs, axis=0))
        stats["packed_tokens"] = jnp.sum(micro["segments"] > 0).astype(jnp.float32)  # prompts included
        weights = micro["loss_mask"] * micro["weight"]
        extra, auxiliary_stats = step.auxiliary_loss(
            params, hidden, auxiliary, micro, weights, network, head_alone=True
        )
        return total + extra, stats | auxiliary_stats

    return loss
