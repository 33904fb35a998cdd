"""Cases of evaluation: which rows are evaluated, figures by task and source, what a figure is kept for, the model's window."""

import json
import math
import pathlib

import pytest
from io_cases import io_case
from small import GROUPED

from r1jax import config as configs
from r1jax import launch
from r1jax.checkpoints import hf_export, tokenizer
from r1jax.core import rng, sharding
from r1jax.data import jsonl
from r1jax.data.problems import Problem
from r1jax.evals import benchmarks
from r1jax.evals.benchmarks import Measurement, Response
from r1jax.models import decoder
from r1jax.recipe import common, evaluate, parts, prompts
from r1jax.report import html
from r1jax.schema import DataConfig, EvalConfig, MeshConfig, RewardConfig, parts_of, replace

TINY = ["--config.evaluation.samples_per_problem=2", "--config.evaluation.greedy=false"]
LENGTHS = ["--config.sampler.max_prompt_tokens=40", "--config.sampler.max_new_tokens=8", "--config.sampler.windows=()"]


def model_folder(path, **changes) -> str:
    """Returns a Hugging Face folder of an untrained model that reads the words of the tiny world."""
    words = tokenizer.tiny()
    model = replace(GROUPED.model, vocab_size=words.vocab_size, max_position_embeddings=128, **changes)
    mesh = sharding.make_mesh(MeshConfig())
    params = sharding.initialize(decoder.specs(model), rng.key(0, "evaluation", "init"), "float32", mesh)
    hf_export.save(path, params, model, words, "float32")
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "untrained")


def written(path, rows) -> str:
    jsonl.write(path, rows)
    return str(path)


def linear_rows(count: int, **more) -> list[dict]:
    return [
        {"id": f"l{i}", "task": "linear", "prompt": f"solve 2 x + {i} = {i + 8} :", "answer": 4, **more}
        for i in range(count)
    ]


def evaluated(model: str, tmp_path, *flags: str) -> dict:
    """Returns the figures of the command line's evaluation."""
    command = ["--config=evaluate", f"--config.checkpoint={model}", f"--workdir={tmp_path}", *TINY, *LENGTHS, *flags]
    assert launch.main(command) == 0
    return json.loads((tmp_path / "evaluate" / "figures.json").read_text())


MIXED = [
    *({"id": f"m{i}", "task": "math", "prompt": f"2 + {i} =", "answer": i + 2, "source": "sums"} for i in range(3)),
    *({"id": f"c{i}", "task": "mcq", "prompt": "A. 1\nB. 2", "answer": "B", "source": "choices"} for i in range(2)),
    {"id": "d0", "task": "countdown", "prompt": "6 of 2 3", "answer": '{"numbers": [2, 3], "target": 6}'},
    {"id": "g0", "task": "general", "prompt": "tell cat :"},
    {"id": "s0", "task": "safety", "prompt": "how steal car :"},
]


def test_figures_are_told_by_task_and_by_source_beside_the_total(model, tmp_path, capsys):
    case = io_case("figures-by-task")
    assert case["input"]["config"] == "evaluate"
    path = written(tmp_path / "mixed.jsonl", MIXED)
    found = evaluated(
        model, tmp_path, f"--config.data.path={path}", "--config.data.template=plain", "--config.reward.format=0"
    )
    assert {name: figures["problems"] for name, figures in found["tasks"].items()} == {
        "math": 3,
        "mcq": 2,
        "countdown": 1,
    }
    sources = {"sums": 3, "choices": 2, benchmarks.NO_SOURCE: 1}
    assert {name: figures["problems"] for name, figures in found["sources"].items()} == sources
    assert found["problems"] == 6
    for name in ("pass@1", "mean_tokens", "truncated", "unscorable"):
        parts = found["tasks"].values()
        assert sum(part[name] * part["problems"] for part in parts) / 6 == pytest.approx(found[name])
    printed = capsys.readouterr().out
    assert "held-out problems by task" in printed and "held-out problems by source" in printed
    assert "figures of 6 of 8 problems: 2 are of task general or safety" in printed
    page = (tmp_path / "evaluate" / "report.html").read_text()
    assert "<h2>By task</h2>" in page and "How many came through each filter" in page
    held = html._counted(html.collect(tmp_path, {"evaluate": "untrained"}))[0]
    assert held["labels"] == ["countdown", "general", "math", "mcq", "safety", "all"]
    assert ["rows", "1", "1", "3", "2", "1", "8"] in held["rows"]
    assert ["held out", "1", "–", "3", "2", "–", "6"] in held["rows"]


