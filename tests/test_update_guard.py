"""Claims about updates that cannot or need not be made: what is not finite is skipped, what has no signal moves nothing."""

import contextlib
import dataclasses
import functools
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.core import hosts, rng, sharding, tree
from r1jax.core.checkpoint import CheckpointStore
from r1jax.core.metrics import MetricsLog, read
from r1jax.data import tasks
from r1jax.data.packing import PackItem, pack_batch
from r1jax.models import decoder
from r1jax.recipe import policy, prompts
from r1jax.recipe.parts import AskingParts
from r1jax.rl import losses, warnings
from r1jax.rl.advantages import group_advantages
from r1jax.rl.journal import Rollout
from r1jax.rl.rollout import Advantages
from r1jax.rl.settings import of_config
from r1jax.schema import GRPOConfig, MeshConfig, OptimizerConfig, PackConfig, parts_of, replace
from r1jax.train import guard, sft, step, supervised

WORDS = tokenizer.tiny()
# One layer, every expert run on every token: this compiles fast.
ONE_LAYER = small.changed(small.MIXTURE, num_hidden_layers=1, first_k_dense_replace=0, moe_implementation="dense")
MODEL = small.changed(ONE_LAYER, router_bias_update_rate=0.01)
PACK = PackConfig(row_tokens=16, rows_per_micro_batch=2)
ARGUMENTS = losses.arguments(GRPOConfig(), 0.1, 1.0)
OPTIMIZERS = {
    kind: OptimizerConfig(kind=kind, learning_rate=1e-2, schedule="cosine", weight_decay=0.1, moment_dtype=dtype)
    for kind, dtype in (("adamw", "bfloat16"), ("muon", "float32"))
}


def grpo_batch():
    generator = np.random.default_rng(0)
    items = []
    for length in (16, 3, 9, 7, 12):
        values = {name: generator.normal(size=length).astype(np.float32) for name in losses.fields(GRPOConfig())}
        values["weight"] = np.full(length, 1 / 40, np.float32)
        items.append(PackItem(generator.integers(1, 32, length).astype(np.int32), np.ones(length, np.float32), values))
    packed = pack_batch(items, PACK.row_tokens, 4)
    return step.batch_arrays(packed, PACK, 2, losses.fields(GRPOConfig())), step.filled_micro_batches(packed, PACK)


def gradient_overflows(params, micro, arguments):
    """Returns a loss of 1 whose gradient is finite and its square not."""
    return 1 + (params.final_norm[0] - jax.lax.stop_gradient(params.final_norm[0])) * 3e38, {}


def gradient_is_nan(params, micro, arguments):
    return 1 + jnp.sqrt(params.final_norm[0] * 0), {}


@functools.cache
def make(kind, loss=None):
    mesh = sharding.make_mesh(MeshConfig())
    trainer = step.Trainer(MODEL, OPTIMIZERS[kind], mesh, loss or losses.make_loss(MODEL, GRPOConfig()), 20)
    return trainer, sharding.initialize(decoder.specs(MODEL.model), rng.key(0, "guard", "init"), "float32", mesh)


