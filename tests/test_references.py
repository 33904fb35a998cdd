import json
import sys

import pytest
from small import problems_of

from r1jax.data import jsonl
from r1jax.recipe import parts, problems
from r1jax.rewards import references
from r1jax.rewards.score import RewardRequest
from r1jax.schema import Config, DataConfig, RewardConfig, parts_of
from r1jax.tools import grade

GOOD = [("math", "#### 72"), ("math", "(3, 4]"), ("mcq", "B"), ("linear", "7"), ("code_io", "[1]")]
GOOD += [("countdown", '{"numbers": [1, 2], "target": 3}')]
BAD = [("math", ""), ("math", "\\frac{1}{"), ("math", "see the graph above"), ("mcq", "B or C"), ("countdown", "3")]
BAD += [("reasoning_gym", '{"family": "chess"}')]


def requests(cases):
    return [RewardRequest(f"{task}-{place}", task, "", "", reference) for place, (task, reference) in enumerate(cases)]


def test_check_names_every_reference_that_no_answer_can_be_graded_by():
    report = references.check(requests(GOOD + BAD), RewardConfig())
    assert (report.checked, len(report.unscorable)) == (12, 6)
    assert list(report.unscorable) == [request.id for request in requests(GOOD + BAD)[6:]]
    assert report.rate == 0.5
    assert report.line().startswith(
        "references: 6 of 12 can be graded (50.00%); unscorable, left out of every statistic: math-6, "
    )
    assert report.line().endswith("countdown-10 and 1 more (the reference is empty)")


def test_check_does_not_read_responses_nor_tasks_without_a_reference():
    assert references.check(requests([("general", ""), ("safety", "")]), RewardConfig()).checked == 0
    hostile = RewardRequest("a", "math", "", "\\boxed{9^{9^{9^{9}}}}", "\\sqrt{2}", truncated=True)
    report = references.check([hostile], RewardConfig(deadline_s=30.0))
    assert (report.checked, report.unscorable, report.line()) == (1, {}, "references: 1 of 1 can be graded (100.00%)")


def test_a_reference_that_takes_too_long_is_reported_and_not_waited_for():
    report = references.check(
        requests([("math", "9^{9^{9^{9}}}"), ("math", "\\sqrt{2}")]), RewardConfig(deadline_s=5.0)
    )
    assert list(report.unscorable) == ["math-0"]
    assert "too large" in report.unscorable["math-0"]


TRIED = {"kind": "python-asserts", "asserts": ["for x in range(3): assert f(x) == x"]}
VAIN = {"kind": "python-asserts", "asserts": ["try:\n    assert f(1) == 2\nexcept Exception:\n    pass"]}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux's namespaces")
def test_tests_that_every_program_passes_are_reported_with_those_that_cannot_be_read():
    tests = {"tried": TRIED, "vain": VAIN, "checker": {"inputs": ["1"], "outputs": ["1"], "checker": "any"}}
    asked = [RewardRequest(name, "code", "", "", json.dumps(given)) for name, given in tests.items()]
    report = references.check(asked, RewardConfig())
    assert (report.checked, list(report.unscorable)) == (3, ["vain", "checker"])
    assert report.unscorable["vain"].startswith("they check nothing")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux's namespaces")
def test_a_row_whose_tests_check_nothing_is_refused_before_a_run(tmp_path):
    rows = [{"id": name, "task": "code", "prompt": "Write f.", "tests": VAIN} for name in ("a", "b")]
    jsonl.write(tmp_path / "in.jsonl", [*rows, {"id": "c", "task": "code", "prompt": "p", "tests": TRIED}])
    config = Config(data=DataConfig(path=str(tmp_path / "in.jsonl")))
    with pytest.raises(
        ValueError, match=r"in.jsonl, line 1 \(a\): field 'tests' cannot be used: .*\(so are those of b\)"
    ):
        problems.source(parts_of(parts.PromptParts, config))


def test_a_letter_that_is_the_gold_too_often_is_told():
    prompt = "Which?\nA. 1\nB. 2\nC. 3\nD. 4"
    even = [RewardRequest(str(n), "mcq", prompt, "", "ABCD"[n % 4]) for n in range(40)]
    assert references.check(even, RewardConfig()).warnings == ()
    uneven = [RewardRequest(str(n), "mcq", prompt, "", "B" if n < 30 else "ABCD"[n % 4]) for n in range(40)]
    assert references.check(uneven, RewardConfig()).warnings == (
        "multiple choice: 32 of 40 golds are B, whose share would be 10: always saying B is paid; shuffle the options",
    )
    assert references.check(uneven[:15], RewardConfig()).warnings == ()


def test_problems_of_a_file_are_reported_before_anything_is_sampled(tmp_path, capsys):
    rows = [
        {"id": f"a{n}", "task": "math", "prompt": "p", "answer": "\\frac{1}{" if n == 3 else str(n)} for n in range(20)
    ]
    jsonl.write(tmp_path / "in.jsonl", rows)
    found = problems.source(parts_of(parts.PromptParts, Config(data=DataConfig(path=str(tmp_path / "in.jsonl")))))
    assert len(found.training()[0][0]) + len(found.held_out()) == 20  # reported, not dropped
    expected = f"{tmp_path}/in.jsonl: references: 19 of 20 can be graded (95.00%); unscorable, left out of every statistic: a3 ("
    assert capsys.readouterr().err.startswith(expected)


def test_grade_reports_its_references_first(tmp_path, capsys):
    rows = [{"id": n, "task": "math", "reference": reference, "response": "5"} for n, reference in enumerate(["5", ""])]
    jsonl.write(tmp_path / "in.jsonl", rows)
    config = Config(data=DataConfig(path=str(tmp_path / "in.jsonl")), output=str(tmp_path / "out.jsonl"))
    assert grade.run(config, "")["scorable"] == 1
    assert "references: 1 of 2 can be graded (50.00%)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gsm8k_test", "math500", "svamp", "cmath"])
def test_references_of_real_data_can_all_be_graded(shared_data, name):
    rows = [json.loads(line) for line in (shared_data / f"{name}.jsonl").read_text().splitlines()]
    found = problems_of(rows)
    cases = [RewardRequest(prompt.id, prompt.task, prompt.text, "", prompt.reference) for prompt in found]
    report = references.check(cases, RewardConfig(deadline_s=30.0))
    assert (report.checked, report.unscorable) == (len(rows), {})
