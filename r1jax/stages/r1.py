"""The whole recipe at one preset."""

from r1jax.stages.recipe import run

__all__ = ["run"]
