"""The helpful reward model: preference pairs, Bradley-Terry, the final summary alone; stage 4's general prompts use it.

Hardware: two CPU cores at `tiny`, which draws and ranks its pairs itself, and at `smollm2_135m`: the head and the last
two blocks, on the outputs of the frozen blocks. The other sizes have the paper's settings and need the mesh they
name.
Command: python -m r1jax.launch --config=reward_helpful
         python -m r1jax.launch --config=reward_helpful:smollm2_135m --config.model.checkpoint=DIR --config.data.path=FILE.jsonl
"""

from r1jax.configs import _presets
from r1jax.schema import CheckpointConfig, Config, OptimizerConfig, PackConfig, RewardModelConfig, SamplerConfig

PRESETS = _presets.POLICIES


def config(preset: str) -> Config:
    """Returns the run at `preset`."""
    return _presets.fitted(recipe("reward_helpful", preset))


def recipe(stage: str, preset: str) -> Config:
    """Returns the run of the paper: batch 256, rate 6e-6, one epoch, at most 8,192 tokens (P2 appendix B.3)."""
    mesh = _presets.SIZES[preset].mesh
    rows = max(2, mesh.row_devices)  # a pair of the longest texts fills two
    slots = max(64, mesh.slot_devices)
    return _presets.config(
        stage,
        preset,
        optimizer=OptimizerConfig(learning_rate=6e-6),
        sampler=_presets.SIZES[preset].sampler if preset in _presets.TINY else SamplerConfig(slots=slots),
        pack=PackConfig(row_tokens=8192, rows_per_micro_batch=rows),
        reward_model=RewardModelConfig(epochs=1, examples_per_update=256),
        checkpointing=CheckpointConfig(every_updates=50),
    )
