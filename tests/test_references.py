import json

import pytest
from small import problems_of

from r1jax.data import jsonl
from r1jax.rewards import references
from r1jax.rewards.score import RewardRequest
from r1jax.schema import Config, DataConfig, RewardConfig
from r1jax.stages import grade, problems

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


def test_problems_of_a_file_are_reported_before_anything_is_sampled(tmp_path, capsys):
    rows = [
        {"id": f"a{n}", "task": "math", "prompt": "p", "answer": "\\frac{1}{" if n == 3 else str(n)} for n in range(20)
    ]
    jsonl.write(tmp_path / "in.jsonl", rows)
    found = problems.source(Config(data=DataConfig(path=str(tmp_path / "in.jsonl"))))
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
