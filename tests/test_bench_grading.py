import dataclasses
import json
import pathlib
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.bench import grading as bench_grading
from r1jax.configs import bench_grading as bench_grading_config
from r1jax.data import answer_forms
from r1jax.rewards.answers.math_answer import grade, parse_number
from r1jax.schema import DataConfig

COMMITTED = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results" / "bench_grading.json"
GROUPS = ("gold", "rewritten", "perturbed")


def measure(path: pathlib.Path, rows: int) -> dict:
    config = bench_grading_config.config("tiny")
    return bench_grading.run(dataclasses.replace(config, data=DataConfig(path=str(path), max_rows=rows)), "")["files"]


@pytest.mark.parametrize(("name", "rows"), [("gsm8k_test", 6), ("math500", 20), ("mmlu_stem", 40)])
def test_a_fixed_slice_of_answers_rewritings_and_near_misses_is_graded_right(shared_data, name, rows):
    figures = measure(shared_data / f"{name}.jsonl", rows)[name]
    assert (figures["rows"], figures["first_misses"]) == (rows, [])
    assert [figures[group] for group in GROUPS] == [1.0, 1.0, 1.0]
    assert figures["fewest_rewritings"] >= 5 and figures["samples_per_s"] > 0


def test_the_committed_measurement_reaches_99_8_percent_of_every_group():
    files = json.loads(COMMITTED.read_text())["files"]
    assert {name: figures["rows"] for name, figures in files.items()} == dict(
        gsm8k_test=1319, math500=500, mmlu_stem=3018
    )
    assert all(figures[group] >= 0.998 for figures in files.values() for group in GROUPS)
    assert all(figures["fewest_rewritings"] >= 5 for figures in files.values())


def test_bench_grading_names_what_it_needs_when_path_or_task_is_wrong(tmp_path):
    with pytest.raises(
        ValueError, match="config.data.path is empty; give a JSONL file, or a folder with gsm8k_test.jsonl"
    ):
        bench_grading.run(bench_grading_config.config("tiny"), "")
    (tmp_path / "a.jsonl").write_text('{"id": "a", "task": "poetry", "prompt": "p", "answer": "x"}\n')
    with pytest.raises(ValueError, match="row 'a' has task 'poetry', needs math or mcq"):
        measure(tmp_path / "a.jsonl", 0)


FORMS = [
    "18",
    "-7",
    "58,500",
    "10,\\!080",
    "0.15",
    ".0000672",
    "\\frac{14}{3}",
    "\\frac43",
    "1\\frac{4}{5}",
    "90^\\circ",
]
FORMS += [
    "\\$18.90",
    "-2,1",
    "(3,4]",
    "x=5",
    "\\{1\\pm\\sqrt{5},-2\\}",
    "52_8",
    "\\text{Evelyn}",
    "p - q",
    "(2,\\infty)",
]
FORMS += ["\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "(0,9) \\cup (9,36)", "y = 2x + 3"]


@pytest.mark.parametrize("gold", FORMS)
def test_every_kind_of_answer_has_five_rewritings_and_a_perturbation_all_of_other_text(gold):
    rewritten, perturbed = answer_forms.rewritings(gold), answer_forms.perturbations(gold)
    assert len(rewritten) >= 5 and len(perturbed) >= 1
    assert gold not in {*rewritten.values(), *perturbed.values()}
    assert not set(rewritten.values()) & set(perturbed.values())


@given(st.fractions(max_denominator=10**4).filter(lambda value: abs(value) < 10**9))
@settings(max_examples=150, deadline=None)
def test_every_way_to_write_a_fraction_is_read_as_its_value_and_no_near_miss_is(value):
    sign, top = "-" if value < 0 else "", abs(value.numerator)
    gold = f"{sign}\\frac{{{top}}}{{{value.denominator}}}"
    for kind, text in answer_forms.rewritings(gold).items():
        if kind != "sentence":
            assert parse_number(text) is not None, (kind, text)
            assert parse_number(text).value / (100 if kind == "percent" else 1) == value, (kind, text)
    for kind, text in answer_forms.perturbations(gold).items():
        found = parse_number(text)
        assert found is None or found.value != value, (kind, text)


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
@settings(max_examples=150, deadline=None)
def test_thousands_decimals_and_powers_of_ten_are_read_exactly(value, places):
    exact = Fraction(value, 10**places)
    digits = str(abs(value)).zfill(places + 1)
    whole, rest = digits[: len(digits) - places], digits[len(digits) - places :]
    sign = "-" if value < 0 else ""
    for mark in (",", "{,}", "\\,", ",\\!"):
        text = f"{sign}{int(whole):,}".replace(",", mark) + (f".{rest}" if rest else "")
        assert parse_number(text).value == exact, text
    assert parse_number(f"{value} \\times 10^{{-{places}}}").value == exact
    assert parse_number(f"x = {sign}{whole}.{rest}0").value == exact


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("3 < x \\le 4", "(3,4]", 1),
        ("4 \\ge x > 3", "(3,4]", 1),
        ("3 < x < 4", "(3,4]", 0),
        ("3 < y \\le 4", "3 < x \\le 4", 0),
        ("[3, 4)", "(3,4]", 0),
        ("x \\in (3,4]", "(3,4]", 1),
        ("x > 2", "(2,\\infty)", 1),
        ("x < 2 \\text{ or } x > 3", "(-\\infty,2) \\cup (3,\\infty)", 1),
        ("52_{8}", "52_8", 1),
        ("52", "52_8", 1),
        ("52_9", "52_8", 0),
        ("42", "52_8", 0),
        ("(\\frac{2(3)}{2}, 1)", "(3, 1)", 1),
        ("2(3)", "5", 0),
        ("10x - 14y = 8", "5x - 7y = 4", 1),
        ("10x - 14y = 8", "5x + 7y = 4", 0),
        ("1.8 \\times 10^{1}", "18", 1),
        ("The answer is $\\text{even}$.", "\\text{even}", 1),
        ("\\textbf{(B)}", "\\text{(B)}", 1),
        ("(C) 5", "\\text{(B)}", 0),
        ("x+y", "x-y", 0),
        ("x-y", "x-y", 1),
        ("x/y", "x-y", 0),
        ("(3,10)", "3:10", 0),
        ("3:10", "3:10", 1),
    ],
)
def test_grade_reads_inequalities_bases_products_equations_and_letters(answer, reference, expected):
    score = grade(f"so \\boxed{{{answer}}}", reference, "auto")
    assert (score.value, score.scorable) == (expected, True)
