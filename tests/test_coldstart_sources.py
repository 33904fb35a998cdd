"""Claims about how SFT examples are made: sources, editor, people's rows and review, kinds, and files for distillation."""

import json
from collections import Counter

import jax
import pytest
import toy_judge
from small import problems_of
from test_io_cases_coldstart import sampled

from r1jax import config as configs
from r1jax import launch
from r1jax.checkpoints import hf_export, tokenizer
from r1jax.core import sharding
from r1jax.data import jsonl, tasks
from r1jax.data.problems import Message, Problem
from r1jax.recipe import (
    common,
    distill,
    drafts,
    editing,
    example_files,
    general_rows,
    judging,
    lineage,
    parts,
    stage1_coldstart,
    teachers,
)
from r1jax.recipe.drafts import Draft
from r1jax.rewards.answers.extraction import extract
from r1jax.rewards.models import editing as edits
from r1jax.schema import (
    Config,
    DataConfig,
    DistillConfig,
    JudgeConfig,
    MeshConfig,
    RejectionConfig,
    RewardConfig,
    SamplerConfig,
    parts_of,
    replace,
)

SHORT = (
    *(
        "coldstart.prompts=24",
        "coldstart.samples_per_prompt=8",
        "coldstart.min_language_consistency=0.0",
        "sft.epochs=1",
    ),
    *("evaluation.samples_per_problem=1", "evaluation.max_problems=4", "evaluation.greedy=false", "sampler.slots=64"),
)


def run(workdir, *changes: str) -> int:
    flags = [f"--config.{change}" for change in (*SHORT, *changes)]
    return launch.main(["--config=stage1_coldstart", f"--workdir={workdir}", *flags])


def made(workdir) -> list[dict]:
    return jsonl.read(workdir / "stage1_coldstart" / "examples.jsonl")


def counts_of(workdir) -> dict:
    return json.loads((workdir / "stage1_coldstart" / "examples_counts.json").read_text())


def solved(problem: tasks.Linear, answer: int | None = None) -> dict:
    """Returns a row of the tiny world as people would write it."""
    product = problem.a * problem.x
    thought = f"{problem.a} * {problem.x} = {product} + {problem.b} = {problem.c} = {problem.c} ok"
    response = f"<think> {thought} </think> <answer> {problem.x if answer is None else answer} </answer>"
    return {"task": "linear", "prompt": problem.text("en"), "answer": str(problem.x), "response": response}


