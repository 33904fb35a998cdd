"""Stage 4: RL for all scenarios at temperature 0.7; general and safety prompts enter in the last part; makes R1.

Hardware: two CPU cores at `tiny`, where it runs the stages before it first when the working folder has none; the mesh
of the size at others.
Command: python -m r1jax.launch --config=stage4_all_scenarios
"""

from r1jax.configs import _presets, stage2_reasoning_rl
from r1jax.schema import Config, ScenarioConfig, replace

PRESETS = _presets.POLICIES


def config(preset: str) -> Config:
    """Returns the run at `preset`: stage 2's settings at temperature 0.7, 1,700 updates, the last 400 with all prompts.

    The other prompts enter with the first rollout that starts at or after update 1,300, which is that of update 1,312.
    """
    base = stage2_reasoning_rl.recipe(preset)
    run = replace(
        base,
        stage="stage4_all_scenarios",
        start="stage3_rejection_sft",
        sampler=replace(base.sampler, temperature=0.7),
        grpo=replace(base.grpo, updates=1700),
        reward=replace(base.reward, reward_model=1.0),
        scenarios=ScenarioConfig(from_update=1300, helpful_model="reward_helpful", safety_model="reward_safety"),
    )
    return _presets.fitted(run)
