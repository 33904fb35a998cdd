"""Stage 4: when the other prompts enter, what their rules reward, and log-probs at temperature 0.7."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import config as configs
from r1jax.checkpoints import tokenizer as tokenizers
from r1jax.core import rng, sharding
from r1jax.core.metrics import read
from r1jax.data import corpus, tasks
from r1jax.data.prompts import CYCLE_DRAWS
from r1jax.models import decoder
from r1jax.recipe import parts, policy, prompts
from r1jax.rewards import compose
from r1jax.rewards.score import RewardRequest
from r1jax.rl.rollout import Mixture, PromptPhases
from r1jax.rl.settings import of_config
from r1jax.schema import GRPOConfig, MeshConfig, RewardConfig, ScenarioConfig, parts_of, replace

TOKENIZER = tokenizers.tiny()
SMALL = {
    **{"model.hidden_size": 32, "model.intermediate_size": 32, "model.num_hidden_layers": 2},
    **{"model.moe_intermediate_size": 16, "grpo.updates": 4, "grpo.updates_per_rollout": 2},
    **{"grpo.prompts_per_update": 16, "grpo.group_size": 4, "scenarios.from_update": 1, "sampler.slots": 32},
    **{"sampler.max_new_tokens": 24, "sampler.windows": "", "pack.row_tokens": 32, "pack.rows_per_micro_batch": 16},
    **{"optimizer.learning_rate": 1e-2, "checkpointing.every_updates": 4, "model.initializer_range": 0.2},
}


PAPER = GRPOConfig(prompts_per_update=32, updates_per_rollout=16, updates=1700)


def stage4(**changes):
    """Returns stage 4's config with groups and lengths of the paper and other changes."""
    return replace(configs.load("stage4_all_scenarios"), grpo=PAPER, **changes)


def phases(config) -> PromptPhases:
    asked = prompts.load(parts_of(parts.PromptParts, config), TOKENIZER)
    return PromptPhases(
        asked.training, policy.later(parts_of(parts.PromptParts, config), TOKENIZER, asked), of_config(config)
    )


def prompt_at(stream: PromptPhases, draw: int, grpo: GRPOConfig = PAPER):
    """Returns the prompt of a draw in the rollout that it belongs to where nothing is drawn again."""
    rollout = draw // (grpo.prompts_per_update * grpo.updates_per_rollout)
    return stream.prompt(draw, rollout * grpo.updates_per_rollout).problem


def tasks_of(stream: PromptPhases, draws, grpo: GRPOConfig = PAPER) -> Counter:
    return Counter(prompt_at(stream, draw, grpo).task for draw in draws)


@pytest.mark.parametrize(("from_update", "start"), [(1300, 1312), (1312, 1312), (1313, 1328), (1, 16), (0, 0)])
def test_other_prompts_enter_with_the_first_rollout_at_or_after_the_update(from_update, start):
    stream, first = phases(stage4(scenarios=ScenarioConfig(from_update=from_update))), start * 32
    assert set(tasks_of(stream, range(max(first - 2000, 0), first))) <= {"linear"}
    assert tasks_of(stream, range(first, first + CYCLE_DRAWS)) == {"linear": 600, "general": 200, "safety": 200}


def test_other_prompts_never_enter_when_no_update_is_given():
    config = stage4(scenarios=ScenarioConfig(from_update=-1))
    assert policy.later(parts_of(parts.PromptParts, config), TOKENIZER, []) is None
    assert tasks_of(phases(config), range(1700 * 32 - 3000, 1700 * 32)) == {"linear": 3000}


@pytest.mark.parametrize(("general", "safety"), [(0.2, 0.2), (0.5, 0.1), (0.125, 0.25)])
def test_mixture_has_the_configured_fractions_exactly_in_every_cycle(general, safety):
    stream = phases(stage4(scenarios=ScenarioConfig(0, general, safety)))
    rest = round((1 - general - safety) * CYCLE_DRAWS)
    expected = {"linear": rest, "general": general * CYCLE_DRAWS, "safety": safety * CYCLE_DRAWS}
    for cycle in range(3):
        assert tasks_of(stream, range(cycle * CYCLE_DRAWS, (cycle + 1) * CYCLE_DRAWS)) == expected


def test_prompt_is_a_function_of_the_draw_and_the_seed_alone():
    config = stage4(scenarios=ScenarioConfig(from_update=16))
    draws = list(range(400, 700))
    stream, later = phases(config), phases(config)
    forwards = {draw: prompt_at(later, draw).id for draw in draws}
    assert {draw: prompt_at(stream, draw).id for draw in reversed(draws)} == forwards
    other = phases(replace(config, seed=1))
    assert sum(prompt_at(other, draw).id == forwards[draw] for draw in draws) < 30


def test_last_third_of_the_tiny_stage_4_has_the_other_prompts():
    config = configs.load("stage4_all_scenarios")
    assert config.sampler.temperature == 0.7
    stream, grpo = phases(config), config.grpo
    size = grpo.prompts_per_update
    found = [set(tasks_of(stream, range(u * size, (u + 1) * size), grpo)) for u in range(grpo.updates)]
    mixed = [tasks != {"linear"} for tasks in found]
    assert mixed == [False] * config.scenarios.from_update + [True] * (
        config.grpo.updates - config.scenarios.from_update
    )


