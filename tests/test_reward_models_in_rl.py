"""Claims about reward models in RL: whom they score, what the journal keeps, and when hacking is told."""

import jax.numpy as jnp
import numpy as np
import pytest
from small import run_until

from r1jax import config as configs
from r1jax.checkpoints import tokenizer as tokenizers
from r1jax.core import rng, sharding, tree
from r1jax.core.metrics import read
from r1jax.data import tasks
from r1jax.models import decoder
from r1jax.recipe import parts, policy, prompts
from r1jax.rewards.compose import PART_NAMES
from r1jax.rewards.models import reward_model
from r1jax.rewards.models.reward_model import RewardModel, TextFormat
from r1jax.rl import reward_model_monitor, rollout
from r1jax.rl.assemble import Training
from r1jax.rl.rollout import Mixture
from r1jax.rl.settings import of_config
from r1jax.schema import MeshConfig, parts_of, replace

WORDS = tokenizers.tiny()
SMALL = {
    **{"model.hidden_size": 32, "model.intermediate_size": 32, "model.num_hidden_layers": 2},
    **{"model.moe_intermediate_size": 16, "grpo.updates": 6, "grpo.updates_per_rollout": 2},
    **{"grpo.prompts_per_update": 8, "grpo.group_size": 4, "scenarios.from_update": 2, "sampler.slots": 16},
    **{"sampler.max_new_tokens": 12, "sampler.windows": "", "pack.row_tokens": 24, "pack.rows_per_micro_batch": 8},
    **{"optimizer.learning_rate": 1e-2, "checkpointing.every_updates": 2, "model.initializer_range": 0.3},
    **{"scenarios.general_fraction": 0.4, "scenarios.safety_fraction": 0.3},
}


