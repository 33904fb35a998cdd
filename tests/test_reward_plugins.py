"""Claims about graders of one's own: by dotted path or file, checked before a run, run in the workers."""

import textwrap

import pytest

from r1jax import launch
from r1jax.rewards import compose, plugins
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig

SOURCE = """
import os
from r1jax.rewards.score import Score

def shout(request, config):
    return Score(float(request.response == request.reference.upper()), {}, True, f"{config.workers} {os.getpid()}")

def valued(request, config):
    return Score(float(request.response), {}, True, "")

def counts(request, config):
    return 1.0

def one_argument(request):
    return None

def three_arguments(request, config, more):
    return None

constant = 5
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own_graders.py"
    path.write_text(textwrap.dedent(SOURCE))
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    return path


def request(task, response, reference="yes", **more):
    return RewardRequest("sample-1", task, "Say yes.", response, reference, **more)


def test_a_file_grades_in_the_workers_beside_the_built_in_tasks(file):
    config = RewardConfig(workers=1, graders=(f"shout={file}:shout",), format=0.0)
    with RewardPool(config) as pool:
        scores = pool.score([request("shout", "YES"), request("shout", "yes"), request("math", "\\boxed{5}", "5")])
    assert [score.value for score in scores] == [1.0, 0.0, 1.0]
    assert scores[0].detail.startswith("1 ")  # it got the config


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dotted_path_grades_in_a_process_of_its_own_whatever_the_number_of_workers(file, monkeypatch, workers):
    monkeypatch.syspath_prepend(str(file.parent))
    config = RewardConfig(workers=workers, graders=("shout=own_graders:shout",))
    with RewardPool(config) as pool:
        [score] = pool.score([request("shout", "YES")])
        assert pool.take_usage().workers_started >= 1
    assert score.parts["accuracy"] == 1.0


def test_a_truncated_sample_of_ones_own_task_has_accuracy_0(file):
    config = RewardConfig(graders=(f"shout={file}:shout",))
    assert compose.score(request("shout", "YES", truncated=True), config).parts["accuracy"] == 0.0


def test_a_grader_replaces_a_built_in_one_only_when_told_to(file):
    own = (f"linear={file}:shout",)
    with pytest.raises(ValueError, match="would replace the built-in grader of 'linear'.*override_graders=true"):
        RewardPool(RewardConfig(graders=own))
    config = RewardConfig(graders=own, override_graders=True)
    assert compose.quick(request("linear", "YES"), config) is None  # no more in the trainer
    with RewardPool(config) as pool:
        assert pool.score([request("linear", "YES")])[0].parts["accuracy"] == 1.0


@pytest.mark.parametrize("response", ["nan", "inf", "-0.1", "1.1"])
def test_a_value_outside_0_to_1_is_unscorable_and_named(file, response):
    with RewardPool(RewardConfig(graders=(f"own={file}:valued",))) as pool:
        good, bad = pool.score([request("own", "0.25"), request("own", response)])
    assert (good.parts["accuracy"], good.scorable, bad.scorable) == (0.25, True, False)
    assert "the grader of 'own' returned the value" in bad.detail and "'sample-1'" in bad.detail


def test_what_is_no_score_is_unscorable_and_named(file):
    with RewardPool(RewardConfig(graders=(f"own={file}:counts",))) as pool:
        [score] = pool.score([request("own", "a")])
    assert score.detail == (
        "sample 'sample-1': the grader raised TypeError: the grader of 'own' returned float, not a Score"
    )


MISTAKES = {
    "own": "'own' is not TASK=PACKAGE.MODULE:FUNCTION or TASK=FILE.py:FUNCTION",
    "own=json": "is not TASK=",
    "=json:loads": "is not TASK=",
    "own=json:": "is not TASK=",
    "own=no_such_package.module:f": "cannot be loaded (ModuleNotFoundError: No module named 'no_such_package')",
    "own={tmp}/nowhere.py:f": "nowhere.py)",
    "own={tmp}/own_graders.py:absent": "has no function 'absent')",
    "own={tmp}/broken.py:f": "No module named 'nowhere_to_be_found')",
    "own={tmp}/wrong.py:f": "cannot be loaded (SyntaxError: ",
    "own={tmp}/own_graders.py:one_argument": "is no grader (too many positional arguments); it is called as f(request, ",
    "own={tmp}/own_graders.py:three_arguments": "is no grader (missing a required argument: 'more')",
    "own={tmp}/own_graders.py:constant": "is no grader (5 is not a callable object)",
    "math={tmp}/own_graders.py:shout": "would replace the built-in grader of 'math'",
}


@pytest.mark.parametrize("entry", MISTAKES)
def test_a_mistake_is_one_line_before_the_run_and_leaves_nothing(file, entry, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "task": "own", "reference": "1", "response": "1"}\n')
    arguments = ["--config=grade", f"--config.data.path={tmp_path}/rows.jsonl", f"--config.output={tmp_path}/out.jsonl"]
    graders = f"--config.reward.graders=('{entry.format(tmp=file.parent)}',)"
    assert launch.main([*arguments, graders]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: config.reward.graders: ") and MISTAKES[entry] in line
    assert not (tmp_path / "out.jsonl").exists()


def test_a_task_given_twice_and_a_task_that_nothing_grades_are_errors(file):
    with pytest.raises(ValueError, match="task 'own' is given twice"):
        plugins.parse((f"own={file}:shout", "own=json:loads"))
    config = RewardConfig(graders=(f"own={file}:shout",))
    compose.check(config, ("own", "math"))
    with pytest.raises(ValueError, match="task 'poetry' has no grader; known tasks: math, .*own"):
        compose.check(config, ("own", "poetry"))
