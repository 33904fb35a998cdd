"""Evaluate a checkpoint: k samples a problem, pass@1 with its error, one greedy sample, length and behaviour.

Hardware: two CPU cores at `tiny` and `tiny_dense` (under a minute); 8 GB of memory at `smollm2_135m`; TPUs for the
rest.
Command: python -m r1jax.launch --config=evaluate --config.checkpoint=RUN/r1_zero --json=FIGURES.json
"""

from r1jax.configs import _presets
from r1jax.schema import Config, EvalConfig, replace

PRESETS = _presets.EVERY


def config(preset: str) -> Config:
    """Returns the run: sampled pass@1 on every row of the files, at temperature 0.6 with top-p 0.95 (P2 D.1).

    Of files that the checkpoint was trained on, only what its run held out is evaluated.
    """
    run = _presets.config(
        "evaluate",
        preset,
        data=replace(_presets.data(preset), holdout_fraction=1.0),  # nothing is trained on
        sampler=_presets.sampler(preset),
        evaluation=EvalConfig(samples_per_problem=16, temperature=0.6, top_p=0.95),
    )
    return _presets.fitted(run)
