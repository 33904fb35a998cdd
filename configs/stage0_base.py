"""Base model of the tiny world: pretraining on generated traces of guess, check and retry.

Hardware: two CPU cores, about ten minutes.
Command: python -m r1jax.launch --config=stage0_base
"""

from r1jax.configs import _presets
from r1jax.schema import CheckpointConfig, Config, OptimizerConfig, PretrainConfig

PRESETS = _presets.TINY


def config(preset: str) -> Config:
    """Returns the run: AdamW with a cosine over rows of packed documents."""
    size = _presets.SIZES[preset]
    return _presets.config(
        "stage0_base",
        preset,
        optimizer=OptimizerConfig(learning_rate=4e-3, schedule="cosine", final_fraction=0.05, warmup_updates=50),
        sampler=size.sampler,
        pack=size.pack,
        pretrain=PretrainConfig(),
        checkpointing=CheckpointConfig(every_updates=400),
    )
