"""Stage 2: reasoning RL on the cold-start model with the language consistency reward; makes Dev2.

Hardware: two CPU cores at `tiny`; it runs the stages before it first when the working folder has none.
Command: python -m r1jax.launch --config=stage2_reasoning_rl
"""

from r1jax.configs import r1_zero
from r1jax.schema import Config, replace

PRESETS = ("tiny", "smollm2_135m")


def config(preset: str) -> Config:
    """Returns the run: R1-Zero's settings, at `tiny` at half the rate; another start, and the language reward (P2 eq. 7)."""
    base = r1_zero.config(preset)
    if preset == "smollm2_135m":
        own = {"reward": replace(base.reward, language=1.0)}
    else:
        own = {
            "optimizer": replace(base.optimizer, learning_rate=1.5e-4),
            "grpo": replace(base.grpo, updates=60),
            "reward": replace(base.reward, language=0.2),
        }
    return replace(base, stage="stage2_reasoning_rl", start="stage1_coldstart", **own)
