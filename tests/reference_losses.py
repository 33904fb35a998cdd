"""Policy objectives in float64 NumPy, sample by sample, from the papers and from the peers' files that each names.

Nothing of r1jax is imported. A sample is a dict: `logp`, `old`, `behaviour`, `reference`, `entropy` (one number a response
token each), `advantage` and `trained`. `frozen` stands in for `logp` wherever a source takes no gradient, so that
central differences over `logp` give the gradient of the source's loss.
"""

import numpy as np


def k3(sample, bound=20.0):
    """k3 of arXiv 2402.03300, eq. 4; a log-ratio above the bound counts as the bound (ours: the sources have none)."""
    gap = np.minimum(sample["reference"] - sample["logp"], bound)
    return np.exp(gap) - gap - 1


def ppo(ratio, advantage, low, high):
    return np.minimum(ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage)


def ratios(sample, old="behaviour", bound=np.inf):
    return np.exp(np.clip(sample["logp"] - sample[old], -bound, bound))


def mean_of_means(samples, value, rows):
    """1/N sum_i 1/L_i sum_t (arXiv 2402.03300, eq. 3)."""
    return sum(np.sum(value(s)) / len(s["logp"]) for s in samples if s["trained"]) / rows


def token_mean(samples, value):
    """sum over all trained tokens / their number (arXiv 2503.14476, eq. 8)."""
    trained = [s for s in samples if s["trained"]]
    return sum(np.sum(value(s)) for s in trained) / max(sum(len(s["logp"]) for s in trained), 1)


def r1_paper(samples, longest):
    """DeepSeek-R1, eq. 1-2, per token; epsilon 10, beta 0.001."""
    objective = lambda s: ppo(ratios(s), s["advantage"], 10, 10) - 0.001 * k3(s)  # noqa: E731
    return -mean_of_means(samples, objective, len(samples))


def deepseekmath(samples, longest):
    objective = lambda s: ppo(ratios(s), s["advantage"], 0.2, 0.2) - 0.04 * k3(s)  # noqa: E731
    return -mean_of_means(samples, objective, len(samples))


def dapo(samples, longest):
    return -token_mean(samples, lambda s: ppo(ratios(s), s["advantage"], 0.2, 0.28))


def dr_grpo(samples, longest):
    """arXiv 2503.20783: sums over tokens, divided by the number of samples and a constant length."""
    total = sum(np.sum(ppo(ratios(s), s["advantage"], 0.2, 0.2)) for s in samples if s["trained"])
    return -total / (len(samples) * longest)


def gspo(samples, longest):
    """arXiv 2507.18071, eq. 5-7: one ratio a sample, (pi / pi_old)^(1/L)."""
    total = 0.0
    for s in samples:
        if s["trained"]:
            ratio = np.exp(np.mean(s["logp"] - s["behaviour"]))
            total += ppo(ratio, s["advantage"], 3e-4, 4e-4)
    return -total / len(samples)


def cispo(samples, longest):
    """arXiv 2506.13585, eq. 4-5: the clipped ratio is a weight without gradient."""

    def objective(s):
        weight = np.minimum(np.exp(s["frozen"] - s["behaviour"]), 5.0)
        return weight * s["advantage"] * s["logp"]

    return -token_mean(samples, objective)


def rloo(samples, longest):
    """arXiv 2402.14740, eq. 8 on sums over tokens; the KL term stands in the reward."""
    total = sum(np.sum(ppo(ratios(s), s["advantage"], 0.2, 0.2)) for s in samples if s["trained"])
    return -total / len(samples)


def trl_default(samples, longest):
    """trl/trainer/grpo_trainer.py (1.16.0), _compute_loss: dapo, and sequence_mask at 3 with a separate sampler."""

    def objective(s):
        gap = np.exp(np.sum(s["old"] - s["behaviour"]))
        return ppo(ratios(s, "old"), s["advantage"], 0.2, 0.2) * (gap if gap <= 3 else 0.0)

    return -token_mean(samples, objective)


def verl_default(samples, longest):
    """verl/trainer/ppo/core_algos.py (1dda039), compute_policy_loss_vanilla: dual clip at 3, log-ratio within 20."""

    def loss(s):
        ratio, a = ratios(s, "old", 20), s["advantage"]
        plain = np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.2))
        return np.minimum(plain, -3.0 * a) if a < 0 else plain

    return token_mean(samples, loss)


def tunix_default(samples, longest):
    """tunix/rl/algo_core.py (0.1.7), grpo_loss_fn, and aggregate_loss in common.py: means over rows with a token."""
    rows = max(sum(s["trained"] for s in samples), 1)

    def loss(s):
        ratio, a = ratios(s, "behaviour", 20), s["advantage"]
        return np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.2)) + 0.04 * (s["logp"] - s["reference"])

    return mean_of_means(samples, loss, rows)


PRESETS = {f.__name__: f for f in (r1_paper, deepseekmath, dapo, dr_grpo, gspo, cispo, rloo)}
PRESETS |= {f.__name__: f for f in (trl_default, verl_default, tunix_default)}


# Single options on top of r1_paper, whose means they keep.


def _option(objective):
    def loss(samples, longest):
        return -mean_of_means(samples, objective, len(samples))

    return loss


def _sapo(s):
    """arXiv 2511.20347, eq. 5; TRL's loss_type sapo."""
    tau = 1.0 if s["advantage"] > 0 else 1.05
    return s["advantage"] * 4 / tau / (1 + np.exp(-tau * (ratios(s) - 1)))


def _two_sided(s):
    """trl/trainer/grpo_trainer.py, delta: the ratio of the unclipped term is bounded."""
    ratio, a = ratios(s), s["advantage"]
    return np.minimum(np.minimum(ratio, 3.0) * a, np.clip(ratio, -9, 11) * a)


