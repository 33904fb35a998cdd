"""Claims about shared prompts: a prompt stands once in a row, and neither loss nor gradient nor log-prob is another."""

import functools

import jax
import numpy as np
import pytest
import small
from small import rl_training

from r1jax import config as configs
from r1jax.core import rng, sharding
from r1jax.core.metrics import read
from r1jax.data.packing import PREFIXES, PackItem, share_prompts, unpack
from r1jax.models import decoder
from r1jax.rewards.compose import PART_NAMES
from r1jax.rl import losses, rollout
from r1jax.rl.journal import Rollout
from r1jax.rl.logprobs import ROUTED, Scorer
from r1jax.sampler.sample import RolloutSample
from r1jax.schema import Config, GRPOConfig, MeshConfig, PackConfig, replace
from r1jax.train import step

MODELS = {"moe": small.MIXTURE, "dense": small.GROUPED, "blocks": small.changed(small.GROUPED, attention_block=5)}


def scored(prompt_sizes=(7, 1, 5), group=4):
    """Returns samples of three questions, one with a prompt of one token, of unequal lengths, with expert records."""
    generator = np.random.default_rng(0)
    samples = []
    for draw, size in enumerate(prompt_sizes):
        prompt = generator.integers(1, 32, size).astype(np.int32)
        record = np.stack([generator.permutation(4)[:2] for _ in range(size)])[:, None].astype(np.int16)
        for index in range(group):
            length = int(generator.integers(1, 9))
            own = np.stack([generator.permutation(4)[:2] for _ in range(length)])[:, None].astype(np.int16)
            samples.append(
                RolloutSample(
                    request_id=draw,
                    sample_index=index,
                    prompt_ids=prompt,
                    token_ids=generator.integers(1, 32, length).astype(np.int32),
                    logps=np.zeros(length, np.float32),
                    behaviour_logps=generator.normal(-3, 0.5, length).astype(np.float32),
                    finish_reason="stop",
                    weight_version=0,
                    routed_experts=np.concatenate([record, own]),
                )
            )
    parts = generator.random((len(samples), len(PART_NAMES))).astype(np.float32)
    return Rollout(samples, parts, np.arange(len(samples)) != 5, len(prompt_sizes))


def packed(config, found):
    advantages = rollout.compute_advantages(found, config, 8)
    return rollout.pack_mini_batch(found, np.random.default_rng(1).permutation(len(found)), advantages, config, 8)


def config_of(network, shared, replay=False, row_tokens=24):
    grpo = GRPOConfig(group_size=4, prompts_per_update=3, kl_coef=0.0, clip_ratio=0.5, routing_replay=replay)
    pack = PackConfig(row_tokens=row_tokens, rows_per_micro_batch=2, shared_prompts=shared)
    return Config(model=network.model, compute=network.compute, grpo=grpo, pack=pack)


def item_of(prompt, length):
    return PackItem(np.concatenate([prompt, np.zeros(length, np.int32)]), np.r_[0 * prompt, np.ones(length)])


def test_prompts_stand_once_a_row_before_their_samples_and_every_sample_once():
    generator = np.random.default_rng(2)
    prompts = [np.full(size, number, np.int32) for number, size in enumerate((12, 9, 1)) for _ in range(6)]
    whole = [item_of(prompt, length) for prompt, length in zip(prompts, generator.integers(1, 10, 18), strict=True)]
    items, rows = share_prompts(whole, [len(prompt) for prompt in prompts], 40)
    assert sorted(index for row in rows for index in row) == list(range(len(items)))
    assert max(sum(len(items[index].tokens) for index in row) for row in rows) <= 40
    for row in rows:
        for place, index in enumerate(row):
            if index < len(prompts) and (before := items[index].prefix) >= 0:
                assert row.index(before) < place and np.array_equal(items[before].tokens, prompts[index][:-1])
                assert np.array_equal(np.r_[items[before].tokens, items[index].tokens], whole[index].tokens)
                assert items[index].loss_mask.sum() == whole[index].loss_mask.sum()
    assert [item.prefix for item in items[12:18]] == [-1] * 6  # of prompts of one token nothing can be shared
    assert sum(len(item.tokens) for item in items) < sum(len(item.tokens) for item in whole)


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="sample 0 has 31 tokens, needs 1 to row_tokens=29"):
        share_prompts([item_of(np.arange(12, dtype=np.int32), 30)], [12], 40)


@functools.cache
def weights(name):
    mesh = sharding.make_mesh(MeshConfig())
    return sharding.initialize(decoder.specs(MODELS[name].model), rng.key(0, "shared", "init"), "float32", mesh)