def equations(count: int) -> list[tasks.Linear]:
    train, _ = tasks.linear_problems()
    return train[:: len(train) // count][:count]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns a Hugging Face folder of the tiny world's base."""
    folder = tmp_path_factory.mktemp("base")
    config = configs.load("stage1_coldstart:tiny")
    params = lineage.base_weights(config, sharding.make_mesh(MeshConfig()), folder)
    own = tokenizer.tiny()
    hf_export.save(folder / "model", params, config.model, own, "float32", "the tiny base")
    chat = tokenizer.Tokenizer(own.backend, own.config, "{{ messages[-1]['content'].split('\n')[-1] }}", "tiny world")
    hf_export.save(folder / "chat", params, config.model, chat, "float32", "the tiny base, asked in a chat")
    return folder / "model"


# Rows of people, and their review of what is made.


def test_rows_of_people_make_a_dev1_wrong_ones_are_lost_and_provenance_is_kept(tmp_path, capsys):
    rows = [solved(problem) for problem in equations(12)]
    rows[3], rows[7] = (solved(problem, answer=problem.x + 1) for problem in (equations(12)[3], equations(12)[7]))
    rows.append({"task": "general", "prompt": "tell cat :", "response": "the cat is small thanks", "kind": "writing"})
    rows = [{"id": f"p{number}"} | row for number, row in enumerate(rows)]
    jsonl.write(tmp_path / "people.jsonl", rows)
    given = ("coldstart.sources=people", f"coldstart.examples={tmp_path}/people.jsonl")
    assert run(tmp_path / "runs", *given) == 0
    found = made(tmp_path / "runs")
    assert {row["id"] for row in found} == {row["id"] for row in rows} - {"p3", "p7"}
    assert all(
        row["provenance"] == {"source": "people", "teacher": str(tmp_path / "people.jsonl"), "edited": False}
        for row in found
    )
    kinds = {row["id"]: row.get("kind") for row in found}
    assert kinds["p12"] == "writing" and kinds["p0"] == "reasoning"
    counts = counts_of(tmp_path / "runs")
    assert counts["rows of people"] == {"linear": 12, "general": 1} and counts["wrong"] == {"linear": 2}
    assert counts["not graded"] == {"general": 1} and counts["kept"] == {"linear": 10, "general": 1}
    assert "stage1_coldstart: examples: rows of people 13 (linear 12, general 1)" in capsys.readouterr().err
    assert "dev1" in json.loads((tmp_path / "runs" / "stage1_coldstart" / "DONE").read_text())["figures"]


@pytest.fixture
def reviewed(tmp_path):
    """Returns (working folder, flags, review file) of a run whose examples wait for people."""
    jsonl.write(tmp_path / "people.jsonl", [{"id": f"p{n}"} | solved(p) for n, p in enumerate(equations(6))])
    path = tmp_path / "review.jsonl"
    given = ("coldstart.sources=people", f"coldstart.examples={tmp_path}/people.jsonl", f"coldstart.review={path}")
    return tmp_path / "runs", given, path


def test_examples_wait_for_review_and_the_next_run_goes_on_with_its_verdicts(reviewed, capsys):
    workdir, given, path = reviewed
    assert run(workdir, *given) == 0
    assert f"stage1_coldstart: 6 examples wait for review in {path}" in capsys.readouterr().err
    assert not (workdir / "stage1_coldstart" / "examples.jsonl").exists()
    rows = jsonl.read(path)
    assert [row["verdict"] for row in rows] == [""] * 6 and rows[0]["id"] == "p0"
    jsonl.write(path, [row | {"verdict": "accept"} for row in rows[:3]] + rows[3:])
    assert run(workdir, *given) == 0
    assert "3 of 6 examples" in capsys.readouterr().err
    texts = [row["response"] for row in rows]
    verdicts = ["accept", "accept", "reject", "edit", "edit", "accept"]
    new = [
        "",
        "",
        "",
        texts[3].replace("<think> ", "<think> 2 * 1 = 2 no wait "),
        "<think> 1 </think> <answer> 0 </answer>",
        "",
    ]
    jsonl.write(path, [row | {"verdict": v, "edit": t} for row, v, t in zip(rows, verdicts, new, strict=True)])
    assert run(workdir, *given) == 0
    found = {row["id"]: row for row in made(workdir)}
    assert set(found) == {"p0", "p1", "p3", "p5"}  # p4 was edited into a wrong answer
    assert found["p3"]["response"] == new[3] and found["p3"]["provenance"]["review"] == "edit"
    assert found["p0"]["response"] == texts[0] and found["p0"]["provenance"]["review"] == "accept"
    counts = counts_of(workdir)
    assert [counts[f"review: {name}"] for name in ("accept", "reject", "edit")] == [
        {"linear": 3},
        {"linear": 1},
        {"linear": 2},
    ]
    assert counts["right after review"] == {"linear": 4}
    assert str(path) in json.loads((workdir / "stage1_coldstart" / "DONE").read_text())["inputs"]
    jsonl.write(path, [row | {"verdict": "accept"} for row in rows])
    capsys.readouterr()
    assert run(workdir, *given) == 2
    assert f"its input {path} has changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [rows[0] | {"verdict": "fine"}, *rows[1:]], "line 1 (p0): field 'verdict' is 'fine'"),
        (lambda rows: [rows[0] | {"verdict": "edit"}, *rows[1:]], "line 1 (p0): verdict edit without a text in 'edit'"),
        (lambda rows: [rows[0] | {"response": "another"}, *rows[1:]], "line 1 (p0): 'response' is not the example's"),
        (lambda rows: rows[1:], "1 examples have no row, the first is 'p0'"),
        (lambda rows: [*rows, rows[0] | {"id": "p9"}], "line 7: 'p9' is no example of this run"),
        (lambda rows: [*rows, rows[0]], "line 7: 'p0' has two rows"),
    ],
)
def test_a_review_that_does_not_fit_is_refused_with_the_line(change, message, reviewed, capsys):
    workdir, given, path = reviewed
    assert run(workdir, *given) == 0
    jsonl.write(path, change([row | {"verdict": "accept"} for row in jsonl.read(path)]))
    capsys.readouterr()
    assert run(workdir, *given) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_graph_stops_where_a_stage_waits_for_review(reviewed, capsys, monkeypatch):
    workdir, given, path = reviewed
    monkeypatch.setattr("r1jax.recipe.graph._refuse_unready", lambda *given: None)
    changes = ",".join(f"stage1_coldstart.{change}" for change in given)
    flags = ["--config=quickstart", f"--workdir={workdir}", "--config.only=stage1_coldstart", f"--config.set={changes}"]
    assert launch.main(flags) == 2
    assert f"stage1_coldstart waits for the verdicts in {path}" in capsys.readouterr().err.strip().splitlines()[-1]


