"""What a run measures besides its results: FLOPs and MFU of its phases, a trace of chosen updates, names in the trace."""

import contextlib
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small

from r1jax.core import metrics, observe, rng, sharding, tree
from r1jax.core.checkpoint import CheckpointStore
from r1jax.core.observe import MeasurementRequest
from r1jax.data.packing import PackItem, pack_batch, share_prompts
from r1jax.models import decoder, flops, utilisation
from r1jax.rl import losses
from r1jax.rl.logprobs import Scorer
from r1jax.sampler.engine import Engine
from r1jax.schema import GRPOConfig, MeshConfig, OptimizerConfig, PackConfig, SamplerConfig, TrainEvalConfig, replace
from r1jax.train import reward, sft, step, supervised
from r1jax.train.evaluations import Evaluations

MESH = sharding.make_mesh(MeshConfig())
PACK = PackConfig(row_tokens=16, rows_per_micro_batch=2)
LENGTHS = [5, 9, 7]
NOTHING = MeasurementRequest()


@pytest.fixture(autouse=True)
def nothing_asked():
    yield
    observe.ask(NOTHING)


@pytest.fixture(scope="module")
def trainer():
    return step.Trainer(small.MIXTURE, OptimizerConfig(learning_rate=1e-2), MESH, sft.make_loss(small.MIXTURE), 6)


def fit(trainer, folder, request=NOTHING, updates=6, **more):
    """Returns the weights after some updates on the same three examples, with a row for every two."""
    observe.ask(request)
    params = sharding.initialize(decoder.specs(small.MIXTURE.model), rng.key(0, "fit", "init"), "float32", MESH)
    generator = np.random.default_rng(0)
    items = [sft.example(*np.split(generator.integers(0, 32, size), [2])) for size in LENGTHS]
    store, log = CheckpointStore(folder / "checkpoints"), metrics.MetricsLog(folder)
    batch = sft.make_batch(items, PACK, 1)
    weights, _ = supervised.fit(
        trainer, lambda: params, lambda update: batch, updates, store, log, 4, log_every=2, name="fit", **more
    )
    store.close()
    log.close()
    return weights


def traces(folder):
    return list(folder.glob("profile/**/*.xplane.pb"))


def test_a_traced_run_has_the_same_bits_and_a_trace_of_the_updates_that_were_asked_for(trainer, tmp_path, capsys):
    plain = fit(trainer, tmp_path / "plain")
    traced = fit(trainer, tmp_path / "traced", MeasurementRequest(profile=(3, 5)))
    assert tree.digest(plain) == tree.digest(traced)
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("plain", "traced")]
    assert rows[0] == rows[1]
    assert not (tmp_path / "plain" / "profile").exists()
    (trace,) = traces(tmp_path / "traced")
    data = jax.profiler.ProfileData.from_file(str(trace))
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "update"]
    assert sorted(steps) == [3, 4]
    assert f"fit: --profile=3:5: a trace is in {tmp_path / 'traced' / 'profile'}\n" in capsys.readouterr().err
    fit(trainer, tmp_path / "plain", MeasurementRequest(profile=(3, 5)), updates=8)
    assert "fit: --profile=3:5: the run is at update 6 already, nothing is traced\n" in capsys.readouterr().err
    assert not (tmp_path / "plain" / "profile").exists()


def test_evaluations_are_in_no_step_of_the_trace_nor_before_it_or_after_it(trainer, tmp_path, monkeypatch):
    calls = small.traced_calls(monkeypatch)
    settings, measured = TrainEvalConfig(every=1), {"pass@1": 0.5, "problems": 4, "samples": 8}
    with contextlib.closing(Evaluations(tmp_path, settings, 6, "fit")) as evaluations:
        fit(
            trainer,
            tmp_path,
            MeasurementRequest(profile=(3, 5)),
            evaluations=evaluations,
            measure=lambda params: calls.append("evaluate") or measured,
        )
    middle = ["start", "begin 3", "end 3", "evaluate", "begin 4", "end 4", "stop"]
    assert calls == ["evaluate"] * 2 + middle + ["evaluate"] * 3


