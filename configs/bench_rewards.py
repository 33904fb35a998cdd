"""Measure what one hanging grader costs a batch: seconds with and without it, samples a second, and the batch again.

Hardware: any; two grader processes, no accelerator and no JAX.
Command: python -m r1jax.launch --config=bench_rewards --json=FIGURES.json
"""

from r1jax.schema import BenchConfig, Config, RewardConfig

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the run over 512 samples, a mini-batch of the paper (32 prompts of 16 samples)."""
    reward = RewardConfig(workers=2, deadline_s=5.0)
    return Config(stage="bench_rewards", preset=preset, reward=reward, bench=BenchConfig(samples=512))