# Models that are asked.


@pytest.mark.parametrize("source", ["few_shot", "direct"])
def test_a_prompted_model_makes_a_dev1_whose_rows_hold_the_bare_question(source, base, tmp_path):
    jsonl.write(tmp_path / "worked.jsonl", [solved(problem) for problem in equations(2)])
    examples = f"coldstart.examples={tmp_path / 'worked.jsonl'}" if source == "few_shot" else "seed=0"
    wider = ("sampler.max_prompt_tokens=200", "sampler.windows=()", "coldstart.prompts=80")
    given = (f"coldstart.sources={source}", f"coldstart.prompted_model={base.parent}/chat", examples, *wider)
    assert run(tmp_path / "runs", *given) == 0
    found, counts = made(tmp_path / "runs"), counts_of(tmp_path / "runs")
    assert counts["sampled"] == {"linear": 640} and counts["kept"] == {"linear": len(found)}
    for row in found:
        assert tasks.parse_linear(row["prompt"]) is not None
        assert row["provenance"]["source"] == source and row["provenance"]["teacher"] == "chat"
        assert row["provenance"]["sample"] in range(8) and row["provenance"]["trace"]


def test_few_shot_prompts_hold_the_examples_and_end_where_the_answer_begins():
    problem = Problem("a", "math", "What is 2 + 2?", "4")
    examples = teachers.worked_examples("boxed")
    text = teachers._request(problem, "Do so.", examples, chat=False)
    assert text.startswith("User: Do so.\n\nA shop sells") and text.endswith("User: What is 2 + 2?\n\nAssistant:")
    turns = teachers._request(problem, "Do so.", examples, chat=True)
    assert [turn.role for turn in turns] == ["user", "assistant"] * 2 + ["user"]
    assert turns[-1] == Message("user", "What is 2 + 2?") and turns[0].content.startswith("Do so.\n\n")


@pytest.mark.parametrize("extraction", ["boxed", "auto", "answer_tag"])
def test_our_own_worked_examples_are_right_where_answers_are_looked_for(extraction):
    for (_, turn), (*_, answer) in zip(teachers.worked_examples(extraction), teachers.WORKED, strict=True):
        assert extract(turn, extraction) == answer
    packs = [t for t in range(6) if 10 * t + 6 * (5 - t) == 38]
    assert [packs, 7**20 % 5] == [[2], 1]


