"""Claims about RL runs under the named losses: they run, resume to the same bits, and draw again within a bound."""

import jax
import numpy as np
import pytest
from small import rl_training, run_until
from test_reward_pool import misbehave

from r1jax import config as configs
from r1jax.core import tree
from r1jax.core.metrics import read
from r1jax.data.problems import Problem
from r1jax.rewards.compose import PART_NAMES
from r1jax.rewards.pool import RewardPool
from r1jax.rl import rollout as rollouts
from r1jax.rl.journal import Journal, Rollout
from r1jax.rl.loop import warm_up
from r1jax.rl.rollout import EncodedPrompt
from r1jax.rl.settings import length_phases
from r1jax.sampler.sample import RolloutSample
from r1jax.schema import replace

SHORT = {"grpo__updates": 4, "grpo__updates_per_rollout": 2, "grpo__kl_coef_schedule": "()"}


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_a_run_under_a_preset_moves_the_policy_and_keeps_every_number_finite(tmp_path, preset):
    training = rl_training(tmp_path, **SHORT, grpo__preset=preset)
    before = tree.digest(training.run.state.params)
    training.train()
    rows = read(tmp_path)
    assert tree.digest(training.run.state.params) != before
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert any(row["grad_norm"] > 0 for row in rows)
    assert "kl" not in rows[0] and training.run.reference is None  # neither has a KL term: no reference is kept or run
    assert training.run.programs.counts()["update"] == len(length_phases(training.run.config))


def test_log_probs_of_the_policy_before_its_updates_survive_a_stop_between_them(tmp_path):
    more = SHORT | {"grpo__preset": "trl_default", "grpo__kl_coef": 0.1, "checkpointing__every_updates": 1}
    whole = rl_training(tmp_path / "whole", **more)
    whole.train()
    stopped = rl_training(tmp_path / "stopped", **more)
    run_until(stopped, 1)
    resumed = rl_training(tmp_path / "stopped", **more)
    resumed.train()
    assert tree.digest(resumed.run.state) == tree.digest(whole.run.state)
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert rows[0] == rows[1]
    first, second = read(tmp_path / "whole")[:2]
    assert first["importance_ratio"] == pytest.approx(1, abs=1e-4)  # the old policy is the trainer's own
    assert abs(second["importance_ratio"] - 1) > 1e-4


def test_in_bfloat16_the_ratio_to_the_trainers_own_log_probs_starts_at_one_and_the_samplers_does_not(tmp_path):
    more = SHORT | {"grpo__updates": 1, "grpo__updates_per_rollout": 1, "compute__compute_dtype": "bfloat16"}
    rows = {}
    for name in ("rollout", "recomputed"):
        rl_training(tmp_path / name, **more, grpo__old_logp=name).train()
        rows[name] = read(tmp_path / name)[0]
    assert rows["recomputed"]["max_ratio"] == pytest.approx(1, abs=1e-6)
    assert rows["rollout"]["max_ratio"] > 1 + 1e-4
    assert rows["recomputed"]["max_logprob_difference"] == pytest.approx(rows["rollout"]["max_logprob_difference"])


CONFIG = configs.load("r1_zero:tiny", [("grpo.group_size", "2"), ("grpo.dynamic_sampling_rounds", "2")])


def made(draws, accuracies):
    """Returns a rollout of groups of two with the given accuracies, by draw."""
    samples = [
        RolloutSample(
            request_id=draw,
            sample_index=index,
            prompt_ids=np.asarray([1, 2], np.int32),
            token_ids=np.asarray([3, draw], np.int32),
            logps=np.zeros(2, np.float32),
            behaviour_logps=np.zeros(2, np.float32),
            finish_reason="stop",
            weight_version=0,
        )
        for draw in draws
        for index in range(2)
    ]
    parts = np.zeros((len(samples), len(PART_NAMES)), np.float32)
    parts[:, 0] = np.reshape(accuracies, -1)
    return Rollout(samples, parts, np.ones(len(samples), bool), len(draws))


def test_groups_that_tie_give_way_to_later_draws_and_fill_up_what_is_missing():
    tied, mixed = [1, 1], [1, 0]
    parts = [made(range(5, 8), [tied, mixed, tied]), made(range(8, 10), [tied, mixed])]
    kept = rollouts.keep_groups(parts, 3, CONFIG)
    assert [sample.request_id for sample in kept.samples] == [5, 5, 6, 6, 9, 9]
    assert rollouts.signals(kept, CONFIG).tolist() == [False, True, True]
    assert kept.draws == 5


def test_a_run_draws_again_within_its_bound_and_never_the_same_prompt_twice(tmp_path):
    more = SHORT | {
        "grpo__dynamic_sampling_rounds": 2,
        "grpo__updates": 2,
        "reward__language": 0.0,
        "reward__format": 0.0,
    }
    training = rl_training(tmp_path, **more)
    drawn, grade = [], training.source.sampling.sample_and_grade

    def watch(draws, *rest):
        drawn.append(draws)
        return grade(draws, *rest)

    training.source.sampling.sample_and_grade = watch
    training.train()
    row = read(tmp_path)[0]
    numbers = [draw for draws in drawn for draw in draws]
    assert numbers == list(range(len(numbers)))
    assert row["prompts_drawn"] == len(numbers) == training.run.cursor.draw
    assert len(drawn) <= 3
    assert len(drawn) == 3 or row["zero_variance_groups"] == 0
    assert row["sampled_tokens"] * 2 > sum(found["tokens"] for found in read(tmp_path))  # those of dropped groups too
    assert row["drawn_accuracy"] == 0
    assert row["prompts_drawn"] > 4  # an untrained model is never right, so that all groups tie


