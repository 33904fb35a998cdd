"""Stage 2: reasoning RL on the cold-start model with the language consistency reward; makes Dev2.

Hardware: two CPU cores at `tiny`, where it runs the stages before it first when the working folder has none; the mesh
of the size at others.
Command: python -m r1jax.launch --config=stage2_reasoning_rl
"""

from r1jax.configs import _presets, r1_zero
from r1jax.schema import Config, replace

PRESETS = _presets.POLICIES


def config(preset: str) -> Config:
    """Returns the run at `preset`."""
    return _presets.fitted(recipe(preset))


def recipe(preset: str) -> Config:
    """Returns the run of the paper: R1-Zero's settings, outputs of 32,768 tokens, the language reward (P2 eq. 7).

    The number of updates is not given. R1's RL took 80 hours, R1-Zero's 10,400 updates took 198 (P2 Table 7): about
    4,200 in all, of which stage 4 has 1,700.
    """
    base, sampler = r1_zero.recipe(preset), _presets.rollouts(preset, 32768)
    return replace(
        base,
        stage="stage2_reasoning_rl",
        start="stage1_coldstart",
        sampler=sampler,
        pack=_presets.rl_pack(preset, sampler),
        reward=replace(base.reward, language=1.0),
        grpo=replace(base.grpo, updates=2400),
    )
