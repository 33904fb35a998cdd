"""Claims about the graph of stages, run very short on the tiny world from the shipped bases."""

import json
import shutil
from collections import Counter

import pytest

from r1jax import config as configs
from r1jax import launch
from r1jax.core import preempt, tree
from r1jax.core.metrics import read
from r1jax.data import files, jsonl, tasks
from r1jax.data.problems import Problem
from r1jax.evals.benchmarks import Response
from r1jax.recipe import common, graph, lineage, stage3_rejection_sft, traces
from r1jax.schema import ModelConfig, RejectionConfig

REASONERS = ("r1_zero", "stage1_coldstart", "stage2_reasoning_rl", "stage3_rejection_sft")
MODELS = ("reward_helpful", "reward_safety")
STAGES = (*REASONERS, *MODELS, "stage4_all_scenarios", "distill", "student_rl")
CHECKPOINTS = ("base", "r1_zero", "dev1", "dev2", "dev3", "r1", "student_distilled", "student_rl")
FIGURES = {
    *("pass@1", "pass@1_se", "greedy", "cons@16", "mean_tokens", "reflective_per_response", "language_consistency"),
    *("arithmetic_true", "first_guess_accuracy", "final_accuracy", "fixed", "broken", "compute"),
}
SHORT_STAGES = (
    *("r1_zero.grpo.updates=4", "stage1_coldstart.coldstart.prompts=100", "stage2_reasoning_rl.grpo.updates=2"),
    *("stage3_rejection_sft.rejection.prompts=100", "stage4_all_scenarios.grpo.updates=4"),
    *("stage4_all_scenarios.scenarios.from_update=2", "student_rl.grpo.updates=2"),
    *(f"{name}.reward_model.{field}" for name in MODELS for field in ("samples_per_prompt=4", "epochs=1")),
    "reward_helpful.reward_model.pairs_per_prompt=8",
)