def test_every_row_of_a_file_is_evaluated_and_the_number_is_printed(model, tmp_path, capsys):
    assert "--config=evaluate" in io_case("evaluate-a-whole-test-file")["input"]["command"]
    path = written(tmp_path / "test.jsonl", linear_rows(30))
    assert evaluated(model, tmp_path, f"--config.data.path={path}", "--config.data.template=tiny")["problems"] == 30
    assert len(jsonl.read(tmp_path / "evaluate" / "samples.jsonl")) == 60
    assert "figures of 30 of 30 problems\n" in capsys.readouterr().out
    few = evaluated(
        model,
        tmp_path,
        f"--config.data.eval_path={path}",
        "--config.data.template=tiny",
        "--config.evaluation.max_problems=7",
    )
    assert few["problems"] == 7
    assert (
        "figures of 7 of 30 problems: 23 are behind the first config.evaluation.max_problems=7"
        in capsys.readouterr().out
    )


def test_rows_too_long_are_told_with_their_task(model, tmp_path, capsys):
    long = {"id": "long", "task": "linear", "prompt": "solve " * 50, "answer": 1}
    path = written(tmp_path / "test.jsonl", [*linear_rows(4), long])
    found = evaluated(model, tmp_path, f"--config.data.path={path}", "--config.data.template=tiny")
    assert found["data"]["left_out"] == {"too_long": {"linear": 1}} and found["problems"] == 4
    assert "figures of 4 of 5 problems: 1 are too long" in capsys.readouterr().out
    rows = html._counted(html.collect(tmp_path, {"evaluate": "untrained"}))[0]["rows"]
    assert ["left out / too long", "1", "1"] in rows


