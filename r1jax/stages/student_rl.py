"""The control of distillation: the student trained by RL alone."""

from r1jax.stages.policy import run

__all__ = ["run"]
