"""The whole recipe as one resumable graph: R1-Zero, the four stages, the distilled student and its RL-only control.

Hardware: two CPU cores at `tiny`; the meshes of its stages at the other sizes.
Command: python -m r1jax.launch --config=r1:tiny
         python -m r1jax.launch --config=r1:v3_671b --config.list=true
"""

from r1jax.configs import _presets
from r1jax.schema import Config, DataConfig, replace

PRESETS = _presets.POLICIES


def config(preset: str) -> Config:
    """Returns the graph's own settings; every stage keeps its own config.

    Every checkpoint is measured alike: 16 samples a problem, and the majority of 64 on the first 30 problems (P2 D.1).
    """
    run = _presets.config(
        "r1",
        preset,
        data=DataConfig(),  # the stages have the world of their own sizes
        sampler=_presets.SIZES[preset].sampler,
        evaluation=replace(_presets.EVALUATION, samples_per_problem=16, consensus_problems=30, consensus_samples=64),
    )
    return _presets.fitted(run)
