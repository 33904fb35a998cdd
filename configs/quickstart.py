"""The whole recipe at the smallest size, from the shipped bases: one table, curves and samples.

Hardware: two CPU cores.
Command: bash launch/quickstart.sh, or python -m r1jax.launch --config=quickstart
"""

from r1jax.configs import r1
from r1jax.schema import Config, replace

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the graph under the name of the quick start."""
    return replace(r1.config(preset), stage="quickstart")
