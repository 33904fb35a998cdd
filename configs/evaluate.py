"""Evaluate a checkpoint: k samples a problem, pass@1 with its error, one greedy sample, length and behaviour.

Hardware: two CPU cores at `tiny` and `tiny_dense` (under a minute); 8 GB of memory at `smollm2_135m`; TPUs for the
rest.
Command: python -m r1jax.launch --config=evaluate --config.checkpoint=RUN/r1_zero --json=FIGURES.json
"""

from r1jax.configs import _presets
from r1jax.schema import Config, DataConfig, replace

PRESETS = _presets.EVERY


def config(preset: str) -> Config:
    """Returns the run: pass@1 on every row of the files, sampled as in the paper (P2 D.1), and a greedy sample of each.

    Of files that the checkpoint was trained on, only what its run held out is evaluated.
    """
    size = _presets.SIZES[preset]
    run = _presets.config(
        "evaluate",
        preset,
        data=DataConfig(world=size.world, holdout_fraction=1.0),  # nothing is trained on
        sampler=size.sampler,
        evaluation=replace(_presets.EVALUATION, samples_per_problem=16, greedy=True),
    )
    return _presets.fitted(run)
