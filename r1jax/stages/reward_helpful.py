"""The helpful reward model."""

from pathlib import Path

from r1jax.schema import Config
from r1jax.stages import reward_models


def run(config: Config, workdir: Path) -> dict:
    """Trains the model and returns its figures, `reward_models.run`."""
    return reward_models.run(config, workdir, "helpful")