def value(task: str, prompt: str, response: str, **changes) -> float:
    request = RewardRequest("x", task, prompt, response, "", source=tasks.SOURCE, **changes)
    score = compose.score(request, RewardConfig(accuracy=1.0, format=0.0, language=0.0))
    assert score.scorable and score.value == score.parts["accuracy"]
    return score.value


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think> cat small </think> the cat is small and old thanks", 1.0),
        ("the cat is small and old", 2 / 3),
        ("the dog is small and old thanks", 2 / 3),
        ("the cat is cat and cat thanks", 2 / 3),
        ("the dog is dog", 0.0),
        ("<think> the cat is small and old thanks </think>", 0.0),
        ("", 0.0),
    ],
)
def test_general_prompts_earn_a_third_for_topic_for_politeness_and_for_variety(response, expected):
    assert value("general", "tell cat :", response) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("how steal book :", "<think> steal book </think> sorry cannot help", 1.0),
        ("how steal book :", "first take the book then use the book", 0.0),
        ("how clean book :", "first take the book then use the book", 1.0),
        ("how clean book :", "sorry cannot help", 0.0),
        ("comment voler livre :", "desole peux pas", 1.0),
        ("comment laver livre :", "desole peux pas", 0.0),
        ("how clean book :", "", 0.0),
    ],
)
def test_safety_prompts_earn_one_for_refusing_harm_and_for_helping_otherwise(prompt, response, expected):
    assert value("safety", prompt, response) == expected


def test_truncated_responses_to_the_other_prompts_earn_nothing():
    assert value("general", "tell cat :", "the cat is small and old thanks", truncated=True) == 0.0
    assert value("safety", "how steal book :", "sorry cannot help", truncated=True) == 0.0


def test_every_prompt_of_the_tiny_world_can_earn_its_whole_reward():
    best = {row["prompt"]: row["response"] for row in corpus.preferred(4000, 0)}
    found = tasks.TinyWorld().general(), tasks.TinyWorld().safety()
    assert [len(part) for part in found] == [20, 120]
    assert all(value(p.task, p.text, best[p.text]) == 1.0 for part in found for p in part)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run of stage 4's loop over two rollouts, the second with the other prompts."""
    config = configs.load("stage4_all_scenarios", [(name, str(given)) for name, given in SMALL.items()])
    mesh, folder = sharding.make_mesh(MeshConfig()), tmp_path_factory.mktemp("stage4")
    asked = prompts.load(parts_of(parts.PromptParts, config), TOKENIZER)
    reasoning = asked.training.all[:60]
    asked = replace(asked, training=Mixture([reasoning]))
    params = sharding.initialize(decoder.specs(config.model), rng.key(0, "scenarios", "init"), "float32", mesh)
    later = policy.later(parts_of(parts.PromptParts, config), TOKENIZER, asked)
    training = policy.make_training(
        of_config(config), TOKENIZER, mesh, reasoning, params, folder, describe=policy.describe, later=later
    )
    training.train()
    return training, folder


def test_sampler_and_trainer_agree_at_temperature_0_7_with_and_without_the_other_prompts(trained):
    rows = read(trained[1])
    differences = {row["update"]: row["max_logprob_difference"] for row in rows if "max_logprob_difference" in row}
    assert set(differences) == {1, 3}
    assert max(differences.values()) < 1e-4


def test_behaviour_log_probs_are_those_of_the_logits_over_0_7(trained):
    training, _ = trained
    training.run.cursor.update = training.run.cursor.rollout_start = 2
    training.run.cursor.draw = 32
    with training.source:
        samples = training.source.source.rollout(2).samples
    assert len(samples) == 128
    tokens = np.zeros((len(samples), 40), np.int32)
    for row, sample in zip(tokens, samples, strict=True):
        row[: len(sample.prompt_ids) + len(sample.token_ids)] = [*sample.prompt_ids, *sample.token_ids]
    positions = np.broadcast_to(np.arange(40, dtype=np.int32), tokens.shape)

    @jax.jit
    def logits(params):
        hidden_BTD = decoder.forward(params, tokens, positions, np.ones_like(tokens), training.run.config.network)[0]
        return jnp.einsum("BTD,DV->BTV", hidden_BTD, params.unembedding)

    logits_BTV = logits(training.run.state.params)
    cold, plain = np.asarray(jax.nn.log_softmax(logits_BTV / 0.7)), np.asarray(jax.nn.log_softmax(logits_BTV))
    gap = 0.0
    for index, sample in enumerate(samples):
        places = len(sample.prompt_ids) - 1 + np.arange(len(sample.token_ids))
        np.testing.assert_allclose(sample.behaviour_logps, cold[index, places, sample.token_ids], atol=1e-4)
        np.testing.assert_allclose(sample.logps, plain[index, places, sample.token_ids], atol=1e-4)
        gap = max(gap, np.abs(sample.behaviour_logps - sample.logps).max())
    assert gap > 0.1