def test_a_trace_of_updates_that_are_not_made_says_so(tmp_path, capsys):
    observe.ask(MeasurementRequest(profile=(5, 7)))
    trace = observe.UpdateTrace("distill", tmp_path)
    with trace.running(3):
        trace.begin(4)
        trace.end(4)
    assert capsys.readouterr().err == "distill: --profile=5:7: the run ended before, nothing was traced\n"
    observe.mention_missing_trace()
    assert capsys.readouterr().err == ""
    observe.ask(MeasurementRequest(profile=(5, 7)))
    observe.mention_missing_trace()
    assert capsys.readouterr().err == "--profile=5:7: no update was made, so there is no trace\n"


def test_a_trace_through_another_libtpu_than_jaxs_own_is_refused(monkeypatch):
    installed = {"libtpu": "0.0.52", "jax": "0.10.2"}
    monkeypatch.setattr(observe.metadata, "version", installed.__getitem__)
    monkeypatch.setattr(observe.metadata, "requires", lambda name: ["numpy>=2", 'libtpu==0.0.42.*; extra == "tpu"'])
    observe.ask(MeasurementRequest(profile=(3, 5)))  # tests run with JAX_PLATFORMS=cpu
    for platforms in ("", "tpu,cpu"):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        with pytest.raises(ValueError) as refused:
            observe.ask(MeasurementRequest(profile=(3, 5)))
        assert str(refused.value) == (
            "--profile=3:5: libtpu 0.0.52 crashes when JAX 0.10.2 traces through it; on a TPU install libtpu==0.0.42.*, "
            "elsewhere set JAX_PLATFORMS=cpu"
        )
        observe.ask(MeasurementRequest(peak_tflops=1.0))
    for version in ("0.0.42", "0.0.42.1"):
        installed["libtpu"] = version
        observe.ask(MeasurementRequest(profile=(3, 5)))


def test_supervised_rows_have_the_flops_of_true_lengths_and_an_mfu_where_the_peak_is_known(trainer, tmp_path):
    fit(trainer, tmp_path / "unknown")
    unknown = metrics.read_timing(tmp_path / "unknown")
    work = flops.of_samples(LENGTHS, read=sum(size - 2 for size in LENGTHS))
    assert [row["update_flops"] for row in unknown] == [2 * flops.update(small.MIXTURE, work).total] * 3
    assert not any("update_mfu" in row for row in unknown)
    fit(trainer, tmp_path / "known", MeasurementRequest(peak_tflops=0.5))
    rows = metrics.read_timing(tmp_path / "known")
    assert [row["update_mfu"] for row in rows] == [row["update_flops"] / (row["update_s"] * 0.5e12) for row in rows]


def test_a_row_whose_updates_were_compiled_has_no_mfu():
    observe.ask(MeasurementRequest(peak_tflops=2.0))
    trainer, rows = SimpleNamespace(mesh=MESH, compilations=0), []
    timing = supervised._Timing(trainer)
    for trainer.compilations in (1, 1):
        timing.add(update_s=2.0, update_flops=1e12)
        rows.append(timing.row())
    assert rows == [
        {"update_s": 2.0, "update_flops": 1e12},
        {"update_s": 2.0, "update_flops": 1e12, "update_mfu": 0.25},
    ]


def test_work_of_a_batch_counts_true_lengths_shared_prompts_once_and_the_ends_that_a_reward_model_reads():
    items = [PackItem(np.arange(size), np.r_[np.zeros(4), np.ones(size - 4)]) for size in (7, 9, 6)]
    shared, rows = share_prompts(items, [4, 4, 4], 32)
    arrays = step.batch_arrays(pack_batch(shared, 32, 2, rows), replace(PACK, row_tokens=32), 1, ())
    # Each sample keeps the last token of its prompt, which predicts its first one: three tokens are shared.
    expected = flops.of_group(3, [1 + 3, 1 + 5, 1 + 2])
    assert step.work(arrays) == replace(expected, read=3 + 5 + 2)
    units = [reward.Unit((np.arange(1, 6), np.arange(1, 4)), (True, False))]
    arrays, _, _ = reward.make_batch(units, PACK, 1)
    assert step.work(arrays, reward.UNIT) == flops.of_samples([5, 3], read=2)


