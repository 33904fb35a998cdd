"""Cold start: supervised fine-tuning of the base on R1-Zero's correct, well-formed, single-language traces.

Hardware: two CPU cores; it trains R1-Zero first when the working folder has none.
Command: python -m r1jax.launch --config=stage1_coldstart
         python -m r1jax.launch --config=stage1_coldstart:smollm2_135m --config.model.checkpoint=DIR --config.data.path=FILE.jsonl
"""

from r1jax.configs import _presets
from r1jax.schema import ColdStartConfig, Config, EvalConfig, OptimizerConfig, SFTConfig

PRESETS = ("tiny", "tiny_dense", "smollm2_135m")


def config(preset: str) -> Config:
    """Returns the run: two or three epochs over the chosen traces, with a cosine to a tenth of the rate."""
    return _smollm2(preset) if preset == "smollm2_135m" else _tiny(preset)


def _smollm2(preset: str) -> Config:
    """Returns the run of a real model on two cores: the paper's rate and epochs (P2 B.4.2) on a few examples."""
    return Config(
        stage="stage1_coldstart",
        preset=preset,
        model=_presets.model(preset),
        compute=_presets.compute(preset),
        optimizer=OptimizerConfig(learning_rate=5e-5, schedule="cosine", final_fraction=0.1),
        sampler=_presets.sampler(preset),
        pack=_presets.pack(preset),
        sft=SFTConfig(epochs=2, examples_per_update=8),
        coldstart=ColdStartConfig(prompts=32, max_examples=64, min_language_consistency=0.9),
        evaluation=EvalConfig(samples_per_problem=4, max_problems=16),
    )


def _tiny(preset: str) -> Config:
    return Config(
        stage="stage1_coldstart",
        preset=preset,
        model=_presets.model(preset),
        compute=_presets.compute(preset),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", final_fraction=0.1, warmup_updates=5),
        data=_presets.data(preset),
        sampler=_presets.sampler(preset),
        pack=_presets.pack(preset),
        sft=SFTConfig(epochs=3, examples_per_update=48),
        coldstart=ColdStartConfig(prompts=1600, max_examples=2400),
        evaluation=EvalConfig(samples_per_problem=4),
    )
