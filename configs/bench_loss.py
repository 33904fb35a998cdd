"""Measure log-probabilities without logits against logits held whole: memory and time, forward and backward.

Hardware: Linux, 5 GB of memory (minutes on two CPU cores); the TPU half is compiled by libtpu and needs no TPU.
Command: python -m r1jax.launch --config=bench_loss --json=FIGURES.json [--config.model.vocab_size=49152]
"""

from r1jax.configs import _presets
from r1jax.schema import Config, PackConfig

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the measurement at SmolLM2's width and vocabulary in float32, 4,096 tokens."""
    pack = PackConfig(row_tokens=512, rows_per_micro_batch=8)
    size = _presets.SIZES["smollm2_135m"]
    return Config(stage="bench_loss", preset=preset, model=size.model, compute=size.compute, pack=pack)
