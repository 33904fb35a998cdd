"""Stage 4: RL for all scenarios; general and safety prompts, and their rewards, enter in the last part only."""

from r1jax.stages.policy import run

__all__ = ["run"]
