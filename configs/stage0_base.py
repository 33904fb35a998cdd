"""Base model of the tiny world: pretraining on generated traces of guess, check and retry.

Hardware: two CPU cores, about ten minutes.
Command: python -m r1jax.launch --config=stage0_base
"""

from r1jax.configs import _presets
from r1jax.schema import CheckpointConfig, Config, PretrainConfig

PRESETS = _presets.TINY


def config(preset: str) -> Config:
    """Returns the run: AdamW with a cosine over rows of packed documents."""
    rates = dict(learning_rate=4e-3, schedule="cosine", final_fraction=0.05, warmup_updates=50)
    return _presets.config(
        "stage0_base",
        preset,
        optimizer=_presets.optimizer(preset, **rates),
        sampler=_presets.sampler(preset),
        pack=_presets.SIZES[preset].pack,
        pretrain=PretrainConfig(),
        checkpointing=CheckpointConfig(every_updates=400),
    )
