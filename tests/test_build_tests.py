"""Built tests accept all accepted programs, break the wrong ones, and are few; generators are run in the sandbox only."""

import json
import shutil
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
from code_problems import LONGEST_RUN, MAXIMUM_SUM, PLACE_OF_MAXIMUM, PROBLEMS
from small import problems_of

from r1jax import launch
from r1jax.data import jsonl
from r1jax.rewards.code import cases as code_cases
from r1jax.rewards.code import tests as code_tests
from r1jax.rewards.sandbox.attack import open_sandbox
from r1jax.rewards.score import RewardRequest
from r1jax.schema import BuildTestsConfig, RewardConfig, SandboxConfig
from r1jax.tools import build_tests

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux's namespaces")

REWARD = RewardConfig(deadline_s=120.0, sandbox=SandboxConfig(wall_s=15.0, cpu_s=2.0))
FLAGS = [
    *("--config.build_tests.inputs_per_kind=1", "--config.build_tests.min_tests=4"),
    *("--config.reward.sandbox.wall_s=15", "--config.reward.sandbox.cpu_s=2", "--config.reward.deadline_s=120"),
]


def rows() -> list[dict]:
    """Returns the problems, without C++ programs where there is no compiler."""
    if shutil.which("g++"):
        return PROBLEMS
    return [{**row, "accepted": [given for given in row["accepted"] if isinstance(given, str)]} for row in PROBLEMS]