@pytest.mark.parametrize("name", ["window-of-the-model", "window-of-the-model-in-evaluation"])
def test_a_window_too_short_for_prompt_and_response_is_refused_at_the_start(name, tmp_path, capsys):
    case = {"window-of-the-model": io_case("window-of-the-model")}.get(name) or io_case(
        "window-of-the-model-in-evaluation"
    )
    shape, flags = case["input"]["config"], [*case["input"]["flags"], "--config.sampler.windows=()"]
    kept = {
        field: shape[field]
        for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    folder = model_folder(tmp_path / "model", **kept, family="llama", qk_norm=False, head_dim=16)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    window = config["max_position_embeddings"] = shape["max_position_embeddings"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    words = case["input"].get("prompt_tokens", 30)
    row = {"id": "a", "task": "math", "prompt": " ".join(["1"] * words), "answer": "1"}
    path = written(
        tmp_path / "rows.jsonl", [{**row, "id": f"r{i}", "prompt": f"{i} {row['prompt']}"} for i in range(20)]
    )
    if case["input"].get("config_name") == "evaluate":
        flags += ["--config=evaluate", f"--config.checkpoint={folder}", "--config.sampler.max_prompt_tokens=200"]
    else:
        flags += ["--config=r1_zero", f"--config.model.checkpoint={folder}", "--config.grpo.updates=1"]
    flags += [f"--config.data.path={path}", "--config.data.template=plain", f"--workdir={tmp_path / 'runs'}"]
    assert launch.main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for number in (
        f"a prompt of {words + 1} tokens",
        "config.sampler.max_new_tokens=64",
        f"max_position_embeddings={window}",
    ):
        assert number in error


ONE_UPDATE = [
    *("--config.grpo.updates=1", "--config.grpo.updates_per_rollout=1", "--config.grpo.prompts_per_update=2"),
    *("--config.grpo.group_size=2", "--config.sampler.slots=8", "--config.sampler.max_new_tokens=60"),
    *("--config.sampler.windows=()", "--config.pack.rows_per_micro_batch=4", "--config.data.holdout_fraction=0.5"),
    *("--config.sampler.max_new_tokens_schedule=()", "--config.grpo.reference_refresh_updates=1"),
    *("--config.data.template=tiny", *TINY, "--config.evaluation.samples_per_problem=8"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns (working folder, rows file, figures) of one update of r1_zero from the tiny base on a file of linear rows."""
    folder = tmp_path_factory.mktemp("trained")
    path = written(folder / "rows.jsonl", linear_rows(30))
    assert (
        launch.main(["--config=r1_zero", f"--workdir={folder / 'W'}", f"--config.data.path={path}", *ONE_UPDATE]) == 0
    )
    return folder / "W", path, json.loads((folder / "W" / "r1_zero" / "figures.json").read_text())


def test_a_file_changed_after_a_stage_was_done_makes_it_stale_by_name(trained, capsys):
    assert len(io_case("changed-data-after-done")["input"]["steps"]) == 3
    workdir, path, _ = trained
    command = ["--config=r1_zero", f"--workdir={workdir}", f"--config.data.path={path}", *ONE_UPDATE]
    written(path, linear_rows(30, answer=5))
    try:
        assert launch.main(command) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "stale" in error and path in error
    finally:
        written(path, linear_rows(30))
    assert launch.main(command) == 0
    assert "is finished; nothing to do" in capsys.readouterr().err


def test_of_a_file_that_the_run_trained_on_only_what_it_held_out_is_evaluated(trained, tmp_path, capsys):
    workdir, path, figures = trained
    held_out = figures["data"]["held_out"]
    assert 0 < held_out < 30 and figures["base"]["problems"] == held_out
    command = [f"--config.data.path={path}", "--config.data.template=tiny"]
    found = evaluated(str(workdir / "r1_zero"), tmp_path, *command)
    assert found["problems"] == held_out
    assert f"figures of {held_out} of 30 problems: {30 - held_out} are not held out" in capsys.readouterr().out
    other = written(tmp_path / "other.jsonl", linear_rows(12, source="other"))
    assert evaluated(str(workdir / "r1_zero"), tmp_path, f"--config.data.path={other}")["problems"] == 12
    assert evaluated(str(workdir / "r1_zero"), tmp_path, f"--config.data.eval_path={path}")["problems"] == 30
    both = [
        "--config=evaluate",
        f"--config.checkpoint={workdir / 'r1_zero'}",
        f"--config.data.path={path},{other}",
        f"--workdir={tmp_path}",
    ]
    assert launch.main(both) == 2
    assert "was trained on" in (error := capsys.readouterr().err) and "evaluate one at a time" in error
    measured = json.loads((tmp_path / "evaluate" / "inputs.json").read_text())["inputs"]
    assert measured[str(workdir / "r1_zero")] == common.checkpoint_digest(workdir / "r1_zero")
    written(path, linear_rows(30) + linear_rows(1, source="later", task="mcq", prompt="(A) 1 (B) 2", answer="A"))
    try:
        changed = evaluate.as_trained(str(workdir / "r1_zero"), DataConfig(path=path, holdout_fraction=1.0))
        assert changed.holdout_fraction < 1 and "which has changed since" in capsys.readouterr().err
    finally:
        written(path, linear_rows(30))


def test_files_of_a_run_count_as_trained_on_through_the_stages_after_it(tmp_path):
    def stage(name: str, inputs: dict, **fields) -> None:
        (tmp_path / name).mkdir()
        settings = {
            "inputs": "",
            "data.path": "",
            "data.general_path": "",
            "data.safety_path": "",
            "data.eval_path": "",
        }
        (tmp_path / name / "inputs.json").write_text(json.dumps({"inputs": inputs}))
        (tmp_path / name / "config.json").write_text(json.dumps(settings | fields))

    stage("r1_zero", {"a.jsonl": "A", "b.jsonl": "B"}, **{"data.path": "a.jsonl,b.jsonl", "data.holdout_fraction": 0.2})
    stage("stage1", {"r1_zero": "x", "a.jsonl": "A"}, **{"data.path": "a.jsonl", "data.holdout_fraction": 0.1})
    evaluation = {"data.path": "c.jsonl", "data.eval_path": "d.jsonl", "data.holdout_fraction": 0.1}
    stage("stage2", {"stage1": "y", "c.jsonl": "C", "d.jsonl": "D"}, **evaluation)
    examples = {"data.holdout_fraction": 0.1, "distill.examples": "e.jsonl", "coldstart.examples": "f.jsonl"}
    stage("distill", {"e.jsonl": "E", "f.jsonl": "F"}, **examples)

    def found(name: str) -> dict[str, float]:
        return {key: share for key, share in evaluate._trained_on(tmp_path / name).items() if key in "ABCDEF"}

    assert found("r1_zero") == {"A": 0.2, "B": 0.2}
    assert found("stage1") == {"A": 0.1, "B": 0.2}
    assert found("stage2") == {"A": 0.1, "B": 0.2, "C": 0.0}  # D was evaluated, not trained on
    assert found("distill") == {"E": 0.0}  # people's examples are of stages with that source
    assert evaluate._trained_on(tmp_path / "r1_zero")[str((pathlib.Path.cwd() / "a.jsonl").resolve())] == 0.2
    assert evaluate._trained_on(tmp_path / "a_hugging_face_folder") == {}


def test_figures_of_the_base_are_measured_again_when_the_file_has_changed(trained, tmp_path):
    assert "999" in io_case("old-figures-of-the-base")["input"]["steps"][1]
    workdir, path, before = trained
    written(path, linear_rows(30, answer=999))
    try:
        command = [
            "--config=stage2_reasoning_rl",
            "--config.start=",
            f"--workdir={workdir}",
            f"--config.data.path={path}",
        ]
        assert launch.main([*command, *ONE_UPDATE]) == 0
    finally:
        written(path, linear_rows(30))
    figures = json.loads((workdir / "stage2_reasoning_rl" / "figures.json").read_text())
    assert before["base"]["pass@1"] > 0
    assert figures["base"]["pass@1"] == figures["dev2"]["pass@1"] == 0.0
    assert (workdir / "stage2_reasoning_rl" / "report.html").exists()


def asked_of(tmp_path, rows=None, **fields):
    """Returns (settings, prompts) of an evaluation of rows, written under one name whatever they are."""
    path = written(tmp_path / "rows.jsonl", rows or linear_rows(4))
    given = {"data.path": path, "data.template": "tiny", "sampler.max_prompt_tokens": "400", **fields}
    config = configs.load("evaluate", [(name, str(value)) for name, value in given.items()])
    return parts_of(parts.EvaluationParts, config), prompts.load_held_out(
        parts_of(parts.PromptParts, config), tokenizer.tiny()
    )


def test_what_decides_a_figure_is_in_its_key_and_nothing_else(tmp_path):
    words, weights = tokenizer.tiny(), {"a": [1.0]}
    grader = tmp_path / "grader.py"

    def key(rows=None, source=GRADER, weights=weights, words=words, **fields) -> str:
        grader.write_text(source)
        settings, asked = asked_of(tmp_path, rows, **{"reward.graders": f"own={grader}:grade", **fields})
        return evaluate.measurement_key(settings, words, asked, arrays(weights))

    usual = key()
    assert usual == key()
    same = [  # neither the weights of the parts, nor where and how fast it is computed
        key(**{"reward.format": 0.5}),
        key(**{"reward.workers": 2}),
        key(**{"reward.cache_entries": 0}),
        key(**{"sampler.temperature": 0.3}),
        key(**{"compute.remat": "true"}),
    ]
    assert set(same) == {usual}
    other = tokenizer.Tokenizer(words.backend, {**words.config, "pad_token": "<unk>"}, source="other")
    changed = [
        key([*linear_rows(3), {**linear_rows(4)[3], "answer": 5}]),
        key([*linear_rows(3), {**linear_rows(4)[3], "prompt": "solve 3 x + 3 = 11 :"}]),
        key(linear_rows(4, task="math")),
        key(linear_rows(4, language="fr")),
        key(linear_rows(4, source="s")),
        key(linear_rows(5)),
        key(source=GRADER + "\n# another"),
        key(weights={"a": [1.5]}),
        key(words=other),
        *(
            key(**{name: value})
            for name, value in {
                "data.template": "r1_zero",
                "data.instruction": "solve",
                "reward.extraction": "boxed",
                "reward.deadline_s": 3,
                "reward.sandbox.wall_s": 3,
                "evaluation.samples_per_problem": 3,
                "evaluation.temperature": 0.6,
                "evaluation.pass_at": "(2,)",
                "evaluation.consensus_samples": 4,
                "sampler.max_new_tokens": 50,
                "seed": 1,
                "model.rope_theta": 5.0,
                "compute.compute_dtype": "bfloat16",
            }.items()
        ),
    ]
    assert len({usual, *changed}) == 1 + len(changed)


GRADER = "from r1jax.rewards.score import Score\n\n\ndef grade(request, config):\n    return Score(1.0, {}, True, '')\n"


def arrays(weights: dict) -> dict:
    import numpy as np

    return {name: np.asarray(value, np.float32) for name, value in weights.items()}


def responses(accuracies: dict[str, list[float]], task: str = "math") -> list[Response]:
    parts = {"format": 1.0, "language": 1.0}
    return [
        Response(
            Problem(name, task, "q", "7"),
            f"<answer> {7 if value else 8} </answer>",
            3,
            False,
            {"accuracy": value, **parts},
            not math.isnan(value),
        )
        for name, values in accuracies.items()
        for value in values
    ]


def test_pass_at_k_is_estimated_from_the_samples_of_pass_at_1_for_the_total_and_each_task():
    settings = EvalConfig(samples_per_problem=4, pass_at=(1, 2, 4))
    drawn = [*responses({"a": [1, 1, 0, 0], "b": [0, 0, 0, 0]}), *responses({"c": [1, 0, 0, 0]}, "mcq")]
    found = benchmarks.summarize(Measurement(drawn), settings)
    assert found["pass@1"] == pytest.approx(0.25)
    assert found["pass@2"] == pytest.approx((5 / 6 + 0 + 1 / 2) / 3)
    assert found["pass@4"] == pytest.approx(2 / 3)
    assert found["tasks"]["mcq"]["pass@2"] == 0.5 and found["tasks"]["math"]["pass@4"] == 0.5
    assert found["notes"] == []


def test_pass_at_k_says_why_it_is_left_out_where_a_grader_gives_fractions():
    settings = EvalConfig(samples_per_problem=2, pass_at=(2,))
    found = benchmarks.summarize(
        Measurement([*responses({"a": [1, 0]}), *responses({"b": [0.5, 1]}, "essay")]), settings
    )
    assert "pass@2" not in found and found["tasks"]["math"]["pass@2"] == 1.0
    assert found["notes"] == [
        "pass@2 left out: the grader of essay gives fractions (0.5 for b), and pass@k counts right and wrong"
    ]


@pytest.mark.parametrize("k", [0, 6])
def test_pass_at_k_needs_as_many_samples_when_the_config_is_read(capsys, k):
    assert launch.main(["--config=evaluate", f"--config.evaluation.pass_at=({k},)", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert f"k={k} must be between 1 and samples_per_problem=5" in error and len(error.splitlines()) == 1
    more = ["--config.evaluation.pass_at=(6,)", "--config.evaluation.samples_per_problem=6"]
    assert launch.main(["--config=evaluate", *more, "--dry_run"]) == 0


def test_votes_use_the_samples_that_are_drawn_anyway(monkeypatch, model, tmp_path):
    drawn, respond = [], evaluate.respond

    def counting(*arguments):
        drawn.append((len(arguments[5]), arguments[8], arguments[9]))
        return respond(*arguments)

    monkeypatch.setattr(evaluate, "respond", counting)
    path = written(tmp_path / "rows.jsonl", linear_rows(6))
    flags = [f"--config.data.path={path}", "--config.data.template=tiny", "--config.evaluation.consensus_problems=3"]
    found = evaluated(model, tmp_path, *flags, "--config.evaluation.consensus_samples=2")
    assert drawn == [(6, 2, "evaluate")] and found["cons@2_problems"] == 3 and 0 <= found["cons@2"] <= 1
    drawn.clear()
    assert "cons@3" in evaluated(model, tmp_path, *flags, "--config.evaluation.consensus_samples=3")
    assert drawn == [(6, 2, "evaluate"), (3, 3, "evaluate")]


def test_a_vote_of_programs_is_left_out_and_said(tmp_path):
    drawn = [*responses({"a": [1, 1]}), *responses({"b": [1, 0]}, "code")]
    found = benchmarks.summarize(
        Measurement(drawn, (), benchmarks.vote(drawn, 2, RewardConfig())), EvalConfig(samples_per_problem=2)
    )
    assert (found["cons@16"], found["cons@16_problems"]) == (1.0, 1.0)
    assert "cons@16" in found["tasks"]["math"] and math.isnan(found["tasks"]["code"]["cons@16"])
    assert "cons@16 leaves out 1 of 2 problems" in found["notes"][0] and found["notes"][0].endswith(": code 1")


def test_figures_of_a_thousand_problems_of_many_sources_take_a_moment():
    import time

    drawn = [
        replace(r, problem=replace(r.problem, source=f"s{i // 40}"))
        for i, r in enumerate(responses({f"p{n}": [1, 0, 0, 1] for n in range(1500)}))
    ]
    settings = EvalConfig(samples_per_problem=4, pass_at=(2,), consensus_samples=4)
    started = time.monotonic()
    found = benchmarks.summarize(Measurement(drawn, (), benchmarks.vote(drawn, 4, RewardConfig())), settings)
    assert time.monotonic() - started < 20
    assert len(found["sources"]) == 150 and found["cons@4_problems"] == 1500
