"""The whole recipe as one resumable graph: R1-Zero, the four stages, the distilled student and its RL-only control.

Hardware: two CPU cores at `tiny`.
Command: python -m r1jax.launch --config=r1:tiny
"""

from r1jax.configs import _presets
from r1jax.schema import Config, EvalConfig

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the graph's own settings; every stage keeps its own config."""
    return Config(
        stage="r1",
        preset=preset,
        model=_presets.model(preset),
        compute=_presets.compute(preset),
        sampler=_presets.sampler(preset),
        evaluation=EvalConfig(samples_per_problem=4, consensus_problems=96),
    )
