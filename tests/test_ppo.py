"""Claims about PPO: advantages and value loss against float64 by hand, a critic that learns, exact resume."""

import numpy as np
import pytest
from small import rl_training, run_until

from r1jax import config as configs
from r1jax.core import tree
from r1jax.core.metrics import read
from r1jax.rewards.compose import PART_NAMES
from r1jax.rl import ppo, rollout
from r1jax.rl.journal import Rollout
from r1jax.rl.settings import length_phases
from r1jax.sampler.sample import RolloutSample


def by_definition(rewards, values, gamma, gae_lambda):
    """arXiv 1506.02438, eq. 16, term by term."""
    after = [*values[1:], 0.0]
    delta = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
    return [
        sum((gamma * gae_lambda) ** (later - t) * delta[later] for later in range(t, len(delta)))
        for t in range(len(delta))
    ]


@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.0), (0.97, 0.5)])
def test_gae_equals_its_definition(length, gamma, gae_lambda):
    generator = np.random.default_rng(length)
    rewards, values = generator.normal(size=length), generator.normal(size=length)
    expected = by_definition(rewards, values, gamma, gae_lambda)
    np.testing.assert_allclose(ppo.gae(rewards, values, gamma, gae_lambda), expected, rtol=1e-12)


def test_gae_by_hand_and_at_lambda_one_the_reward_to_come_less_the_value():
    rewards, values = np.asarray([0.0, 0.0, 1.0]), np.asarray([0.5, 0.25, 0.75])
    # delta = (-0.25, 0.5, 0.25); A_3 = 0.25, A_2 = 0.5 + 0.5 * 0.25, A_1 = -0.25 + 0.5 * 0.625
    np.testing.assert_allclose(ppo.gae(rewards, values, 1.0, 0.5), [0.0625, 0.625, 0.25])
    np.testing.assert_allclose(ppo.gae(rewards, values, 1.0, 1.0), 1 - values)


def test_advantages_are_whitened_over_the_tokens_that_are_trained_alone():
    rows = [np.asarray([1.0, 3.0]), np.asarray([100.0]), np.asarray([5.0])]
    white = ppo.whitened(rows, np.asarray([True, False, True]))
    np.testing.assert_allclose(np.concatenate(white), [-1, 0, 0, 1], atol=1e-6)  # mean 3, sample deviation 2
    assert not np.concatenate(ppo.whitened(rows, np.zeros(3, bool))).any()


@pytest.mark.parametrize(
    ("value", "old", "returned", "expected"),
    [(1.0, 1.0, 3.0, 2.0), (2.0, 1.0, 3.0, 1.62), (0.0, 1.0, 3.0, 4.5), (5.0, 1.0, 3.0, 2.0)],
)
def test_value_loss_takes_the_larger_of_the_two_errors(value, old, returned, expected):
    assert float(ppo.value_loss(value, old, returned, 0.2)) == pytest.approx(expected)


MORE = {
    "grpo__updates": 4,
    "grpo__updates_per_rollout": 2,
    "grpo__kl_coef_schedule": "()",
    "grpo__kl_coef": 0.1,
    "checkpointing__every_updates": 1,
}


def ppo_training(folder, **more):
    return rl_training(folder, name="ppo_baseline:tiny", **MORE, **more)


def test_policy_and_critic_move_and_a_stopped_run_ends_in_the_same_bits(tmp_path):
    whole = ppo_training(tmp_path / "whole")
    before = tree.digest(whole.objective.critic_state.params), tree.digest(whole.run.params)
    whole.train()
    after = tree.digest(whole.objective.critic_state.params), tree.digest(whole.run.params)
    assert before[0] != after[0] and before[1] != after[1]
    stopped = ppo_training(tmp_path / "stopped")
    run_until(stopped, 1)
    resumed = ppo_training(tmp_path / "stopped")
    resumed.train()
    assert (tree.digest(resumed.objective.critic_state.params), tree.digest(resumed.run.params)) == after
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert rows[0] == rows[1]
    assert all(np.isfinite(value) for row in read(tmp_path / "whole") for value in row.values())
    assert whole.run.programs.counts() == resumed.run.programs.counts()
    lengths = len(length_phases(whole.run.config))
    assert {whole.run.programs.counts()[name] for name in ("update", "critic", "values", "reference")} == {lengths}


def scored(kl):
    """Returns two samples of one group, right and wrong; `kl` is log(policy / reference) of each token."""
    samples = [
        RolloutSample(
            request_id=0,
            sample_index=index,
            prompt_ids=np.asarray([1], np.int32),
            token_ids=np.asarray([3, 4], np.int32),
            logps=np.zeros(2, np.float32),
            behaviour_logps=np.full(2, -1, np.float32),
            finish_reason="stop",
            weight_version=0,
        )
        for index in range(2)
    ]
    parts = np.zeros((2, len(PART_NAMES)), np.float32)
    parts[0, PART_NAMES.index("accuracy")] = 1
    reference = [sample.behaviour_logps - np.float32(kl) for sample in samples]
    values = {"reference_logp": reference, "value": [np.zeros(2, np.float32)] * 2}
    return Rollout(samples, parts, np.ones(2, bool), 1, values)


def test_a_kl_term_in_the_reward_is_taken_off_token_by_token_with_a_critic(tmp_path):
    training = ppo_training(tmp_path, grpo__group_size=2, reward__format=0.0, reward__language=0.0)
    advantages = training.objective.advantages(scored(kl=0.5), 0)
    # returns at lambda 1: the reward to come, 0.1 * 0.5 off for every token
    np.testing.assert_allclose(advantages.values["return"], [[0.9, 0.95], [-0.1, -0.05]], rtol=1e-6)
    assert advantages.advantages[0].mean() > 0 > advantages.advantages[1].mean()


def test_a_kl_term_in_the_reward_is_taken_off_as_a_sum_without_a_critic():
    fields = [
        ("grpo.group_size", "2"),
        ("grpo.kl_placement", "reward"),
        ("grpo.advantage", "mean"),
        ("reward.format", "0"),
    ]
    config = configs.load("r1_zero:tiny", fields)
    found = scored(kl=0.5)
    found.values["reference_logp"][1] += np.float32(0.5)  # the second sample is where the reference is
    advantages = rollout.compute_advantages(found, config, 10, kl_coef=0.1)
    np.testing.assert_allclose(advantages.advantages, [0.45, -0.45], rtol=1e-6)  # rewards 0.9 and 0
    assert advantages.rewards.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "fields", "line"),
    [
        ("ppo_baseline:tiny", [("grpo.preset", "dapo")], "grpo.preset=dapo: this config is PPO's"),
        ("ppo_baseline:tiny", [("grpo.denominator", "signal")], "denominator=signal is of groups"),
        ("r1_zero:tiny", [("grpo.kl_placement", "reward")], "kl_placement=reward with advantage=group_std"),
        ("r1_zero:tiny", [("grpo.kl_coef_schedule", "((0, -0.5),)")], "a coefficient is below 0"),
    ],
)
def test_what_does_not_go_together_is_refused(name, fields, line):
    with pytest.raises(ValueError, match=line):
        configs.load(name, fields)