def test_the_peak_is_the_chips_divided_by_its_devices_and_a_cpu_has_none():
    assert utilisation.peak(MESH) is None
    observe.ask(MeasurementRequest(peak_tflops=0.25))
    assert utilisation.peak(MESH) == 0.25e12
    alone = [SimpleNamespace(coords=[x, 0, 0], core_on_chip=0) for x in range(4)]
    pairs = [SimpleNamespace(coords=[x, 0, 0], core_on_chip=core) for x in range(4) for core in range(2)]
    slices = [SimpleNamespace(coords=[0, 0, 0], slice_index=index) for index in range(3)]
    assert [utilisation.devices_of_chip(devices[-1], devices) for devices in (alone, pairs, slices)] == [1, 2, 1]
    assert {kind: chip.operations / 1e12 for kind, chip in utilisation.CHIPS.items()} == {
        "TPU v4": 275, "TPU v5": 459, "TPU v5 lite": 197, "TPU v6 lite": 918, "TPU7x": 2307,
    }  # fmt: skip


def scopes(lowered) -> set[str]:
    """Returns the names of the scopes that operations of a lowered program come from."""
    names = re.findall(r'loc\("([^"]+)"', lowered.as_text(debug_info=True))
    return {word for name in names for word in re.findall(r"\w+", name)}


def test_every_part_of_the_programs_has_its_name_in_a_trace():
    network = small.changed(
        small.MIXTURE, n_shared_experts=1, num_nextn_predict_layers=1, mtp_loss_weight=0.3, router_bias_update_rate=0.1
    )
    config = GRPOConfig()
    update = step.Trainer(network, OptimizerConfig(), MESH, losses.make_loss(network, config), 2)
    shape = (1, PACK.rows_per_micro_batch, PACK.row_tokens)
    integers = dict.fromkeys(("tokens", "targets", "positions", "segments"), "int32")
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, dtype in (integers | dict.fromkeys(("loss_mask", *losses.fields(config)), "float32")).items()
    }
    arguments, params = losses.arguments(config, 0.0, 1.0), sharding.abstract(update.specs, "float32")
    forward = {"embedding", "attention", "ffw", "router", "experts", "shared_expert", "head"}
    with sharding.use_mesh(MESH):
        lowered = update._update.lower(update.abstract_state(), batch, np.int32(1), arguments)
        assert scopes(lowered) >= forward | {"prediction", "loss", "optimizer", "router_bias"}
        scored = {name: batch[name] for name in integers}
        lowered = Scorer(network, MESH)._score.lower(params, scored, np.int32(1), np.float32(1))
        assert scopes(lowered) >= forward | {"score"}
    engine = Engine(network, SamplerConfig(slots=2, max_prompt_tokens=8, max_new_tokens=8), MESH, stop_ids=(1,))
    with sharding.use_mesh(MESH, sharding.DECODE):
        state = jax.eval_shape(engine._empty_state)
        lowered = engine._prefill.lower(params, np.zeros(8, np.int32), np.int32(8), None)
        assert scopes(lowered) >= forward | {"prefill"}
        prefix = jax.eval_shape(engine._prefill, params, np.zeros(8, np.int32), np.int32(8), None)
        lowered = engine._insert.lower(prefix, state, np.zeros(2, np.int32), engine.default_slot_params(2))
        assert scopes(lowered) >= {"insert"}
        assert scopes(engine._decode.lower(params, state, 2, 16)) >= forward | {"decode", "sample"}
