"""Claims about rollouts: same tokens whatever the slots, exact log-probs, one prefill a group, honest bookkeeping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.core import rng, sharding
from r1jax.data import tasks
from r1jax.data.packing import PackItem, pack_batch, unpack
from r1jax.models import decoder, moe
from r1jax.sampler import engine as engines
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import RolloutRequest, SamplingLaw
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import MeshConfig, SamplerConfig
from r1jax.stages import common, stage0_base

WORDS = tokenizer.tiny()
MODEL = configs.load("r1_zero:tiny").model
GROUPS, SAMPLES, LONGEST = 6, 12, 42
NEAR_TIE = 1e-6  # router margin below which a rounding may flip the choice


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def params(mesh):
    return common.load_asset(stage0_base.asset_path("tiny"), MODEL, mesh)


def requests(law=None, groups=GROUPS, samples=SAMPLES, seed=0):
    law = law or SamplingLaw(max_new_tokens=LONGEST, stop_ids=(WORDS.eos_id,))
    prompts = tasks.linear_prompts("train")
    result = []
    for draw in range(groups):
        keys = rng.sample_keys(seed, "test", np.full(samples, draw), np.arange(samples), "sample")
        ids = np.asarray(WORDS.encode(prompts[31 * draw].text), np.int32)
        result.append(RolloutRequest(draw, ids, keys, law))
    return result


def build(mesh, slots, steps, windows=()):
    sampler = SamplerConfig(
        slots=slots, steps_per_dispatch=steps, max_prompt_tokens=16, max_new_tokens=LONGEST, windows=windows
    )
    return RolloutSampler(Engine(MODEL, sampler, mesh, (WORDS.eos_id,), WORDS))


@pytest.fixture(scope="module")
def sampler(mesh):
    return build(mesh, slots=16, steps=8)


@pytest.fixture(scope="module")
def rollout(sampler, params):
    samples = sampler.generate(requests(), params, version=7)
    return samples, sampler.statistics


@pytest.mark.parametrize(("slots", "steps", "windows"), [(5, 8, ()), (72, 5, (24, 40)), (16, 1, ())])
def test_tokens_do_not_depend_on_slots_steps_windows_or_order(rollout, mesh, params, slots, steps, windows):
    samples, _ = rollout
    other = build(mesh, slots, steps, windows).generate(requests()[::-1], params)
    found = {(s.request_id, s.sample_index): s for s in other}
    assert len(found) == GROUPS * SAMPLES
    for sample in samples:
        twin = found[sample.request_id, sample.sample_index]
        assert np.array_equal(sample.token_ids, twin.token_ids)
        assert sample.finish_reason == twin.finish_reason


def router_margin(params, tokens, positions, segments):
    """Returns, for each token, the smallest gap between a kept and a dropped choice in any router, [R, T]."""
    smallest = []

    def margin(scores, kept):
        ranked = -np.sort(-scores, axis=-1)
        return ranked[..., kept - 1] - ranked[..., kept]

    def spy(router, bias, x, c):
        scores = np.asarray(jax.nn.sigmoid(x @ router)) + np.asarray(bias)
        grouped = scores.reshape(*scores.shape[:-1], c.n_group, -1)
        group = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        chosen = np.argsort(-group, axis=-1)[..., : c.topk_group]
        keep = np.zeros(group.shape, bool)
        np.put_along_axis(keep, chosen, True, axis=-1)
        masked = np.where(keep[..., None], grouped, -np.inf).reshape(scores.shape)
        smallest.append(np.minimum(margin(group, c.topk_group), margin(masked, c.num_experts_per_tok)))
        return original(router, bias, x, c)

    original, moe.route = moe.route, spy
    try:
        with jax.disable_jit():
            decoder.forward(params, tokens, positions, segments, MODEL)
    finally:
        moe.route = original
    return np.min(smallest, axis=0)


def test_log_probs_and_experts_equal_a_teacher_forced_forward(rollout, params):
    samples, _ = rollout
    items = []
    for s in samples:
        whole = np.concatenate([s.prompt_ids, s.token_ids])
        items.append(PackItem(whole, np.ones(len(whole), np.float32)))
    batch = pack_batch(items, 64, 64)
    arrays = batch.tokens, batch.positions, batch.segments
    hidden, _, auxiliary = decoder.forward(params, *(jnp.asarray(a) for a in arrays), MODEL)
    logp = jax.nn.log_softmax(decoder.logits(params, hidden))
    logp = np.asarray(jnp.take_along_axis(logp, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0])
    margins = router_margin(params, *arrays)
    experts = np.asarray(auxiliary.experts).transpose(1, 2, 0, 3)
    worst, compared, ties = 0.0, 0, 0
    for s, forced, margin, (row, start, length) in zip(
        samples, unpack(logp, batch), unpack(margins, batch), batch.slots, strict=True
    ):
        near = np.flatnonzero(margin < NEAR_TIE)
        safe = len(forced) if near.size == 0 else int(near[0])
        ties += int(near.size > 0)
        prompt = len(s.prompt_ids)
        forced, sampled = forced[prompt - 1 : safe], s.logps[: max(safe - prompt + 1, 0)]
        worst = max(worst, float(np.abs(forced - sampled).max(initial=0.0)))
        compared += len(sampled)
        assert np.array_equal(s.routed_experts[:safe], experts[row, start : start + length][:safe])
        assert np.array_equal(s.logps, s.behaviour_logps)  # temperature 1, no filter
    print(f"{compared} log-probs, largest difference {worst:.2e}, {ties} samples cut at a router tie")
    assert compared > 500
    assert ties <= 3
    assert worst < 1e-5


def test_each_group_is_prefilled_once_and_weights_are_versioned(rollout):
    samples, statistics = rollout
    assert statistics.prefills == GROUPS
    assert statistics.tokens == sum(len(s.token_ids) for s in samples)
    assert {s.weight_version for s in samples} == {7}
    assert [(s.request_id, s.sample_index) for s in samples] == [(g, i) for g in range(GROUPS) for i in range(SAMPLES)]


def test_stop_token_is_kept_and_lengths_are_exact(rollout):
    samples, _ = rollout
    for s in samples:
        stops = np.flatnonzero(s.token_ids == WORDS.eos_id)
        if s.finish_reason == "stop":
            assert stops.tolist() == [len(s.token_ids) - 1]
        else:
            assert s.finish_reason == "length" and len(s.token_ids) == LONGEST and not stops.size
    assert {s.finish_reason for s in samples} == {"stop", "length"}


def test_keys_decide_the_samples(rollout, sampler, params):
    samples, _ = rollout
    again = sampler.generate(requests(groups=2), params)
    other = sampler.generate(requests(groups=2, seed=1), params)
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(samples, again, strict=False))
    assert any(not np.array_equal(a.token_ids, b.token_ids) for a, b in zip(again, other, strict=True))
    assert len({tuple(s.token_ids) for s in again}) > 12


def test_new_weights_and_any_slots_compile_nothing(sampler, params):
    before = sampler.engine.compilations()
    shifted = jax.tree.map(lambda leaf: leaf * 1.01, params)
    sampler.generate(requests(groups=3, samples=5), shifted)
    sampler.generate(requests(groups=1, samples=1), params)
    assert sampler.engine.compilations() == before


def test_a_slot_used_by_a_longer_sample_before_gives_the_same_tokens(sampler, params):
    fresh = sampler.generate(requests(groups=1, samples=2), params)
    sampler.generate(requests(groups=4), params)
    assert all(
        np.array_equal(a.token_ids, b.token_ids)
        for a, b in zip(fresh, sampler.generate(requests(groups=1, samples=2), params), strict=True)
    )


def test_an_exception_reaches_the_caller_and_the_sampler_goes_on(sampler, params, monkeypatch):
    expected = sampler.generate(requests(groups=1), params)
    calls = []
    decode = sampler.engine.decode

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("device lost")
        return decode(*arguments)

    monkeypatch.setattr(sampler.engine, "decode", failing)
    with pytest.raises(RuntimeError, match="device lost"):
        sampler.generate(requests(groups=1), params)
    again = sampler.generate(requests(groups=1), params)
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(expected, again, strict=True))


def test_a_prompt_that_is_too_long_is_refused(sampler, params):
    request = RolloutRequest(0, np.zeros(17, np.int32), np.zeros((1, 2), np.uint32), SamplingLaw())
    with pytest.raises(ValueError, match="prompt of 17 tokens exceeds config.sampler.max_prompt_tokens=16"):
        sampler.generate([request], params)


def test_a_full_cache_ends_a_sample_with_capacity(sampler, params):
    law = SamplingLaw(max_new_tokens=10_000)
    samples = sampler.generate(requests(law, groups=1, samples=3), params)
    assert {s.finish_reason for s in samples} == {"capacity"}
    prompt = len(samples[0].prompt_ids)
    assert {len(s.token_ids) for s in samples} == {sampler.engine.rows - prompt}


def test_prefill_in_two_pieces_equals_one(sampler, params):
    engine, ids = sampler.engine, np.arange(1, 15, dtype=np.int32)
    whole = engine.prefill(params=params, padded_tokens=np.pad(ids, (0, 2)), true_length=14)
    first = engine.prefill(params=params, padded_tokens=np.pad(ids[:9], (0, 7)), true_length=9)
    both = engine.prefill(params=params, existing_prefix=first, padded_tokens=np.pad(ids[9:], (0, 11)), true_length=5)
    assert int(both.length) == 14
    np.testing.assert_allclose(both.logits, whole.logits, atol=1e-4)
    np.testing.assert_allclose(both.cache.keys[:, :, :14], whole.cache.keys[:, :, :14], atol=1e-5)


def law_of(logits, **changes):
    size = len(logits)
    fields = dict(
        temperature=np.ones(size, np.float32),
        top_p=np.ones(size, np.float32),
        top_k=np.zeros(size, np.int32),
        max_new_tokens=np.full(size, 9, np.int32),
        key=np.stack([np.arange(size), np.zeros(size)], axis=1).astype(np.uint32),
        stop_ids=np.full((size, engines.MAX_STOP_TOKENS), -1, np.int32),
    )
    fields |= {name: np.full(size, value, fields[name].dtype) for name, value in changes.items()}
    return engines.SlotParams(**fields)


def test_nucleus_and_top_k_keep_what_a_hand_computation_keeps():
    probs = np.asarray([[0.5, 0.05, 0.3, 0.15]])
    scores = jnp.log(jnp.asarray(probs))

    def kept(top_p, top_k):
        out = engines.filtered(scores, jnp.asarray([top_p]), jnp.asarray([top_k]))
        return np.flatnonzero(np.isfinite(out[0])).tolist()

    assert kept(0.5, 0) == [0]
    assert kept(0.6, 0) == [0, 2]
    assert kept(0.81, 0) == [0, 2, 3]
    assert kept(1.0, 3) == [0, 2, 3]
    assert kept(0.01, 0) == [0]


def test_behaviour_log_prob_is_of_the_law_that_was_sampled_from():
    logits = jnp.tile(jnp.log(jnp.asarray([0.5, 0.05, 0.3, 0.15])), (64, 1))
    token, raw, behaviour = engines.sample(logits, law_of(logits, temperature=0.5, top_k=2), jnp.zeros(64, jnp.int32))
    sharpened = np.asarray([0.25, 0.0, 0.09, 0.0]) / 0.34
    assert set(np.asarray(token)) == {0, 2}
    np.testing.assert_allclose(np.exp(behaviour), sharpened[np.asarray(token)], rtol=1e-5)
    np.testing.assert_allclose(np.exp(raw), np.asarray([0.5, 0.05, 0.3, 0.15])[np.asarray(token)], rtol=1e-5)


def test_temperature_zero_takes_the_best_token():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(32, 9)), jnp.float32)
    token, _, behaviour = engines.sample(logits, law_of(logits, temperature=0.0), jnp.zeros(32, jnp.int32))
    assert np.array_equal(token, np.argmax(logits, axis=-1))
    assert not np.asarray(behaviour).any()


def test_sampled_frequencies_follow_the_softmax():
    probs = np.asarray([0.4, 0.3, 0.2, 0.07, 0.03])
    draws = 20_000
    logits = jnp.tile(jnp.log(jnp.asarray(probs, jnp.float32)), (draws, 1))
    token, _, _ = engines.sample(logits, law_of(logits), jnp.full(draws, 3, jnp.int32))
    counts = np.bincount(np.asarray(token), minlength=5)
    chi_square = float(((counts - draws * probs) ** 2 / (draws * probs)).sum())
    assert chi_square < 18.47  # 4 degrees of freedom, p = 0.001