def training(folder) -> Training:
    """Returns a small run of stage 4 with reward models of random weights, ready to start."""
    config = configs.load("stage4_all_scenarios", [(name, str(given)) for name, given in SMALL.items()])
    mesh = sharding.make_mesh(MeshConfig())
    asked = prompts.load(parts_of(parts.PromptParts, config), WORDS)
    reasoning = asked.training.all[:60]
    asked = replace(asked, training=Mixture([reasoning]))
    params = sharding.initialize(decoder.specs(config.model), rng.key(0, "rl", "init"), "float32", mesh)
    shape = reward_model.architecture(replace(config.network, model=replace(config.model, initializer_range=0.5)))
    models = {}
    for seed, (task, name) in enumerate((("general", "helpful"), ("safety", "safety"))):
        weights = sharding.initialize(
            decoder.specs(shape.model, shape.scalar_head), rng.key(seed, "model", "init"), jnp.float32, mesh
        )
        models[task] = RewardModel(weights, shape, mesh, TextFormat(name, "tiny"), WORDS, 8, 24)
    later = policy.later(parts_of(parts.PromptParts, config), WORDS, asked)
    more = dict(describe=policy.describe, later=later, reward_models=models)
    return policy.make_training(of_config(config), WORDS, mesh, reasoning, params, folder, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the finished run, its folder, its rollouts by the update at which they start)."""
    folder = tmp_path_factory.mktemp("whole")
    run, kept = training(folder), {}
    write = run.source.journal.write

    def keeping(start, scored):
        kept[start] = scored
        return write(start, scored)

    run.source.journal.write = keeping
    run.train()
    return run, folder, kept


def by_task(run: Training, scored, start: int) -> list[str]:
    return [run.recorder.inputs.prompts.prompt(sample.request_id, start).problem.task for sample in scored.samples]


def test_prompts_of_each_data_set_are_scored_by_its_model_and_reasoning_by_its_rule(whole):
    run, _, kept = whole
    texts_of = lambda scored: WORDS.decode_batch([sample.token_ids for sample in scored.samples])  # noqa: E731
    column = {name: PART_NAMES.index(name) for name in PART_NAMES}
    seen = set()
    for start in (2, 4):
        scored = kept[start]
        rows = zip(by_task(run, scored, start), scored.samples, texts_of(scored), scored.reward_terms, strict=True)
        for task, sample, text, terms in rows:
            question = run.recorder.inputs.prompts.prompt(sample.request_id, start).problem.text
            seen.add(task)
            if task == "linear":
                assert terms[column["reward_model"]] == terms[column["rule"]] == 0
                continue
            rule = tasks.general_score if task == "general" else tasks.safety_score
            expected = (
                0.0 if sample.truncated else run.recorder.inputs.reward_models[task].rewards([question], [text])[0]
            )
            assert abs(terms[column["reward_model"]] - expected) < 1e-5
            assert terms[column["accuracy"]] == 0
            assert abs(terms[column["rule"]] - (0.0 if sample.truncated else rule(question, text))) < 1e-6
    assert seen == {"linear", "general", "safety"}


def test_reward_of_a_general_prompt_is_model_plus_format_plus_language(whole):
    run, _, kept = whole
    advantages = rollout.compute_advantages(kept[4], run.run.config, 12)
    given, column = run.run.config.reward, PART_NAMES.index
    parts, tasks_of = kept[4].reward_terms, np.asarray(by_task(run, kept[4], 4))
    expected = parts[:, column("reward_model")] + given.format * parts[:, column("format")]
    expected += given.language * parts[:, column("language")]
    mine = tasks_of != "linear"
    np.testing.assert_allclose(advantages.rewards[mine], expected[mine], atol=1e-6)
    assert np.ptp(advantages.rewards[mine]) > 0.01


def test_reward_models_are_not_asked_before_their_update(whole):
    run, folder, kept = whole
    assert not kept[0].reward_terms[:, PART_NAMES.index("reward_model")].any()
    rows = read(folder)
    told = ["reward_model" in row for row in rows]
    assert told == [False] * 2 + [True] * 4
    for row in rows[2:]:
        assert {"rule", "reasoning_accuracy", "helpful_reward", "safety_reward", "hacking_warning"} <= set(row)
        assert row["hacking_warning"] == 0 and row["accuracy"] == row["reasoning_accuracy"]


@pytest.mark.parametrize("updates", [3, 5])
def test_run_stopped_amid_a_scored_rollout_goes_on_to_the_same_bits(whole, updates, tmp_path):
    run, folder, _ = whole
    run_until(training(tmp_path), updates)
    again = training(tmp_path)
    again.train()
    assert tree.digest(again.run.params) == tree.digest(run.run.params)
    assert read(tmp_path) == read(folder)


def test_trend_is_the_slope_in_its_standard_errors():
    draw = np.random.default_rng(0)
    found = [reward_model_monitor.trend(draw.normal(0, 0.1, 10), np.full(10, 0.1)) for _ in range(2000)]
    assert abs(np.mean(found)) < 0.05 and 0.75 < np.std(found) < 1.05
    assert reward_model_monitor.trend(np.arange(10) * 0.1, np.full(10, 0.1)) == pytest.approx(
        0.1 / (0.1 / np.sqrt(82.5))
    )
    assert reward_model_monitor.trend([0, 1, 2], [0, 0, 0]) == 0 and reward_model_monitor.trend([1] * 9, [0] * 9) == 0


def rows_of(rewards, verified, error: float = 0.02) -> list[dict]:
    """Returns the figures of one rollout each."""
    names = ("reward_model", "reasoning_accuracy")
    return [
        dict(zip(names, pair, strict=True)) | {f"{name}_se": error for name in names}
        for pair in zip(rewards, verified, strict=True)
    ]


def warnings(rows: list[dict], window: int = 10, errors: float = 3.0) -> list[str]:
    return [reward_model_monitor.hacking_trends(rows[:i], rows[i], window, errors)[1] for i in range(len(rows))]


def test_hacking_is_told_in_one_line_when_the_reward_rises_and_the_verified_figure_falls():
    draw, steps = np.random.default_rng(0), np.arange(30)
    split = np.maximum(steps - 10, 0) * 0.02
    rows = rows_of(0.4 + split + draw.normal(0, 0.02, 30), 0.8 - split + draw.normal(0, 0.02, 30))
    told = warnings(rows)
    first = next(i for i, line in enumerate(told) if line)
    assert 12 <= first <= 20 and all(told[20:])
    assert told[25].startswith("reward hacking? over 10 rollouts the reward model's reward rose from ")
    assert "reasoning_accuracy fell from" in told[25] and "\n" not in told[25]
    assert reward_model_monitor.hacking_trends(rows[:25], rows[25], 10, 3.0)[0]["hacking_warning"] == 1.0


def test_hacking_is_not_told_before_the_window_is_full():
    steps = np.arange(12) * 0.05
    told = warnings(rows_of(0.3 + steps, 0.9 - steps, error=0.01))
    assert [bool(line) for line in told] == [False] * 9 + [True] * 3


def test_reasoning_is_that_of_reasoning_prompts_where_one_model_is_off(whole):
    run, _, kept = whole
    group, scored = run.run.config.grpo.group_size, kept[4]
    prompts_of = [run.recorder.inputs.prompts.prompt(sample.request_id, 4) for sample in scored.samples[::group]]
    both = reward_model_monitor.figures(scored, prompts_of, run.recorder.inputs.reward_models, group)
    one = reward_model_monitor.figures(
        scored, prompts_of, {"general": run.recorder.inputs.reward_models["general"]}, group
    )
    assert one["reasoning_accuracy"] == both["reasoning_accuracy"] and "safety_reward" not in one


@pytest.mark.parametrize("kind", ["both rise", "only noise", "both fall", "reward rises alone"])
def test_hacking_is_not_told_of_a_healthy_run(kind):
    slopes = {"both rise": (1, 1), "only noise": (0, 0), "both fall": (-1, -1), "reward rises alone": (1, 0)}[kind]
    false = 0
    for seed in range(40):
        draw, steps = np.random.default_rng(seed), np.arange(40) * 0.01
        curves = [0.4 + slope * steps + draw.normal(0, 0.02, 40) for slope in slopes]
        false += any(warnings(rows_of(*curves)))
    assert false <= (2 if kind == "reward rises alone" else 0)


def test_hidden_rule_that_falls_is_told_too():
    steps = np.arange(10) * 0.03
    rows = [
        row | {"rule": 0.9 - s, "rule_se": 0.01} for row, s in zip(rows_of(0.4 + steps, [0.8] * 10), steps, strict=True)
    ]
    assert "rule fell from 0.900 to 0.630" in warnings(rows)[-1]