def update_of(name, config, found):
    """Returns (loss, gradients, tokens in rows) of all micro-batches of a mini-batch."""
    batch, params = packed(config, found), weights(name)
    arrays = step.batch_arrays(batch, config.pack, rollout.micro_batches(config), losses.fields(config.grpo))
    given = losses.arguments(config.grpo, 0.0, 1.0)
    loss = jax.jit(jax.value_and_grad(losses.make_loss(MODELS[name], config.grpo), has_aux=True))
    total, grads = 0.0, None
    for number in range(step.filled_micro_batches(batch, config.pack)):
        (value, _), found_grads = loss(params, {key: array[number] for key, array in arrays.items()}, given)
        total += float(value)
        grads = found_grads if grads is None else jax.tree.map(np.add, grads, found_grads)
    return total, grads, int((batch.segments > 0).sum())


@pytest.mark.parametrize(("name", "replay"), [("moe", False), ("moe", True), ("dense", False), ("blocks", False)])
def test_loss_and_gradients_are_those_of_prompts_that_stand_with_every_sample(name, replay):
    found = scored()
    apart = update_of(name, config_of(MODELS[name], False, replay), found)
    shared = update_of(name, config_of(MODELS[name], True, replay), found)
    assert shared[0] == pytest.approx(apart[0], rel=1e-5)
    for a, b in zip(jax.tree.leaves(shared[1]), jax.tree.leaves(apart[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6 * max(float(np.abs(b).max()), 1e-3))
    assert shared[2] < 0.9 * apart[2]


def test_log_probs_of_every_sample_are_the_same_bits_or_an_ulp_away():
    found, rows = scored(), {}
    for shared in (False, True):
        config = config_of(small.GROUPED, shared)
        batch = packed(config, found)
        arrays = step.batch_arrays(batch, config.pack, rollout.micro_batches(config), ())
        assert (PREFIXES in arrays) == shared and ROUTED not in arrays
        scorer = Scorer(small.GROUPED, sharding.make_mesh(MeshConfig()))
        logps = scorer(weights("dense"), arrays, step.filled_micro_batches(batch, config.pack), 1.0)
        rows[shared] = unpack(logps.reshape(batch.tokens.shape), batch)
    order = np.random.default_rng(1).permutation(len(found))
    for place, index in enumerate(order):
        length = len(found.samples[index].token_ids)
        np.testing.assert_allclose(rows[True][place][-length:], rows[False][place][-length:], atol=2e-6)


def test_a_run_with_shared_prompts_follows_the_same_course_on_fewer_tokens(tmp_path):
    more = {
        "grpo__updates": 3,
        "grpo__updates_per_rollout": 3,
        "grpo__kl_coef_schedule": "()",
        "grpo__old_logp": "recomputed",
    }
    more |= {"grpo__prompts_per_update": 4, "pack__row_tokens": 64}
    rows = {}
    for shared in (False, True):
        rl_training(tmp_path / str(shared), **more, pack__shared_prompts=shared).train()
        rows[shared] = read(tmp_path / str(shared))
    for apart, together in zip(rows[False], rows[True], strict=True):
        assert together["tokens"] == apart["tokens"] and together["packed_tokens"] < apart["packed_tokens"]
        for name in ("loss", "kl", "grad_norm", "entropy", "importance_ratio"):
            assert together[name] == pytest.approx(apart[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ([("mesh.context", "2")], "mesh.context=1"),
        ([("auxiliary.aux_loss_alpha", "0.1")], "auxiliary.aux_loss_alpha=0"),
        ([("grpo.advantage", "gae")], "grpo.advantage other than gae"),
    ],
)
def test_what_does_not_go_with_shared_prompts_is_named(fields, wanted):
    with pytest.raises(ValueError, match=f"pack.shared_prompts=true needs {wanted}"):
        configs.load("r1_zero:tiny", [("pack.shared_prompts", "true"), *fields])


def test_one_response_of_full_length_beside_its_prompt_still_fills_a_row_exactly():
    found = scored((15,), 2)
    samples = [replace(found.samples[0], token_ids=np.ones(9, np.int32), behaviour_logps=np.zeros(9, np.float32))]
    one = Rollout([samples[0], *found.samples[1:]], found.reward_terms, found.scorable, 1)
    config = config_of(small.GROUPED, True)
    config = replace(config, grpo=replace(config.grpo, group_size=2, prompts_per_update=1))
    batch = packed(config, one)
    assert (batch.segments > 0).sum(axis=1).max() == 24
