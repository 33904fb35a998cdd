"""Distillation: a smaller dense student learns from stage 3's examples by SFT alone.

Hardware: two CPU cores at `tiny`; it runs the stages before it first when the working folder has none.
Command: python -m r1jax.launch --config=distill
"""

from r1jax.configs import _presets, stage1_coldstart
from r1jax.schema import Config, SFTConfig, replace

PRESETS = ("tiny",)
STUDENT = "tiny_dense"


def config(preset: str) -> Config:
    """Returns the run: the student's base, three epochs, cosine to a tenth (P2 B.4.3)."""
    base = stage1_coldstart.config(STUDENT)
    return replace(
        base,
        stage="distill",
        model=_presets.model(STUDENT),
        optimizer=replace(base.optimizer, learning_rate=2e-3),
        sft=SFTConfig(epochs=3, examples_per_update=48),
        input_preset=preset,
    )
