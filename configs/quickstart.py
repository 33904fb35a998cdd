"""The whole recipe at the smallest size: base, R1-Zero, evaluation of both, one table and one report.

Hardware: two CPU cores, within ten minutes.
Command: bash launch/quickstart.sh, or python -m r1jax.launch --config=quickstart
"""

from r1jax.configs import r1_zero
from r1jax.schema import Config, replace

PRESETS = ("tiny", "tiny_dense")


def config(preset: str) -> Config:
    """Returns the run: the settings of r1_zero at this size, under the stage that strings the parts together."""
    return replace(r1_zero.config(preset), stage="quickstart")
