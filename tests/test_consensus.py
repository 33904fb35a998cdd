"""cons@k: answers vote together when the task's own grader takes them for one, and its verdict is the grader's."""

import json
import math
import time

import pytest

from r1jax.data.problems import Problem
from r1jax.evals import benchmarks, consensus
from r1jax.evals.benchmarks import Response
from r1jax.rewards.answers.extraction import reference_answer
from r1jax.rewards.pool import RewardPool
from r1jax.schema import RewardConfig, replace

# (reference, another spelling of it, whether the grader takes the spelling for the reference)
SPELLINGS = [
    ("#### 72", "72", True),
    ("#### 72", "72.0", True),
    ("#### 72", "72 dollars", True),
    ("\\boxed{72}", "\\$72", True),
    ("72", "\\boxed{72}", True),
    ("72", "seventy-two", True),
    ("72", "seventy-three", False),
    ("1,234", "1234", True),
    ("1234", "1{,}234", True),
    ("0.5", "1/2", True),
    ("0.5", "\\frac{1}{2}", True),
    ("\\frac12", "\\dfrac{1}{2}", True),
    ("\\frac{1}{2}", "0.50", True),
    ("0.5", "50\\%", True),
    ("50%", "50", True),
    ("1\\frac{4}{5}", "9/5", True),
    ("-3", "−3", True),
    ("2.5e3", "2500", True),
    ("3 \\times 10^2", "300", True),
    ("90^\\circ", "90", True),
    ("\\frac{\\sqrt3}{2}", "\\sqrt{3}/2", True),
    ("\\frac{\\sqrt{3}}{2}", "\\frac12 \\sqrt{3}", True),
    ("\\sqrt{12}", "2\\sqrt{3}", True),
    ("2\\sqrt{3}", "3\\sqrt{2}", False),
    ("(1,2)", "(1, 2)", True),
    ("(1,2)", "(2,1)", False),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)", True),
    ("x+1", "1+x", True),
    ("x+1", "x-1", False),
    ("x^2 + 2x + 1", "(x+1)^2", True),
    ("2 \\cdot 3x", "6x", True),
    ("\\{1,2,3\\}", "\\{3,2,1\\}", True),
    ("[0, 1)", "0 \\le x < 1", True),
    ("x > 2", "(2, \\infty)", True),
    ("[0, 1)", "[0, 1]", False),
    ("\\pi", "3.14", False),
    ("2\\pi", "\\pi \\cdot 2", True),
    ("x = 5", "5", True),
    ("5", "x = 5", True),
    ("\\text{Monday}", "Monday", True),
    ("east", "\\text{East}", True),
    ("52_8", "52", True),
    ("3:45", "3:45", True),
    ("\\text{(B)}", "B", True),
    ("10 \\text{ cm}", "10", True),
    ("$7$", "7.", True),
]
WRONG = "-987654"


def graded(asked: list[tuple[Problem, str]], reward: RewardConfig, truncated: bool = False) -> list[Response]:
    """Returns texts as responses to their problems, with the grader's own verdicts."""
    drawn = [Response(problem, text, len(text), truncated, {}, True) for problem, text in asked]
    with RewardPool(reward) as pool:
        scores = pool.score([response.request() for response in drawn])
    return [replace(r, parts=score.parts, scorable=score.scorable) for r, score in zip(drawn, scores, strict=True)]


def tagged(*answers: str) -> list[str]:
    return [f"<think> hm </think> <answer> {answer} </answer>" for answer in answers]


def voted(task: str, reference: str, texts: list[str], prompt: str = "q", **more) -> float:
    """Returns cons@k of one problem."""
    reward = RewardConfig(**more)
    problem = Problem("p", task, prompt, reference)
    return benchmarks.vote(graded([(problem, text) for text in texts], reward), len(texts), reward)["p"]


def verdicts_of(rows: list[tuple[str, list[str]]]) -> tuple[list[list[float]], list[float]]:
    """Returns (the grader's verdicts on the samples, cons@k) of problems {reference, answers}, all graded at once."""
    reward, size = RewardConfig(), len(rows[0][1])
    problems = [Problem(f"p{number}", "math", "q", reference) for number, (reference, _) in enumerate(rows)]
    asked = [(p, text) for p, (_, answers) in zip(problems, rows, strict=True) for text in tagged(*answers)]
    responses = graded(asked, reward)
    accuracies = [r.parts["accuracy"] for r in responses]
    groups = [accuracies[i : i + size] for i in range(0, len(accuracies), size)]
    return groups, list(benchmarks.vote(responses, size, reward).values())


def test_cons_at_k_is_the_graders_verdict_where_all_samples_write_the_same():
    found, votes = verdicts_of([(reference, [spelling] * 3) for reference, spelling, _ in SPELLINGS])
    assert [accuracies[0] == 1.0 for accuracies in found] == [right for _, _, right in SPELLINGS]
    assert votes == [accuracies[0] for accuracies in found]


def test_right_answers_in_several_spellings_outvote_a_wrong_one_that_is_as_frequent_as_each():
    rows = [
        (ref, [WRONG, reference_answer(ref), other, reference_answer(ref), WRONG])
        for ref, other, right in SPELLINGS
        if right
    ]
    found, votes = verdicts_of(rows)
    assert all(accuracies == [0.0, 1.0, 1.0, 1.0, 0.0] for accuracies in found)
    assert votes == [1.0] * len(rows)


def test_wrong_answers_in_several_spellings_outvote_a_right_one_that_is_more_frequent_than_each():
    rows = [("-987654", [WRONG, WRONG, WRONG, *[ref, spelling] * 2]) for ref, spelling, right in SPELLINGS if right]
    found, votes = verdicts_of(rows)
    assert all(accuracies == [1.0] * 3 + [0.0] * 4 for accuracies in found)
    assert votes == [0.0] * len(rows)


