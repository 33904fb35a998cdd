"""Settings of reinforcement learning: groups, the policy's loss, a critic, stage 4's scenarios."""

from dataclasses import dataclass
from typing import Literal, get_args

from r1jax.schema.checks import Check, Checked, Schedule, above, at_least, rising, share

LossPreset = Literal[  # their values: configs/_losses.py
    "r1_paper",
    "deepseekmath",
    "dapo",
    "dr_grpo",
    "gspo",
    "cispo",
    "rloo",
    "trl_default",
    "verl_default",
    "tunix_default",
]
LOSS_PRESETS = get_args(LossPreset)


def _exponent(field: str) -> Check:
    return Check(
        field, lambda c: getattr(c, field) <= 80, "must be at most 80: float32 cannot hold the exp of more than 88"
    )


@dataclass(frozen=True)
class GRPOConfig(Checked):
    """Group-relative policy optimisation; the defaults are preset r1_paper (P2 eq. 1-3, section 3.2.1)."""

    group_size: int = 16  # G: samples per prompt
    prompts_per_update: int = 32  # 32 x 16 = 512 outputs per mini-batch
    updates_per_rollout: int = 16  # 8,192 outputs split into 16 mini-batches
    updates: int = 10400  # total policy updates
    clip_ratio: float = 10.0  # epsilon; may exceed 1
    kl_coef: float = 0.001  # beta, k3 estimator in the loss
    kl_coef_schedule: Schedule = ()
    reference_refresh_updates: int = 400  # 0 never refreshes
    rollouts_ahead: int = 0  # disaggregated: rollouts drawn while earlier ones are trained on; bounds the staleness
    offload_reference: bool = False  # keep the reference in host memory between uses
    aggregation: Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum", "token_sum"] = "seq_mean_token_mean"
    length_divisor: int = 0  # seq_mean_token_sum divides by this constant (Dr. GRPO); 0 is max_new_tokens
    advantage_epsilon: float = 1e-6  # added to the standard deviation of a group
    truncated: Literal["keep", "mask", "drop"] = (
        "keep"  # keep: scored (accuracy 0, format 0); mask: not trained on; drop: not in the group's statistics either
    )
    preset: LossPreset = "r1_paper"  # sets the fields below, kl_coef, clip_ratio and the three above
    advantage: Literal["group_std", "mean", "batch_std", "leave_one_out", "per_reward", "gae"] = (
        "group_std"  # gae: PPO with a critic (config.ppo)
    )
    advantage_ddof: int = 0  # 0: population standard deviation; 1: sample's
    advantage_guard: Literal["add", "max"] = "add"  # std + epsilon, or max(std, epsilon)
    singleton: Literal["zero", "reward"] = "zero"  # advantage of the only scorable sample of a group
    denominator: Literal["all", "trained", "signal"] = (
        "all"  # samples in the mean: all, or the trained ones; signal trains only on groups whose rewards differ
    )
    ratio: Literal["token", "sequence", "sequence_token"] = "token"
    surrogate: Literal["clip", "cispo", "sapo"] = "clip"
    clip_ratio_high: float = 0.0  # epsilon of the upper bound; 0 is clip_ratio
    dual_clip: float = 0.0  # for A < 0 the objective is at least dual_clip * A; 0 is off
    ratio_cap: float = 0.0  # two-sided clipping: bound of the unclipped ratio; 0 is off
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)  # for A > 0 and for A <= 0 (arXiv 2511.20347)
    log_ratio_clamp: float = 0.0  # bound of |log(policy / old policy)|; 0: only float32's range bounds it
    kl_estimator: Literal["k1", "k2", "k3", "k3_clamped", "k3_weighted", "k3_straight_through"] = "k3"
    kl_log_ratio_clamp: float = 20.0  # k3: log(reference / policy) of a token counts at most this; 0 is off
    kl_placement: Literal["loss", "reward"] = "loss"  # reward: subtract beta * k1 of its tokens from a sample's reward
    entropy_coef: float = 0.0  # entropy bonus, weighted like the objective
    old_logp: Literal["rollout", "recomputed"] = (
        "rollout"  # denominator of the ratio: the sampler's log-probs, or the trainer's before its first update
    )
    mismatch: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    mismatch_threshold: float = 2.0  # largest trainer / sampler probability that is not cut
    off_policy_threshold: float = 0.0  # samples of A < 0 further from the policy than this (nats a token) are masked
    routing_replay: bool = False  # update and reference send every token to the experts that the sampler chose
    replay_check_every: int = 0  # measure the mismatch without replay every this many rollouts; 0: never
    dynamic_sampling_rounds: int = 0  # at most this many rounds of prompts to replace groups whose rewards tie
    overlong_buffer_fraction: float = 0.0  # last part of max_new_tokens over which the reward falls by 1 (DAPO)

    checks = (
        *at_least(1, "group_size", "prompts_per_update", "updates_per_rollout", "updates"),
        *at_least(0, "rollouts_ahead", "clip_ratio_high", "ratio_cap", "log_ratio_clamp", "kl_coef", "length_divisor"),
        *at_least(0, "kl_log_ratio_clamp", "off_policy_threshold", "dynamic_sampling_rounds", "advantage_epsilon"),
        *at_least(0, "replay_check_every"),
        _exponent("log_ratio_clamp"),
        _exponent("kl_log_ratio_clamp"),
        *above(0, "clip_ratio", "mismatch_threshold"),
        Check("dual_clip", lambda c: not c.dual_clip or c.dual_clip > 1, "must be above 1, or 0 for off"),
        Check("advantage_ddof", lambda c: c.advantage_ddof in (0, 1), "must be 0 or 1"),
        Check("sapo_temperatures", lambda c: min(c.sapo_temperatures) > 0, "must be above 0"),
        *share("must be in [0, 1]", "overlong_buffer_fraction"),
        Check(
            "mismatch",
            lambda c: c.mismatch == "none" or c.old_logp == "recomputed",
            "needs old_logp=recomputed: the sampler's own log-probs have no mismatch",
        ),
        Check(
            "replay_check_every",
            lambda c: c.routing_replay or not c.replay_check_every,
            "needs routing_replay=true",
        ),
        Check(
            "dynamic_sampling_rounds",
            lambda c: not (c.dynamic_sampling_rounds and c.rollouts_ahead),
            "needs rollouts_ahead=0: which prompts the next rollout takes is known only when this one is drawn",
        ),
        rising("kl_coef_schedule"),
        Check(
            "kl_coef_schedule",
            lambda c: all(value >= 0 for _, value in c.kl_coef_schedule),
            ": a coefficient is below 0",
        ),
        Check(
            "kl_placement",
            lambda c: c.kl_placement == "loss" or c.advantage in ("gae", "mean", "leave_one_out"),
            "with advantage={c.advantage}: the deviation of the rewards would scale the KL term; use gae, mean or "
            "leave_one_out",
        ),
        Check(
            "denominator",
            lambda c: c.denominator != "signal" or c.advantage != "gae",
            "is of groups; with advantage=gae use trained",
        ),
    )

    @property
    def uses_reference(self) -> bool:
        """Whether any update has a KL term."""
        return self.kl_coef > 0 or any(value > 0 for _, value in self.kl_coef_schedule)


