"""Cases of io_cases.jsonl about the making of examples: the teacher's digest, and the grader of a row's own task."""

import json
import pathlib
import shutil

import pytest
from io_cases import io_case
from small import finished_stage, problems_of

from r1jax import config as configs
from r1jax import launch
from r1jax.checkpoints import tokenizer
from r1jax.core import sharding
from r1jax.data import jsonl
from r1jax.data.problems import Problem
from r1jax.evals.benchmarks import Response
from r1jax.recipe import example_files, lineage, stage1_coldstart, stage3_rejection_sft, teachers
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.schema import DataConfig, MeshConfig, RewardConfig, replace

SHORT = (
    *(
        "coldstart.prompts=30",
        "coldstart.samples_per_prompt=8",
        "coldstart.min_language_consistency=0.0",
        "sft.epochs=1",
    ),
    *("evaluation.samples_per_problem=1", "evaluation.max_problems=4", "evaluation.greedy=false", "sampler.slots=64"),
)


def arguments(workdir, *changes: str) -> list[str]:
    return [
        "--config=stage1_coldstart",
        f"--workdir={workdir}",
        *(f"--config.{change}" for change in (*SHORT, *changes)),
    ]


def teacher_at(folder: pathlib.Path, scale: float) -> None:
    """Makes a finished r1_zero run at `folder` whose weights are the shipped base's, scaled."""
    import jax

    config = configs.load("r1_zero:tiny")
    mesh = sharding.make_mesh(MeshConfig())
    base = lineage.base_weights(config, mesh, folder.parent)
    made = finished_stage(config, folder.parent / f"made-{scale}", jax.tree.map(lambda leaf: leaf * scale, base), {})
    marker = json.loads((made / "DONE").read_text()) | {"output": f"weights times {scale}"}
    (made / "DONE").write_text(json.dumps(marker))
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)


def test_a_swapped_teacher_makes_the_finished_stage_stale(tmp_path, capsys):
    assert io_case("swapped-teacher")["expected"] == "Stale, T named."
    teacher, workdir = tmp_path / "T", tmp_path / "runs"
    teacher_at(teacher, 1.0)
    given = arguments(workdir, f"coldstart.teacher={teacher}")
    assert launch.main(given) == 0
    marker = workdir / "stage1_coldstart" / "DONE"
    assert json.loads(marker.read_text())["inputs"][str(teacher)] == "weights times 1.0"
    capsys.readouterr()
    assert launch.main(given) == 0
    assert "is finished; nothing to do" in capsys.readouterr().err
    before = marker.read_bytes()
    teacher_at(teacher, 0.5)
    assert launch.main(given) == 2
    assert f"is stale: its input {teacher} has changed" in capsys.readouterr().err.strip().splitlines()[-1]
    assert marker.read_bytes() == before


@pytest.mark.parametrize("name", ["teacher", "prompted_model", "examples", "judge"])
def test_every_model_and_file_that_examples_are_made_from_is_an_input(name, tmp_path):
    teacher, model, rows = tmp_path / "T", tmp_path / "model", tmp_path / "rows.jsonl"
    for folder in (teacher, model):
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "DONE").write_text(json.dumps({"output": folder.name}))
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "config.json").write_text("{}")
    (judge / "model.safetensors").write_bytes(b"weights")
    jsonl.write(rows, [{"prompt": "p", "response": "r"}])
    fields = {
        "coldstart.sources": "r1_zero,few_shot,people",
        "coldstart.teacher": teacher,
        "coldstart.prompted_model": model,
        "coldstart.examples": rows,
        "coldstart.editor": "judge",
        "judge.checkpoint": judge,
    }
    config = configs.load("stage1_coldstart", [(field, str(value)) for field, value in fields.items()])
    before = stage1_coldstart.inputs(config.stage, config.coldstart, config.judge)
    changed = {"teacher": teacher, "prompted_model": model, "examples": rows, "judge": judge}[name]
    if name == "examples":
        jsonl.write(rows, [{"prompt": "p", "response": "another"}])
    elif name == "judge":
        (judge / "config.json").write_text('{"a": 1}')
    else:
        (changed / "DONE").write_text(json.dumps({"output": "another"}))
    after = stage1_coldstart.inputs(config.stage, config.coldstart, config.judge)
    assert {path for path in before if before[path] != after[path]} == {str(changed)}


CODE_ROW = {
    "id": "square",
    "task": "code",
    "prompt": "Write square(x), which returns x times x.",
    "tests": {"kind": "python-asserts", "asserts": ["assert square(3) == 9", "assert square(-2) == 4"]},
}
REFERENCE = "def square(x):\n    return x * x\n"
WRONG = "def square(x):\n    return x + x\n"


def sampled(problem: Problem, texts: list[str], config: RewardConfig) -> list[Response]:
    """Returns responses graded as the stages grade what they sample."""
    requests = [RewardRequest(problem.id, problem.task, problem.text, text, problem.reference) for text in texts]
    with RewardPool(config) as pool:
        scores = pool.score(requests)
    return [
        Response(problem, text, 9, False, score.parts, score.scorable)
        for text, score in zip(texts, scores, strict=True)
    ]


