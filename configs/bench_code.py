"""Measure the code reward: reference solutions pass, mutated ones fail, samples a second on both backends.

Hardware: Linux with namespaces (docs/sandbox.md); two CPU cores (a quarter of an hour for HumanEval and MBPP), no
accelerator.
Command: python -m r1jax.launch --config=bench_code "--config.bench.code_files=('humaneval.jsonl','mbpp.jsonl')" --json=FIGURES.json
"""

from r1jax.schema import BenchConfig, Config, RewardConfig, SandboxConfig

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the measurement with two workers, and limits that a slow machine does not meet."""
    sandbox = SandboxConfig(wall_s=30.0, cpu_s=10.0)
    reward = RewardConfig(workers=2, deadline_s=90.0, batch_deadline_s=7200.0, sandbox=sandbox)
    return Config(stage="bench_code", preset=preset, reward=reward, bench=BenchConfig(samples=128))