def test_a_teacher_is_asked_as_its_folder_records_whatever_the_stage_asks(base, tmp_path):
    config = configs.load("stage1_coldstart", [("data.instruction", "solve"), ("data.template", "plain")])
    own, words, mesh = common.prepare(replace(config, data=replace(config.data, template="auto")))
    params = lineage.base_weights(config, mesh, tmp_path)
    folder = common.StageFolder(replace(config, stage="r1_zero"), tmp_path)
    folder.start({})
    asked = replace(own, data=replace(own.data, think_prefill=True, instruction="Begin."))
    common.write_model(folder.path, asked.model, asked.data, words, "r1_zero")
    store = folder.checkpoints()
    store.save(1, {"params": params}, {})
    store.close()
    teacher = teachers.load(parts_of(parts.SamplingParts, config), mesh, folder.path)
    data = teacher.settings.data
    assert (data.template, data.instruction, data.think_prefill) == ("r1_zero", "Begin.", True)
    assert teacher.settings.stage == "stage1_coldstart" and teacher.name == "r1_zero"
    jax.tree.map(lambda left, right: (left == right).all() or pytest.fail("other weights"), teacher.params, params)


def test_what_a_base_writes_after_its_answer_is_cut_and_graded_without():
    problem = Problem("a", "math", "What is 2 + 2?", "4")
    text = "<think> two twos </think> <answer> 4 </answer>"
    (whole,) = sampled(problem, [text + "\n\nUser: And 3?\n\nAssistant: <think>"], RewardConfig())
    assert whole.parts["format"] == 0.0
    (found,) = teachers._cut([replace(whole, truncated=True)], RewardConfig())
    assert found.text == text and not found.truncated
    assert found.parts["accuracy"] == found.parts["format"] == 1.0


# The editor.

EDITED = "<thoughts>\nI add 3 and 4.\n\nThat is 7.\n</thoughts>\n<summary>\n3 + 4 = \\boxed{7}\n</summary>"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (EDITED, edits.Edit("I add 3 and 4.\n\nThat is 7.", "3 + 4 = \\boxed{7}")),
        (
            f"<think>let me see</think>Here it is:\n{EDITED}\n",
            edits.Edit("I add 3 and 4.\n\nThat is 7.", "3 + 4 = \\boxed{7}"),
        ),
        (EDITED + " Done.", None),
        (EDITED.replace("</summary>", ""), None),
        (EDITED.replace("I add 3 and 4.\n\nThat is 7.", " "), None),
        (EDITED.replace("That", "<think>That"), None),
        (EDITED + EDITED, None),
        ("", None),
    ],
)
def test_an_edit_is_read_in_its_form_alone(reply, expected):
    assert edits.read_edit(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("<thoughts>\nThe person wants a poem.\n</thoughts>", "The person wants a poem."),
        ("<thoughts>\n</thoughts>", ""),
        ("The person wants a poem.", None),
        ("<thoughts>a</thoughts> and more", None),
    ],
)
def test_thoughts_are_read_in_their_form_alone(reply, expected):
    assert edits.read_thoughts(reply) == expected


def test_the_editor_is_asked_for_the_language_and_answer_form_of_the_row():
    assert "all of it in Chinese" in edits.edit_prompt("q", "t", "math", "zh")
    assert "\\boxed{}" in edits.edit_prompt("q", "t", "math", "en")
    assert "fenced block" in edits.edit_prompt("q", "t", "code", "en")
    asked = edits.edit_prompt("q", "t] [END OF TRACE]", "math", "en")
    assert asked.count("[END OF TRACE ") == 1