def test_wrong_answers_that_are_not_equal_do_not_vote_together():
    rows = [("-987654", [WRONG, WRONG, WRONG, *[ref, spelling] * 2]) for ref, spelling, right in SPELLINGS if not right]
    assert verdicts_of(rows)[1] == [1.0] * len(rows)


OPTIONS = "Which?\nA. one\nB. two\nC. three\nD. four"


@pytest.mark.parametrize(
    ("task", "reference", "answers", "prompt", "expected"),
    [
        ("mcq", "B", ["A", "B", "two", "(A)", "B."], OPTIONS, 1.0),
        ("mcq", "B", ["B", "B", "A", "one", "(A)"], OPTIONS, 0.0),
        ("mcq", "B", ["A or C", "neither", "all", "B"], OPTIONS, 1.0),  # what names no one option does not vote
        ("linear", "7", ["7", "8", "8.0", "7", "seven", "07"], "q", 1.0),
        ("linear", "7", ["7", "8", "8.0", "7", "8 "], "q", 0.0),
        ("countdown", '{"numbers": [2, 3, 4], "target": 10}', ["2*3+4", "4+3*2", "2+3+4", "2+3+4"], "q", 1.0),
        ("countdown", '{"numbers": [2, 3, 4], "target": 10}', ["2*3+4", "4-3+2", "2+4-3", "2-3+4"], "q", 0.0),
        ("code_io", "[1, 2]", ["[1,2]", "(1, 2)", "[3]", "[3]", "[ 3 ]", "[1, 2]", "[1,  2]"], "q", 1.0),
        ("code_io", "[1, 2]", ["[1,2]", "(1, 2)", "[3]", "(3,)", "[ 3 ]"], "q", 0.0),
        ("code_io", "1", ["1", "1.0", "1.0", "`1`", "1.00"], "q", 0.0),
    ],
)
def test_each_task_votes_on_what_its_grader_reads(task, reference, answers, prompt, expected):
    assert voted(task, reference, tagged(*answers), prompt) == expected


def test_what_is_no_answer_does_not_vote_and_a_problem_without_votes_is_wrong():
    assert voted("math", "5", ["no answer at all", "<think> 9 <answer> 9", *tagged("5")]) == 1.0
    assert voted("math", "5", ["none", "none"]) == 0.0


def test_truncated_samples_do_not_vote():
    reward, problem = RewardConfig(), Problem("p", "math", "q", "5")
    drawn = graded([(problem, text) for text in tagged("6", "6")], reward, truncated=True)
    drawn += graded([(problem, text) for text in tagged("5")], reward)
    assert benchmarks.vote(drawn, 3, reward) == {"p": 1.0}


def test_answers_are_looked_for_where_the_reward_looks_for_them():
    boxed = ["<answer> 6 </answer> \\boxed{5}"] * 2
    assert voted("math", "5", boxed) == 0.0
    assert voted("math", "5", boxed, extraction="boxed") == 1.0


def test_tasks_without_equal_answers_and_ungradable_problems_are_left_out():
    code = json.dumps({"kind": "python-asserts", "setup": "", "asserts": ["assert f(1) == 1"]})
    reward = RewardConfig(graders=("essay=json:loads",))
    drawn = [
        Response(Problem("c", "code", "q", code), "def f(x): return x", 1, False, {"accuracy": 1.0}, True),
        Response(Problem("e", "essay", "q"), "text", 1, False, {"accuracy": 0.5}, True),
        Response(Problem("m", "math", "q", "7"), "<answer> 7 </answer>", 1, False, {"accuracy": 0.0}, False),
        Response(Problem("n", "math", "q", "7"), "<answer> 7 </answer>", 1, False, {"accuracy": 1.0}, True),
    ]
    found = benchmarks.vote(drawn, 1, reward)
    assert {name: math.isnan(verdict) for name, verdict in found.items()} == {
        "c": True,
        "e": True,
        "m": True,
        "n": False,
    }
    assert found["n"] == 1.0
    assert not consensus.votes_of("math", RewardConfig(graders=("math=json:loads",), override_graders=True))


def test_a_slow_comparison_ends_at_its_deadline_and_its_answers_stay_apart():
    slow = ["9^{9^{9^{9}}}", "9^{9^{9^{9}}} + 1"]
    reward, problem = RewardConfig(deadline_s=1.0), Problem("p", "math", "q", "7")
    parts = [{"accuracy": 1.0}, {"accuracy": 0.0}, {"accuracy": 0.0}]
    drawn = [Response(problem, t, 1, False, p, True) for t, p in zip(tagged("7", *slow), parts, strict=True)]
    started = time.monotonic()
    assert benchmarks.vote(drawn, 3, reward) == {"p": 1.0}
    assert time.monotonic() - started < 30


def test_nothing_is_compared_where_comparisons_cannot_change_the_verdict(monkeypatch):
    monkeypatch.setattr(consensus, "RewardPool", None)  # no comparison can be made
    drawn = [
        Response(Problem("p", "math", "q", "7"), text, 1, False, {"accuracy": accuracy}, True)
        for text, accuracy in zip(tagged("7", "7.0", "8", "9", "10"), (1.0, 1.0, 0.0, 0.0, 0.0), strict=True)
    ]
    assert benchmarks.vote(drawn[:4][:3], 3, RewardConfig()) == {"p": 1.0}
    wrong = [Response(r.problem, r.text, 1, False, {"accuracy": 0.0}, True) for r in drawn]
    assert benchmarks.vote(wrong, 5, RewardConfig()) == {"p": 0.0}
    with pytest.raises(TypeError):
        benchmarks.vote(drawn, 5, RewardConfig())
