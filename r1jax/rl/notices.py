"""What a run says about a rollout that has little or nothing to train on."""

import numpy as np

from r1jax.rl.journal import Rollout
from r1jax.schema import GRPOConfig


def of_rollout(scored: Rollout, signal: np.ndarray, grpo: GRPOConfig, kl_coef: float) -> list[str]:
    """Returns one line for each of: no sample counts, no group has a signal, every sample was cut off.

    `signal` [N / G] says of each group whether its rewards differ. Without one all advantages are 0, and so is the
    gradient of the surrogate: the KL term trains alone, and nothing does when `kl_coef` is 0 or no sample counts.
    """
    total, groups = len(scored), len(signal)
    cut = np.asarray([sample.truncated for sample in scored.samples], bool)
    counted = scored.scorable & ~(cut & (grpo.truncated == "mask"))
    lines = []
    if not scored.scorable.any():
        lines.append(f"no sample is scorable (0 of {total}); nothing trains: look at the prompts' answers and graders")
    elif not counted.any():
        lines.append(f"no sample counts (grpo.truncated=mask, {cut.sum()} of {total} cut off); nothing trains")
    elif not np.any(signal):
        why = "; a group of one always ties, raise grpo.group_size" if grpo.group_size == 1 else ""
        rest = "only the KL term trains" if kl_coef else "nothing trains, kl_coef is 0"
        lines.append(f"no group has a signal ({groups} of {groups} tie); {rest}{why}")
    if cut.all():
        lines.append(f"every sample was cut off ({total} of {total}): raise sampler.max_new_tokens")
    return lines