def without_schedule(optimizer):
    """Returns the digest of the optimiser's state without the schedule's count."""
    found = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
    return tree.digest(jax.tree.map(lambda node: () if found(node) else node, optimizer, is_leaf=found))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_update_with_a_nan_in_batch_or_weights_changes_no_bit_and_the_next_goes_on_from_there(kind):
    trainer, params = make(kind)
    arrays, filled = grpo_batch()
    broken = arrays | {"advantage": arrays["advantage"].copy()}
    broken["advantage"][1, 0, 2] = np.nan
    state, first = trainer.update(trainer.init(params), arrays, filled, ARGUMENTS)
    assert float(first["skipped_updates"]) == 0 and bool(jnp.any(state.params.sparse.ffw.bias))
    clean = jax.tree.map(jnp.copy, state)
    before = tree.digest(state.params), without_schedule(state.optimizer)
    state, stats = trainer.update(state, broken, filled, ARGUMENTS)
    assert (float(stats["skipped_updates"]), math.isnan(stats["loss"]), int(state.update)) == (1, True, 2)
    assert (tree.digest(state.params), without_schedule(state.optimizer)) == before
    # The next update is the one that would have come without it, made at the rate of the third update.
    state, third = trainer.update(state, arrays, filled, ARGUMENTS)
    start = jax.device_get(clean.params)
    direct, second = trainer.update(clean, arrays, filled, ARGUMENTS)
    assert float(third["learning_rate"]) < float(second["learning_rate"])
    ratio = float(third["learning_rate"]) / float(second["learning_rate"])
    moved = [jax.tree.map(lambda a, b: a - b, jax.device_get(s.params), start) for s in (state, direct)]
    np.testing.assert_allclose(moved[0].embedding, ratio * moved[1].embedding, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(moved[0].sparse.ffw.up, ratio * moved[1].sparse.ffw.up, rtol=1e-3, atol=1e-7)
    assert np.array_equal(state.params.sparse.ffw.bias, direct.params.sparse.ffw.bias)

    poisoned = trainer.init(params.replace(embedding=params.embedding.at[3, 5].set(jnp.nan)))
    before = tree.digest(poisoned.params), without_schedule(poisoned.optimizer)
    poisoned, stats = trainer.update(poisoned, arrays, filled, ARGUMENTS)
    assert float(stats["skipped_updates"]) == 1
    assert (tree.digest(poisoned.params), without_schedule(poisoned.optimizer)) == before
    assert trainer.compilations == 1


@pytest.mark.parametrize(("loss", "norm"), [(gradient_overflows, np.inf), (gradient_is_nan, np.nan)])
def test_a_gradient_norm_that_is_not_finite_beside_a_finite_loss_is_skipped(loss, norm):
    trainer, params = make("adamw", loss)
    state = trainer.init(params)
    before = tree.digest(state.params), without_schedule(state.optimizer)
    state, stats = trainer.update(state, *grpo_batch(), ARGUMENTS)
    assert (tree.digest(state.params), without_schedule(state.optimizer)) == before
    assert math.isfinite(stats["loss"]) and float(stats["skipped_updates"]) == 1
    np.testing.assert_equal(float(stats["grad_norm"]), norm)


def test_the_guard_keeps_no_second_copy_of_the_state():
    trainer, params = make("adamw", gradient_is_nan)
    arrays, filled = grpo_batch()
    state = trainer.init(params)
    memory = trainer._update.lower(state, arrays, np.int32(filled), ARGUMENTS).compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    gradients = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    assert memory.alias_size_in_bytes >= held  # every new leaf is written over its old one
    assert memory.temp_size_in_bytes < 4 * gradients


BUILD = {
    **small.RL_FIELDS,
    "model.num_hidden_layers": 1,
    "model.first_k_dense_replace": 0,
    "grpo.updates_per_rollout": 1,
    "grpo.prompts_per_update": 2,
    "grpo.group_size": 4,
    "sampler.slots": 8,
    "sampler.max_new_tokens": 12,
    "pack.rows_per_micro_batch": 4,
    "checkpointing.every_updates": 2,
}


def run(folder, changes, **fields):
    """Returns (training, what it printed, its error, (before, after, zero-gradient) parameters by update) of a run.

    `changes` maps the update at which a rollout starts to a function of the rollout.
    """
    fields = {**BUILD, **{name.replace("__", "."): value for name, value in fields.items()}}
    config = configs.load("r1_zero:tiny", [(name, str(value)) for name, value in fields.items()])
    mesh = sharding.make_mesh(MeshConfig())
    train = prompts.encode(tasks.linear_prompts("train")[:20], parts_of(AskingParts, config), WORDS)
    params = sharding.initialize(decoder.specs(config.model), rng.key(0, "guard/loop", "init"), "float32", mesh)
    training = policy.make_training(of_config(config), WORDS, mesh, train, params, folder, describe=policy.describe)
    source, objective, transform = training.source.source, training.objective, training.run.trainer.transform
    next_rollout, update, seen = source.rollout, objective.update, {}

    @jax.jit
    def without_gradient(state):
        updates, _ = transform.update(jax.tree.map(jnp.zeros_like, state.params), state.optimizer, state.params)
        return optax.apply_updates(state.params, updates)

    def changed(start):
        return changes.get(start, lambda scored: scored)(ended(next_rollout(start)))

    def watched(run, batch, start):
        before = jax.device_get(training.run.state.params)
        still = jax.device_get(without_gradient(training.run.state))
        stats = update(run, batch, start)
        seen[start + 1] = before, jax.device_get(training.run.state.params), still
        return stats

    source.rollout, objective.update = changed, watched
    printed, error = io.StringIO(), None
    with contextlib.redirect_stderr(printed):
        try:
            training.train()
        except ValueError as raised:
            error = raised
    training.run.store.close()
    training.recorder.close()
    return training, printed.getvalue().splitlines(), error, seen


def ended(scored, reason="stop"):
    samples = [dataclasses.replace(sample, finish_reason=reason) for sample in scored.samples]
    return replace(scored, samples=samples)


def zero_rewards(scored):
    return replace(scored, reward_terms=np.zeros_like(scored.reward_terms))


def unscorable(scored):
    return replace(scored, scorable=np.zeros(len(scored), bool))


def cut_off(scored):
    return zero_rewards(ended(scored, "length"))


def signal(scored):
    """Returns the rollout with rewards that differ in every group."""
    parts = np.zeros_like(scored.reward_terms)
    parts[::2, 0] = 1
    return replace(scored, reward_terms=parts)


def broken(scored):
    first, rest = scored.samples[0], scored.samples[1:]
    nan = dataclasses.replace(first, behaviour_logps=np.full_like(first.behaviour_logps, np.nan))
    return signal(replace(scored, samples=[nan, *rest]))


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    """Returns (folder, *run) of a run without a KL term: updates 1 and 5 are ordinary, the last three are broken."""
    folder = tmp_path_factory.mktemp("eventful")
    kinds = (signal, zero_rewards, unscorable, broken, signal, cut_off, broken, broken, broken)
    fields = {"grpo__updates": 12, "grpo__kl_coef": 0, "optimizer__max_skipped_updates": 3}
    return folder, *run(folder, dict(enumerate(kinds)), **fields)


def test_without_a_kl_term_a_rollout_without_a_signal_has_no_gradient_and_moves_by_momentum_alone(eventful):
    folder, _, _, _, seen = eventful
    rows = {row["update"]: row for row in read(folder)}
    assert [rows[update]["grad_norm"] for update in (2, 3, 6)] == [0, 0, 0]
    assert rows[2]["zero_variance_groups"] == 1 and rows[3]["tokens"] == 0 and rows[6]["truncated"] == 1
    for update in (2, 3, 6):
        before, after, still = seen[update]
        assert tree.digest(after) != tree.digest(before)  # Adam's moments go on
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(still), strict=True):
            np.testing.assert_allclose(a, b, rtol=3e-7, atol=1e-8)  # the rounding of the last operation
    steps = [np.abs(seen[update][1].embedding - seen[update][0].embedding).max() for update in (1, 2)]
    assert steps[1] < steps[0]


