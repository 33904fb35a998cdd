"""Claims about evaluation between updates: it changes no bit of training, and the best weights are kept, stopped or not."""

import contextlib
import json
import math

import jax
import jax.numpy as jnp
import pytest
from small import RL_FIELDS, Stopped, best_weights, finished_stage, rl_training, run_until, traced_calls

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.core import checkpoint, observe, rng, sharding, tree
from r1jax.core.metrics import read, read_evaluation, read_timing
from r1jax.data import tasks
from r1jax.models import decoder
from r1jax.recipe import common, evaluate, export_hf, parts, policy, prompts, train_eval
from r1jax.rl.rollout import Mixture
from r1jax.schema import DataConfig, TrainEvalConfig, parts_of
from r1jax.train.evaluations import Evaluations, best_of

WORDS = tokenizer.tiny()
# Random weights answer nothing right; how far they keep to one language moves with every update.
MEASURED = {
    "name": "r1_zero:tiny_dense",
    "grpo__updates": 5,
    "train_eval__every": 2,
    "train_eval__metric": "language_consistency",
    "train_eval__max_problems": 4,
    "evaluation__samples_per_problem": 2,
    "held_out": 6,
}


def kept(folder):
    """Returns [record, digest of the weights] of the best weights in a run's folder."""
    return best_weights(
        folder, configs.load("r1_zero:tiny_dense", [(name, str(value)) for name, value in RL_FIELDS.items()])
    )


@pytest.fixture(scope="module")
def calls():
    """Returns a list of what was asked of the profiler, and of the evaluations, in the run of `measured`."""
    return []


@pytest.fixture(scope="module")
def measured(tmp_path_factory, calls):
    """Returns (training, folder, {update: digest of the weights}) of a run that was evaluated after 2, 4 and 5 updates."""
    folder, digests = tmp_path_factory.mktemp("measured"), {}
    observe.ask(observe.MeasurementRequest(profile=(3, 5)))
    training = rl_training(folder, **MEASURED)
    record = training.run.evaluations.record

    def noting(update, figures, params):
        digests[update] = tree.digest(params)
        record(update, figures, params)

    training.run.evaluations.record = noting
    evaluated = training.source.evaluate
    with pytest.MonkeyPatch.context() as patched:
        traced = traced_calls(patched)
        training.source.evaluate = lambda: traced.append("evaluate") or evaluated()
        training.train()
    observe.ask(observe.MeasurementRequest())
    calls += traced
    return training, folder, digests


def test_evaluations_are_in_no_step_of_a_trace_nor_before_it_or_after_it(measured, calls):
    middle = ["start", "begin 3", "end 3", "begin 4", "end 4", "stop"]
    assert calls == ["evaluate", *middle, "evaluate", "evaluate"]


def test_rows_are_written_every_so_many_updates_and_after_the_last(measured):
    _, folder, _ = measured
    rows = read_evaluation(folder)
    assert [row["update"] for row in rows] == [2, 4, 5]
    assert all(row["problems"] == 4 and row["samples"] == 8 and 0 <= row["greedy"] <= 1 for row in rows)
    assert len({row["language_consistency"] for row in rows}) > 1
    timed = [row for row in read_timing(folder) if "evaluation_s" in row]
    assert [(row["update"], len(row)) for row in timed] == [(2, 2), (4, 2), (5, 2)]  # rows of their own
    assert policy.time_split(folder)["evaluation"] > 0
    assert list((folder / "tensorboard" / "evaluation").iterdir())


def test_training_has_the_same_bits_without_evaluation(measured, tmp_path):
    training, folder, _ = measured
    other = rl_training(tmp_path, **{**MEASURED, "train_eval__every": 0})
    other.train()
    assert read(tmp_path) == read(folder)
    assert tree.digest(other.run.state) == tree.digest(training.run.state)
    assert not (tmp_path / "evaluation.jsonl").exists() and not (tmp_path / "best").exists()


def test_the_weights_of_the_highest_value_are_kept(measured):
    training, folder, digests = measured
    best = max(read_evaluation(folder), key=lambda row: (row["language_consistency"], -row["update"]))
    record, digest = kept(folder)
    assert record == {
        "update": best["update"],
        "metric": "language_consistency",
        "value": best["language_consistency"],
    }
    assert record == best_of(folder)
    assert digest == digests[best["update"]]