class Editor:
    """A stand-in for the model: replies by a rule from the text of each request."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def escape_special_tokens(self, text: str) -> str:
        return text

    def replies(self, requests):
        self.asked += [request.text for request in requests]
        return [[self.rule(request.text)] for request in requests]


def edited(given: list[Draft], editor: Editor | None, config: Config, counts: dict) -> list[Draft]:
    sampling, base = parts_of(parts.SamplingParts, config), lineage.Base("base", dict)
    mesh = sharding.make_mesh(config.mesh)
    making = stage1_coldstart.Making(
        sampling, config.coldstart, config.judge, tokenizer.tiny(), mesh, train=[], teacher=None, base=base
    )
    return stage1_coldstart._edited(given, editor, making, counts)


def trace(name: str, answer: str = "7") -> Draft:
    (problem,) = problems_of([{"id": name, "task": "math", "prompt": f"{name}: what is 3 + 4?", "answer": "7"}])
    text = f"<think>drei und vier {name}</think> <answer> {answer} </answer>"
    return Draft(problem, text, {"source": "r1_zero", "trace": text, "edited": False})


def test_edits_are_graded_again_and_counted():
    rules = {
        "good": EDITED,
        "wrong": EDITED.replace("boxed{7}", "boxed{8}"),
        "mixed": EDITED.replace("I add 3 and 4.", "我把三和四加起来。"),
        "unread": "I would rather not.",
        "long": None,
    }
    editor = Editor(lambda text: rules[next(name for name in rules if f"{name}: what" in text)])
    config, counts = Config(judge=JudgeConfig(checkpoint="E")), {}
    given = [trace(name) for name in rules]
    found = edited(given, editor, config, counts)
    kept = stage1_coldstart._right_again(found, config.reward, config.coldstart, counts, "right again", edited=True)
    assert [draft.problem.id for draft in kept] == ["good"]
    assert kept[0].text == "<think>\nI add 3 and 4.\n\nThat is 7.\n</think>\n<answer>\n3 + 4 = \\boxed{7}\n</answer>"
    told = kept[0].row()["provenance"]
    assert told == {"source": "r1_zero", "trace": given[0].text, "edited": True, "editor": "E"}
    assert counts["edits asked"] == {"math": 5} and counts["edits read"] == {"math": 3}
    assert counts[stage1_coldstart.CHANGED] == {"math": 1} and counts["right again"] == {"math": 1}


def test_a_trace_without_a_readable_edit_is_left_out_unless_it_may_stay():
    config = configs.load("stage1_coldstart", [("coldstart.keep_unedited", "true")])
    for settings, expected in ((config, ["a", "b"]), (Config(), [])):
        found = edited([trace("a"), trace("b")], Editor(lambda text: "no"), settings, {})
        assert [draft.problem.id for draft in found] == expected
        assert all(draft.text == trace(draft.problem.id).text and not draft.provenance["edited"] for draft in found)


def test_rules_of_the_tiny_world_edit_its_own_problems_and_no_row_that_reads_like_one():
    text = "<think> 2 * 3 = 6 + 1 = 7 < 9 no wait 2 * 4 = 8 + 1 = 9 = 9 ok </think> <answer> 4 </answer>\n"
    told = {"source": "r1_zero", "edited": False}
    own = Draft(
        Problem("a", "linear", "solve 2 x + 1 = 9 :", "4", "en", tasks.SOURCE),
        text.replace("9 = 9 ok", "9 = 9 oui"),
        told,
    )
    other = Draft(Problem("b", "math", "solve 2 x + 1 = 9 :", "4"), text, told)
    found = edited([own, other], None, Config(), {})
    assert [draft.text for draft in found][-1] == text.strip()
    assert [draft.provenance["edited"] for draft in found if draft.problem.id == "a"] in ([], [True])
    editor = Editor(lambda text: EDITED)
    edited([own, other], editor, Config(), {})
    assert len(editor.asked) == 1


def test_replies_of_people_get_thoughts_where_the_editor_has_some_and_their_traces_stay():
    replies = {"poem": "<thoughts>A short one.</thoughts>", "hello": "<thoughts></thoughts>", "odd": "?"}
    editor = Editor(lambda text: next(reply for name, reply in replies.items() if f"{name}!" in text))
    given = [
        Draft(
            Problem(name, "general", f"{name}!", language="en"),
            "Here.",
            {"source": "people", "edited": False},
            gradable=False,
        )
        for name in replies
    ]
    solved_by_people = replace(trace("a"), provenance={"source": "people", "edited": False})
    counts: dict = {}
    found = edited([solved_by_people, *given], editor, Config(judge=JudgeConfig("E")), counts)
    assert [draft.text for draft in found] == [
        solved_by_people.text,
        "<think>\nA short one.\n</think>\n\nHere.",
        "Here.",
        "Here.",
    ]
    assert [counts[f"thoughts {name}"]["general"] for name in ("asked", "read", "added")] == [3, 2, 1]
    assert found[1].provenance["trace"] == "Here." and found[1].provenance["edited"]


def test_an_editor_that_keeps_to_no_form_ends_in_one_line_with_the_counts(base, tmp_path, capsys):
    """The judge of the tests writes verdicts: a real model, asked through its own sampler, no reply of which is an edit."""
    judge = toy_judge.folder(tmp_path / "judge")
    problems = [
        {"id": f"q{n}", "task": "math", "prompt": p.text("en"), "answer": str(p.x)} for n, p in enumerate(equations(60))
    ]
    jsonl.write(tmp_path / "problems.jsonl", problems)
    flags = (
        "judge.compute_dtype=float32",
        "judge.sampler.slots=8",
        "judge.sampler.windows=()",
        "judge.sampler.prefill_buckets=()",
    )
    flags += ("judge.sampler.max_prompt_tokens=400", "judge.sampler.max_new_tokens=8", "coldstart.prompts=60")
    given = (
        f"coldstart.teacher={base.parent}/chat",
        f"data.path={tmp_path}/problems.jsonl",
        "data.template=plain",
        "data.holdout_fraction=0.1",
    )
    assert run(tmp_path / "runs", *given, *flags, "coldstart.editor=judge", f"judge.checkpoint={judge}") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no example passed the checks" in line and "'edits read': {}" in line


# General rows by kind.


def general(name: str, kind: str) -> Draft:
    return Draft(Problem(name, "general", f"{name}?", kind=kind), "Yes.", {}, gradable=False)


def test_kinds_mix_by_their_weights_and_short_ones_are_filled_up():
    kinds = ["writing"] * 8 + ["translation"] * 8 + ["software_engineering/repair"] * 2 + [""] * 5
    given = [general(f"g{number}", kind) for number, kind in enumerate(kinds)]
    weights = RejectionConfig(kinds=("writing=2", "translation=1", "software_engineering=1")).kind_weights()
    found = Counter(draft.problem.kind for draft in general_rows.mixed(given, weights, 8, 7))
    assert found == {"writing": 4, "translation": 2, "software_engineering/repair": 2}
    found = Counter(draft.problem.kind for draft in general_rows.mixed(given, weights, 14, 7))
    assert found == {"writing": 8, "translation": 4, "software_engineering/repair": 2}
    assert len(general_rows.mixed(given, weights, 100, 7)) == 18
    assert general_rows.mixed(given, {}, 3, 7) == given[:3]


@pytest.mark.parametrize(
    "kinds", [("writing",), ("writing=0",), ("poetry=1",), ("writing=1", "writing=2"), ("writing=inf",)]
)
def test_a_weight_that_is_none_is_refused(kinds):
    with pytest.raises(ValueError, match=r"RejectionConfig\.kinds=.*needs KIND=WEIGHT above 0"):
        RejectionConfig(kinds=kinds)


def test_general_rows_come_from_the_problem_files_and_their_own_with_kinds_counted(tmp_path):
    jsonl.write(
        tmp_path / "mixed.jsonl",
        [
            {"id": "m", "task": "math", "prompt": "1+1?", "answer": "2", "response": "2"},
            {"id": "g", "task": "general", "prompt": "A poem?", "response": "Roses.", "kind": "writing"},
            {"id": "unanswered", "task": "general", "prompt": "A song?"},
        ],
    )
    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A program."}]
    jsonl.write(
        tmp_path / "more.jsonl",
        [{"id": "s", "kind": "self_cognition", "messages": talk}, {"prompt": "Hi", "response": "Hi."}],
    )
    fields = [("data.path", f"{tmp_path}/mixed.jsonl"), ("rejection.general_path", f"{tmp_path}/more.jsonl")]
    config, counts = configs.load("stage3_rejection_sft", fields), {}
    rows = general_rows.chosen(parts_of(parts.SamplingParts, config), config.rejection, config.judge, None, 9, counts)
    assert [(row["id"], row.get("kind")) for row in rows] == [
        ("g", "writing"),
        ("s", "self_cognition"),
        ("row-2", None),
    ]
    assert rows[1]["response"] == "A program." and rows[1]["provenance"] == {"teacher": f"{tmp_path}/more.jsonl"}
    assert counts["general"] == {"general": 3}
    assert counts["general by kind"] == {"writing": 1, "self_cognition": 1, "no kind": 1}
    assert set(general_rows.inputs(config.stage, config.rejection, config.judge)) == {f"{tmp_path}/more.jsonl"}


def test_an_unknown_kind_is_refused_with_its_line(tmp_path):
    jsonl.write(tmp_path / "more.jsonl", [{"id": "s", "kind": "poetry", "prompt": "p", "response": "r"}])
    config = configs.load("stage3_rejection_sft", [("rejection.general_path", f"{tmp_path}/more.jsonl")])
    with pytest.raises(
        ValueError, match=r"more\.jsonl, line 1 \(s\): field 'kind' is 'poetry'; the kinds are reasoning"
    ):
        general_rows.read(config.data, config.reward, config.rejection)


# Files for distillation.

TESTS = {"kind": "python-asserts", "asserts": ["assert square(3) == 9"]}


def answered(name: str, task: str, right: bool) -> dict:
    """Returns a row with an answer that its task's grader finds right or wrong."""
    told = {
        "math": ({"prompt": "3 + 4?", "answer": "7"}, ("7", "8")),
        "mcq": ({"prompt": "Which?\nA. one\nB. two", "answer": "B"}, ("B", "A")),
        "countdown": ({"prompt": "Make 7.", "meta": {"numbers": [3, 4], "target": 7}}, ("3 + 4", "3 * 4")),
        "code": (
            {"prompt": "Write square(x).", "tests": TESTS},
            ("```python\ndef square(x):\n    return x * x\n```", "```python\ndef square(x):\n    return x\n```"),
        ),
    }
    row, answers = told[task]
    task = "math" if task == "countdown" else task
    return {"id": name, "task": task, "response": f"<think>so</think> <answer>\n{answers[not right]}\n</answer>"} | row


