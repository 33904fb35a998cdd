"""Ablation: the student distilled or trained by RL alone, at three compute budgets that match pairwise.

Hardware: two CPU cores; it runs the stages before it first when the working folder has none.
Command: python -m r1jax.launch --config=ablation_budget --workdir=runs
"""

from r1jax.configs import r1
from r1jax.schema import Config, replace

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns one, two and three epochs of distillation and as many RL updates as cost the same or a little more."""
    variants = (
        *("distill_1 distill sft.epochs=1", "rl_1 student_rl grpo.updates=20"),
        *("distill_2 distill sft.epochs=2", "rl_2 student_rl grpo.updates=34"),
        *("distill_3 distill sft.epochs=3", "rl_3 student_rl grpo.updates=46"),
    )
    return replace(r1.config(preset), stage="ablation", output="budget", variants=variants)
