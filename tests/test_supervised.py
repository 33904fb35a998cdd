"""Claims about which examples an epoch trains on, and that training which was asked to end goes on in the same bits."""

import contextlib

import numpy as np
import pytest
import small
from small import Stopped

from r1jax.core import preempt, rng, sharding, tree
from r1jax.core.checkpoint import CheckpointStore
from r1jax.core.metrics import MetricsLog, read_evaluation
from r1jax.data.hashing import hash64
from r1jax.data.prompts import keyed_permutation
from r1jax.models import decoder
from r1jax.schema import MeshConfig, OptimizerConfig, PackConfig, SFTConfig, TrainEvalConfig
from r1jax.train import sft, step, supervised
from r1jax.train.epochs import examples_of_updates
from r1jax.train.evaluations import Evaluations, best_of

ONE_LAYER = small.changed(small.GROUPED, num_hidden_layers=1)


@pytest.mark.parametrize(
    ("count", "epochs", "size", "sizes"),
    [
        (12, 1, 7, [7, 5]),
        (12, 2, 7, [7, 7, 7, 3]),
        (12, 2, 5, [5, 5, 5, 5, 4]),
        (12, 3, 4, [4] * 9),
        (3, 2, 128, [3, 3]),
        (1, 1, 1, [1]),
    ],
)
def test_every_example_is_trained_once_an_epoch_and_the_last_update_takes_the_rest(count, epochs, size, sizes):
    updates = examples_of_updates(count, epochs, size, "distill", 0)
    assert [len(chosen) for chosen in updates] == sizes
    stream = np.concatenate(updates).reshape(epochs, count)
    assert all(sorted(epoch) == list(range(count)) for epoch in stream)


def test_updates_that_divide_an_epoch_are_those_of_each_epochs_own_order():
    updates = examples_of_updates(12, 2, 4, "stage1_coldstart", 3)
    orders = [keyed_permutation(12, hash64("stage1_coldstart", 3, "shuffle", epoch)) for epoch in range(2)]
    expected = [order[start : start + 4] for order in orders for start in (0, 4, 8)]
    assert np.array_equal(updates, expected)


@pytest.mark.parametrize("field", ["epochs", "examples_per_update"])
def test_no_epoch_and_no_example_an_update_are_refused(field):
    with pytest.raises(ValueError, match=f"SFTConfig.{field}=0 must be at least 1"):
        SFTConfig(**{field: 0})


def fit(trainer, params, folder, asked_in=None, every=0, measure=None):
    """Returns (digest of the weights, loss, metrics) of six updates; in the batch of one the process is asked to end.

    `measure` measures the weights after every so many updates, and after the last.
    """
    batches = [sft.make_batch([sft.example([1], [2 + n, 3, 4])], PackConfig(8, 2), 1) for n in range(6)]

    def batch_at(update):
        if update + 1 == asked_in:
            preempt._handle(15, None)
        return batches[update]

    with contextlib.closing(CheckpointStore(folder / "c")) as store, contextlib.closing(MetricsLog(folder)) as log:
        evaluations = Evaluations(folder, TrainEvalConfig(every=every), 6, "supervised")
        options = {"log_every": 5, "evaluations": evaluations, "measure": measure}
        with contextlib.closing(evaluations):
            weights, loss = supervised.fit(trainer, lambda: params, batch_at, 6, store, log, 100, **options)
    return tree.digest(weights), loss, (folder / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns (trainer, start weights, result of a run that nothing stops)."""
    mesh = sharding.make_mesh(MeshConfig())
    trainer = step.Trainer(ONE_LAYER, OptimizerConfig(learning_rate=1e-2), mesh, sft.make_loss(ONE_LAYER), 6)
    params = sharding.initialize(decoder.specs(ONE_LAYER.model), rng.key(0, "supervised", "init"), "float32", mesh)
    return trainer, params, fit(trainer, params, tmp_path_factory.mktemp("whole"))


def test_training_asked_to_end_saves_the_update_in_hand_and_goes_on_in_the_same_bits(whole, tmp_path, monkeypatch):
    trainer, params, expected = whole
    monkeypatch.setattr(preempt, "_notice", preempt._Notice())
    for asked_in in (3, 5):
        with pytest.raises(preempt.Preempted):
            fit(trainer, params, tmp_path / "asked", asked_in)
        monkeypatch.setattr(preempt, "_notice", preempt._Notice())
        with contextlib.closing(CheckpointStore(tmp_path / "asked" / "c")) as store:
            assert store.latest() == asked_in
    assert fit(trainer, params, tmp_path / "asked") == expected


def test_training_that_is_evaluated_has_the_same_bits_and_one_row_an_evaluation_wherever_it_stops(whole, tmp_path):
    trainer, params, expected = whole
    measured = []

    def measure(weights):
        measured.append(tree.digest(weights))
        if len(measured) == 1:
            raise Stopped
        return {"pass@1": float(len(measured) < 4), "problems": 1}

    with pytest.raises(Stopped):
        fit(trainer, params, tmp_path, every=4, measure=measure)
    assert fit(trainer, params, tmp_path, every=4, measure=measure) == expected
    assert [row["update"] for row in read_evaluation(tmp_path)] == [4, 6]
    assert measured[0] == measured[1] and measured[2] == expected[0]
    assert best_of(tmp_path) == {"update": 4, "metric": "pass@1", "value": 1.0}  # equal values: the earlier
