"""R1-Zero: GRPO with rule rewards straight from a base model, no supervised data.

Hardware: two CPU cores at `tiny` and `tiny_dense` (about five minutes); 8 GB of memory at `smollm2_135m`.
Command: python -m r1jax.launch --config=r1_zero
         python -m r1jax.launch --config=r1_zero:smollm2_135m --config.model.checkpoint=DIR --config.data.path=FILE.jsonl
"""

from r1jax.configs import _presets
from r1jax.schema import CheckpointConfig, Config, EvalConfig, GRPOConfig, OptimizerConfig, RewardConfig

PRESETS = ("tiny", "tiny_dense", "smollm2_135m")


def config(preset: str) -> Config:
    """Returns the run: the paper's objective, with batch, rate and length for the size of the model."""
    real = preset == "smollm2_135m"
    return Config(
        stage="r1_zero",
        preset=preset,
        model=_presets.model(preset),
        compute=_presets.compute(preset),
        optimizer=OptimizerConfig(learning_rate=3e-6 if real else 3e-4),
        data=_presets.data(preset),
        sampler=_presets.sampler(preset),
        reward=RewardConfig(format=0.0 if real else 0.2),
        grpo=_real_grpo() if real else _tiny_grpo(),
        pack=_presets.pack(preset),
        checkpointing=CheckpointConfig(every_updates=5 if real else 20),
        evaluation=EvalConfig(samples_per_problem=4, max_problems=16) if real else EvalConfig(samples_per_problem=4),
    )


def _tiny_grpo() -> GRPOConfig:
    return GRPOConfig(
        group_size=16,
        prompts_per_update=16,
        updates_per_rollout=2,
        updates=120,
        reference_refresh_updates=40,
    )


def _real_grpo() -> GRPOConfig:
    return GRPOConfig(group_size=8, prompts_per_update=4, updates_per_rollout=1, updates=5)
