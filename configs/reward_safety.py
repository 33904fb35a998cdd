"""The safety reward model: labelled responses, cross-entropy, the whole response; stage 4's safety prompts use it.

Hardware: as reward_helpful.
Command: python -m r1jax.launch --config=reward_safety
         python -m r1jax.launch --config=reward_safety:smollm2_135m --config.model.checkpoint=DIR --config.data.path=FILE.jsonl
"""

from r1jax.configs import _presets, reward_helpful
from r1jax.schema import Config

PRESETS = _presets.POLICIES


def config(preset: str) -> Config:
    """Returns the run: the helpful model's settings (P2 appendix B.3)."""
    return _presets.fitted(reward_helpful.recipe("reward_safety", preset))
