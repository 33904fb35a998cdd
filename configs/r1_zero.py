"""R1-Zero: GRPO with rule rewards straight from a base model, no supervised data.

Hardware: two CPU cores at `tiny` and `tiny_dense` (about five minutes); 8 GB of memory at `smollm2_135m`; the mesh of
the size at the others.
Command: python -m r1jax.launch --config=r1_zero
         python -m r1jax.launch --config=r1_zero:smollm2_135m --config.model.checkpoint=DIR --config.data.path=FILE.jsonl
"""

from r1jax.configs import _presets
from r1jax.schema import CheckpointConfig, Config, GRPOConfig, OptimizerConfig, RewardConfig

PRESETS = _presets.EVERY
LENGTHS = ((0, 32768.0), (8200, 65536.0))  # of the longest output, by update (P2 section 2.3)


def config(preset: str) -> Config:
    """Returns the run at `preset`."""
    return _presets.fitted(recipe(preset))


def recipe(preset: str) -> Config:
    """Returns the run of the paper: its objective, batch, rate, lengths and number of updates (P2 section 2.3)."""
    sampler = _presets.rollouts(preset, 65536, LENGTHS)
    return _presets.config(
        "r1_zero",
        preset,
        optimizer=OptimizerConfig(learning_rate=3e-6),
        sampler=sampler,
        reward=RewardConfig(accuracy=1.0, format=1.0),
        grpo=GRPOConfig(
            group_size=16,
            prompts_per_update=32,
            updates_per_rollout=16,
            updates=10400,
            clip_ratio=10.0,
            kl_coef=0.001,
            reference_refresh_updates=400,
        ),
        pack=_presets.rl_pack(preset, sampler),
        checkpointing=CheckpointConfig(every_updates=64),
        evaluation=_presets.EVALUATION,
    )