def test_the_length_penalty_of_dapo_reaches_the_advantages_and_is_in_tokens(tmp_path):
    config = configs.load("r1_zero:tiny", [("grpo.preset", "dapo"), ("grpo.group_size", "2"), ("reward.format", "0")])
    scored = made([0], [[1, 1]])
    scored.samples[1].__dict__["token_ids"] = np.zeros(10, np.int32)
    advantages = rollouts.compute_advantages(scored, config, 10)
    assert advantages.rewards.tolist() == [1.0, 0.0] and advantages.advantages[0] > 0 > advantages.advantages[1]


def test_dropped_samples_leave_the_statistics_and_masked_ones_do_not():
    scored = made([0, 1], [[1, 0], [1, 0]])
    scored.samples[1].__dict__["finish_reason"] = "length"
    for truncated, expected in (("keep", 1.0), ("mask", 1.0), ("drop", 0.0)):
        config = configs.load("r1_zero:tiny", [("grpo.group_size", "2"), ("grpo.truncated", truncated)])
        advantages = rollouts.compute_advantages(scored, config, 10)
        assert advantages.advantages[0] == pytest.approx(expected, rel=1e-4)
        assert advantages.trained.tolist() == [True, truncated == "keep", True, True]


def test_samples_whose_grader_hangs_or_crashes_leave_the_statistics_of_their_group():
    scored = made([0, 1, 2], np.zeros((3, 2)))
    asked = [EncodedPrompt(Problem(f"p{draw}", "math", "", ""), np.zeros(1, np.int32)) for draw in (0, 0, 1, 1, 2, 2)]
    texts = ["fine", "aborts", "hangs", "killed", "fine", "half"]
    config = configs.load("r1_zero:tiny", [("grpo.group_size", "2"), ("reward.deadline_s", "1.0")])
    with RewardPool(replace(config.reward, workers=2), misbehave) as pool:
        parts, scorable = rollouts.grade(scored.samples, asked, texts, pool)
    assert scorable.tolist() == [True, False, False, False, True, True]
    advantages = rollouts.compute_advantages(Rollout(scored.samples, parts, scorable, 3), config, 10)
    assert advantages.has_signal.tolist() == [False, False, True]  # one of two, none of two, two of two
    assert advantages.advantages[:4].tolist() == [0.0] * 4 and advantages.advantages[4] > 0 > advantages.advantages[5]
    assert advantages.trained.tolist() == scorable.tolist()


def test_the_journal_keeps_the_trainers_values_and_the_number_of_draws(tmp_path):
    scored = made([4, 7], [[1, 0], [0, 0]])
    scored.__dict__.update(draws=5, values={"old_logp": [np.full(2, i, np.float32) for i in range(4)]})
    Journal(tmp_path).write(0, scored)
    found = Journal(tmp_path).read(0)
    assert found.draws == 5
    assert jax.tree.all(jax.tree.map(np.array_equal, found.values, scored.values))


def test_resampling_with_rollouts_ahead_is_refused():
    with pytest.raises(ValueError, match="dynamic_sampling_rounds=4 needs rollouts_ahead=0"):
        fields = [("grpo.preset", "dapo"), ("grpo.rollouts_ahead", "1"), ("mode", "disaggregated")]
        configs.load("r1_zero:tiny", fields)


def test_a_prompt_is_graded_when_its_samples_are_done_and_others_are_still_drawn(tmp_path):
    training = rl_training(tmp_path, **SHORT, sampler__slots=4)
    sampling = training.source.sampling
    training.run.restore(training.objective)
    warm_up(training.run, training.source, training.objective, training.recorder)
    with training.source:
        begin, begun = sampling.pool.begin, []

        def watch(requests):
            begun.append((sampling.sampler.statistics.dispatches, len(requests)))
            return begin(requests)

        sampling.pool.begin = watch
        scored = training.source.rollout(0)
    size = training.run.config.grpo.group_size
    assert [count for _, count in begun] == [size] * scored.draws
    assert begun[0][0] < sampling.sampler.statistics.dispatches  # the first prompt of four is done before the last
    texts = training.recorder.inputs.tokenizer.decode_batch([sample.token_ids for sample in scored.samples])
    asked = [training.recorder.inputs.prompts.prompt(draw, 0) for draw in range(scored.draws) for _ in range(size)]
    with RewardPool(training.run.config.reward) as pool:
        parts, scorable = rollouts.grade(scored.samples, asked, texts, pool)
    assert np.array_equal(parts, scored.reward_terms) and np.array_equal(scorable, scored.scorable)


def test_groups_that_tie_are_not_trained_on_where_the_means_are_of_those_with_a_signal():
    scored = made([0, 1], [[1, 0], [1, 1]])
    config = configs.load("r1_zero:tiny", [("grpo.group_size", "2"), ("grpo.denominator", "signal")])
    advantages = rollouts.compute_advantages(scored, config, 10)
    assert advantages.trained.tolist() == advantages.in_mean.tolist() == [True, True, False, False]
    packed = rollouts.pack_mini_batch(scored, np.arange(4), advantages, config, 10)
    assert packed.loss_mask.sum() == 4  # two samples of two tokens
    assert np.unique(packed.values["weight"][packed.loss_mask > 0]).tolist() == [0.25]  # 1 / (2 samples * 2 tokens)


def test_a_mixture_cut_to_its_leading_dense_layer_runs(tmp_path):
    more = SHORT | {"grpo__updates_per_rollout": 1, "grpo__updates": 1, "model__num_hidden_layers": 1}
    training = rl_training(tmp_path, **more)
    assert training.run.config.network.model.n_routed_experts and not training.run.config.network.model.num_moe_layers
    training.train()
    assert read(tmp_path)[0]["tokens"] > 0
