"""Measure the token cache of fine-tuning: rows a second with one and two workers, a killed build, a second start.

Hardware: Linux, two CPU cores, 4 GB of disk, no accelerator (half an hour with SmolLM2's tokenizer).
Command: python -m r1jax.launch --config=bench_tokens --config.model.checkpoint=DIR --workdir=WORK --json=FIGURES.json
"""

from r1jax.schema import BenchConfig, Config

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the measurement of 200,000 rows, 1.1 GB of text, with the tokenizer in config.model.checkpoint."""
    return Config(stage="bench_tokens", preset=preset, bench=BenchConfig(samples=200_000, threads=2, repeats=3))