def test_a_broken_update_is_skipped_said_once_and_leaves_finite_weights_and_rows(eventful):
    folder, _, lines, _, seen = eventful
    rows = {row["update"]: row for row in read(folder)}
    assert [update for update, row in rows.items() if row["skipped_updates"]] == [4, 7, 8, 9]
    for update, (before, after, _) in seen.items():
        assert (tree.digest(before) == tree.digest(after)) == (update in (4, 7, 8, 9))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())
    assert "loss" not in rows[4] and rows[4]["reward"] >= 0
    said = [line for line in lines if "skipped" in line]
    assert [line.split(":")[0] for line in said] == [f"r1_zero update {update}" for update in (4, 7, 8, 9)]
    assert "its loss is not finite (loss nan, gradient norm nan); weights and moments stay" in said[0]


def test_rollouts_without_a_signal_are_said_once_each(eventful):
    _, _, lines, _, _ = eventful
    assert [line for line in lines if "skipped" not in line and "update" in line] == [
        "r1_zero update 2: no group has a signal (2 of 2 tie); nothing trains, the loss has no KL term",
        "r1_zero update 3: no sample is scorable (0 of 8); nothing trains: look at the prompts' answers and graders",
        "r1_zero update 6: no group has a signal (2 of 2 tie); nothing trains, the loss has no KL term",
        "r1_zero update 6: every sample was cut off (8 of 8): raise sampler.max_new_tokens",
    ]


