"""Measure how long updates wait for checkpoints, written beside the work or waited for whole; SmolLM2-135M's shape.

Hardware: 8 GB of memory and 4 GB of disk below --workdir; two CPU cores, about 5 minutes.
Command: python -m r1jax.launch --config=bench_saving --json=FIGURES.json
"""

from r1jax.configs import _presets
from r1jax.schema import Config, PackConfig

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the measurement: 1.6 GB of weights and moments, updates on one row of 512 tokens."""
    size = _presets.SIZES["smollm2_135m"]
    return Config(
        stage="bench_saving",
        preset=preset,
        model=size.model,
        compute=size.compute,
        pack=PackConfig(row_tokens=512, rows_per_micro_batch=1),
    )