def arguments(workdir, *changes: str, more: tuple[str, ...] = ()) -> list[str]:
    """Returns the command line of the short graph with further STAGE.FIELD=VALUE changes and further flags."""
    evaluation = dict(samples_per_problem=1, max_problems=40, consensus_problems=4)
    return [
        *("--config=quickstart", f"--workdir={workdir}", f"--config.set={','.join((*SHORT_STAGES, *changes))}"),
        *(f"--config.evaluation.{name}={value}" for name, value in evaluation.items()),
        *more,
    ]


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def stamps(workdir) -> dict[str, int]:
    """Returns when each file of the stages and evaluations was last written, in nanoseconds."""
    folders = [workdir / name for name in (*STAGES, "evaluations")]
    return {str(path): path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


def marker(workdir, stage: str) -> dict:
    return json.loads((workdir / stage / "DONE").read_text())


def states(workdir, *changes: str, capsys) -> dict[str, str]:
    """Returns the states that the listing tells, with changes of single stages."""
    path = workdir.parent / "listing.json"
    assert launch.main(arguments(workdir, *changes, more=("--config.list", f"--json={path}"))) == 0
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert all(f"{stage} " in printed and state in printed for stage, state in found.items())
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(working folder, summary) of the short graph."""
    workdir = tmp_path_factory.mktemp("graph") / "runs"
    assert launch.main(arguments(workdir)) == 0
    return workdir, json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def workdir(finished):
    return finished[0]


@pytest.fixture(scope="module")
def summary(finished):
    return finished[1]


def test_summary_holds_every_checkpoint_with_every_figure(summary):
    assert set(summary) == {"checkpoints", "reward_models", "wall_s"} and summary["wall_s"] > 0
    assert sorted(summary["checkpoints"]) == sorted(CHECKPOINTS)
    assert all(set(figures) >= FIGURES for figures in summary["checkpoints"].values())
    assert all(figures["problems"] == figures["samples"] == 40 for figures in summary["checkpoints"].values())
    free = [name for name, figures in summary["checkpoints"].items() if figures["compute"] <= 0]
    assert free == ["base"]


def test_summary_and_report_show_the_held_out_accuracy_of_both_reward_models(workdir, summary):
    assert list(summary["reward_models"]) == list(MODELS)
    page = (workdir / "report.html").read_text()
    for name, found in summary["reward_models"].items():
        assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
        assert found.get("pairs", 0) + found.get("responses", 0) > 5 and 0 <= found["ece"] <= 1
        assert name in page
    assert "Reward models on held-out prompts" in page


def test_every_stage_leaves_a_report_of_its_own_that_no_longer_reloads(workdir, summary):
    pages = {stage: (workdir / stage / "report.html").read_text() for stage in ("", *STAGES)}
    assert [stage for stage, page in pages.items() if 'http-equiv="refresh"' in page or "At work" in page] == []
    for stage in MODELS:
        assert "Reward models on held-out prompts" in pages[stage] and "Training on examples" in pages[stage]
    assert "r1_zero, in training" in pages["r1_zero"] and "r1_zero, in training" in pages[""]


def test_stage_4_tells_what_the_reward_models_say_beside_what_is_verified(workdir):
    rows = read(workdir / "stage4_all_scenarios")
    names = {"reward_model", "rule", "reasoning_accuracy", "helpful_reward", "safety_reward", "hacking_warning"}
    assert [names <= set(row) for row in rows] == [False, False, True, True]
    assert all(0 <= row[name] <= 1 for row in rows[2:] for name in names)
    assert all(row["accuracy"] == row["reasoning_accuracy"] for row in rows[2:])


def test_every_stage_is_done_with_config_metrics_and_samples(workdir):
    for stage in STAGES:
        record = marker(workdir, stage)
        assert set(record) == {"inputs", "output", "figures"}
        assert json.loads((workdir / stage / "config.json").read_text())["stage"] == stage
        assert len(read(workdir / stage)) > 0
        if stage in MODELS:
            continue
        assert len(jsonl.read(workdir / stage / "samples.jsonl")) == 40


def test_inputs_of_a_stage_are_the_outputs_of_those_before_it(workdir):
    output = {stage: marker(workdir, stage)["output"] for stage in STAGES}
    assert len(set(output.values())) == len(STAGES)
    base = {lineage.BASE: ""}
    assert {stage: marker(workdir, stage)["inputs"] for stage in STAGES} == {
        "r1_zero": base,
        "stage1_coldstart": base | {"r1_zero": output["r1_zero"]},
        "stage2_reasoning_rl": {"stage1_coldstart": output["stage1_coldstart"]},
        "stage3_rejection_sft": base | {"stage2_reasoning_rl": output["stage2_reasoning_rl"]},
        **{name: {"stage3_rejection_sft": output["stage3_rejection_sft"]} for name in MODELS},
        "stage4_all_scenarios": {name: output[name] for name in ("stage3_rejection_sft", *MODELS)},
        "distill": base | {"stage3_rejection_sft": output["stage3_rejection_sft"]},
        "student_rl": base,
    }


def test_stage_3_starts_from_the_weights_of_the_base_and_stage_4_from_those_of_stage_3(workdir):
    def start(name: str) -> str:
        config, _, mesh = common.prepare(configs.load(name))
        return tree.digest(lineage.start_weights(config, mesh, workdir))

    assert start("stage3_rejection_sft") == start("r1_zero") not in {marker(workdir, s)["output"] for s in STAGES}
    assert start("stage4_all_scenarios") == marker(workdir, "stage3_rejection_sft")["output"]


def test_second_run_writes_nothing_and_tells_the_same(workdir, summary):
    before = stamps(workdir)
    assert launch.main(arguments(workdir)) == 0
    assert stamps(workdir) == before
    assert json.loads((workdir / "summary.json").read_text())["checkpoints"] == summary["checkpoints"]


def test_base_is_evaluated_once_whatever_stage_compares_itself_with_it(workdir, summary):
    written = stamps(workdir)
    for name, stage in (("base", "r1_zero"), ("student_base", "distill")):
        assert written[str(workdir / "evaluations" / f"{name}.json")] < written[str(workdir / stage / "DONE")]
    base = summary["checkpoints"]["base"]
    for stage in (*REASONERS, "stage4_all_scenarios"):
        figures = marker(workdir, stage)["figures"]["base"]
        assert {name: base[name] for name in figures} == figures
    assert marker(workdir, "distill")["figures"]["base"] == marker(workdir, "student_rl")["figures"]["base"] != base


def test_listing_tells_done_stages_and_a_changed_one_with_its_dependents_as_stale(workdir, capsys):
    before = stamps(workdir)
    assert states(workdir, capsys=capsys) == dict.fromkeys(STAGES, "done")
    stale = dict.fromkeys(("stage3_rejection_sft", *MODELS, "stage4_all_scenarios", "distill"), "stale")
    changed = states(workdir, "stage3_rejection_sft.sft.epochs=1", capsys=capsys)
    assert changed == dict.fromkeys(STAGES, "done") | stale
    assert stamps(workdir) == before


def test_a_changed_file_or_checkpoint_is_stale_in_the_listing_and_one_that_is_not_there_is_left_to_the_run(tmp_path):
    file, model = tmp_path / "rows.jsonl", tmp_path / "model"
    file.write_text("{}")
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    stages = {"r1_zero": configs.load("r1_zero:tiny")}
    folder = common.StageFolder(stages["r1_zero"], tmp_path)
    inputs = {
        str(file): files.digest(str(file)),
        str(model): common.checkpoint_digest(model),
        "base": "",
        "gone.py": "x",
    }
    folder.start(inputs)
    folder.finish({}, inputs, "digest")
    assert graph.state("r1_zero", stages, tmp_path) == "done"
    (model / "model.safetensors").write_bytes(b"other weights")
    assert graph.state("r1_zero", stages, tmp_path) == "stale"
    (model / "model.safetensors").write_bytes(b"weights")
    file.write_text('{"id": 1}')
    assert graph.state("r1_zero", stages, tmp_path) == "stale"
    file.unlink()
    assert graph.state("r1_zero", stages, tmp_path) == "done"


def test_listing_of_an_empty_folder_tells_all_as_missing(tmp_path, capsys):
    assert states(tmp_path / "runs", capsys=capsys) == dict.fromkeys(STAGES, "missing")
    assert not (tmp_path / "runs").exists()


def test_stale_stage_is_refused_with_the_flag_that_mends_it(workdir, capsys):
    before = stamps(workdir)
    assert launch.main(arguments(workdir, "stage3_rejection_sft.sft.epochs=1")) == 2
    assert last_line(capsys) == (
        f"error: {workdir / 'stage3_rejection_sft'} is stale: its config or an input has changed; "
        "run again with --config.from=stage3_rejection_sft"
    )
    assert stamps(workdir) == before


@pytest.mark.parametrize("flag", ["--config.only=distill", "--config.from=stage4_all_scenarios"])
def test_stage_is_refused_when_the_one_before_it_is_stale_and_keeps_what_it_had(workdir, capsys, flag):
    before = stamps(workdir)
    assert launch.main(arguments(workdir, "stage3_rejection_sft.sft.epochs=1", more=(flag,))) == 2
    assert last_line(capsys).endswith("run again with --config.from=stage3_rejection_sft")
    assert stamps(workdir) == before


def test_from_runs_a_changed_stage_again_and_leaves_the_others_alone(workdir, tmp_path):
    copy = tmp_path / "runs"
    shutil.copytree(workdir, copy)
    before = stamps(copy)
    assert launch.main(arguments(copy, "distill.sft.epochs=1", more=("--config.from=distill",))) == 0
    after = stamps(copy)
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert {path.removeprefix(f"{copy}/").split("/")[0] for path in changed} == {"distill", "evaluations"}
    assert [path for path in changed if "evaluations" in path] == [f"{copy}/evaluations/student_distilled.json"]
    assert marker(copy, "distill")["output"] != marker(workdir, "distill")["output"]
    assert len(read(copy / "distill")) * 3 == len(read(workdir / "distill"))


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("r1_zero", STAGES[:8]),
        ("stage2_reasoning_rl", STAGES[2:8]),
        ("stage3_rejection_sft", STAGES[3:8]),
        ("reward_safety", ("reward_safety", "stage4_all_scenarios")),
        ("stage4_all_scenarios", ("stage4_all_scenarios",)),
        ("distill", ("distill",)),
        ("student_rl", ("student_rl",)),
    ],
)
def test_from_chooses_a_stage_and_all_that_depend_on_it(stage, expected):
    assert tuple(graph.chosen_stages(configs.load("quickstart", [("from", stage)]))) == expected


def test_only_chooses_the_named_stages_in_the_order_of_the_graph():
    chosen = graph.chosen_stages(configs.load("r1", [("only", "distill,stage1_coldstart")]))
    assert chosen == ["stage1_coldstart", "distill"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ("--config.only=stage2_reasoning_rl",),
            "stage2_reasoning_rl needs stage1_coldstart, which is not done in {workdir}; "
            "run with --config.only=stage1_coldstart first",
        ),
        (("--config.only=stage2_reasoning",), "no stage named 'stage2_reasoning' in the graph; did you mean "),
        (("--config.only=distill", "--config.from=r1_zero"), "config.only=distill and config.from=r1_zero: give one"),
        (("--config.from=distil",), "no stage named 'distil' in the graph; did you mean 'distill'?"),
        (("--config.set=destill.sft.epochs=1",), "needs STAGE.FIELD=VALUE; did you mean 'distill'?"),
        (("--config.set=distill.sft.epoch=1",), "SFTConfig has no field 'epoch' (in config.sft.epoch)"),
        (
            ("--config.grpo.updates=3",),
            "config.grpo.updates is no setting of the whole graph; give it to a stage: "
            "--config.set=STAGE.grpo.updates=VALUE",
        ),
    ],
)
def test_mistake_about_the_graph_is_one_line_and_leaves_nothing(tmp_path, capsys, flags, expected):
    workdir = tmp_path / "runs"
    assert launch.main(["--config=quickstart", f"--workdir={workdir}", *flags]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and expected.format(workdir=workdir) in output.err
    assert not workdir.exists()


def test_a_run_from_a_stage_on_that_did_not_end_goes_on_without_what_became_stale_and_a_finished_one_starts_over(
    tmp_path, monkeypatch
):
    config, ends, runs = configs.load("quickstart", [("from", "stage3_rejection_sft")]), [preempt.Preempted], []
    chosen = graph.chosen_stages(config)

    def stage_function(stage):
        def run(stage_config, workdir):
            runs.append(stage)
            (workdir / stage).mkdir(exist_ok=True)
            (workdir / stage / "work").touch()
            if stage == chosen[1] and ends[-1]:
                raise ends[-1]
            return {}

        return run

    monkeypatch.setattr(graph.stage_table, "function", stage_function)
    monkeypatch.setattr(graph, "_refuse_unready", lambda *arguments: None)
    for name in ("hold_gate", "export", "_show", "_to_export"):
        monkeypatch.setattr(graph, name, lambda *arguments: None)
    monkeypatch.setattr(graph, "summarize", lambda *arguments: {})
    monkeypatch.setattr(graph.inherited, "require", lambda *arguments: None)
    kept = tmp_path / chosen[0] / "kept"
    kept.parent.mkdir()
    kept.touch()
    with pytest.raises(preempt.Preempted):
        graph.run(config, tmp_path)
    assert not kept.exists()  # the first run of the command removes the stages
    kept.touch()
    other = tmp_path / chosen[1] / "kept"
    for end, stale in ((preempt.Preempted, ""), (ValueError, ""), (preempt.Preempted, chosen[0])):
        ends.append(end)
        other.touch()
        monkeypatch.setattr(graph, "state", lambda stage, *_, stale=stale: "stale" if stage == stale else "stopped")
        with pytest.raises(end):
            graph.run(config, tmp_path)
        assert kept.exists() == (stale == "") and other.exists()
        kept.touch()
    ends.append(None)
    monkeypatch.setattr(graph, "state", lambda *_: "stopped")
    graph.run(config, tmp_path)
    assert kept.exists()
    graph.run(config, tmp_path)
    assert not kept.exists()
    assert [stage for stage in runs if stage == chosen[0]] == [chosen[0]] * 6


def test_gate_stops_the_graph_with_the_reason_and_keeps_the_stage(workdir, tmp_path, capsys):
    copy, gate = tmp_path / "runs", "r1_zero.gate.pass_at_1=0.99"
    for name in ("r1_zero", "evaluations"):
        shutil.copytree(workdir / name, copy / name)
    before, figures = stamps(copy), marker(copy, "r1_zero")["figures"]["r1_zero"]
    assert launch.main(arguments(copy, gate)) == 2
    assert last_line(capsys) == (
        f"error: gate: r1_zero has pass@1 {figures['pass@1']:.3f}, below config.gate.pass_at_1=0.99 of r1_zero; "
        "the graph stops here"
    )
    assert stamps(copy) == before and not (copy / "stage1_coldstart").exists()
    lower = ("r1_zero.gate.pass_at_1=0.01", "r1_zero.gate.language_consistency=0.01")
    assert launch.main(arguments(copy, *lower, more=("--config.only=r1_zero",))) == 0
    assert stamps(copy) == before


def test_graph_hands_its_seed_and_evaluation_to_every_stage_and_single_fields_to_one():
    given = [("seed", "3"), ("evaluation.max_problems", "7"), ("set", "distill.sft.epochs=1,distill.seed=4")]
    stages = graph.stage_configs(configs.load("quickstart", given))
    assert {stage: config.seed for stage, config in stages.items()} == dict.fromkeys(STAGES, 3) | {"distill": 4}
    assert {config.evaluation.max_problems for config in stages.values()} == {7}
    assert (stages["distill"].sft.epochs, stages["stage3_rejection_sft"].sft.epochs) == (1, 2)


def test_stage_3_examples_are_right_capped_distinct_and_of_training_problems(workdir):
    rows = jsonl.read(workdir / "stage3_rejection_sft" / "examples.jsonl")
    reasoning = [row for row in rows if tasks.parse_linear(row["prompt"])]
    assert len(reasoning) > 20
    assert len({(row["prompt"], row["response"]) for row in reasoning}) == len(reasoning)
    assert max(Counter(row["id"] for row in reasoning).values()) <= 2
    for row in reasoning:
        problem = tasks.parse_linear(row["prompt"])
        assert not tasks.is_held_out(problem.a, problem.b)
        assert f"<answer> {problem.x} </answer>" in row["response"]
        assert row["provenance"]["teacher"] == "stage2_reasoning_rl"
        assert row["provenance"]["sample"] in range(4) and row["provenance"]["trace"] == row["response"]


def test_a_quarter_of_stage_3s_examples_is_general_and_keeps_its_rules(workdir):
    rows = jsonl.read(workdir / "stage3_rejection_sft" / "examples.jsonl")
    counts = json.loads((workdir / "stage3_rejection_sft" / "examples_counts.json").read_text())
    general = [row for row in rows if tasks.parse_linear(row["prompt"]) is None]
    assert (counts["general"], counts["kept"]) == ({"general": len(general)}, {"linear": len(rows) - len(general)})
    assert abs(len(general) / len(rows) - 0.25) <= 0.5 / len(rows)
    for row in general:
        rule = tasks.general_score if len(row["prompt"].split()) == 3 else tasks.safety_score
        assert rule(row["prompt"], row["response"]) == 1.0
        assert row["provenance"] == {"teacher": "rules of the tiny world"}


def test_students_learn_from_stage_3s_examples_and_from_none(workdir):
    source = (workdir / "stage3_rejection_sft" / "examples.jsonl").read_bytes()
    assert (workdir / "distill" / "examples.jsonl").read_bytes() == source
    assert not (workdir / "student_rl" / "examples.jsonl").exists()


def response(text: str, accuracy=1.0, form=1.0, language=1.0, scorable=True) -> Response:
    parts = {"accuracy": accuracy, "format": form, "language": language}
    problem = Problem("p", "linear", "solve 2 x + 1 = 5 :", "2")
    return Response(problem, text, len(text.split()), False, parts, scorable)


CLEAN = "<think> 2 * 2 = 4 + 1 = 5 ok </think> <answer> 2 </answer>"
LOOP = "<think> " + "no wait 3 * 3 = 9 no " * 9 + "</think> <answer> 2 </answer>"
LONG = f"<think> {' '.join(f'w{number}' for number in range(13))} </think> <answer> 2 </answer>"
CODE = "<think> ```x = 2``` </think> <answer> 2 </answer>"


def test_each_check_drops_its_own_kind_of_trace():
    drawn = [
        response(CLEAN),
        response(CLEAN, accuracy=0.0),
        response(CLEAN, scorable=False),
        response(CLEAN, form=0.0),
        response(CLEAN, language=0.9),
        response(LOOP),
        response(LONG),
        response(CODE),
        response(CLEAN + " fine"),
    ]
    counts = {}
    checks = traces.basic_checks(1.0) + stage3_rejection_sft.readable(RejectionConfig(max_paragraph_words=12))
    kept = traces.passing(drawn, checks, counts)
    assert [number for number, _ in kept] == [0, 8]
    expected = {
        **{"sampled": 9, "right": 7, "well formed": 6, "one language": 5, "no loop": 4},
        **{"short paragraphs": 3, "no code block": 2},
    }
    assert counts == {name: {"linear": count} for name, count in expected.items()}


def test_paragraphs_are_counted_one_by_one_and_only_in_the_thinking():
    short, no_code = (check for _, check in stage3_rejection_sft.readable(RejectionConfig(max_paragraph_words=12)))
    words = " ".join(f"w{number}" for number in range(9))
    assert short(response(f"<think> {words}\n\n{words} </think> {words} {words}"))
    assert not short(response(f"<think> {words}\n{words} </think> done"))
    allowed = stage3_rejection_sft.readable(RejectionConfig(drop_code_blocks=False))[1][1]
    assert (no_code(response(CODE)), allowed(response(CODE))) == (False, True)
    assert no_code(response("<think> plan </think> <answer>\n```python\nprint(2)\n```\n</answer>"))


def test_cap_drops_repeated_texts_then_holds_to_the_number_per_prompt_and_in_all():
    drawn = [("a", "1"), ("a", "1"), ("a", "2"), ("a", "3"), ("b", "1"), ("c", "1"), ("c", "2")]
    rows = [{"id": name, "prompt": f"prompt {name}", "response": text} for name, text in drawn]
    assert traces.capped(rows, 2) == [rows[index] for index in (0, 2, 4, 5, 6)]
    assert traces.capped(rows, 1) == [rows[index] for index in (0, 4, 5)]
    assert traces.capped(rows, 2, most=3) == [rows[index] for index in (0, 2, 4)]


def test_a_run_of_a_version_with_other_field_names_is_refused_and_its_model_is_read(tmp_path):
    config = configs.load("r1_zero:tiny")
    folder = common.StageFolder(config, tmp_path)
    folder.start({})
    jsonl.write(folder.path / "examples.jsonl", [{}])
    path = folder.path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({name.replace("compute.", "model."): value for name, value in fields.items()}))
    with pytest.raises(
        ValueError, match=r"holds a run with another config \(compute.scan_layers: None there, False now"
    ):
        folder.check()
    assert common.read_model(folder.path, ModelConfig())[0] == config.model


def test_examples_of_a_stopped_stage_are_used_only_for_its_own_config_and_inputs(tmp_path):
    config = configs.load("stage3_rejection_sft")
    folder = common.StageFolder(config, tmp_path)
    folder.start({"stage2_reasoning_rl": "one"})
    jsonl.write(folder.path / "examples.jsonl", [{"prompt": "p", "response": "r"}])
    assert folder.state({}) == "stopped" and folder.finished({"stage2_reasoning_rl": "one"}) is None
    with pytest.raises(ValueError, match="its input stage2_reasoning_rl has changed"):
        folder.finished({"stage2_reasoning_rl": "two"})
    path = folder.path / "config.json"
    older = json.loads(path.read_text()) | {"checkpointing.async_save": False, "sampler.record_routed_experts": True}
    path.write_text(json.dumps(older))  # fields that there once were
    folder.check()
    other = configs.load("stage3_rejection_sft", [("rejection.prompts", "5")])
    with pytest.raises(ValueError, match=r"another config \(rejection.prompts: 3000 there, 5 now\)"):
        common.StageFolder(other, tmp_path).check()
