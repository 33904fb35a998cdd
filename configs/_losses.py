"""The named policy objectives: the fields that `--config.grpo.preset=NAME` sets, with their sources.

A preset sets the fields of the loss, not batch sizes, lengths or rates. If a source does not give a value, it is
r1_paper's or the library's default, as the comment notes.
"""

from typing import Any

from r1jax.schema import GRPOConfig

FIELDS = (
    "clip_ratio",
    "kl_coef",
    "kl_coef_schedule",
    "aggregation",
    "length_divisor",
    "advantage_epsilon",
    "truncated",
    "advantage",
    "advantage_ddof",
    "advantage_guard",
    "singleton",
    "denominator",
    "ratio",
    "surrogate",
    "clip_ratio_high",
    "dual_clip",
    "ratio_cap",
    "sapo_temperatures",
    "log_ratio_clamp",
    "kl_estimator",
    "kl_log_ratio_clamp",
    "kl_placement",
    "entropy_coef",
    "old_logp",
    "mismatch",
    "mismatch_threshold",
    "off_policy_threshold",
    "dynamic_sampling_rounds",
    "overlong_buffer_fraction",
)
_CHANGES: dict[str, dict[str, Any]] = {
    # DeepSeek-R1 (arXiv 2501.12948), eq. 1-3, section 3.2.1.
    "r1_paper": {},
    # arXiv 2402.03300, eq. 3 and section 4.2; epsilon is not stated there: 0.2.
    "deepseekmath": dict(clip_ratio=0.2, kl_coef=0.04),
    # arXiv 2503.14476: eq. 8-13 and section 4.1 (buffer 4,096 of 20,480); resampling has no bound there, here 4 rounds.
    "dapo": dict(
        clip_ratio=0.2,
        clip_ratio_high=0.28,
        kl_coef=0.0,
        aggregation="token_mean",
        denominator="trained",
        dynamic_sampling_rounds=4,
        overlong_buffer_fraction=0.2,
    ),
    # arXiv 2503.20783, section 3.2: no division by the length or by the deviation, no KL; epsilon 0.2.
    "dr_grpo": dict(clip_ratio=0.2, kl_coef=0.0, advantage="mean", aggregation="seq_mean_token_sum"),
    # arXiv 2507.18071, eq. 5-7 and section 5.1; no KL term there.
    "gspo": dict(clip_ratio=3e-4, clip_ratio_high=4e-4, kl_coef=0.0, ratio="sequence"),
    # MiniMax-M1 (arXiv 2506.13585), eq. 4-5: no lower bound, no KL; the upper bound is not stated: 5, as TRL advises.
    "cispo": dict(
        clip_ratio=1.0,
        clip_ratio_high=4.0,
        kl_coef=0.0,
        surrogate="cispo",
        aggregation="token_mean",
        denominator="trained",
    ),
    # arXiv 2402.14740, eq. 8: REINFORCE on sums over the tokens of a sequence, the KL term in the reward. Coefficient
    # and clip are those of TRL's RLOOConfig.
    "rloo": dict(
        clip_ratio=0.2,
        kl_coef=0.05,
        kl_placement="reward",
        advantage="leave_one_out",
        aggregation="seq_mean_token_sum",
        length_divisor=1,
    ),
    # trl/trainer/grpo_config.py of 1.16.0: loss_type dapo, scale_rewards group, beta 0, and with a sampler of its own
    # vllm_importance_sampling_mode sequence_mask at 3.
    "trl_default": dict(
        clip_ratio=0.2,
        kl_coef=0.0,
        advantage_ddof=1,
        advantage_epsilon=1e-4,
        aggregation="token_mean",
        denominator="trained",
        kl_estimator="k3_weighted",
        old_logp="recomputed",
        mismatch="sequence_mask",
        mismatch_threshold=3.0,
    ),
    # verl/trainer/ppo/core_algos.py at 1dda039: compute_policy_loss_vanilla, agg_loss token-mean, no KL, dual clip 3.
    "verl_default": dict(
        clip_ratio=0.2,
        kl_coef=0.0,
        advantage_ddof=1,
        singleton="reward",
        aggregation="token_mean",
        denominator="trained",
        dual_clip=3.0,
        log_ratio_clamp=20.0,
        kl_estimator="k3_clamped",
        old_logp="recomputed",
    ),
    # tunix/rl/grpo/grpo_learner.py and algo_core.py of 0.1.7: k1 in the loss at beta 0.04, means over non-empty rows.
    "tunix_default": dict(
        clip_ratio=0.2,
        kl_coef=0.04,
        advantage_ddof=1,
        denominator="trained",
        log_ratio_clamp=20.0,
        kl_estimator="k1",
        old_logp="rollout",
    ),
}
_BASE = {name: getattr(GRPOConfig(), name) for name in FIELDS}
PRESETS = {name: _BASE | changes for name, changes in _CHANGES.items()}


def grpo(preset: str, **changes) -> GRPOConfig:
    """Returns the group-relative config with the loss of `preset`; `changes` win over it."""
    fields: dict[str, Any] = PRESETS[preset] | {"preset": preset} | changes
    return GRPOConfig(**fields)
