"""Cases of io_cases.jsonl about fields that a stage does not read and examples that no update takes."""

import json

import pytest
from io_cases import io_case

from r1jax import launch
from r1jax.core.metrics import read
from r1jax.data import jsonl, tasks
from r1jax.train import sft


def solved(problem: tasks.Linear) -> dict:
    """Returns a row of the tiny world: the equation and one right guess."""
    product = problem.a * problem.x
    thought = f"{problem.a} * {problem.x} = {product} + {problem.b} = {problem.c} = {problem.c} ok"
    response = f"<think> {thought} </think> <answer> {problem.x} </answer>"
    return {"prompt": problem.text("en"), "response": response}


def refusal(case: dict, tmp_path, capsys) -> str:
    """Returns the one line that refuses a case's command."""
    arguments = case["input"]["command"].split()
    assert launch.main([*arguments, f"--workdir={tmp_path}/runs"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and not list(tmp_path.iterdir())
    return captured.err


def test_a_field_that_the_stage_never_reads_is_refused_in_one_line(tmp_path, capsys):
    told = refusal(io_case("field-that-the-stage-never-reads"), tmp_path, capsys)
    assert told.startswith("error: r1_zero does not read config.sft; ")
    assert "r1_zero does not read config.sft" in io_case("field-that-the-stage-never-reads")["expected"]


def test_a_grpo_field_of_a_distillation_is_refused_in_one_line(tmp_path, capsys):
    told = refusal(io_case("grpo-field-of-a-distillation"), tmp_path, capsys)
    assert told.startswith("error: distill does not read config.grpo; ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config=r1_zero", "--config.distill.examples=F.jsonl"], "r1_zero does not read config.distill"),
        (["--config=r1_zero", "--config.pretrain.updates", "3"], "r1_zero does not read config.pretrain"),
        (["--config=evaluate", "--config.grpo.updates=1"], "evaluate does not read config.grpo"),
        (["--config=grade", "--config.model.vocab_size=9"], "grade does not read config.model"),
        (["--config=stage0_base", "--config.data.path=F.jsonl"], "stage0_base does not read config.data"),
        (["--config=export_hf", "--config.optimizer.kind=muon"], "export_hf does not read config.optimizer"),
        (["--config=distill", "--config.pack.shared_prompts"], "distill does not read config.pack.shared_prompts"),
        (["--config=quickstart", "--config.set=distill.grpo.updates=3"], "distill does not read config.grpo"),
        (["--config=r1_zero", "--config.data.holdout_fraction=0.5"], "config.data.holdout_fraction is read with"),
        (["--config=r1_zero", "--config.data.columns=a=prompt"], "config.data.columns is read with config.data.path"),
        (["--config=stage2_reasoning_rl", "--config.data.weights=1,2"], "config.data.weights is read with config.data"),
        (
            ["--config=r1_zero", "--config.scenarios.safety_fraction=0.1"],
            "config.scenarios.safety_fraction is read with",
        ),
        (
            ["--config=evaluate", "--config.data.eval_path=F", "--config.data.holdout_fraction=0.5"],
            "without config.data.eval_path",
        ),
        (["--config=evaluate", "--sweep=sampler.top_p=0.5,0.9"], "config.evaluation.top_p"),
    ],
)
def test_siblings_of_a_field_that_the_stage_never_reads(tmp_path, capsys, arguments, expected):
    assert launch.main([*arguments, f"--workdir={tmp_path}/runs"]) == 2
    told = capsys.readouterr().err
    assert expected in told and told.count("\n") == 1 and not list(tmp_path.iterdir())


def test_all_examples_of_an_epoch_are_trained_and_the_figures_count_them(tmp_path, monkeypatch):
    given = io_case("examples-that-no-update-takes")["input"]
    train, _ = tasks.linear_problems()
    rows = [solved(problem) for problem in train[: given["examples"]]]
    jsonl.write(tmp_path / "rows.jsonl", [*rows, {"prompt": "tell cat :", "response": "cat " * 200}])
    trained, make_batch = [], sft.make_batch

    def recorded(items, *arguments, **more):
        trained.append([item.tokens.tobytes() for item in items])
        return make_batch(items, *arguments, **more)

    monkeypatch.setattr(sft, "make_batch", recorded)
    settings = {name: value for name, value in given.items() if name.startswith("sft.")}
    settings |= {"distill.examples": tmp_path / "rows.jsonl", "evaluation.greedy": "false"}
    settings |= {"evaluation.max_problems": 1, "evaluation.samples_per_problem": 1, "sampler.slots": 1}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    assert launch.main(["--config=distill", *flags, f"--workdir={tmp_path}/runs"]) == 0
    folder = tmp_path / "runs" / "distill"
    figures = json.loads((folder / "DONE").read_text())["figures"]
    assert [len(update) for update in trained] == [7, 5] and len(set(sum(trained, []))) == 12
    assert (figures["examples"], figures["left_out"]) == (12, {"longer than pack.row_tokens": 1})
    assert figures["tokens"] == sum(len(tokens) // 4 for update in trained for tokens in update)
    assert [row["update"] for row in read(folder)] == [1, 2]