def test_a_row_has_the_figures_of_the_same_weights_evaluated_alone_with_the_longest_responses(measured):
    training, folder, _ = measured
    config = training.run.config
    assert training.run.programs.counts()["evaluation_decode"]  # the first rollout's responses are shorter
    settings = parts.EvaluationParts(
        *(config.stage, config.seed, config.network, config.sampler, config.reward),
        config.train_eval.settings(configs.load("r1_zero:tiny", [("evaluation.samples_per_problem", "2")]).evaluation),
    )
    asking = parts_of(parts.AskingParts, configs.load("r1_zero:tiny"))
    asked = prompts.encode(tasks.linear_prompts("test")[:6], asking, WORDS)
    words = tasks.TinyWorld().reflective_words
    figures, _ = evaluate.evaluate(settings, WORDS, training.run.mesh, asked, training.run.params, words)
    row = {name: value for name, value in read_evaluation(folder)[-1].items() if name != "update"}
    assert json.dumps(train_eval.flat(figures), sort_keys=True) == json.dumps(row, sort_keys=True)  # NaN as well


def test_a_run_stopped_in_an_evaluation_before_the_best_weights_and_after_them_ends_in_the_same(measured, tmp_path):
    _, folder, _ = measured

    def stop(*arguments):
        raise Stopped

    training = rl_training(tmp_path, **MEASURED)
    training.source.evaluate = stop
    with pytest.raises(Stopped):
        training.train()
    assert not read_evaluation(tmp_path) and checkpoint.numbers(tmp_path / "checkpoints") == [2]
    training = rl_training(tmp_path, **MEASURED)
    training.run.evaluations._store.save = stop
    with pytest.raises(Stopped):
        training.train()
    assert len(read_evaluation(tmp_path)) == 1 and not checkpoint.numbers(tmp_path / "best" / "checkpoints")
    run_until(rl_training(tmp_path, **MEASURED), 4)
    assert checkpoint.numbers(tmp_path / "best" / "checkpoints")
    rl_training(tmp_path, **MEASURED).train()
    assert (tmp_path / "evaluation.jsonl").read_bytes() == (folder / "evaluation.jsonl").read_bytes()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    assert kept(tmp_path) == kept(folder)


# Which weights are kept


