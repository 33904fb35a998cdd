"""The PPO baseline: R1-Zero's loop with a critic in place of groups."""

from r1jax.stages.policy import run

__all__ = ["run"]
