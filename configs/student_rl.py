"""The control of distillation: the same student trained by RL alone, at equal compute.

Hardware: two CPU cores at `tiny`.
Command: python -m r1jax.launch --config=student_rl
"""

from r1jax.configs import r1_zero
from r1jax.configs.distill import STUDENT
from r1jax.schema import Config, replace

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the run: R1-Zero's settings on the student's base."""
    base = r1_zero.config(STUDENT)
    return replace(base, stage="student_rl", grpo=replace(base.grpo, updates=46), input_preset=preset)
