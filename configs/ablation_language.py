"""Ablation: reasoning RL with and without the language consistency reward, from the same cold start.

Hardware: two CPU cores; it runs the stages before it first when the working folder has none.
Command: python -m r1jax.launch --config=ablation_language --workdir=runs
"""

from r1jax.configs import r1
from r1jax.schema import Config, replace

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the two variants of stage 2."""
    variants = ("with stage2_reasoning_rl", "without stage2_reasoning_rl reward.language=0")
    return replace(r1.config(preset), stage="ablation", output="language", variants=variants)