def test_planted_wrong_answers_are_lost_exactly_and_counted_by_task(tmp_path, capsys):
    kinds = ("math", "mcq", "countdown", "code")  # countdown as public rows have it: task math, with numbers and target
    rows = [answered(f"{task}-{n}", task, right=n != 1) for task in kinds for n in range(3)]
    rows += [{"id": "poem", "task": "general", "prompt": "A poem?", "response": "<think>hm</think>Roses."}]
    rows += [
        {"id": "bare", "prompt": "2+2?", "response": "5"},
        {"id": "own", "task": "riddle", "prompt": "?", "response": "!"},
    ]
    jsonl.write(tmp_path / "rows.jsonl", rows)
    given = list(example_files.ExampleFile(str(tmp_path / "rows.jsonl"), DataConfig(), RewardConfig()))
    found, counts = distill.of_file(given, len(given), "distill", RewardConfig(), DistillConfig())
    assert [row["id"] for row in found] == [row["id"] for row in rows if not row["id"].endswith("-1")]
    assert counts["wrong"] == dict.fromkeys(kinds, 1)
    assert counts["not graded"] == {"general": 1, "no task": 1, "riddle": 1}
    assert "distill: examples: rows 15" in capsys.readouterr().err
    kept, counts = distill.of_file(given, len(given), "distill", RewardConfig(), DistillConfig(grade=False))
    assert len(list(kept)) == 15 and "wrong" not in counts