def _sequence_token(s):
    """arXiv 2507.18071, eq. 14."""
    ratio = np.exp(np.mean(s["frozen"] - s["behaviour"]) + s["logp"] - s["frozen"])
    return ppo(ratio, s["advantage"], 10, 10)


def _off_policy(s):
    """trl/trainer/grpo_trainer.py, get_off_policy_mask."""
    kept = s["advantage"] >= 0 or np.mean(s["behaviour"] - s["frozen"]) <= 0.1
    return kept * ppo(ratios(s), s["advantage"], 10, 10)


def _mismatch(mode):
    """trl/trainer/grpo_trainer.py, vllm_importance_sampling_mode, bound 1.5."""

    def objective(s):
        gap = s["old"] - s["behaviour"]
        weight = np.exp(np.sum(gap) if mode.startswith("sequence") else gap)
        weight = np.minimum(weight, 1.5) if mode.endswith("truncate") else weight * (weight <= 1.5)
        return ppo(ratios(s, "old"), s["advantage"], 10, 10) * weight

    return objective


def _with_kl(kl):
    return lambda s: ppo(ratios(s), s["advantage"], 10, 10) - 0.5 * kl(s)


def _clamped(s):
    """verl/trainer/ppo/core_algos.py, kl_penalty_forward low_var_kl."""
    gap = np.clip(s["reference"] - s["logp"], -20, 20)
    return np.clip(np.exp(gap) - gap - 1, -10, 10)


def _straight_through(s):
    """verl's k3+: the value of k3, the gradient of k2."""
    gap, k2 = np.minimum(s["reference"] - s["frozen"], 20), lambda logp: (logp - s["reference"]) ** 2 / 2
    return np.exp(gap) - gap - 1 + k2(s["logp"]) - k2(s["frozen"])


KLS = {
    "k1": lambda s: s["logp"] - s["reference"],
    "k2": lambda s: (s["logp"] - s["reference"]) ** 2 / 2,
    "k3": k3,
    "k3_clamped": _clamped,
    "k3_weighted": lambda s: ratios(s) * k3(s),  # DeepSeek-V3.2, arXiv 2512.02556
    "k3_straight_through": _straight_through,
}
NONE = dict(kl_coef=0.0)
OPTIONS = [  # (fields of the config, loss)
    (NONE | dict(surrogate="sapo"), _option(_sapo)),
    (NONE | dict(ratio_cap=3.0), _option(_two_sided)),
    (NONE | dict(ratio="sequence_token"), _option(_sequence_token)),
    (NONE | dict(off_policy_threshold=0.1), _option(_off_policy)),
    *(
        (NONE | dict(old_logp="recomputed", mismatch=mode, mismatch_threshold=1.5), _option(_mismatch(mode)))
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
    *((dict(kl_coef=0.5, kl_estimator=name), _option(_with_kl(kl))) for name, kl in KLS.items()),
    (
        NONE | dict(entropy_coef=0.3),
        _option(lambda s: ppo(ratios(s), s["advantage"], 10, 10) + 0.3 * s["entropy"]),
    ),
    (
        NONE | dict(aggregation="token_sum"),
        lambda samples, longest: -sum(np.sum(ppo(ratios(s), s["advantage"], 10, 10)) for s in samples if s["trained"]),
    ),
]


def gradient(loss, samples, longest, step=1e-6):
    """Returns d loss / d logp of every sample, by central differences."""
    grads = []
    for index, sample in enumerate(samples):
        grad = np.zeros(len(sample["logp"]))
        for token in range(len(grad)):
            sides = []
            for sign in (1, -1):
                moved = [dict(s) for s in samples]
                moved[index]["logp"] = sample["logp"].copy()
                moved[index]["logp"][token] += sign * step
                sides.append(loss(moved, longest))
            grad[token] = (sides[0] - sides[1]) / (2 * step)
        grads.append(grad)
    return grads


# Advantages of one group, or of all groups where a source needs them.


def group_std(groups, ddof=0, epsilon=1e-6):
    """DeepSeek-R1, eq. 3."""
    return [(g - g.mean()) / (g.std(ddof=ddof) + epsilon) if np.ptp(g) else g * 0 for g in groups]


def batch_std(groups, epsilon=1e-4):
    """trl/trainer/grpo_trainer.py, scale_rewards="batch"."""
    deviation = np.concatenate(groups).std(ddof=1)
    return [(g - g.mean()) / (deviation + epsilon) for g in groups]


def leave_one_out(groups):
    """arXiv 2402.14740, eq. 8."""
    return [np.asarray([r - np.delete(g, i).mean() for i, r in enumerate(g)]) for g in groups]


def per_reward(groups, weights, epsilon=1e-4):
    """trl/trainer/grpo_trainer.py, multi_objective_aggregation="normalize_then_sum"; groups are [G, terms]."""
    sums = [((g - g.mean(0)) / (g.std(0, ddof=1) + epsilon)) @ weights for g in groups]
    every = np.concatenate(sums)
    return [(s - every.mean()) / (every.std(ddof=1) + epsilon) for s in sums]


ADVANTAGES = {
    **dict.fromkeys(("r1_paper", "deepseekmath", "dapo", "gspo", "cispo"), group_std),
    "dr_grpo": lambda groups: [g - g.mean() for g in groups],
    "rloo": leave_one_out,
    "trl_default": lambda groups: group_std(groups, 1, 1e-4),
    "verl_default": lambda groups: group_std(groups, 1, 1e-6),
    "tunix_default": lambda groups: group_std(groups, 1, 1e-6),
}