def test_too_many_skipped_in_a_row_end_the_run_in_one_line_with_the_last_checkpoint_intact(eventful):
    folder, training, _, error, _ = eventful
    assert str(error).startswith("r1_zero: the last 3 updates, up to 9, were skipped, the loss is not finite; look at")
    assert "\n" not in str(error)
    store = CheckpointStore(folder / "checkpoints")
    assert store.latest() == 8 and store.record(8)["skipped"] == 2  # a resumed run counts on
    found = store.restore(8, {"params": training.run.trainer.restore_target().params})["params"]
    assert tree.digest(found) == tree.digest(training.run.state.params)


def test_groups_of_one_train_the_kl_term_alone_and_masked_rollouts_nothing(tmp_path):
    fields = {"grpo__updates": 3, "grpo__group_size": 1, "grpo__prompts_per_update": 8, "grpo__truncated": "mask"}
    _, lines, error, seen = run(tmp_path, {1: cut_off}, **fields, grpo__kl_coef=0.5)
    assert error is None
    alone = "no group has a signal (8 of 8 tie); only the KL term trains; a group of one always ties"
    assert [line for line in lines if "update" in line] == [
        f"r1_zero update 1: {alone}, raise grpo.group_size",
        "r1_zero update 2: no sample counts (grpo.truncated=mask, 8 of 8 cut off); nothing trains",
        "r1_zero update 2: every sample was cut off (8 of 8): raise sampler.max_new_tokens",
        f"r1_zero update 3: {alone}, raise grpo.group_size",
    ]
    rows = read(tmp_path)
    assert [row["zero_variance_groups"] for row in rows] == [1, 1, 1]
    assert (rows[1]["tokens"], rows[1]["grad_norm"], rows[1]["skipped_updates"]) == (0, 0, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(seen[3][1]))


def test_a_group_of_one_has_no_advantage_whatever_its_reward():
    advantages, rewards, differs = group_advantages(jnp.asarray([[3.0], [0.0]]), jnp.ones(1), jnp.ones(2, bool), 1)
    assert (advantages.tolist(), rewards.tolist(), differs.tolist()) == ([0, 0], [3, 0], [False, False])


def test_a_rollout_with_a_signal_says_nothing():
    class Sample:
        truncated = False

    scorable = np.asarray([True, True, False, True])
    scored = Rollout([Sample()] * 4, np.zeros((4, 3)), scorable, 2)
    advantages = Advantages(np.zeros(4), np.zeros(4), scorable, scorable, np.asarray([True, False]))
    assert warnings.of_rollout(scored, advantages, GRPOConfig(group_size=2), 0.0) == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_zero_gradient_moves_fresh_weights_by_weight_decay_alone(kind):
    trainer, params = make(kind)
    arrays, filled = grpo_batch()
    still = arrays | {"loss_mask": np.zeros_like(arrays["loss_mask"])}
    before = jax.device_get(params)
    state, stats = trainer.update(trainer.init(params), still, filled, ARGUMENTS)
    assert (float(stats["grad_norm"]), float(stats["loss"]), float(stats["skipped_updates"])) == (0, 0, 0)
    shrunk = 1 - 0.1 * float(stats["learning_rate"])
    np.testing.assert_allclose(state.params.embedding, shrunk * before.embedding, rtol=1e-6)
    np.testing.assert_allclose(state.params.sparse.ffw.gate, shrunk * before.sparse.ffw.gate, rtol=1e-6)
    assert np.array_equal(state.params.final_norm, before.final_norm)