def recorded(folder, values, metric="pass@1", last=40, resumed_at=0, **rows):
    """Records evaluations {update: value} with weights that hold their update; returns what is kept of them."""
    settings = TrainEvalConfig(every=10, metric=metric)
    evaluations = Evaluations(folder, settings, last, "r1_zero")
    evaluations.resume(resumed_at, lambda: {"w": jnp.float32(resumed_at)})
    for update, value in values.items():
        evaluations.record(update, {metric: value, "problems": 4.0, **rows}, {"w": jnp.float32(update)})
    evaluations.close()
    if (best := best_of(folder)) is None:
        return None
    target = {"w": jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    assert checkpoint.load(folder / "best" / "checkpoints", "params", target)["w"] == best["update"]
    return best["update"]


def test_of_equal_values_the_earlier_counts_and_what_is_not_a_number_never(tmp_path):
    assert recorded(tmp_path / "a", {10: 0.5, 20: 0.5, 30: 0.25}) == 10
    assert recorded(tmp_path / "b", {10: math.nan, 20: 0.25, 30: math.nan}) == 20
    assert recorded(tmp_path / "c", {10: math.nan}) is None


def test_weights_of_updates_after_the_checkpoint_that_a_run_goes_on_from_are_dropped_with_their_rows(tmp_path):
    assert recorded(tmp_path, {10: 0.25, 20: 0.75}) == 20
    assert recorded(tmp_path, {20: 0.5}, resumed_at=10) == 20
    assert [row["pass@1"] for row in read_evaluation(tmp_path)] == [0.25, 0.5]


def test_weights_compete_with_the_kept_ones_by_the_metric_of_now_if_measured_on_the_same_problems(tmp_path):
    assert recorded(tmp_path, {10: 0.75}, greedy=0.5) == 10
    assert recorded(tmp_path, {20: 0.25}, metric="greedy", resumed_at=10) == 10
    assert recorded(tmp_path, {30: 0.625}, metric="greedy", resumed_at=20) == 30
    assert recorded(tmp_path, {40: 0.125}, metric="greedy", resumed_at=30, problems=8.0) == 40


def test_evaluations_are_due_at_multiples_and_at_the_end_once_and_never_without_them(tmp_path):
    evaluations = Evaluations(tmp_path / "a", TrainEvalConfig(every=10), 25, "r1_zero")
    assert [update for update in range(26) if evaluations.is_due(update)] == [10, 20, 25]
    evaluations.record(10, {"pass@1": 0.5, "problems": 1}, {"w": jnp.float32(0)})
    assert not evaluations.is_due(10)
    evaluations.close()
    off = Evaluations(tmp_path / "b", TrainEvalConfig(), 25, "r1_zero")
    off.resume(10, lambda: {})
    off.close()
    assert not any(map(off.is_due, range(26))) and not (tmp_path / "b").exists()


# What is refused


def test_a_metric_that_is_not_measured_is_refused_with_those_that_are():
    every = [("train_eval.every", "5"), ("evaluation.pass_at", "(4,)")]
    with pytest.raises(
        ValueError, match=r"train_eval\.metric=pass@8 is not measured; choose one of pass@1, pass@4, greedy"
    ):
        configs.load("r1_zero:tiny", [*every, ("train_eval.metric", "pass@8")])
    with pytest.raises(ValueError, match=r"train_eval\.metric=pass@4 is not measured"):
        configs.load("r1_zero:tiny", [*every, ("train_eval.metric", "pass@4"), ("train_eval.samples_per_problem", "2")])
    assert configs.load("r1_zero:tiny", [*every, ("train_eval.metric", "pass@4")]).train_eval.metric == "pass@4"


def test_evaluation_without_held_out_problems_is_refused():
    parts_now = parts_of(train_eval.TrainEvalParts, configs.load("r1_zero:tiny", [("train_eval.every", "5")]))
    nothing = prompts.StagePrompts(tasks.TinyWorld(), Mixture([]), [], {})
    with pytest.raises(ValueError, match=r"train_eval\.every=5: r1_zero has no problems to evaluate; give some with "):
        train_eval.measure(parts_now, WORDS, nothing)


# The best weights as a checkpoint


def test_the_folder_of_the_best_weights_reads_as_its_run_with_other_weights(tmp_path, monkeypatch):
    config = configs.load("r1_zero:tiny", [(name, str(value)) for name, value in RL_FIELDS.items()])
    mesh = sharding.make_mesh(config.mesh)
    last, best = (
        sharding.initialize(decoder.specs(config.model), rng.key(seed, "best", "init"), "float32", mesh)
        for seed in (0, 1)
    )
    folder = finished_stage(config, tmp_path, last, {})
    checkpoint.write_json(folder / common.INPUTS, {"inputs": {"rows.jsonl": "0" * 64}})
    common.write_model(folder, config.model, DataConfig(), WORDS, "tiny")
    with contextlib.closing(checkpoint.CheckpointStore(folder / "best" / "checkpoints", keep=1)) as store:
        store.save(5, {"params": best}, {"update": 5})
    assert common.read_folder(folder / "best", configs.load("r1_zero:tiny").model, DataConfig())[0] == config.model
    assert tree.digest(common.load_weights(config.model, mesh, str(folder / "best"))) == tree.digest(best)
    assert common.checkpoint_digest(folder / "best") != common.checkpoint_digest(folder)
    assert export_hf.run_fields(folder / "best") == export_hf.run_fields(folder)
    assert evaluate._trained_on(folder / "best") == evaluate._trained_on(folder)
    assert common.run_folder(tmp_path / "best") == tmp_path / "best"
    assert not common.replaceable(folder) and common.replaceable(folder / "best")

    def replaced_meanwhile(*arguments):
        with contextlib.closing(checkpoint.CheckpointStore(folder / "best" / "checkpoints", keep=1)) as store:
            store.save(6, {"params": last}, {"update": 6})

    monkeypatch.setattr(common, "load_weights", replaced_meanwhile)
    asked = configs.load("evaluate:tiny", [("checkpoint", str(folder / "best"))])
    with pytest.raises(ValueError, match=r"best: a run wrote other weights there while they were read; run again, or"):
        evaluate.run(asked, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
