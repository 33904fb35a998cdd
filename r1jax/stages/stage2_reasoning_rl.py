"""Stage 2: reasoning RL on the cold-start model, with the language consistency reward."""

from r1jax.stages.policy import run

__all__ = ["run"]
