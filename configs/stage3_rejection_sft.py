"""Stage 3: rejection sampling from Dev2, mixed with general data; SFT of the base for two epochs; makes Dev3.

Hardware: two CPU cores at `tiny`, where it runs the stages before it first when the working folder has none; the mesh
of the size at others.
Command: python -m r1jax.launch --config=stage3_rejection_sft
"""

from r1jax.configs import _presets, stage1_coldstart
from r1jax.schema import CheckpointConfig, ColdStartConfig, Config, RejectionConfig, replace

PRESETS = _presets.POLICIES


def config(preset: str) -> Config:
    """Returns the run at `preset`: the cold start's optimiser and epochs, more examples.

    The paper keeps 627,000 reasoning samples of some 88,000 prompts, seven a prompt, and adds about 200,000 of other
    kinds (P2 B.3.1, B.3.3); how many it drew of each is not given.
    """
    run = replace(
        stage1_coldstart.recipe(preset),
        stage="stage3_rejection_sft",
        coldstart=ColdStartConfig(),
        rejection=RejectionConfig(
            prompts=88000,
            samples_per_prompt=16,
            max_examples_per_prompt=8,
            min_language_consistency=0.9,
            general_fraction=0.25,
        ),
        checkpointing=CheckpointConfig(every_updates=200),
    )
    return _presets.fitted(run)
