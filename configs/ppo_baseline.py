"""PPO with a critic as large as the policy, the baseline of R1-Zero: same prompts, samples, rewards and updates.

Hardware: as r1_zero, and as much memory again for the critic and its optimiser.
Command: python -m r1jax.launch --config=ppo_baseline --sweep=ppo.gae_lambda=0.95,1.0 --sweep=seed=0,1,2
"""

from r1jax.configs import _presets, r1_zero
from r1jax.schema import Config, PPOConfig, replace

PRESETS = _presets.EVERY


def config(preset: str) -> Config:
    """Returns R1-Zero's run with GAE in place of groups, the KL term in the reward, clip 0.2 and means over tokens."""
    base = r1_zero.recipe(preset)
    ppo = dict(advantage="gae", clip_ratio=0.2, kl_placement="reward", aggregation="token_mean", denominator="trained")
    # A critic has all to learn where the policy has little: ten times its rate (no source gives one).
    rate = base.optimizer.learning_rate * 10
    run = replace(base, stage="ppo_baseline", grpo=replace(base.grpo, **ppo), ppo=PPOConfig(critic_learning_rate=rate))
    return _presets.fitted(run)
