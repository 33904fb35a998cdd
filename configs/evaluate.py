"""Evaluate a checkpoint: k samples a problem, pass@1 with its error, one greedy sample, length and behaviour.

Hardware: two CPU cores at `tiny` and `tiny_dense` (under a minute); 8 GB of memory at `smollm2_135m`.
Command: python -m r1jax.launch --config=evaluate --config.checkpoint=RUN/r1_zero --json=FIGURES.json
"""

from r1jax.configs import _presets
from r1jax.schema import Config, EvalConfig

PRESETS = ("tiny", "tiny_dense", "smollm2_135m")


def config(preset: str) -> Config:
    """Returns the run: the paper's sampled pass@1 at temperature 1, on every held-out problem."""
    return Config(
        stage="evaluate",
        preset=preset,
        model=_presets.model(preset),
        sampler=_presets.sampler(preset),
        evaluation=EvalConfig(samples_per_problem=5),
    )
