"""Warnings about a rollout that has little or nothing to train on."""

import numpy as np

from r1jax.rl.journal import Rollout
from r1jax.rl.rollout import Advantages
from r1jax.schema import GRPOConfig


def of_rollout(scored: Rollout, advantages: Advantages, grpo: GRPOConfig, kl_coef: float) -> list[str]:
    """Returns one line for each of: no sample counts, no group has a signal, every sample was cut off.

    When the rewards of every group tie, all advantages are 0 and so is the gradient of the surrogate: only the KL term
    and the entropy bonus train, and nothing does without them or when no sample counts. A critic's advantages do not
    need rewards that differ.
    """
    total, groups = len(scored), len(advantages.has_signal)
    cut = np.asarray([sample.truncated for sample in scored.samples], bool)
    lines = []
    if not scored.scorable.any():
        lines.append(f"no sample is scorable (0 of {total}); nothing trains: look at the prompts' answers and graders")
    elif not (scored.scorable & ~(cut & (grpo.truncated != "keep"))).any():
        lines.append(
            f"no sample counts (grpo.truncated={grpo.truncated}, {cut.sum()} of {total} cut off); nothing trains"
        )
    elif not advantages.has_signal.any() and grpo.advantage != "gae":
        why = "; a group of one always ties, raise grpo.group_size" if grpo.group_size == 1 else ""
        terms = ["the KL term"] if kl_coef and grpo.kl_placement == "loss" else []
        terms += ["the entropy bonus"] if grpo.entropy_coef else []
        effect = f"only {' and '.join(terms)} trains" if terms else "nothing trains, the loss has no KL term"
        effect = effect if advantages.trained.any() else "nothing trains"
        lines.append(f"no group has a signal ({groups} of {groups} tie); {effect}{why}")
    if cut.all():
        lines.append(f"every sample was cut off ({total} of {total}): raise sampler.max_new_tokens")
    return lines
