import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from r1jax.rewards.compose import PART_NAMES
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

HANGS = "\\boxed{9^{9^{9^{9}}}}"  # sympy computes the power


def request(name, response, reference):
    return RewardRequest(name, "math", "What is it?", response, reference)


def symbolic(name, correct=True):
    return request(name, "\\boxed{\\sqrt{12}}", "2\\sqrt{3}" if correct else "3\\sqrt{3}")


def crash(request, config):
    if request.response == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if request.response == "raise":
        raise RuntimeError("two\nlines")
    return Score(1.0, {}, True, " ".join(sorted({"jax", "sympy"} & set(sys.modules))))


@pytest.mark.parametrize("workers", [0, 2])
def test_score_returns_one_score_per_request_in_order(workers):
    requests = [
        symbolic("a"),
        request("b", "<answer>5</answer>", "5"),
        symbolic("c", False),
        request("d", "<answer>6</answer>", "5"),
    ]
    with RewardPool(RewardConfig(workers=workers)) as pool:
        assert [score.parts["accuracy"] for score in pool.score(requests)] == [1.0, 1.0, 0.0, 0.0]
        assert pool.score([]) == []


def test_a_hanging_sample_is_unscorable_and_the_others_and_the_pool_survive():
    requests = [symbolic("a"), request("slow-7", HANGS, "5"), symbolic("b"), symbolic("c", False)]
    with RewardPool(RewardConfig(workers=0, deadline_s=1.0)) as pool:
        started = time.monotonic()
        scores = pool.score(requests)
        assert time.monotonic() - started < 15.0
        assert [score.scorable for score in scores] == [True, False, True, True]
        assert [score.parts["accuracy"] for score in scores] == [1.0, 0.0, 1.0, 0.0]
        assert scores[1].detail == "sample 'slow-7': grading passed the deadline of 1 s"
        assert tuple(scores[1].parts) == PART_NAMES
        assert pool.score([symbolic("d")])[0].parts["accuracy"] == 1.0


def test_the_batch_deadline_leaves_the_unfinished_samples_unscorable():
    requests = [symbolic("a"), *(request(f"slow-{index}", HANGS, "5") for index in range(3))]
    with RewardPool(RewardConfig(workers=1, deadline_s=60.0, batch_deadline_s=3.0)) as pool:
        scores = pool.score(requests)
        assert [score.scorable for score in scores] == [True, False, False, False]
        assert scores[3].detail == "sample 'slow-2': not graded within the batch deadline of 3 s"
        assert pool.score([symbolic("b")])[0].parts["accuracy"] == 1.0


def test_a_crashed_or_raising_grader_loses_only_its_sample():
    requests = [request(name, name, "") for name in ("fine", "crash", "raise", "good")]
    with RewardPool(RewardConfig(workers=2), score_function=crash) as pool:
        scores = pool.score(requests)
    assert [score.scorable for score in scores] == [True, False, False, True]
    assert scores[1].detail == "sample 'crash': the grader's process ended with code -9"
    assert scores[2].detail == "sample 'raise': the grader raised RuntimeError: two lines"
    assert scores[0].detail == "sympy"  # the worker has sympy loaded and no jax


def test_an_unknown_task_is_an_error_before_anything_is_graded():
    with (
        RewardPool(RewardConfig(workers=1)) as pool,
        pytest.raises(ValueError, match="'x' has task 'poetry'; known tasks: math"),
    ):
        pool.score([RewardRequest("x", "poetry", "", "", "")])


def test_workers_and_deadlines_out_of_range_are_errors():
    with pytest.raises(ValueError, match="deadline_s=0"):
        RewardPool(RewardConfig(deadline_s=0))
    with pytest.raises(ValueError, match="workers=-1"):
        RewardPool(RewardConfig(workers=-1))


SCRIPT = """
import os, sys
print("imported", flush=True)
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig
pool = RewardPool(RewardConfig(workers=1, deadline_s=100.0))
good = RewardRequest("a", "math", "", "\\\\boxed{\\\\sqrt{12}}", "2\\\\sqrt{3}")
print(pool.score([good])[0].parts["accuracy"], flush=True)
if len(sys.argv) > 1:
    import threading, time
    bad = RewardRequest("b", "math", "", "\\\\boxed{9^{9^{9^{9}}}}", "5")
    threading.Thread(target=pool.score, args=([bad],), daemon=True).start()
    time.sleep(1)
    os.kill(os.getpid(), 9)
pool.close()
"""


def run_script(tmp_path, *arguments):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, timeout=60
    )


def test_workers_do_not_import_the_main_module_so_it_needs_no_guard(tmp_path):
    result = run_script(tmp_path)
    assert (result.stdout.split(), result.returncode) == (["imported", "1.0"], 0), result.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's parent-death signal")
def test_no_worker_outlives_a_killed_trainer_even_when_it_hangs(tmp_path):
    started = time.monotonic()
    result = run_script(tmp_path, "killed")  # returns when the last holder of its output, workers included, has ended
    assert result.returncode == -signal.SIGKILL
    assert time.monotonic() - started < 30.0  # the sample's own deadline is 100 s


def test_gradings_begun_apart_are_finished_together_in_order_under_one_batch_deadline():
    with RewardPool(RewardConfig(workers=1, deadline_s=60.0, batch_deadline_s=3.0)) as pool:
        started = time.monotonic()
        begun = [
            pool.begin([symbolic("a"), symbolic("b", False)]),
            pool.begin([symbolic("c"), request("d", HANGS, "5")]),
        ]
        assert time.monotonic() - started < 3.0  # a fork server has to start, but nothing is waited for
        scores = pool.finish(begun)
    assert [score.parts["accuracy"] for score in scores] == [1.0, 0.0, 1.0, 0.0]
    assert [score.scorable for score in scores] == [True, True, True, False]