@dataclass(frozen=True)
class PPOConfig(Checked):
    """What PPO adds to GRPOConfig (grpo.advantage=gae): a critic of the policy's shape and its advantages (P2 A.3)."""

    gae_lambda: float = 1.0  # P2 A.3: 0.95 clearly below GRPO, 1.0 nearly level
    gamma: float = 1.0
    value_clip: float = 0.2  # clips a value's change in its loss to this; 0 is off
    critic_learning_rate: float = 0.0  # 0 is optimizer.learning_rate

    checks = (
        *share("must be in [0, 1]", "gae_lambda", "gamma"),
        *at_least(0, "value_clip", "critic_learning_rate"),
    )


@dataclass(frozen=True)
class ScenarioConfig(Checked):
    """Stage 4's general and safety prompts: only from one update on, as in the paper's last 400 of 1,700."""

    from_update: int = -1  # -1: never; takes effect at the first rollout that starts at or after it
    general_fraction: float = 0.2  # of the prompts from then on
    safety_fraction: float = 0.2
    helpful_model: str = ""  # reward model of the general prompts: a stage of the working folder, or a stage's folder
    safety_model: str = ""  # that of the safety prompts; "": their task's own grader rewards them
    hacking_window: int = 10  # rollouts over which trends of the reward model's reward and verified figures are taken
    hacking_errors: float = 3.0  # warn if the first rises and the second falls by this many standard errors

    checks = (
        Check("hacking_window", lambda c: c.hacking_window >= 4, "must be at least 4 rollouts"),
        *above(0, "hacking_errors"),
    )
