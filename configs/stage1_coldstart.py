"""Cold start: supervised fine-tuning of the base on R1-Zero's correct, well-formed, single-language traces.

Hardware: two CPU cores at `tiny`, where it trains R1-Zero first when the working folder has none; the mesh of the size
at others.
Command: python -m r1jax.launch --config=stage1_coldstart
         python -m r1jax.launch --config=stage1_coldstart:smollm2_135m --config.model.checkpoint=DIR --config.data.path=FILE.jsonl
"""

from r1jax.configs import _presets
from r1jax.schema import ColdStartConfig, Config, OptimizerConfig, SFTConfig

PRESETS = _presets.EVERY
CONTEXT = 32768  # tokens of a row of SFT (P2 B.4.2, B.4.3)


def config(preset: str) -> Config:
    """Returns the run at `preset`."""
    return _presets.fitted(recipe(preset))


def recipe(preset: str) -> Config:
    """Returns the run of the paper: 5e-5 to 5e-6 by a cosine, 2 epochs, batch 128, rows of 32,768 tokens (P2 B.4.2).

    The paper has "thousands" of examples, several samples a prompt (P2 B.3.2), and gives no warm-up and no threshold.
    """
    return _presets.config(
        "stage1_coldstart",
        preset,
        optimizer=OptimizerConfig(learning_rate=5e-5, schedule="cosine", final_fraction=0.1),
        sampler=_presets.rollouts(preset, 32768),
        pack=_presets.pack(preset, CONTEXT),
        sft=SFTConfig(epochs=2, examples_per_update=128),
        coldstart=ColdStartConfig(prompts=5000, samples_per_prompt=4, max_examples=5000, min_language_consistency=0.9),
        evaluation=_presets.EVALUATION,
    )
