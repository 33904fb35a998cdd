"""The contract for problems: rows checked by their task's grader, questions split by what they ask, files divided."""

import json

import pytest
from small import problems_of

from r1jax import config as configs
from r1jax.data.problems import Message, Problem, question_key, read_prompt, split_holdout
from r1jax.data.tasks import TinyWorld
from r1jax.recipe import parts, problems
from r1jax.schema import parts_of

ASSERTS = {"kind": "python-asserts", "setup": "", "asserts": ["assert add(1, 2) == 3"]}


def asked(count: int) -> list[Problem]:
    return [Problem(f"q-{index}", "math", f"What is {index} + 1?", str(index + 1)) for index in range(count)]


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def math_rows(count: int, name: str = "m", **more) -> list[dict]:
    return [
        {"id": f"{name}{index}", "task": "math", "prompt": f"{name}: {index} + 1 =", "answer": index + 1, **more}
        for index in range(count)
    ]


def source(capsys=None, **fields) -> problems.FileProblems:
    given = [(f"data.{name}", str(value)) for name, value in fields.items()]
    found = problems.source(parts_of(parts.PromptParts, configs.load("r1_zero:smollm2_135m", given)))
    if capsys:
        found.said = capsys.readouterr().err
    return found


def test_rows_become_problems_with_what_their_grader_needs():
    rows = [
        {"id": "a", "prompt": "p", "answer": "7", "task": "math", "source": "svamp", "meta": {}},
        {"id": "b", "prompt": "p", "answer": 7},
        {"id": "c", "prompt": "p", "task": "code", "tests": ASSERTS, "language": "en"},
        {"id": "d", "prompt": "p", "task": "general"},
        {"id": "e", "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "answer": "1"},
    ]
    assert problems_of(rows, task="math") == [
        Problem("a", "math", "p", "7", "", "svamp"),
        Problem("b", "math", "p", "7"),
        Problem("c", "code", "p", json.dumps(ASSERTS, sort_keys=True), "en"),
        Problem("d", "general", "p"),
        Problem("e", "math", (Message("system", "s"), Message("user", "u")), "1"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "answer": "1"}, "row 1: field 'id' is None"),
        ({"id": "b", "prompt": " ", "answer": "1"}, r"row 1 \(b\): field 'prompt' is empty"),
        ({"id": "b", "prompt": "p"}, r"row 1 \(b\): task math needs the field 'answer'"),
        ({"id": "b", "prompt": "p", "answer": True}, r"row 1 \(b\): field 'answer' is True"),
        ({"id": "b", "prompt": "p", "answer": float("nan")}, r"row 1 \(b\): field 'answer' is nan"),
        ({"id": "b", "prompt": "p", "answer": "1", "task": 3}, r"row 1 \(b\): field 'task' is 3"),
        ({"id": "b", "prompt": "p", "answer": "1", "task": "poetry"}, r"row 1 \(b\): task 'poetry' has no grader"),
        ({"id": "b", "prompt": "p", "task": "code"}, r"row 1 \(b\): task code needs the field 'tests'"),
        ({"id": "b", "prompt": "p", "task": "code", "tests": {"kind": "x"}}, r"field 'tests' cannot be used: kind 'x'"),
        ({"id": "b", "prompt": [], "answer": "1"}, r"row 1 \(b\): field 'prompt' is \[\]"),
        ({"id": "b", "prompt": [{"role": "user"}], "answer": "1"}, "needs 'role' and 'content'"),
        ({"id": "b", "prompt": [{"role": "assistant", "content": "x"}], "answer": "1"}, "must hold a question"),
    ],
)
def test_a_bad_row_is_refused_with_its_place_and_field(row, message):
    with pytest.raises(ValueError, match=message):
        problems_of([row], task="math")


def test_a_row_without_what_its_grader_needs_is_told_which_column_it_may_be(tmp_path):
    rows = written(tmp_path / "a.jsonl", [{"task": "math", "problem": "1 + 1 =", "gold": "2"}])
    with pytest.raises(
        ValueError, match=r"line 1 \(row-1\): task math needs the field 'answer'; .*columns=gold=answer$"
    ):
        source(path=rows)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_refused_with_its_line(tmp_path, answer):
    rows = written(tmp_path / "a.jsonl", [{"id": "a", "task": "math", "prompt": "p", "answer": answer}])
    with pytest.raises(ValueError, match=r"a.jsonl, line 1 \(a\): field 'answer' is empty, task math needs it"):
        source(path=rows)


def test_references_are_counted_only_where_there_are_any(tmp_path, capsys):
    rows = written(tmp_path / "a.jsonl", [{"id": "a", "task": "code", "prompt": "p", "tests": ASSERTS}])
    assert "1 of 1 can be graded" in source(capsys, path=rows, holdout_fraction=0).said
    rows = written(tmp_path / "b.jsonl", [{"id": "a", "task": "general", "prompt": "p"}])
    assert "can be graded" not in source(capsys, path=rows, holdout_fraction=0).said


def test_questions_are_split_by_what_they_ask_and_not_by_their_ids():
    rows = asked(2000)
    train, test = split_holdout(rows, 0.1)
    assert sorted(map(repr, train + test)) == sorted(map(repr, rows)) and 150 < len(test) < 250
    assert {row.id for row in split_holdout(reversed(rows), 0.1)[1]} == {row.id for row in test}
    assert {row.id for row in test} < {row.id for row in split_holdout(rows, 0.2)[1]}
    assert split_holdout(rows, 0.0) == (rows, []) and split_holdout(rows, 1.0) == ([], rows)
    with pytest.raises(ValueError, match="holdout_fraction=1.5"):
        split_holdout(rows, 1.5)


