"""Claims about routing replay: which experts run, what gets a gradient, what is packed, and the mismatch it removes."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.core import rng, sharding, tree
from r1jax.core.metrics import read
from r1jax.data import tasks
from r1jax.data.packing import PackItem, pack_batch
from r1jax.models import decoder, moe
from r1jax.recipe import policy, prompts
from r1jax.recipe.parts import AskingParts
from r1jax.rewards.compose import PART_NAMES
from r1jax.rl import losses
from r1jax.rl import rollout as rollouts
from r1jax.rl.journal import Rollout
from r1jax.rl.logprobs import ROUTED, Scorer, replayed_experts
from r1jax.rl.settings import of_config
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import RolloutRequest, SamplingParams
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import Config, GRPOConfig, MeshConfig, PackConfig, SamplerConfig, parts_of, replace
from r1jax.train import step

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = tokenizer.tiny()
# Three leading dense layers as in DeepSeek-V3, then four of 16 experts: close calls are frequent among so many.
MODEL = small.changed(
    small.MIXTURE,
    num_hidden_layers=7,
    first_k_dense_replace=3,
    n_routed_experts=16,
    routed_scaling_factor=2.5,
    router_bias_update_rate=0.01,
    moe_implementation="dense",
)
GROUPS, SAMPLES, PROMPT, LONGEST = 12, 4, 6, 24


@functools.cache
def weights(network):
    """Returns weights drawn by NumPy: nothing to compile."""
    generator = np.random.default_rng(0)

    def one(spec):
        if spec.init in (sharding.ones, sharding.zeros):
            return jnp.asarray(np.full(spec.shape, float(spec.init is sharding.ones), np.float32))
        return jnp.asarray(generator.normal(0, network.model.initializer_range, spec.shape).astype(np.float32))

    return sharding.map_specs(one, decoder.specs(network.model))


def micro_batch(ids):
    """Returns a micro-batch of one row of twelve tokens and four of padding, its tokens sent to `ids` [12, Lm, k]."""
    generator = np.random.default_rng(3)
    values = {name: generator.normal(-1, 0.3, 12).astype(np.float32) for name in losses.fields(GRPOConfig())}
    values["weight"] = np.full(12, 1 / 12, np.float32)
    item = PackItem(generator.integers(0, 32, 12).astype(np.int32), np.ones(12, np.float32), values, {ROUTED: ids})
    pack = PackConfig(row_tokens=16, rows_per_micro_batch=1)
    arrays = step.batch_arrays(pack_batch([item], 16, 1), pack, 1, losses.fields(GRPOConfig()))
    return {name: array[0] for name, array in arrays.items()}


def own_pair(layer):
    return [15 - 2 * layer, 2 * layer]


@pytest.mark.parametrize("scanned", [True, False])
def test_after_three_dense_layers_each_mixture_layer_runs_the_experts_recorded_for_it(scanned):
    network = small.changed(MODEL, scan_layers=scanned)
    params = weights(network)
    ids = np.broadcast_to(np.asarray([own_pair(m) for m in range(4)], np.int16), (12, 4, 2))
    micro = micro_batch(ids)
    arguments = losses.arguments(GRPOConfig(), 0.1, 1.0)
    gradient = jax.jit(jax.grad(losses.make_loss(network, GRPOConfig()), has_aux=True))
    grads, stats = jax.device_get(gradient(params, micro, arguments))
    ran = np.abs(grads.sparse.ffw.down).max(axis=(2, 3)) > 0  # [Lm, E] experts that got a gradient
    assert [np.flatnonzero(layer).tolist() for layer in ran] == [sorted(own_pair(m)) for m in range(4)]
    routed = np.abs(grads.sparse.ffw.router).max(axis=1) > 0
    assert np.array_equal(routed, ran)  # the live router learns from the experts that ran
    used = np.zeros((4, 16))
    for m in range(4):
        used[m, own_pair(m)] = 12
    assert np.array_equal(stats["expert_load"], used)  # what moves the selection bias


def test_weights_are_the_live_routers_scores_at_the_recorded_experts_and_a_missing_record_leaves_it_the_choice():
    network = small.changed(MODEL, n_group=4, topk_group=1, norm_topk_prob=True)
    generator = np.random.default_rng(0)
    router, x = generator.normal(size=(16, 16)).astype(np.float32), generator.normal(size=(2, 5, 16))
    bias = generator.normal(size=16).astype(np.float32)
    forced = np.stack([generator.permutation(16)[:2] for _ in range(10)]).reshape(2, 5, 2)
    forced[1, 2] = forced[0, 4] = -1
    x = x.astype(np.float32)
    experts, found = moe.route(router, bias, x, network.model, forced)
    own, own_weights = moe.route(router, bias, x, network.model)
    missing = forced[..., 0] < 0
    assert np.array_equal(experts, np.where(missing[..., None], own, forced))
    scores = 1 / (1 + np.exp(-(x.astype(np.float64) @ router)))
    picked = np.take_along_axis(scores, np.asarray(experts), axis=-1)
    np.testing.assert_allclose(found, 2.5 * picked / picked.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(found[missing], own_weights[missing])


def test_experts_in_another_order_are_no_disagreement():
    params = weights(MODEL)
    micro = micro_batch(np.full((12, 4, 2), -1, np.int16))
    run = jax.jit(lambda ids: decoder.forward(params, *inputs(micro), MODEL, experts=ids)[2])
    chosen = np.asarray(run(replayed_experts(micro)).experts)
    assert not np.asarray(run(chosen[..., ::-1]).differs).any()
    other = chosen.copy()
    other[2, 0, 5, 0] = next(e for e in range(16) if e not in chosen[2, 0, 5])
    differs = np.asarray(run(other).differs)
    assert np.argwhere(differs[:3]).tolist() == [[2, 0, 5]]  # layer 3 may see the change


def inputs(micro):
    return micro["tokens"], micro["positions"], micro["segments"]


def test_the_prediction_module_routes_by_itself():
    network = small.changed(MODEL, num_nextn_predict_layers=1)
    params, ids = weights(network), np.full((4, 1, 16, 2), [3, 7], np.int16)
    micro = micro_batch(np.full((12, 4, 2), -1, np.int16))

    @jax.jit
    def run(params):
        hidden, _, auxiliary = decoder.forward(params, *inputs(micro), network, experts=ids)
        _, routing = decoder.predict_further(params, hidden, auxiliary, *inputs(micro), network)
        return auxiliary.experts, routing.experts

    main, further = run(params)
    assert set(np.unique(main).tolist()) == {3, 7}
    assert len(np.unique(further)) > 4


def test_records_stand_at_their_own_tokens_and_padding_has_none():
    lengths = (3, 5, 2)
    records = [np.arange(n * 4, dtype=np.int16).reshape(n, 2, 2) + 100 * i for i, n in enumerate(lengths)]
    items = [
        PackItem(np.arange(n, dtype=np.int32), np.ones(n, np.float32), {}, {ROUTED: record})
        for n, record in zip(lengths, records, strict=True)
    ]
    batch = pack_batch(items, 8, 2)
    held = batch.inputs[ROUTED]
    assert held.shape == (2, 8, 2, 2) and held.dtype == np.int16
    for record, (row, start, length) in zip(records, batch.slots, strict=True):
        assert np.array_equal(held[row, start : start + length], record)
    assert np.array_equal(held == -1, np.broadcast_to(batch.segments[..., None, None] == 0, held.shape))
    pack = PackConfig(row_tokens=8, rows_per_micro_batch=1)
    assert step.batch_arrays(batch, pack, 2, ())[ROUTED].shape == (2, 1, 8, 2, 2)
    with pytest.raises(ValueError, match=r"routed_experts of shape \(2, 2, 2\), needs one entry of 3 a token"):
        PackItem(np.arange(3), np.ones(3), {}, {ROUTED: records[2]})
    with pytest.raises(ValueError, match=r"sample 1 has inputs \[\], needs \['routed_experts'\]"):
        pack_batch([items[0], PackItem(np.arange(3), np.ones(3))], 8, 2)


def settings(replay=True):
    return Config(
        model=MODEL.model,
        compute=MODEL.compute,
        auxiliary=MODEL.auxiliary,
        grpo=GRPOConfig(group_size=SAMPLES, prompts_per_update=GROUPS, routing_replay=replay),
        pack=PackConfig(row_tokens=64, rows_per_micro_batch=24),
    )


@functools.cache
def draw(dtype):
    """Returns a rollout of MODEL sampled in a compute dtype."""
    mesh, generator = sharding.make_mesh(MeshConfig()), np.random.default_rng(1)
    sampler = SamplerConfig(slots=GROUPS * SAMPLES, max_prompt_tokens=PROMPT, max_new_tokens=LONGEST)
    scheduler = RolloutSampler(
        Engine(small.changed(MODEL, compute_dtype=dtype), sampler, mesh, (0,), record_experts=True)
    )
    requests = [
        RolloutRequest(
            number,
            generator.integers(1, 32, PROMPT - number % 3).astype(np.int32),
            rng.sample_keys(0, "replay", np.full(SAMPLES, number), np.arange(SAMPLES), "sample"),
            SamplingParams(max_new_tokens=LONGEST, stop_ids=(0,)),
        )
        for number in range(GROUPS)
    ]
    samples = scheduler.generate(requests, scheduler.engine.load_params(weights(MODEL)))
    return Rollout(samples, np.zeros((len(samples), len(PART_NAMES)), np.float32), np.ones(len(samples), bool), 1)


def advantages(scored):
    """Returns what says of every sample that it is trained, with advantage 0."""
    zeros, every = np.zeros(len(scored)), np.ones(len(scored), bool)
    return rollouts.Advantages(zeros, zeros, every, every, every)


@functools.cache
def mismatch(dtype):
    """Returns (mean, largest) |trainer - sampler| log-prob with and without replay, the two scores' largest difference,
    and the share of tokens and layers whose experts differ; the trainer computes in float32."""
    scored, config, params = draw(dtype), settings(), weights(MODEL)
    packed = rollouts.pack_mini_batch(scored, np.arange(len(scored)), advantages(scored), config, LONGEST)
    fields = ("behaviour_logp",)
    arrays = step.batch_arrays(packed, config.pack, rollouts.micro_batches(config), fields)
    filled = step.filled_micro_batches(packed, config.pack)
    scorer, live = Scorer(MODEL, sharding.make_mesh(MeshConfig())), dict(arrays)
    del live[ROUTED]
    counted = arrays["loss_mask"] > 0
    scores = [scorer(params, batch, filled, 1.0) for batch in (arrays, live)]
    gaps = [np.abs(logp - arrays["behaviour_logp"])[counted] for logp in scores]

    @jax.jit
    def disagreement(micro):
        differs = decoder.forward(params, *inputs(micro), MODEL, experts=replayed_experts(micro))[2].differs
        return jnp.sum(differs * (micro["segments"] > 0)), differs.shape[0] * jnp.sum(micro["segments"] > 0)

    different, pairs = np.sum(
        [disagreement({name: array[i] for name, array in arrays.items()}) for i in range(filled)], axis=0
    )
    assert counted.sum() == sum(len(sample.token_ids) for sample in scored.samples)
    apart = float(np.abs(scores[0] - scores[1])[counted].max())
    return *((float(gap.mean()), float(gap.max())) for gap in gaps), apart, different / pairs


def test_every_token_of_a_rollout_has_a_record_the_last_one_too():
    for sample in draw("float32").samples:
        ids = np.concatenate([sample.prompt_ids, sample.token_ids])[None]
        places, ones = np.arange(ids.size)[None], np.ones_like(ids)
        assert sample.routed_experts.shape == (ids.size, 4, 2)
        if sample.sample_index == 0 and ids.size == PROMPT + LONGEST:  # one shape, one compilation
            chosen = live_choice(weights(MODEL), ids, places, ones)
            assert np.array_equal(sample.routed_experts, np.moveaxis(chosen[:, 0], 0, 1))


@jax.jit
def live_choice(params, ids, places, ones):
    return decoder.forward(params, ids, places, ones, MODEL)[2].experts


def test_mismatch_with_replay_is_below_the_mismatch_without():
    (mean, largest), (mean_without, largest_without), _, share = mismatch("bfloat16")
    print(
        f"sampled in bfloat16, scored in float32: experts differ at {share:.2%} of tokens and layers; "
        f"|log-prob difference| mean {mean:.4f} with replay, {mean_without:.4f} without; "
        f"largest {largest:.3f} with, {largest_without:.3f} without"
    )
    assert share > 0.01
    assert mean < 0.8 * mean_without
    assert largest < largest_without


def test_at_equal_precision_replay_changes_nothing():
    (mean, largest), _, apart, share = mismatch("float32")
    print(f"sampled and scored in float32: replay moves log-probs by {apart:.1e}, sampler and trainer by {largest:.1e}")
    assert share == 0
    assert apart <= 1e-6
    assert largest < 1e-4


def test_without_replay_the_batch_is_what_it_was():
    scored = draw("float32")
    packed = rollouts.pack_mini_batch(scored, np.arange(4), advantages(scored), settings(replay=False), LONGEST)
    arrays = step.batch_arrays(packed, settings().pack, rollouts.micro_batches(settings()), ("weight",))
    assert set(arrays) == {"tokens", "targets", "positions", "segments", "loss_mask", "weight"}


def test_a_sample_without_a_record_and_a_model_without_routers_are_refused():
    scored = draw("float32")
    bare = replace(scored, samples=[replace(s, routed_experts=None) for s in scored.samples])
    with pytest.raises(ValueError, match=r"sample 0/0 was journalled without the experts.*routing_replay=false"):
        rollouts.pack_mini_batch(bare, np.arange(4), advantages(scored), settings(), LONGEST)
    with pytest.raises(ValueError, match=r"needs a model with mixture-of-experts layers \(model.n_routed_experts=0\)"):
        configs.load("r1_zero:tiny_dense", [("grpo.routing_replay", "true")])
    with pytest.raises(ValueError, match=r"replay_check_every=2 needs routing_replay=true"):
        configs.load("r1_zero:tiny", [("grpo.replay_check_every", "2")])


FIELDS = {
    **small.RL_FIELDS,
    "model.num_hidden_layers": 3,
    "compute.compute_dtype": "bfloat16",
    "model.initializer_range": 0.2,
    "compute.moe_implementation": "dense",
    "optimizer.learning_rate": 1e-3,
    "grpo.updates": 3,
    "grpo.updates_per_rollout": 2,
    "grpo.prompts_per_update": 2,
    "grpo.group_size": 4,
    "grpo.routing_replay": True,
    "grpo.replay_check_every": 1,
    "sampler.slots": 16,
    "sampler.max_new_tokens": 20,
    "reward.language": 1.0,
    "pack.rows_per_micro_batch": 4,
    "checkpointing.every_updates": 1,
}


def build(folder):
    config = configs.load("r1_zero:tiny", [(name, str(value)) for name, value in FIELDS.items()])
    train = prompts.encode(tasks.linear_prompts("train")[:30], parts_of(AskingParts, config), WORDS)
    mesh = sharding.make_mesh(MeshConfig())
    return policy.make_training(
        of_config(config), WORDS, mesh, train, weights(config.network), folder, describe=policy.describe
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    training = build(folder)
    training.train()
    return training, folder


def test_a_run_with_replay_logs_the_mismatch_with_and_without_at_the_first_update_of_each_rollout(whole):
    training, folder = whole
    rows = read(folder)
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert ["mean_logprob_difference_without_replay" in row for row in rows] == [True, False, True]
    for row in (rows[0], rows[2]):
        assert 0 < row["mean_logprob_difference"] <= row["max_logprob_difference"]
        assert 0 < row["routing_disagreement"] < 0.1
        assert row["grad_norm"] > 0
    assert "mean_policy_shift" in rows[1]
    assert set(training.run.programs.counts().values()) == {1}
    found = [(row["mean_logprob_difference"], row["mean_logprob_difference_without_replay"]) for row in rows[::2]]
    print("bfloat16 on both sides:", [f"mean {a:.4f} with replay, {b:.4f} without" for a, b in found])
    assert sum(a for a, _ in found) < sum(b for _, b in found)


@pytest.mark.slow
def test_a_run_with_replay_resumes_from_the_journal_bit_equal(whole, tmp_path):
    training, folder = whole
    stopped = build(tmp_path / "stopped")
    small.run_until(stopped, 1)
    resumed, sampled = build(tmp_path / "stopped"), []
    draw = resumed.source.sampling.draw
    resumed.source.sampling.draw = lambda start, *more: sampled.append(start) or draw(start, *more)
    resumed.train()
    assert sampled == [2]  # the first rollout and its records come from the journal
    assert tree.digest(resumed.run.state) == tree.digest(training.run.state)
    assert (tmp_path / "stopped" / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def meshes():
    return small.driver_report("routing_replay_driver.py", timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["data2_expert4_routed", "expert2_context4"])
def test_a_replayed_update_on_eight_devices_equals_one_within_rounding(meshes, run):
    one, found = meshes["one"], meshes[run]
    for name in ("loss", "grad_norm", "max_expert_share", "routing_disagreement"):
        assert found[name] == pytest.approx(one[name], rel=2e-5, abs=1e-6), name
    assert one["routing_disagreement"] > 10  # random records: most differ from the live choice
    assert found["difference"] <= 2 * np.finfo(np.float32).eps  # as in test_sharding
    assert found["reference"] <= 1e-5