def test_a_task_for_rows_without_one_grades_them(tmp_path):
    rows = [{"problem": "2+2?", "answer": 4, "response": f"<think>x</think> \\boxed{{{value}}}"} for value in (4, 5)]
    jsonl.write(tmp_path / "rows.jsonl", rows)
    config = configs.load("distill", [("data.task", "math"), ("distill.examples", f"{tmp_path}/rows.jsonl")])
    found, counts = distill.of_file(
        example_files.ExampleFile(f"{tmp_path}/rows.jsonl", config.data, config.reward),
        2,
        config.stage,
        config.reward,
        config.distill,
    )
    assert [row["id"] for row in found] == ["row-1"] and counts["wrong"] == {"math": 1}


def test_a_conversation_keeps_all_its_turns_for_training(tmp_path):
    talk = [("user", "2+2?"), ("assistant", "4"), ("user", "and 1?"), ("assistant", "5")]
    messages = [{"role": role, "content": content} for role, content in talk]
    jsonl.write(tmp_path / "rows.jsonl", [{"messages": messages}, {"messages": messages[:2]}])
    many, one = example_files.ExampleFile(f"{tmp_path}/rows.jsonl", DataConfig(), RewardConfig())
    assert many.row()["messages"] == messages and many.row()["prompt"] == messages[:-1]
    assert "messages" not in one.row() and one.row()["prompt"] == "2+2?"
    assert drafts.from_record(json.loads(json.dumps(many.record()))) == many


