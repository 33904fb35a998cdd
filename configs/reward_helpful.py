"""The helpful reward model: preference pairs, Bradley-Terry, the final summary alone; stage 4's general prompts use it.

Hardware: two CPU cores at `tiny`, which draws and ranks its pairs itself, and at `smollm2_135m`: the head and the last two
blocks, on what the frozen ones made of the texts. `v3_671b` has the paper's settings and needs the mesh it names.
Command: python -m r1jax.launch --config=reward_helpful
         python -m r1jax.launch --config=reward_helpful:smollm2_135m --config.model.checkpoint=DIR --config.data.path=FILE.jsonl
"""

from r1jax.configs import _presets
from r1jax.schema import CheckpointConfig, Config, DataConfig, OptimizerConfig, PackConfig, RewardModelConfig, replace

PRESETS = ("tiny", "smollm2_135m", "v3_671b")


def config(preset: str) -> Config:
    """Returns the run at `preset`."""
    make = {"tiny": _tiny, "smollm2_135m": _smollm2}.get(preset, _paper)
    return make("reward_helpful", preset)


def _paper(stage: str, preset: str) -> Config:
    """Returns the run of R1's size: batch 256, rate 6e-6, one epoch, at most 8,192 tokens (P2 appendix B.3)."""
    return Config(
        stage=stage,
        preset=preset,
        model=_presets.model(preset),
        compute=_presets.compute(preset),
        mesh=_presets.mesh(preset),
        optimizer=OptimizerConfig(learning_rate=6e-6),
        pack=PackConfig(row_tokens=8192, rows_per_micro_batch=64),
        checkpointing=CheckpointConfig(every_updates=50),
    )


def _tiny(stage: str, preset: str) -> Config:
    return Config(
        stage=stage,
        preset=preset,
        model=_presets.model(preset),
        compute=_presets.compute(preset),
        start="stage3_rejection_sft",
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_updates=5),
        data=replace(_presets.data(preset), holdout_fraction=0.2),
        sampler=_presets.sampler(preset),
        pack=PackConfig(row_tokens=96, rows_per_micro_batch=8),
        reward_model=RewardModelConfig(epochs=6, examples_per_update=32, samples_per_prompt=16, pairs_per_prompt=64),
    )


def _smollm2(stage: str, preset: str) -> Config:
    return Config(
        stage=stage,
        preset=preset,
        model=_presets.model(preset),
        compute=_presets.compute(preset),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_updates=5),
        data=DataConfig(holdout_fraction=0.25, template="plain"),
        pack=PackConfig(row_tokens=384, rows_per_micro_batch=4),
        reward_model=RewardModelConfig(
            epochs=2, examples_per_update=32, frozen_blocks=28, prompt_tokens=64, response_tokens=128
        ),
    )