def drawing(monkeypatch, make) -> None:
    """Makes the stages' teacher draw what `make` returns."""
    monkeypatch.setattr(teachers, "load", lambda settings, *given: teachers.Teacher(settings, None, None, "T"))
    monkeypatch.setattr(teachers, "sampled", lambda *given, **more: make())


@pytest.fixture(scope="module")
def traced() -> list[Response]:
    """The case's trace, right, and one with a wrong program."""
    text = io_case("right-code-traces-thrown-away")["input"]["trace"]["text"]
    assert "<reference solution>" in text
    (problem,) = problems_of([CODE_ROW])
    texts = [text.replace("<reference solution>", program) for program in (REFERENCE, WRONG)]
    found = sampled(problem, texts, RewardConfig())
    assert [response.parts["accuracy"] for response in found] == [1.0, 0.0]
    return found


def test_right_code_traces_are_graded_again_by_the_grader_of_code_and_kept(traced, monkeypatch, tmp_path):
    assert "right both times, kept" in io_case("right-code-traces-thrown-away")["expected"]
    drawing(monkeypatch, lambda: traced)
    config = configs.load(
        "stage1_coldstart", [("coldstart.teacher", str(tmp_path)), ("coldstart.min_language_consistency", "0")]
    )
    rows, counts = stage1_coldstart.collect(config, tokenizer.tiny(), None, [], tmp_path)
    assert [(row["id"], row["task"], row["response"]) for row in rows] == [("square", "code", traced[0].text)]
    assert counts["sampled"] == {"code": 2} and counts["right"] == {"code": 1}
    assert counts["right again"] == counts["kept"] == {"code": 1}


def test_stage_3_keeps_the_program_that_a_code_row_asks_for_and_no_block_of_the_thinking(traced, monkeypatch, tmp_path):
    fenced = traced[0].text.replace("<think>x</think>", "<think>x\n```python\npass\n```\n</think>")
    drawn = [*traced, replace(traced[0], text=fenced)]
    drawing(monkeypatch, lambda: drawn)
    monkeypatch.setattr(lineage, "require", lambda *given: tmp_path)
    changes = [("rejection.min_language_consistency", "0"), ("rejection.general_fraction", "0")]
    rows, counts = stage3_rejection_sft.collect(
        configs.load("stage3_rejection_sft", changes), tokenizer.tiny(), None, [], tmp_path
    )
    assert [row["response"] for row in rows] == [traced[0].text]
    assert counts["short paragraphs"] == {"code": 2} and counts["no code block"] == {"code": 1}


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        ({"task": "math", "prompt": "What is 3 + 4?", "answer": "7"}, "7", "8"),
        ({"task": "mcq", "prompt": "Which?\nA. one\nB. two", "answer": "B"}, "B", "A"),
        (
            {"task": "countdown", "prompt": "Make 7 of 3 and 4.", "meta": {"numbers": [3, 4], "target": 7}},
            "3 + 4",
            "3 * 4",
        ),
        ({"task": "code_io", "prompt": "What does print([1, 2]) print?", "answer": "[1, 2]"}, "[1, 2]", "[2, 1]"),
    ],
    ids=lambda value: value.get("task") if isinstance(value, dict) else None,
)
def test_traces_of_every_task_are_graded_again_by_their_own_grader(row, right, wrong, monkeypatch, tmp_path):
    (problem,) = problems_of([{"id": "a"} | row])
    texts = [f"<think>x</think> <answer> {answer} </answer>" for answer in (right, wrong)]
    drawing(monkeypatch, lambda: sampled(problem, texts, RewardConfig()))
    config = configs.load(
        "stage1_coldstart", [("coldstart.teacher", str(tmp_path)), ("coldstart.min_language_consistency", "0")]
    )
    rows, counts = stage1_coldstart.collect(config, tokenizer.tiny(), None, [], tmp_path)
    assert [row["response"] for row in rows] == texts[:1]
    assert counts["right again"] == {row["task"]: 1 for row in rows}


# What a file of finished responses is read as, and said to lack.


def read(tmp_path, case: str) -> tuple[list, list[str]]:
    """Returns (drafts, remarks) of a case's rows."""
    given = io_case(case)["input"]
    path = tmp_path / "rows.jsonl"
    jsonl.write(path, given["rows"] if "rows" in given else [given["row"]])
    rows = example_files.ExampleFile(str(path), DataConfig(), RewardConfig())
    return list(rows), rows.remarks


def test_messages_are_read_for_distillation(tmp_path):
    ((draft,), _) = read(tmp_path, "messages-for-distillation")
    assert (draft.problem.prompt, draft.text) == ("2+2?", "<think>x</think>4")


def test_rows_without_one_closed_thought_are_told_before_training(tmp_path):
    drafts, lines = read(tmp_path, "thought-in-its-own-column")
    assert drafts[0].text == "<think>\n2 and 2 are 4\n</think>\n\n4"
    assert any("reasoning_content merged into the response" in line for line in lines)
    assert any(
        "1 of 2 responses lack exactly one closed <think>...</think> (a thought that is never closed: 1)" in line
        for line in lines
    )


def test_a_row_with_two_thoughts_is_counted(tmp_path):
    _, lines = read(tmp_path, "two-thoughts")
    assert any(
        "1 of 1 responses lack exactly one closed <think>...</think> (several thoughts: 1)" in line for line in lines
    )