def arguments(folder, *more) -> list[str]:
    paths = [f"--config.data.path={folder / 'in.jsonl'}", f"--config.output={folder / 'out.jsonl'}"]
    return ["--config=build_tests", *paths, f"--workdir={folder / 'work'}", *FLAGS, *more]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Returns (rows by id, figures) of the stage on all problems."""
    folder = tmp_path_factory.mktemp("build")
    jsonl.write(folder / "in.jsonl", rows())
    assert launch.main(arguments(folder, f"--json={folder / 'figures.json'}")) == 0
    made = {row["id"]: row for row in jsonl.read(folder / "out.jsonl", required=("id", "prompt", "tests"))}
    return made, json.loads((folder / "figures.json").read_text())


def value(row: dict, program: str | dict) -> float:
    """Returns the accuracy of a program by the grader of task code."""
    [prompt] = problems_of([row])
    given = build_tests.source(program, "")
    response = f"```{given.language}\n{given.text}```"
    score = code_tests.accuracy(RewardRequest(row["id"], "code", prompt.text, response, prompt.reference), REWARD)
    assert score.scorable
    return score.value


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem["id"])
def test_built_tests_pass_every_accepted_program_and_break_every_wrong_one(built, problem):
    row = built[0][problem["id"]]
    accepted = [given for given in problem["accepted"] if isinstance(given, str) or shutil.which("g++")]
    assert [value(row, program) for program in accepted] == [1.0] * len(accepted)
    assert [value(row, program) for program in problem["wrong"]] == [0.0] * len(problem["wrong"])
    assert row["built"]["unbroken"] == [] and len(row["tests"]["cases"]) >= 4


def test_inputs_on_which_accepted_programs_disagree_are_dropped(built):
    row = built[0][PLACE_OF_MAXIMUM["id"]]
    assert row["built"]["dropped"] >= 2
    for case in row["tests"]["cases"]:
        numbers = case["input"].split()[1:]
        assert numbers.count(max(numbers, key=int)) == 1
    assert built[0][MAXIMUM_SUM["id"]]["built"]["dropped"] == 0


def test_figures_count_rows_tests_and_broken_programs(built):
    made, figures = built
    assert (figures["rows"], figures["rows_with_tests"]) == (4, 4)
    assert figures["tests"] == sum(len(row["tests"]["cases"]) for row in made.values())
    assert (figures["wrong_broken"], figures["wrong_unbroken"]) == (15, 0)


def test_wrong_program_that_no_input_breaks_is_told():
    right = MAXIMUM_SUM["accepted"]
    sources = [
        tuple(code_tests.SourceCode(text, "python") for text in texts) for texts in (right, [right[0], "print(1)"])
    ]
    problem = code_cases.CodeProblem("p", "", *sources, (MAXIMUM_SUM["generators"][0],))
    found = code_cases.build(problem, BuildTestsConfig(inputs_per_kind=1, min_tests=1), REWARD)
    assert (found.broken, found.unbroken, len(found.cases)) == ((1,), (0,), 1)


# Generators.

HOSTILE_GENERATORS = {
    "exit": "import sys\nsys.exit(0)",
    "no function": "x = 1",
    "endless": "def make_input(kind, rng):\n    while True: pass",
    "no text": "def make_input(kind, rng): return 7",
    "chance of its own": "import secrets\ndef make_input(kind, rng): return secrets.token_hex(8)",
    "huge": "def make_input(kind, rng): return 'x' * 1001",
    "raises": "def make_input(kind, rng): raise ValueError(kind)",
    "syntax": "def make_input(kind, rng) return 1",
    "answer forged": "import sys\nsys.__stdout__.write('[]')\nsys.__stdout__.flush()\nimport os\nos._exit(0)",
}


@pytest.mark.parametrize("name", HOSTILE_GENERATORS)
def test_useless_generator_gives_no_input_and_the_others_go_on(name):
    config = BuildTestsConfig(inputs_per_kind=1, max_input_characters=1000)
    generators = (HOSTILE_GENERATORS[name], "def make_input(kind, rng): print('noise'); return kind")
    problem = code_cases.CodeProblem("p", "", (), (), generators)
    sandbox = open_sandbox(SandboxConfig(wall_s=10.0, cpu_s=1.0))
    assert code_cases.generated(problem, config, sandbox, 0) == list(code_cases.KINDS)


def test_inputs_are_keyed_by_seed_and_problem():
    config, sandbox = BuildTestsConfig(inputs_per_kind=2), open_sandbox(REWARD.sandbox)
    problem = code_cases.CodeProblem("p", "", (), (), tuple(LONGEST_RUN["generators"]))
    first = code_cases.generated(problem, config, sandbox, 0)
    assert (
        first == code_cases.generated(problem, config, sandbox, 0) != code_cases.generated(problem, config, sandbox, 1)
    )
    assert len(first) == len(set(first)) > len(code_cases.KINDS)


def test_generator_prompt_names_every_kind_and_holds_the_statement():
    text = code_cases.prompt("Add {a} and {b}.")
    assert "Add {a} and {b}." in text and all(f"- {kind}:" in text for kind in code_cases.KINDS)


# The choice of tests.


@hypothesis.given(
    st.lists(st.frozensets(st.integers(0, 6), max_size=4), max_size=12), st.integers(1, 5), st.integers(0, 99)
)
@hypothesis.settings(deadline=None)
def test_cover_breaks_all_that_any_test_breaks_and_holds_no_more_than_needed(breaks, least, salt):
    sizes = [(salt * 7 + n * 13) % 10 for n in range(len(breaks))]
    chosen = code_cases.cover(breaks, sizes, least)
    everything = frozenset().union(*breaks)
    assert chosen == sorted(set(chosen)) and frozenset().union(*(breaks[n] for n in chosen)) == everything
    assert len(chosen) >= min(least, len(breaks))
    assert len(chosen) <= max(least, len(everything))


def test_cover_takes_the_widest_test_first_and_the_smaller_of_two():
    breaks = [frozenset({0}), frozenset({1}), frozenset({0, 1, 2}), frozenset({3}), frozenset({3})]
    assert code_cases.cover(breaks, [1, 1, 9, 5, 4], 1) == [2, 4]


# The stage.


@pytest.mark.parametrize(
    "change, message",
    [
        ({"accepted": ["print(1)"]}, "'accepted' needs two programs or more"),
        ({"wrong": [7]}, "a program must be Python text or"),
        ({"generators": "x"}, "'generators' must be a list"),
        ({"generators": []}, "no model is given to write them"),
        ({"id": "maximum-sum", "again": True}, "was used before"),
        (
            {"accepted": [{"language": "cpp", "text": "int main() {"}, "print(1)"]},
            "accepted program 0: it does not compile",
        ),
    ],
)
def test_bad_row_is_named_in_one_line_and_nothing_is_written(tmp_path, capsys, change, message):
    extra = [MAXIMUM_SUM] if change.pop("again", False) else []
    jsonl.write(tmp_path / "in.jsonl", [*extra, {**MAXIMUM_SUM, **change}])
    assert launch.main(arguments(tmp_path)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.jsonl").exists()


def test_generators_are_the_python_programs_of_replies():
    program = MAXIMUM_SUM["generators"][0].strip() + "\n"
    reply = f"<think>```python\nx\n```</think>\nHere:\n```python\n{program}```"
    assert build_tests.generators_of([reply, None, "```cpp\nx\n```", reply]) == (program,)
