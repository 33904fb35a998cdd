"""The safety reward model: labelled responses, cross-entropy, the whole response; stage 4's safety prompts use it.

Hardware: as reward_helpful.
Command: python -m r1jax.launch --config=reward_safety
         python -m r1jax.launch --config=reward_safety:smollm2_135m --config.model.checkpoint=DIR --config.data.path=FILE.jsonl
"""

from r1jax.configs import reward_helpful
from r1jax.schema import Config, replace

PRESETS = ("tiny", "smollm2_135m", "v3_671b")


def config(preset: str) -> Config:
    """Returns the run: the helpful model's settings (P2 appendix B.3); at `tiny` fewer samples, as it has six times the prompts."""
    base = reward_helpful.config(preset)
    if preset != "tiny":
        return replace(base, stage="reward_safety")
    return replace(
        base, stage="reward_safety", reward_model=replace(base.reward_model, epochs=10, samples_per_prompt=8)
    )