@pytest.mark.parametrize("again", ["What is  1 + 1?", "what is 1 + 1?\n", "Ｗhat is 1 + 1?", "What is 1 + 1?\u00a0"])
def test_spacing_case_and_width_make_no_other_question(again):
    assert question_key(Problem("a", "math", again)) == question_key(Problem("b", "math", "What is 1 + 1?"))
    one_turn = read_prompt([{"role": "system", "content": "Be short."}, {"role": "user", "content": again}])
    assert question_key(Problem("c", "math", one_turn)) == question_key(Problem("b", "math", "What is 1 + 1?"))


def test_general_and_safety_rows_are_apart_and_no_held_out_row_is_trained_on(tmp_path):
    rows = math_rows(40)
    rows += [{"id": f"g{i}", "task": "general", "prompt": f"Tell me of {i}."} for i in range(40)]
    rows += [{"id": f"s{i}", "task": "safety", "prompt": f"How do I {i}?"} for i in range(40)]
    found = source(path=written(tmp_path / "f.jsonl", rows), holdout_fraction=0.3)
    [reasoning], weights = found.training()
    sides = reasoning, found.held_out(), found.general(), found.safety()
    assert weights == (1.0,) and all(sides)
    assert [{p.task for p in side} for side in sides] == [{"math"}, {"math"}, {"general"}, {"safety"}]
    assert len(found.general()) < 40 and len(found.safety()) < 40 and len(reasoning) + len(found.held_out()) == 40
    names = [p.id for side in sides for p in side]
    assert len(set(names)) == len(names)


def test_every_row_of_an_evaluation_file_is_held_out_and_its_questions_are_trained_on_nowhere(tmp_path, capsys):
    train = written(tmp_path / "train.jsonl", math_rows(20))
    test = written(tmp_path / "test.jsonl", math_rows(5) + math_rows(25, "other"))
    found = source(capsys, path=train, eval_path=test)
    [reasoning], _ = found.training()
    assert len(found.held_out()) == 30 and len(reasoning) == 15
    assert "5 rows ask what config.data.eval_path asks, left out" in found.said
    assert not {question_key(p) for p in reasoning} & {question_key(p) for p in found.held_out()}


def test_general_rows_that_no_update_draws_are_said(tmp_path, capsys):
    rows = written(tmp_path / "f.jsonl", [*math_rows(2), {"id": "g", "task": "general", "prompt": "hello"}])
    told = "are not drawn: config.scenarios.from_update=-1"
    assert told in source(capsys, path=rows, holdout_fraction=0).said
    given = [("data.path", rows), ("data.holdout_fraction", "0"), ("scenarios.from_update", "2")]
    problems.source(parts_of(parts.PromptParts, configs.load("r1_zero:smollm2_135m", given)))
    assert told not in capsys.readouterr().err


def test_several_files_mix_by_their_weights_and_may_share_ids(tmp_path):
    others = [row | {"id": same["id"]} for row, same in zip(math_rows(10, "y"), math_rows(10, "x"), strict=True)]
    one, two = written(tmp_path / "a.jsonl", math_rows(10, "x")), written(tmp_path / "b.jsonl", others)
    found = source(path=f"{one},{two}", weights="(3, 1)", holdout_fraction=0)
    parts, weights = found.training()
    assert [len(part) for part in parts] == [10, 10] and weights == (3.0, 1.0)
    assert len({p.id for part in parts for p in part}) == 20
    merged, alone = source(path=f"{one},{two}", holdout_fraction=0).training()
    assert [len(part) for part in merged] == [20] and alone == (1.0,)
    with pytest.raises(ValueError, match="are 1, config.data.path names 2 files"):
        source(path=f"{one},{two}", weights="(3,)")


def test_a_language_that_the_rule_does_not_know_is_refused_with_its_line(tmp_path):
    path = written(tmp_path / "f.jsonl", [*math_rows(1, language="English"), *math_rows(1, "k", language="Klingon")])
    with pytest.raises(ValueError, match=r"f.jsonl, line 2 \(k0\): field 'language'"):
        source(path=path)
    written(tmp_path / "f.jsonl", math_rows(3, language="English"))
    assert {p.language for p in source(path=path, holdout_fraction=0).training()[0][0]} == {"en"}


def test_all_rows_may_be_held_out_where_nothing_is_trained(tmp_path):
    found = source(path=written(tmp_path / "f.jsonl", math_rows(30)), holdout_fraction=1.0)
    assert len(found.held_out()) == 30
    with pytest.raises(ValueError, match="no row is left to train on"):
        found.training()


def test_the_tiny_world_is_a_source_that_a_preset_names():
    assert isinstance(problems.source(parts_of(parts.PromptParts, configs.load("r1_zero"))), TinyWorld)
    with pytest.raises(ValueError, match="r1_zero:smollm2_135m has no problems of its own"):
        problems.source(parts_of(parts.PromptParts, configs.load("r1_zero:smollm2_135m")))
    with pytest.raises(ValueError, match="does not speak the tiny world"):
        TinyWorld().check_words(lambda text: [1, 2], "X")
