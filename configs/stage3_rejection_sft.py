"""Stage 3: rejection sampling from Dev2, mixed with general data; SFT of the base for two epochs; makes Dev3.

Hardware: two CPU cores at `tiny`; it runs the stages before it first when the working folder has none.
Command: python -m r1jax.launch --config=stage3_rejection_sft
"""

from r1jax.configs import stage1_coldstart
from r1jax.schema import ColdStartConfig, Config, RejectionConfig, SFTConfig, replace

PRESETS = ("tiny", "smollm2_135m")


def config(preset: str) -> Config:
    """Returns the run: the cold start's optimiser, more examples (P2 B.3.3)."""
    base, real = stage1_coldstart.config(preset), preset == "smollm2_135m"
    return replace(
        base,
        stage="stage3_rejection_sft",
        coldstart=ColdStartConfig(),
        sft=base.sft if real else SFTConfig(epochs=2, examples_per_update=48),
        rejection=RejectionConfig(
            prompts=32 if real else 3000,
            samples_per_prompt=4,
            max_examples_per_prompt=2,
            min_language_consistency=base.coldstart.min_language_consistency,
        ),
    )