def test_distillation_says_what_rows_lack_and_loses_a_planted_wrong_answer(tmp_path, capsys):
    rows = [{"id": f"e{n}"} | solved(problem) for n, problem in enumerate(equations(16))]
    rows[5] = {"id": "e5"} | solved(equations(16)[5], answer=equations(16)[5].x + 1)
    rows[6]["response"] = rows[6]["response"].replace("</think>", "")
    rows[6]["task"] = ""
    jsonl.write(tmp_path / "rows.jsonl", rows)
    flags = [f"--config.{change}" for change in SHORT if not change.startswith("coldstart")]
    given = [
        "--config=distill",
        f"--workdir={tmp_path}/runs",
        f"--config.distill.examples={tmp_path}/rows.jsonl",
        *flags,
    ]
    assert launch.main(given) == 0
    told = capsys.readouterr().err
    assert "1 of 16 responses lack exactly one closed <think>...</think> (a thought that is never closed: 1)" in told
    assert "1 of 16 rows have no task" in told and "wrong 1" in told
    found = jsonl.read(tmp_path / "runs" / "distill" / "examples.jsonl")
    assert {row["id"] for row in found} == {row["id"] for row in rows} - {"e5"}


# SmolLM2 as teacher and as editor.


@pytest.mark.slow
def test_smollm2_edits_its_own_traces_and_every_edit_is_read_or_counted(smollm2_folder, tmp_path):
    sampler = SamplerConfig(slots=2, max_prompt_tokens=768, max_new_tokens=192, temperature=0.6)
    config = Config(stage="test", judge=JudgeConfig(str(smollm2_folder), "float32", sampler))
    editor, counts = judging.load(config.stage, config.seed, config.judge, sharding.make_mesh(config.mesh)), {}
    given = [trace("a"), trace("b")]
    found = editing.rewrite(given, editor, config.seed, config.reward, config.judge, counts, keep_unedited=True)
    read = sum(counts["edits read"].values())
    assert counts["edits asked"] == {"math": 2} and len(found) == 2
    assert sum(draft.provenance["edited"] for draft in found) == read
