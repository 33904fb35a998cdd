"""Stage 4: RL for all scenarios at temperature 0.7; general and safety prompts enter in the last part; makes R1.

Hardware: two CPU cores at `tiny`; it runs the stages before it first when the working folder has none.
Command: python -m r1jax.launch --config=stage4_all_scenarios
"""

from r1jax.configs import stage2_reasoning_rl
from r1jax.schema import Config, ScenarioConfig, replace

PRESETS = ("tiny", "smollm2_135m")


def config(preset: str) -> Config:
    """Returns the run: stage 2's settings at temperature 0.7; the last third has the other prompts (paper: 400 of 1,700).

    A third of stage 2's rate, where the paper keeps it: at the full rate this size loses accuracy at temperature 1.
    """
    base, real = stage2_reasoning_rl.config(preset), preset == "smollm2_135m"
    return replace(
        base,
        stage="stage4_all_scenarios",
        start="stage3_rejection_sft",
        optimizer=base.optimizer if real else replace(base.optimizer, learning_rate=1e-4),
        sampler=replace(base.sampler, temperature=0.7),
        grpo=base.grpo if real else replace(base.grpo, updates=60),
        reward=replace(base.reward, reward_model=1.0),
        scenarios=ScenarioConfig(
            from_update=3 if real else 40, helpful_model="reward_helpful", safety_model="reward_safety"
        ),
    )
