"""The quick start: the whole graph of the recipe at a tiny preset."""

from r1jax.stages.recipe import run

__all__ = ["run"]