def supervised_run(folder, broken, updates=10, limit=10):
    """Returns (loss, printed lines, error, rows, store) of a fit whose batches `broken` have no finite loss."""
    mesh = sharding.make_mesh(MeshConfig())
    optimizer = OptimizerConfig(learning_rate=1e-2, max_skipped_updates=limit)
    trainer = step.Trainer(ONE_LAYER, optimizer, mesh, sft.make_loss(ONE_LAYER), updates)
    params = sharding.initialize(decoder.specs(ONE_LAYER.model), rng.key(0, "guard/fit", "init"), "float32", mesh)
    arrays, filled, inverse = sft.make_batch([sft.example([1], [2, 3, 4])], PACK, 1)
    batch_at = lambda update: (arrays, filled, np.float32(np.nan) if update + 1 in broken else inverse)  # noqa: E731
    store, log, loss, error = CheckpointStore(folder / "checkpoints"), MetricsLog(folder), None, None
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            _, loss = supervised.fit(trainer, lambda: params, batch_at, updates, store, log, 3, log_every=5, name="sft")
        except ValueError as raised:
            error = raised
    log.close()
    return loss, printed.getvalue().splitlines(), error, read(folder), store


def test_supervised_training_names_each_skipped_update_and_keeps_the_last_finite_loss(tmp_path):
    loss, lines, error, rows, store = supervised_run(tmp_path, {2, 5, 10})
    assert error is None and math.isfinite(loss) and store.record(10) == {"update": 10, "loss": loss, "skipped": 1}
    assert [line.split(":")[0] for line in lines] == [f"sft update {update}" for update in (2, 5, 10)]
    assert [(row["update"], row["skipped_updates"], "loss" in row) for row in rows] == [(5, 1, False), (10, 1, False)]


def test_supervised_training_ends_after_the_allowed_number_in_a_row(tmp_path):
    _, lines, error, _, store = supervised_run(tmp_path, set(range(3, 11)), limit=4)
    assert "the last 4 updates, up to 6, were skipped" in str(error)
    assert len(lines) == 4 and store.latest() == 3
    loss, lines, error, _, _ = supervised_run(tmp_path / "unlimited", set(range(3, 11)), limit=0)
    assert error is None and len(lines) == 8 and math.isfinite(loss)  # that of update 2


def test_a_run_that_goes_on_counts_from_where_it_was():
    skipped = guard.SkippedUpdates("sft", 3, in_a_row=1)
    stats = {"loss": 0.5, "grad_norm": math.inf, "skipped_updates": 1.0}
    with contextlib.redirect_stderr(io.StringIO()):
        skipped.note(8, stats)
        with pytest.raises(ValueError, match="the last 3 updates, up to 9, were skipped, the gradient norm is not"):
            skipped.note(9, stats)


def test_a_critic_that_is_skipped_alone_is_named(capsys):
    stats = {"loss": 0.5, "grad_norm": 1.0, "value_loss": math.nan, "critic_grad_norm": math.nan, "skipped_updates": 1}
    guard.SkippedUpdates("ppo_baseline", 0).note(7, stats)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "ppo_baseline update 7: skipped, its critic's loss is not finite (loss 0.5, gradient norm 1, "
    )


def test_only_the_writing_process_says_that_an_update_was_skipped(monkeypatch, capsys):
    stats = {"loss": math.nan, "grad_norm": 1.0, "skipped_updates": 1.0}
    for writes in (False, True):
        monkeypatch.setattr(hosts, "is_writer", lambda writes=writes: writes)
        guard.SkippedUpdates("sft", 0).note(1, stats)
        assert len(capsys.readouterr().err.splitlines()) == writes
