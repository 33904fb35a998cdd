"""Claims about rollouts: same tokens whatever the slots, exact log-probs, one prefill a group, honest bookkeeping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.core import rng, sharding
from r1jax.data import tasks
from r1jax.data.packing import PackItem, pack_batch, unpack
from r1jax.models import decoder, moe, rope
from r1jax.recipe import common, stage0_base
from r1jax.sampler import engine as engines
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import RolloutRequest, SamplingParams
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import MeshConfig, SamplerConfig

WORDS = tokenizer.tiny()
MODEL = configs.load("r1_zero:tiny").network
GROUPS, SAMPLES, LONGEST = 6, 12, 42
NEAR_TIE = 1e-6  # router margin below which a rounding may flip the choice


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def params(mesh):
    return common.load_asset(stage0_base.asset_path("tiny"), MODEL.model, mesh)


def requests(sampling=None, groups=GROUPS, samples=SAMPLES, seed=0):
    sampling = sampling or SamplingParams(max_new_tokens=LONGEST, stop_ids=(WORDS.eos_id,))
    prompts = tasks.linear_prompts("train")
    result = []
    for draw in range(groups):
        keys = rng.sample_keys(seed, "test", np.full(samples, draw), np.arange(samples), "sample")
        ids = np.asarray(WORDS.encode(prompts[31 * draw].text), np.int32)
        result.append(RolloutRequest(draw, ids, keys, sampling))
    return result


def build(mesh, slots, steps, windows=(), record=True):
    sampler = SamplerConfig(
        slots=slots, steps_per_dispatch=steps, max_prompt_tokens=16, max_new_tokens=LONGEST, windows=windows
    )
    return RolloutSampler(Engine(MODEL, sampler, mesh, (WORDS.eos_id,), WORDS, record_experts=record))


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


def test_without_a_record_of_experts_tokens_and_log_probs_have_the_same_bits(rollout, mesh, params):
    plain = build(mesh, slots=16, steps=8, record=False).generate(requests(), params)
    for sample, twin in zip(rollout[0], plain, strict=True):
        assert sample.routed_experts is not None and twin.routed_experts is None
        for name in ("token_ids", "logps", "behaviour_logps"):
            assert np.array_equal(getattr(sample, name), getattr(twin, name)), name


def teacher_forced(params, batch):
    """Returns (log p(target) [R, T], experts [R, T, Lm, k], smallest gap between a kept and a dropped choice [R, T])."""
    gaps = []

    def gap(scores, kept):
        ranked = -jnp.sort(-scores, axis=-1)
        return ranked[..., kept - 1] - ranked[..., kept] if kept < scores.shape[-1] else jnp.inf

    def spy(router, bias, x, c, forced):
        scores = jax.nn.sigmoid(x @ router) + bias
        grouped = scores.reshape(*scores.shape[:-1], c.n_group, -1)
        group = jnp.sort(grouped, axis=-1)[..., -2:].sum(-1)
        least = -jnp.sort(-group, axis=-1)[..., c.topk_group - 1]
        masked = jnp.where((group >= least[..., None])[..., None], grouped, -jnp.inf).reshape(scores.shape)
        gaps.append(jnp.minimum(gap(group, c.topk_group), gap(masked, c.num_experts_per_tok)))
        return original(router, bias, x, c, forced)

    @jax.jit
    def run(params, tokens, positions, segments, targets):
        hidden, _, auxiliary = decoder.forward(params, tokens, positions, segments, MODEL)
        logp = jax.nn.log_softmax(decoder.logits(params, hidden))
        picked = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        return picked, auxiliary.experts.transpose(1, 2, 0, 3), jnp.min(jnp.stack(gaps), axis=0)

    original, moe.route = moe.route, spy
    try:
        return jax.device_get(run(params, batch.tokens, batch.positions, batch.segments, batch.targets))
    finally:
        moe.route = original


def exact_logps(params, batch):
    """Returns log p(target) [R, T] of a forward pass in float64, with the rotation angles of the float32 one."""
    angles = jax.device_get(rope.angles(jnp.asarray(batch.positions), MODEL.model))
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        patch.setattr(rope, "angles", lambda positions, c: tuple(jnp.asarray(a, jnp.float64) for a in angles))
        wide = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), params)
        hidden, *_ = decoder.forward(wide, batch.tokens, batch.positions, batch.segments, MODEL)
        logits = decoder.logits(wide, hidden)
        assert logits.dtype == jnp.float64
        logp = jax.nn.log_softmax(logits)
        return np.asarray(jnp.take_along_axis(logp, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0])


def test_log_probs_and_experts_equal_a_teacher_forced_forward(rollout, params):
    """Log-probs are within 1e-5 of those of exact arithmetic; the float32 forward has roundings of its own beside them."""
    samples, _ = rollout
    items = []
    for s in samples:
        whole = np.concatenate([s.prompt_ids, s.token_ids])
        items.append(PackItem(whole, np.ones(len(whole), np.float32)))
    batch = pack_batch(items, 64, 64)
    logp, experts, margins = teacher_forced(params, batch)
    exact = exact_logps(params, batch)
    off, apart, ties = [], [], 0
    for s, forced, true, margin, (row, start, length) in zip(
        samples, unpack(logp, batch), unpack(exact, batch), unpack(margins, batch), batch.slots, strict=True
    ):
        near = np.flatnonzero(margin < NEAR_TIE)
        safe = len(forced) if near.size == 0 else int(near[0])
        ties += int(near.size > 0)
        prompt = len(s.prompt_ids)
        sampled = s.logps[: max(safe - prompt + 1, 0)]
        off.extend(np.abs(true[prompt - 1 : safe] - sampled))
        apart.extend(np.abs(forced[prompt - 1 : safe] - sampled))
        assert np.array_equal(s.routed_experts[:safe], experts[row, start : start + length][:safe])
        assert np.array_equal(s.logps, s.behaviour_logps)  # temperature 1, no filter
    print(f"{len(off)} log-probs, largest difference {max(off):.2e} from float64 and {max(apart):.2e} from float32")
    print(f"99 of 100 within {np.quantile(apart, 0.99):.1e} of float32, {ties} samples cut at a router tie")
    assert len(off) > 500
    assert ties <= 3
    assert max(off) < 1e-5
    assert np.quantile(apart, 0.99) < 1e-5 and max(apart) < 2e-5


def test_an_insert_writes_the_named_slots_and_leaves_the_others(sampler, params):
    engine = sampler.engine
    prefix = engine.prefill(params=params, padded_tokens=np.arange(16, dtype=np.int32), true_length=9)
    before = jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), engine.init_decode_state())
    named, old = [3, 15, 0], jax.device_get(before)
    new, cached = jax.device_get(engine.bulk_insert(prefix, before, named)), jax.device_get(prefix)
    for slot in range(16):
        if slot not in named:
            for one, other in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
                axis = int(one.ndim > 3)  # layers come first in the cache
                assert np.array_equal(one.take(slot, axis), other.take(slot, axis))
            continue
        rows, padding = new.cache.keys[:, slot, :16], new.cache.keys[:, slot, 16:]
        assert np.array_equal(rows, cached.cache.keys[:, 0, :16])
        assert np.array_equal(padding, old.cache.keys[:, slot, 16:])
        assert np.array_equal(new.logits[slot], cached.logits)
        assert (new.length[slot], new.generated[slot], new.status[slot]) == (9, 0, engines.RUNNING)


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


def test_a_stop_string_cuts_tokens_log_probs_and_experts_alike(mesh, params, rollout):
    settings = SamplerConfig(
        slots=10, steps_per_dispatch=5, max_prompt_tokens=16, max_new_tokens=LONGEST, stop_strings=("= ",)
    )
    stopping = RolloutSampler(Engine(MODEL, settings, mesh, (WORDS.eos_id,), WORDS, record_experts=True))
    cut = 0
    for whole, s in zip(rollout[0], stopping.generate(requests(), params), strict=True):
        prefixes = (n for n in range(1, len(whole.token_ids) + 1) if "= " in WORDS.decode(whole.token_ids[:n]))
        kept = next(prefixes, len(whole.token_ids))
        cut += kept < len(whole.token_ids)
        assert np.array_equal(s.token_ids, whole.token_ids[:kept])
        assert np.array_equal(s.routed_experts, whole.routed_experts[: len(s.prompt_ids) + kept])
        assert len(s.logps) == len(s.behaviour_logps) == kept
        assert s.finish_reason == ("stop" if kept < len(whole.token_ids) else whole.finish_reason)
    assert cut > 10


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
    request = RolloutRequest(0, np.zeros(17, np.int32), np.zeros((1, 2), np.uint32), SamplingParams())
    with pytest.raises(ValueError, match="prompt of 17 tokens exceeds config.sampler.max_prompt_tokens=16"):
        sampler.generate([request], params)


def test_a_full_cache_ends_a_sample_with_capacity(sampler, params):
    sampling = SamplingParams(max_new_tokens=10_000)
    samples = sampler.generate(requests(sampling, groups=1, samples=3), params)
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


def slot_params(logits, **changes):
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


def test_a_prompt_in_pieces_may_end_in_more_padding_than_a_slot_has_rows(sampler, params):
    engine, ids = sampler.engine, np.arange(1, 15, dtype=np.int32)
    state = engine.init_decode_state()
    whole = engine.prefill(params=params, padded_tokens=np.pad(ids, (0, 2)), true_length=14)
    pieces = None
    for start in range(0, 14, 4):
        piece = ids[start : start + 4]
        padded = np.pad(piece, (0, 16 - len(piece)))
        pieces = engine.prefill(
            params=params, existing_prefix=pieces, padded_tokens=padded, true_length=len(piece)
        )  # 64 rows of cache, the engine's slots have 58
    state = engine.insert(pieces, engine.insert(whole, state, 0), 1)
    _, out = engine.decode(params, state, sampler.steps)
    assert pieces.cache.rows > engine.rows
    assert np.array_equal(out.tokens[0], out.tokens[1])
    with pytest.raises(ValueError, match="14 \\+ 44 prompt tokens fill the 58 cache rows of a slot"):
        engine.prefill(params=params, existing_prefix=pieces, padded_tokens=np.zeros(44, np.int32), true_length=44)


def kept_by_hand(scores, top_p, top_k):
    """Returns (scores with what the parameters forbid at -inf, how near the running sum comes to top_p), in float64."""
    order = np.argsort(-scores, kind="stable")[: top_k or None]
    probs = np.exp(scores[order] - scores[order].max())
    before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
    result = np.full(scores.shape, -np.inf)
    chosen = order[before < top_p] if top_p < 1 else order
    result[chosen] = scores[chosen]
    return result, float(np.abs(before - top_p).min())


def test_requests_with_parameters_of_their_own_share_the_slots(rollout, sampler, params):
    choices = [
        SamplingParams(0.7, 0.9, 0, 9, (WORDS.eos_id,)),
        SamplingParams(1.5, 0.8, 12, 30, (WORDS.eos_id,)),
        SamplingParams(0.0, 1.0, 0, 12, (WORDS.eos_id,)),
        SamplingParams(1.0, 1.0, 0, LONGEST, (WORDS.eos_id,)),
    ]
    mixed = [dataclasses.replace(r, sampling=sampling) for r, sampling in zip(requests(groups=4), choices, strict=True)]
    samples = sampler.generate(mixed, params)
    alone = {(s.request_id, s.sample_index): s for s in rollout[0]}
    rows = [np.concatenate([s.prompt_ids, s.token_ids]) for s in samples]
    items = [PackItem(row, np.ones(len(row), np.float32)) for row in rows]
    batch = pack_batch(items, 64, len(items))
    hidden, _, _ = decoder.forward(params, *map(jnp.asarray, (batch.tokens, batch.positions, batch.segments)), MODEL)
    logits = np.asarray(decoder.logits(params, hidden), np.float64)
    compared, near = 0, 0
    for s, (row, start, _) in zip(samples, batch.slots, strict=True):
        sampling = choices[s.request_id]
        assert len(s.token_ids) == sampling.max_new_tokens or s.finish_reason == "stop"
        if sampling.temperature == 1.0:
            twin = alone[s.request_id, s.sample_index]
            assert np.array_equal(s.token_ids, twin.token_ids)
            assert np.array_equal(s.behaviour_logps, twin.behaviour_logps)
            continue
        first = start + len(s.prompt_ids) - 1
        for place, (token, behaviour) in enumerate(zip(s.token_ids, s.behaviour_logps, strict=True)):
            if sampling.temperature == 0:
                assert behaviour == 0.0 and logits[row, first + place, token] > logits[row, first + place].max() - 1e-4
                continue
            scores, gap = kept_by_hand(
                logits[row, first + place] / sampling.temperature, sampling.top_p, sampling.top_k
            )
            if sampling.top_p < 1 and gap < 1e-5:
                near += 1
                continue
            assert scores[token] - np.logaddexp.reduce(scores) == pytest.approx(behaviour, abs=3e-5)
            compared += 1
    print(f"{compared} log-probs of filtered distributions, {near} left out at the edge of a nucleus")
    assert compared > 150
    assert near <= 5
    assert len({tuple(s.token_ids) for s in samples if s.request_id == 2}) == 1  # greedy


def test_a_dispatch_that_takes_too_long_is_an_error_that_names_the_requests(sampler, params, monkeypatch):
    monkeypatch.setattr(sampler, "deadline_s", -1.0)
    with pytest.raises(TimeoutError, match=r"no progress for -1 s; requests in flight: \[0, 1\]"):
        sampler.generate(requests(groups=3), params)
    monkeypatch.undo()
    assert len(sampler.generate(requests(groups=1), params)) == SAMPLES


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


def test_top_k_comes_first_and_the_nucleus_is_of_what_it_leaves():
    scores = jnp.log(jnp.asarray([[0.5, 0.05, 0.3, 0.15]]))
    out = engines.filtered(scores, jnp.asarray([0.6]), jnp.asarray([2]))  # 0.625 and 0.375 once the two best are left
    assert np.flatnonzero(np.isfinite(out[0])).tolist() == [0]
    assert np.array_equal(engines.filtered(scores, jnp.asarray([1.0]), jnp.asarray([9])), scores)


def test_a_slot_without_a_filter_keeps_its_whole_vocabulary_beside_one_that_has_a_filter():
    scores = jnp.asarray(np.random.default_rng(0).normal(0, 6, (2, 5000)), jnp.float32)
    out = engines.filtered(scores, jnp.asarray([1.0, 0.9]), jnp.asarray([0, 0]))
    assert np.array_equal(out[0], scores[0])
    assert 1 <= np.isfinite(out[1]).sum() < 2500


def test_behaviour_log_prob_is_of_the_distribution_that_was_sampled_from():
    logits = jnp.tile(jnp.log(jnp.asarray([0.5, 0.05, 0.3, 0.15])), (64, 1))
    token, raw, behaviour = engines.sample(
        logits, slot_params(logits, temperature=0.5, top_k=2), jnp.zeros(64, jnp.int32)
    )
    sharpened = np.asarray([0.25, 0.0, 0.09, 0.0]) / 0.34
    assert set(np.asarray(token)) == {0, 2}
    np.testing.assert_allclose(np.exp(behaviour), sharpened[np.asarray(token)], rtol=1e-5)
    np.testing.assert_allclose(np.exp(raw), np.asarray([0.5, 0.05, 0.3, 0.15])[np.asarray(token)], rtol=1e-5)


def test_temperature_zero_takes_the_best_token():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(32, 9)), jnp.float32)
    token, _, behaviour = engines.sample(logits, slot_params(logits, temperature=0.0), jnp.zeros(32, jnp.int32))
    assert np.array_equal(token, np.argmax(logits, axis=-1))
    assert not np.asarray(behaviour).any()


def test_sampled_frequencies_follow_the_softmax():
    probs = np.asarray([0.4, 0.3, 0.2, 0.07, 0.03])
    draws = 20_000
    logits = jnp.tile(jnp.log(jnp.asarray(probs, jnp.float32)), (draws, 1))
    token, _, _ = engines.sample(logits, slot_params(logits), jnp.full(draws, 3, jnp.int32))
    counts = np.bincount(np.asarray(token), minlength=5)
    chi_square = float(((counts - draws * probs) ** 2 / (draws * probs)).sum())
    assert chi_square < 18.47  # 4 degrees of freedom, p = 0.001
