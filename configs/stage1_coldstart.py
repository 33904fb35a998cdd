"""Cold start: supervised fine-tuning of the base on R1-Zero's correct, well-formed, single-language traces.

Hardware: two CPU cores; it trains R1-Zero first when the working folder has none.
Command: python -m r1jax.launch --config=stage1_coldstart
"""

from r1jax.configs import _presets
from r1jax.schema import ColdStartConfig, Config, EvalConfig, OptimizerConfig, SFTConfig

PRESETS = ("tiny", "tiny_dense")


def config(preset: str) -> Config:
    """Returns the run: two epochs over the chosen traces, with a cosine to a tenth of the rate."""
    return Config(
        stage="stage1_coldstart",
        preset=preset,
        model=_presets.model(preset),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", final_fraction=0.1, warmup_updates=5),
        data=_presets.data(preset),
        sampler=_presets.sampler(preset),
        pack=_presets.pack(preset),
        sft=SFTConfig(epochs=3, examples_per_update=48),
        coldstart=ColdStartConfig(prompts=1600, max_examples=2400),
        evaluation=EvalConfig(samples_per_problem=4),
    )
