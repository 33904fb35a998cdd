"""Ablation: the language consistency reward on and off, in R1-Zero from the base and in stage 2 from the cold start.

Hardware: two CPU cores at `tiny`; it runs the stages before it first when the working folder has none.
Command: python -m r1jax.launch --config=ablation_language --workdir=runs
Over seeds: python -m r1jax.launch --config=ablation_language "--config.seeds=(0,1,2)" --workdir=runs
"""

from r1jax.configs import _presets, r1
from r1jax.schema import Config, replace

PRESETS = _presets.POLICIES


def config(preset: str) -> Config:
    """Returns two variants of R1-Zero and two of stage 2."""
    variants = (
        *("zero_without r1_zero", "zero_with r1_zero reward.language=1"),
        *("stage2_without stage2_reasoning_rl reward.language=0", "stage2_with stage2_reasoning_rl"),
    )
    return replace(r1.config(preset), stage="ablation", output="language", variants=variants)
