"""Claims about what grade --explain says, and about values as text."""

import dataclasses
import json

import pytest

from r1jax.data import jsonl
from r1jax.rewards import explaining
from r1jax.rewards.answers import reading, showing
from r1jax.rewards.score import RewardRequest
from r1jax.schema import Config, DataConfig, RewardConfig
from r1jax.tools import grade

ROWS = [
    {"id": "half", "task": "math", "reference": "1/2", "response": "<think>x</think>Half: \\boxed{0.50}, so."},
    {"id": 2, "task": "math", "reference": "(3, 4]", "response": "3 < x < 4", "extraction": "whole"},
    {"id": "prose", "task": "math", "reference": "see the graph above here", "response": "\\boxed{1}"},
    {"id": "letter", "task": "mcq", "prompt": "Which?\nA. 3\nB. 4", "reference": "B", "response": "\\boxed{A}"},
    {"id": "none", "task": "math", "reference": "5", "response": "<think>5"},
]


def explained(tmp_path, given="", rows=ROWS, **changes):
    jsonl.write(tmp_path / "rows.jsonl", rows)
    config = Config(data=DataConfig(path=str(tmp_path / "rows.jsonl")), explain=given)
    return grade.run(dataclasses.replace(config, **changes), "")["explained"]


def test_explain_gives_span_form_type_and_value_of_both_sides_and_the_rule(tmp_path):
    [found] = explained(tmp_path, "half")
    assert (found["id"], found["verdict"], found["extraction"]) == ("half", "right", "auto")
    answer, reference = found["steps"]["answer"], found["steps"]["reference"]
    start, end = answer["span"]
    assert ROWS[0]["response"][start:end] == answer["text"] == answer["notation"] == "0.50"
    assert (answer["type"], answer["value"]) == ("number", "1/2")
    assert (reference["text"], reference["type"], reference["value"]) == ("1/2", "number", "1/2")
    assert found["steps"]["rule"] == "number with number: values compared, units where both have one"


def test_explain_follows_a_rows_own_extraction_and_ids_that_are_numbers(tmp_path):
    [found] = explained(tmp_path, "2")
    assert (found["extraction"], found["verdict"]) == ("whole", "wrong")
    assert [found["steps"][side]["value"] for side in ("answer", "reference")] == ["3 < x < 4", "(3, 4]"]


def test_explain_without_an_id_shows_the_first_rows_and_writes_nothing(tmp_path, capsys):
    many = [{**ROWS[0], "id": n} for n in range(grade.EXPLAINED + 3)]
    assert len(explained(tmp_path, rows=many, output=str(tmp_path / "out.jsonl"))) == grade.EXPLAINED
    assert not (tmp_path / "out.jsonl").exists()
    assert capsys.readouterr().out.endswith("\n3 more rows; --explain=ID shows one of them\n")


def test_explain_says_what_there_is_of_rows_that_are_not_comparisons(tmp_path, capsys):
    found = {one["id"]: one for one in explained(tmp_path)}
    assert [one["verdict"] for one in found.values()] == ["right", "wrong", "unscorable", "wrong", "wrong"]
    assert found["prose"]["steps"]["rule"].endswith("cannot be graded: it is prose, not an answer")
    assert (found["letter"]["steps"], found["letter"]["detail"]) == (None, "answer 'A' is option A, reference B")
    assert (found["none"]["steps"]["answer"]["text"], found["none"]["steps"]["rule"]) == ("", "no answer found")
    assert json.loads(json.dumps(found["half"])) == {
        **found["half"],
        "steps": json.loads(json.dumps(found["half"]["steps"])),
    }
    assert (
        "half (task math, extraction auto): right\n  answer\n    span         0.50   (characters "
        in capsys.readouterr().out
    )


def test_explain_names_the_nearest_id_when_there_is_none_of_that_name(tmp_path):
    with pytest.raises(ValueError, match=r"^--explain=hal: no row of .*rows.jsonl has that id; did you mean 'half'\?$"):
        explained(tmp_path, "hal")
    with pytest.raises(ValueError, match="row 'half': field 'extraction' is 'tag', must be one of auto, boxed"):
        explained(tmp_path, "half", rows=[{**ROWS[0], "extraction": "tag"}])


def test_a_task_with_a_grader_of_the_users_has_no_steps(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from r1jax.rewards.score import Score\n\ndef grade(request, config):\n    return Score(1.0, {}, True, 'as told')\n"
    )
    config = RewardConfig(graders=(f"math={tmp_path / 'mine.py'}:grade",), override_graders=True)
    [found] = explaining.explain([RewardRequest("a", "math", "", "\\boxed{1}", "2")], config)
    assert (found.verdict, found.steps, found.lines()[1].split()) == ("right", None, ["detail", "as", "told"])


@pytest.mark.parametrize(
    ("text", "kind", "shown"),
    [
        ("0.75", "number", "3/4"),
        ("2^{-80}", "number", f"1/{2**80}"),
        ("10^{9999}", "number", "about 10^9999"),
        ("\\frac{3\\sqrt{3}}{4}", "number", "3*sqrt(3)/4"),
        ("x-(y-z)", "expression", "x - (y - z)"),
        ("-\\frac{a+b}{c d}", "expression", "-(a + b)/(c*d)"),
        ("(x-1)^{-2}", "expression", "(x - 1)^(-2)"),
        ("a/(b/c)", "expression", "a/(b/c)"),
        ("\\{1\\pm\\sqrt5, -2\\}", "set", "{1 + sqrt(5), 1 - sqrt(5), -2}"),
        ("(6,31,-1)", "tuple", "(6, 31, -1)"),
        ("(-\\infty, 2) \\cup (3, 4] \\cup (5, \\infty)", "interval", "(-∞, 2) ∪ (3, 4] ∪ (5, ∞)"),
        ("x \\le 5 - y", "relation", "x ≤ 5 - y"),
        ("f(x)=x+1", "named value", "f(x) = x + 1"),
        ("\\begin{pmatrix} 1 & -1/3 \\\\ 0 & x \\end{pmatrix}", "matrix", "[[1, -1/3], [0, x]]"),
        ("5 \\text{ m}/\\text{s}^2", "number", "5 m/s^2"),
        ("12 apples", "number", "12 (apple)"),
        ("52_8", "number", "52 in base 8"),
        ("3:30 pm", "time", "15:30 (pm)"),
        ("x\\equiv 3 \\pmod 7", "relation", "x ≡ 3 mod 7"),
        ("\\sum_{k=1}^{n} k^2", "expression", "sum(k^2, k = 1 to n)"),
        ("\\text{Evelyn}", "text", "'evelyn'"),
        ("\\text{(C)}", "choice", "option C"),
    ],
)
def test_a_value_is_shown_as_people_write_it(text, kind, shown):
    value = reading.read(text)
    assert (value.type, showing.show(value)) == (kind, shown)


def test_a_long_value_is_cut():
    shown = showing.show(reading.read("+".join(f"x_{{{n}}}" for n in range(100))))
    assert len(shown) == showing.MAX_CHARACTERS and shown.endswith("...")
