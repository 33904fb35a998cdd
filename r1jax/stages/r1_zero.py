"""R1-Zero: GRPO with rule rewards straight from a base model."""

from r1jax.stages.policy import run

__all__ = ["run"]
