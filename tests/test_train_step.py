"""Claims about the update: packing and micro-batching change nothing, the router bias balances, schedules and decay."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from r1jax.core import checkpoint, rng, sharding, tree
from r1jax.data.packing import pack_batch
from r1jax.models import decoder, moe
from r1jax.schema import MeshConfig, OptimizerConfig, PackConfig
from r1jax.train import optimizer, sft, step

MODEL = small.MIXTURE
SMOOTH = OptimizerConfig(learning_rate=1e-2, eps=1e-2)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def params(mesh):
    return sharding.initialize(decoder.specs(MODEL.model), rng.key(0, "step", "init"), "float32", mesh)


@pytest.fixture(scope="module")
def items():
    generator = np.random.default_rng(0)
    rows = [generator.integers(1, 32, n) for n in (16, 3, 9, 7, 12, 4, 5, 2)]
    return [sft.example(row[:1], row[1:]) for row in rows]


def moved(params, mesh, arrays, filled, inverse, network=MODEL, config=SMOOTH):
    trainer = step.Trainer(network, config, mesh, sft.make_loss(network), 10)
    state, stats = trainer.update(trainer.init(params), arrays, filled, inverse)
    return jax.device_get(state.params), jax.device_get(stats), trainer


def largest_difference(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_update_is_the_same_packed_or_one_sample_a_row_in_any_micro_batches(params, mesh, items):
    expected = None
    for rows, micro, alone in ((8, 1, False), (2, 4, False), (8, 1, True), (4, 2, True), (1, 8, True)):
        pack = PackConfig(row_tokens=16, rows_per_micro_batch=rows)
        layout = [[index] for index in range(8)] if alone else None
        arrays, filled, inverse = sft.make_batch(items, pack, micro, layout)
        result, stats, _ = moved(params, mesh, arrays, filled, inverse)
        if expected is None:
            expected = result, float(stats["loss"])
        assert float(stats["loss"]) == pytest.approx(expected[1], rel=1e-5)
        assert largest_difference(result, expected[0]) < 2e-6  # weights below 1, rounding of sums in another order


def test_one_program_serves_any_fill_and_the_state_is_donated(params, mesh, items):
    pack = PackConfig(row_tokens=16, rows_per_micro_batch=2)
    trainer = step.Trainer(MODEL, SMOOTH, mesh, sft.make_loss(MODEL), 10)
    state = trainer.init(params)
    for count in (8, 2, 5):
        old = state
        state, _ = trainer.update(state, *sft.make_batch(items[:count], pack, 4))
        assert old.params.embedding.is_deleted()
    assert trainer.compilations == 1
    assert int(state.update) == 3


def test_empty_rows_are_not_run(items):
    pack = PackConfig(row_tokens=16, rows_per_micro_batch=2)
    packed = pack_batch(items[:2], 16, 8)
    assert step.filled_micro_batches(packed, pack) == 1
    assert step.filled_micro_batches(pack_batch(items, 16, 8), pack) == 2


def test_router_bias_moves_towards_balance_outside_the_gradient(params, mesh, items):
    arrays = sft.make_batch(items, PackConfig(row_tokens=16, rows_per_micro_batch=8), 1)
    still, _, _ = moved(params, mesh, *arrays)
    assert not still.sparse.ffw.bias.any()
    network = small.changed(MODEL, router_bias_update_rate=0.01)
    result, _, _ = moved(params, mesh, *arrays, network=network)
    micro = {name: array[0] for name, array in arrays[0].items()}
    _, _, auxiliary = decoder.forward(params, micro["tokens"], micro["positions"], micro["segments"], network)
    load = np.asarray(moe.load(auxiliary.experts, micro["segments"] > 0, 4))
    assert load.sum() == 2 * (micro["segments"] > 0).sum()  # two experts a token, padding not counted
    np.testing.assert_allclose(result.sparse.ffw.bias, 0.01 * np.sign(load.mean(-1, keepdims=True) - load), rtol=1e-6)


def test_weight_decay_touches_matrices_only(params):
    decayed = optimizer._decays(params)
    assert decayed.embedding and decayed.unembedding and decayed.sparse.ffw.gate and decayed.dense.attention.kv_b
    assert not (decayed.final_norm or decayed.dense.attention_norm or decayed.sparse.ffw.bias)
    assert not decayed.dense.attention.kv_a_norm


def test_weight_decay_alone_shrinks_matrices_by_rate_times_decay(params):
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    transform = optimizer.make(config, 1)
    grads = jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(lambda g, p: transform.update(g, transform.init(p), p)[0])(grads, params)
    np.testing.assert_allclose(updates.sparse.ffw.gate, -0.05 * params.sparse.ffw.gate, rtol=1e-6)
    np.testing.assert_allclose(updates.embedding, -0.05 * params.embedding, rtol=1e-6)
    for still in (updates.final_norm, updates.dense.ffw_norm, updates.sparse.ffw.bias):
        assert not np.asarray(still).any()


def test_schedules_have_the_values_computed_by_hand():
    cosine = optimizer.learning_rate(OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_updates=4), 14)
    np.testing.assert_allclose([cosine(u) for u in (0, 2, 4)], [0.25, 0.625, 1.0], rtol=1e-6)
    np.testing.assert_allclose([cosine(9), cosine(14)], [0.55, 0.1], rtol=1e-5)
    constant = optimizer.learning_rate(OptimizerConfig(learning_rate=3e-6), 10)
    assert float(constant(0)) == float(constant(9)) == pytest.approx(3e-6)


def test_clip_bounds_the_global_norm():
    grads = {"w": jnp.asarray([3.0, 4.0])}
    clipped, _ = optimizer.make(OptimizerConfig(learning_rate=1.0, clip_norm=1.0), 1).update(
        grads, optimizer.make(OptimizerConfig(learning_rate=1.0), 1).init(grads), grads
    )
    np.testing.assert_allclose(clipped["w"], [-1.0, -1.0], rtol=1e-4)  # Adam's first step is the sign


def test_checkpoint_gives_back_the_same_bits_and_keeps_the_newest(tmp_path, params, mesh):
    store = checkpoint.CheckpointStore(tmp_path / "c", keep=2)
    half = tree.cast(params, jnp.bfloat16)
    for number in (1, 2, 3):
        store.save(number, {"params": params, "half": half}, {"update": number})
    assert store.latest() == 3 and store.record(3) == {"update": 3}
    targets = {
        "params": sharding.abstract(decoder.specs(MODEL.model), jnp.float32, mesh),
        "half": sharding.abstract(decoder.specs(MODEL.model), jnp.bfloat16, mesh),
    }
    targets["half"] = jax.tree.map(lambda a, b: jax.ShapeDtypeStruct(a.shape, b.dtype), targets["half"], half)
    found = store.restore(3, targets)
    assert tree.digest(found["params"]) == tree.digest(params)
    assert tree.digest(found["half"]) == tree.digest(half)
    store.close()
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.name.isdigit()) == ["2", "3"]


def test_checkpoint_of_another_model_is_refused_by_array_and_shape(tmp_path, params, mesh):
    store = checkpoint.CheckpointStore(tmp_path / "c")
    store.save(1, {"params": params}, {})
    for change, message in (
        ({"hidden_size": 32}, r"embedding is \(32, 16\), the model needs \(32, 32\)"),
        ({"tie_word_embeddings": True}, "unembedding is not in the model"),
        ({"q_lora_rank": 8}, "dense.attention.q_a is missing"),
    ):
        target = sharding.abstract(decoder.specs(small.changed(MODEL, **change).model), jnp.float32, mesh)
        with pytest.raises(ValueError, match=message) as error:
            store.restore(1, {"params": target})
        assert "\n" not in str(error.value)


def test_an_unfinished_checkpoint_is_not_seen(tmp_path, params):
    store = checkpoint.CheckpointStore(tmp_path / "c")
    store.save(1, {"params": params}, {})
    store.close()
    (tmp_path / "c" / "2.orbax-checkpoint-tmp-1").mkdir()
    again = checkpoint.CheckpointStore(tmp_path / "c")
    assert again.latest() == 1


def test_a_checkpoint_holds_the_arrays_of_its_moment_although_they_are_donated_while_it_is_written(tmp_path, mesh):
    target = {"a": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
    add = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
    store = checkpoint.CheckpointStore(tmp_path / "c", keep=1, keep_every=4)
    state = {"a": jnp.zeros((512, 512))}
    for number in range(1, 10):
        state = add(state)
        store.save(number, {"state": state}, {"update": number})
    state = add(state)
    assert {name: float(store.restore(name, {"state": target})["state"]["a"].max()) for name in (4, 8, 9)} == {
        4: 4.0,
        8: 8.0,
        9: 9.0,
    }
    store.close()
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.name.isdigit()) == ["4", "8", "9"]


def test_a_checkpoint_that_cannot_be_written_is_reported_by_the_next_call(tmp_path, params, monkeypatch):
    store = checkpoint.CheckpointStore(tmp_path / "c")
    store.save(1, {"params": params}, {"update": 1})
    store.wait()

    def full(path, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "rename", full)
    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(pathlib.Path, "rename", full)
    store.save(2, {"params": params}, {"update": 2})
    with pytest.raises(OSError, match="No space left"):
        store.save(3, {"params": params}, {"update": 3})
    monkeypatch.undo()
    assert checkpoint.CheckpointStore(tmp_path / "c").latest() == 1


def test_reading_a_folder_leaves_the_checkpoint_that_a_run_is_writing_there(tmp_path, params, mesh):
    store = checkpoint.CheckpointStore(tmp_path / "stage" / "c")
    store.save(1, {"params": params}, {})
    store.close()
    half = tmp_path / "stage" / "c" / "2.orbax-checkpoint-tmp-1"
    half.mkdir()
    target = sharding.abstract(decoder.specs(MODEL.model), jnp.float32, mesh)
    assert tree.digest(checkpoint.load(tmp_path / "stage" / "c", "params", target)) == tree.digest(params)
    assert half.exists() and checkpoint.numbers(tmp_path / "stage" / "c") == [1]
    with pytest.raises(ValueError, match="empty holds no finished checkpoint; run that stage to its end first"):
        checkpoint.load(tmp_path / "empty" / "c", "params", target)
    assert not (tmp_path / "empty").exists()


def test_a_save_that_fails_leaves_the_older_checkpoint_and_the_store_usable(tmp_path, params, mesh):
    store = checkpoint.CheckpointStore(tmp_path / "c")
    store.save(1, {"params": params}, {"update": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(2, {"params": params}, {"update": object()})
    store.close()
    again = checkpoint.CheckpointStore(tmp_path / "c")
    assert again.latest() == 1
    target = sharding.abstract(decoder.specs(MODEL.model), jnp.float32, mesh)
    assert tree.digest(again.restore(1, {"params": target})["params"]) == tree.digest(params)
    again.save(2, {"params": params}, {"update": 2})
    assert again.record(2) == {"update": 2}


def test_a_seed_that_is_no_unsigned_32_bit_number_is_refused():
    for seed in (-1, 2**32):
        for draw in (lambda s: rng.key(s, "a", "init"), lambda s: rng.sample_keys(s, "a", [0], [0], "sample")):
            with pytest.raises(ValueError, match=f"config.seed={seed} must be between 0 and 4294967295"):
                draw(seed)
    assert rng.sample_keys(2**32 - 1, "a", [0], [0], "sample").shape == (1, 2)


def test_a_position_gives_each_slot_the_key_it_has_alone():
    keys = rng.sample_keys(0, "a", np.arange(5), np.zeros(5), "sample")
    positions = jnp.asarray([0, 3, 3, 7, 1])
    together = jax.random.key_data(rng.at_position(jnp.asarray(keys), positions))
    for slot in range(5):
        alone = jax.random.key_data(rng.at_position(jnp.asarray(keys[slot : slot + 1]), positions[slot : slot + 1]))
        assert np.array_equal(alone[0], together[slot])
    assert len({tuple(key) for key in np.asarray(together).tolist()}) == 5


def test_keys_depend_on_every_part_and_on_nothing_else():
    draws, samples = np.asarray([0, 0, 1, 5]), np.asarray([0, 1, 0, 3])
    keys = rng.sample_keys(0, "r1_zero", draws, samples, "sample")
    assert len({tuple(key) for key in keys}) == 4
    assert np.array_equal(keys[[3]], rng.sample_keys(0, "r1_zero", draws[3:], samples[3:], "sample"))
    assert np.array_equal(keys[::-1], rng.sample_keys(0, "r1_zero", draws[::-1], samples[::-1], "sample"))
    for other in ((1, "r1_zero", "sample"), (0, "stage2", "sample"), (0, "r1_zero", "evaluate")):
        assert not np.array_equal(keys, rng.sample_keys(other[0], other[1], draws, samples, other[2]))
