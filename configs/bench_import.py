"""Measure the host memory an import takes beside the parameters: a synthetic 4 GB checkpoint in 4 files, or your own.

Hardware: Linux, 10 GB of memory and 5 GB of disk below --workdir (about a minute on two CPU cores).
Command: python -m r1jax.launch --config=bench_import --json=FIGURES.json [--config.model.checkpoint=DIR]
"""

from r1jax.schema import Config, ModelConfig

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the measurement; config.model is the synthetic checkpoint's shape, 2.15 billion bfloat16 weights."""
    model = ModelConfig(
        family="llama",
        vocab_size=65536,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
    )
    return Config(stage="bench_import", preset=preset, model=model)
