"""Ablation: the student distilled or trained by RL alone, at three compute budgets that match pairwise.

Hardware: two CPU cores at `tiny`; it runs the stages before it first when the working folder has none.
Command: python -m r1jax.launch --config=ablation_budget --workdir=runs
"""

from r1jax.configs import _presets, r1
from r1jax.schema import Config, replace

PRESETS = _presets.POLICIES
# Numbers of RL updates that cost as much as one, two and three epochs of distillation, or a little more. For `tiny` and
# `smollm2_135m` they are computed from the examples and lengths of their own runs, for others from the paper's: an
# epoch is 804,745 examples of 5,355 tokens (P2 Table 5) at 6 operations a parameter, an update 512 outputs at 10,
# assumed to be 10,000 tokens long: 505 updates an epoch, rounded up to whole rollouts of 16.
UPDATES = {"tiny": (20, 34, 46), "smollm2_135m": (2, 3, 5)}
PAPER = (512, 1024, 1520)


def config(preset: str) -> Config:
    """Returns one, two and three epochs of distillation and as many RL updates as cost the same or a little more."""
    variants = (
        variant
        for epochs, updates in enumerate(UPDATES.get(preset, PAPER), start=1)
        for variant in (
            f"distill_{epochs} distill sft.epochs={epochs}",
            f"rl_{epochs} student_rl grpo.updates={updates}",
        )
    )
    return replace(r1.config(preset), stage="ablation", output="budget", variants=tuple(variants))
