import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid

import pytest

from r1jax.rewards import compose, worker
from r1jax.rewards.answers import math_answer
from r1jax.rewards.compose import RULE_PARTS
from r1jax.rewards.pool import Grading, RewardPool
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig


def math(name, response, reference="5"):
    return RewardRequest(name, "math", "What is it?", response, reference)


def symbolic(name, correct=True):
    return math(name, "\\boxed{\\sqrt{12}}", "2\\sqrt{3}" if correct else "3\\sqrt{3}")


class Unreadable(Exception):
    """An exception that pickles and cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one}{two}")


def misbehave(request, config):
    """A grader that does what the response says, a little later, when the pool knows who grades it."""
    if request.response in MISBEHAVIOUR:
        time.sleep(0.2)
    match request.response:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "aborts":
            os.abort()
        case "segfaults":
            ctypes.string_at(0)
        case "exits":
            os._exit(3)
        case "sys.exit":
            sys.exit(0)
        case "interrupts":
            raise KeyboardInterrupt
        case "raises":
            raise RuntimeError("two\nlines")
        case "raises the unreadable":
            raise Unreadable(1, 2)
        case "times out":
            raise TimeoutError("of its own")
        case "returns the unreadable":
            return Score(1.0, {"lock": threading.Lock()}, True, "")
        case "returns nothing":
            return None
        case "exhausts memory":
            bytearray(worker.WORKER_MEMORY_BYTES)
        case "recurses":
            recurse = lambda: recurse()  # noqa: E731
            recurse()
        case "hangs":
            time.sleep(1000)
        case "hangs in C":
            pow(7, 10**9)  # one call that no signal handler of Python's interrupts
        case "server":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(1000)
    value = 0.5 if request.response == "half" else 1.0
    return Score(value, {"accuracy": value}, True, str(os.getpid()))


def odd(response, name=""):
    return RewardRequest(name or response, "math", "", response, "")


def loaded(request, config):
    return Score(1.0, {}, True, " ".join(sorted({"jax", "sympy"} & set(sys.modules))))


@pytest.mark.parametrize("workers", [0, 2])
def test_score_returns_one_score_per_request_in_order(workers):
    requests = [symbolic("a"), math("b", "<answer>5</answer>"), symbolic("c", False), math("d", "<answer>6</answer>")]
    with RewardPool(RewardConfig(workers=workers)) as pool:
        assert [score.parts["accuracy"] for score in pool.score(requests)] == [1.0, 1.0, 0.0, 0.0]
        assert pool.score([]) == []


def busy(seconds):
    """Computes for so many seconds of the processor, whatever `Exception` it meets."""
    ends = time.process_time() + seconds
    while time.process_time() < ends:
        try:
            sum(range(1000))
        except Exception:
            pass


def stubborn(request, config):
    """A grader in the place of the built-in ones: 1 for the response "right", and trouble that a text or a reference names."""
    if "counted" in request.prompt:
        (pathlib.Path(request.prompt.split()[1]) / uuid.uuid4().hex).touch()
    match request.reference if request.reference in TROUBLE else request.response:
        case "computes":
            busy(1000)
        case "computes in C":
            pow(7, 10**9)
        case "sleeps":
            time.sleep(1000)
        case "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exhausts memory":
            bytearray(worker.WORKER_MEMORY_BYTES)
        case "raises":
            raise RuntimeError("two\nlines")
        case "thinks":
            busy(1.0)
            return compose.compose(request, config, Score(1.0, {}, True, ""))
    if request.reference == "unreadable":
        return compose.compose(request, config, Score(0.0, {}, False, "the reference is unreadable"))
    return compose.compose(request, config, Score(float(request.response == "right"), {}, True, ""))


TROUBLE = {
    "computes": "grading passed the deadline of 2 s",
    "computes in C": "grading passed the deadline of 2 s",
    "sleeps": "grading passed the deadline of 2 s",
    "is killed": "the grader's process ended with code -9",
    "exhausts memory": "the grader raised MemoryError",
    "raises": "the grader raised RuntimeError: two lines",
}


@pytest.fixture
def stubborn_math(monkeypatch):
    monkeypatch.setattr(compose, "score", stubborn)


def test_an_answer_that_is_not_decided_is_wrong_and_its_neighbours_are_right(stubborn_math):
    requests = [math(f"right {number}", "right") for number in range(8)]
    requests[4:4] = [math(what, what) for what in TROUBLE]
    with RewardPool(RewardConfig(workers=2, deadline_s=2.0, batch_deadline_s=120.0)) as pool:
        scores = {request.id: score for request, score in zip(requests, pool.score(requests), strict=True)}
        assert pool.score([math("later", "right")])[0].parts["accuracy"] == 1.0
    assert all(score.scorable for score in scores.values())
    assert [name for name, score in scores.items() if score.parts["accuracy"] != 1.0] == list(TROUBLE)
    for what, reason in TROUBLE.items():
        assert scores[what].detail.startswith(f"the answer was not decided: {reason}")
        assert tuple(scores[what].parts) == RULE_PARTS


def test_an_answer_that_is_not_decided_keeps_the_other_parts_of_its_text(stubborn_math):
    config = RewardConfig(workers=1, deadline_s=0.5, language=1.0)
    text = RewardRequest("a", "math", "What is it?", "computes", "5")
    with RewardPool(config) as pool:
        [score] = pool.score([text])
    assert score == compose.compose(text, config, Score(0.0, {}, True, score.detail))
    assert (score.value, score.parts["language"]) == (1.0, 1.0)


def test_a_sample_is_unscorable_when_its_reference_alone_is_not_decided_either(stubborn_math):
    cases = {**TROUBLE, "unreadable": "grading passed the deadline of 2 s"}
    requests = [math(reference, "computes", reference) for reference in cases]
    with RewardPool(RewardConfig(workers=2, deadline_s=2.0, batch_deadline_s=120.0)) as pool:
        scores = pool.score(requests)
    assert not any(score.scorable or any(score.parts.values()) for score in scores)
    for (reference, reason), score in zip(cases.items(), scores, strict=True):
        assert score.detail.startswith(f"sample {reference!r}: {reason}")


def test_a_batch_of_which_half_is_hostile_has_all_its_right_answers_right_by_a_deadline_that_fits_only_them(
    stubborn_math,
):
    batch = [math(f"{kind} {number}", kind, str(number)) for number in range(40) for kind in ("computes", "right")]
    with RewardPool(RewardConfig(workers=2, deadline_s=20.0, batch_deadline_s=15.0)) as pool:
        scores = pool.score(batch)
    assert [score.parts["accuracy"] for score in scores] == [0.0, 1.0] * 40
    assert all(score.scorable for score in scores)
    assert "not decided: not graded within the batch deadline of 15 s" in scores[0].detail


def test_a_slow_answer_is_graded_when_the_others_are_through(stubborn_math):
    batch = [math("slow", "thinks"), *(math(f"{number}", "computes", f"{number}") for number in range(3))]
    with RewardPool(RewardConfig(workers=1, deadline_s=30.0, batch_deadline_s=10.0)) as pool:
        scores = pool.score(batch)
    assert [score.parts["accuracy"] for score in scores] == [1.0, 0.0, 0.0, 0.0]


def test_a_reference_is_asked_about_once_for_all_its_samples_and_batches(stubborn_math, tmp_path):
    def undecided(names, reference="5"):
        prompt = f"counted {tmp_path}"
        scores = pool.score([RewardRequest(name, "math", prompt, "raises", reference, prefill=name) for name in names])
        assert all(score.scorable for score in scores)
        return len(list(tmp_path.iterdir()))

    with RewardPool(RewardConfig(workers=1, deadline_s=0.2)) as pool:  # one turn each, and a probe
        assert [undecided("a"), undecided("bc"), undecided("d", "6")] == [2, 4, 6]


def test_the_batch_deadline_leaves_what_had_no_turn_unscorable(stubborn_math):
    long = "x" * 100_000
    requests = [math("sleeps", "sleeps"), *(math(f"{number}", f"{number}{long}") for number in range(40))]
    with RewardPool(RewardConfig(workers=1, deadline_s=60.0, batch_deadline_s=1.0)) as pool:
        scores = pool.score(requests)
        assert not any(score.scorable for score in scores)
        assert scores[40].detail == "sample '39': not graded within the batch deadline of 1 s"
        assert pool.score([math("later", "right")])[0].parts["accuracy"] == 1.0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_grader_that_fails_in_the_trainer_leaves_its_sample_to_a_worker(monkeypatch, workers):
    def fails(*arguments):
        raise ValueError("of the trainer's process")

    monkeypatch.setattr(math_answer, "quick", fails)
    requests = [math("a", "\\boxed{5}"), RewardRequest("b", "mcq", "A) 1\nB) 2", "\\boxed{B}", "B")]
    with RewardPool(RewardConfig(workers=workers)) as pool:
        assert [score.parts["accuracy"] for score in pool.score(requests)] == [1.0, 1.0]
        with pytest.raises(ValueError, match="'x' has task 'poetry'; known tasks: math"):
            pool.score([RewardRequest("x", "poetry", "", "", "")])


def test_a_score_that_is_missing_moves_no_other_sample_into_its_place():
    scores = [Score(1.0, {}, True, ""), None, Score(0.0, {}, True, "")]
    with RewardPool(RewardConfig()) as pool, pytest.raises(AssertionError, match="sample 'b' has no score"):
        pool.finish([Grading([math(name, "") for name in "abc"], scores, {})])


def test_gradings_begun_apart_are_finished_together_in_order_under_one_batch_deadline(stubborn_math):
    with RewardPool(RewardConfig(workers=1, deadline_s=60.0, batch_deadline_s=4.0)) as pool:
        started = time.monotonic()
        begun = [
            pool.begin([math("a", "right"), math("b", "wrong")]),
            pool.begin([math("c", "right"), math("d", "computes")]),
        ]
        assert time.monotonic() - started < 3.0  # a fork server has to start, but nothing is waited for
        scores = pool.finish(begun)
    assert [score.parts["accuracy"] for score in scores] == [1.0, 0.0, 1.0, 0.0]
    assert [score.scorable for score in scores] == [True] * 4
    assert "batch deadline of 4 s" in scores[3].detail


def test_a_limit_is_kept_whatever_is_caught_and_rings_no_more_afterwards():
    with pytest.raises(worker.OutOfTime):
        worker.within(0.05, busy, 1000)
    assert worker.within(0.05, int, "7") == 7
    assert signal.getitimer(signal.ITIMER_PROF) == signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    busy(0.5)  # past the limit and its kill


def test_a_limit_does_not_interrupt_an_import(tmp_path, monkeypatch):
    source = "import time\nwhile time.process_time() < AT: pass\nDONE = True\n"
    (tmp_path / "slow_module.py").write_text(source.replace("AT", repr(time.process_time() + 0.5)))
    monkeypatch.syspath_prepend(str(tmp_path))

    def imports():
        import slow_module

        busy(1000 if slow_module.DONE else 0)

    with pytest.raises(worker.OutOfTime):
        worker.within(0.05, imports)
    assert sys.modules.pop("slow_module").DONE


MISBEHAVIOUR = {
    "killed": "the grader's process ended with code -9",
    "aborts": "the grader's process ended with code -6",
    "segfaults": "the grader's process ended with code -11",
    "exits": "the grader's process ended with code 3",
    "sys.exit": "the grader raised SystemExit: 0",
    "interrupts": "the grader raised KeyboardInterrupt",
    "raises": "the grader raised RuntimeError: two lines",
    "raises the unreadable": "the grader raised Unreadable: 12",
    "times out": "the grader raised TimeoutError: of its own",
    "returns the unreadable": "the grader raised TypeError: ",
    "returns nothing": "the grader raised AttributeError: ",
    "exhausts memory": "the grader raised MemoryError",
    "recurses": "the grader raised RecursionError: ",
    "hangs": "grading passed the deadline of 1 s",
    "hangs in C": "grading passed the deadline of 1 s",
}


def test_whatever_a_grader_does_concerns_its_own_sample_alone():
    requests = [odd(f"fine {number}") for number in range(8)]
    requests[4:4] = [odd(what) for what in MISBEHAVIOUR]
    with RewardPool(RewardConfig(workers=2, deadline_s=1.0, batch_deadline_s=60.0), misbehave) as pool:
        scores = pool.score(requests)
        assert [s.scorable for s in pool.score([odd(f"later {number}") for number in range(4)])] == [True] * 4
    failed = {request.id: score.detail for request, score in zip(requests, scores, strict=True) if not score.scorable}
    assert failed.keys() == MISBEHAVIOUR.keys()
    for what, reason in MISBEHAVIOUR.items():
        assert failed[what].startswith(f"sample {what!r}: {reason}")
    for what, kind in {"exhausts memory": "MemoryError", "interrupts": "KeyboardInterrupt"}.items():
        assert failed[what] == f"sample {what!r}: the grader raised {kind}"  # without a message


def test_workers_have_sympy_loaded_and_no_jax():
    with RewardPool(RewardConfig(workers=1), loaded) as pool:
        assert pool.score([odd("a")])[0].detail == "sympy"


def test_a_worker_that_is_killed_while_idle_costs_no_sample():
    with RewardPool(RewardConfig(workers=2, batch_deadline_s=60.0), misbehave) as pool:
        idle = {int(score.detail) for score in pool.score([odd(f"fine {number}") for number in range(20)])}
        for process in idle:
            os.kill(process, signal.SIGKILL)
        scores = pool.score([odd(f"later {number}") for number in range(20)])
    assert all(score.scorable for score in scores)
    assert not idle & {int(score.detail) for score in scores}


def test_the_end_of_the_server_that_workers_fork_from_costs_only_what_they_were_grading():
    requests = [odd(f"fine {number}") for number in range(40)]
    requests.insert(20, odd("server"))
    with RewardPool(RewardConfig(workers=1, deadline_s=20.0, batch_deadline_s=60.0), misbehave) as pool:
        scores = pool.score(requests)
        usage = pool.take_usage()
    assert [request.id for request, score in zip(requests, scores, strict=True) if not score.scorable] == ["server"]
    assert usage.workers_started > 1


def test_a_batch_deadline_ends_a_queue_that_the_pipe_to_the_workers_cannot_hold():
    long = "x" * 100_000
    requests = [odd("hangs"), *(odd(f"{number}{long}", f"fine {number}") for number in range(40))]
    with RewardPool(RewardConfig(workers=1, deadline_s=60.0, batch_deadline_s=6.0), misbehave) as pool:
        started = time.monotonic()
        scores = pool.score(requests)
        assert time.monotonic() - started < 40.0
        assert not any(score.scorable for score in scores)
        assert scores[40].detail == "sample 'fine 39': not graded within the batch deadline of 6 s"
        assert pool.score([odd("fine")])[0].scorable


def test_one_hanging_sample_of_512_costs_one_worker_and_no_other_sample():
    requests = [odd(f"fine {number}") for number in range(512)]
    requests[100] = odd("hangs")
    with RewardPool(RewardConfig(workers=2, deadline_s=4.0, batch_deadline_s=120.0), misbehave) as pool:
        scores = pool.score(requests)
        usage = pool.take_usage()
        started, ends = usage.workers_started, time.monotonic() + 20.0
        while started < 3 and time.monotonic() < ends:  # the hang may end last, and its worker be replaced after it
            time.sleep(0.1)
            started += pool.take_usage().workers_started
    assert sum(score.scorable for score in scores) == 511
    assert scores[100].detail == "sample 'hangs': grading passed the deadline of 4 s"
    assert (usage.samples, usage.cache_hits, started) == (512, 0, 3)


def counted(request, config):
    """A grader that leaves a mark each time it runs, in the folder that the prompt names."""
    folder = pathlib.Path(request.prompt)
    (folder / uuid.uuid4().hex).touch()
    if request.response == "raises":
        raise ValueError("bad")
    if request.response == "hangs":
        time.sleep(1000)
    return Score(0.5, {}, True, "")


def test_equal_samples_are_graded_once_in_a_batch_and_in_later_ones(tmp_path):
    def sample(name, response="a", **more):
        return RewardRequest(name, "math", str(tmp_path), response, "", **more)

    with RewardPool(RewardConfig(workers=2), counted) as pool:
        assert [s.value for s in pool.score([sample("1"), sample("2"), sample("3", "b")])] == [0.5] * 3
        assert [s.value for s in pool.finish([pool.begin([sample("4")]), pool.begin([sample("5", "b")])])] == [0.5] * 2
        assert (len(list(tmp_path.iterdir())), pool.take_usage().cache_hits) == (2, 3)
        one, other = pool.begin([sample("8", "d")]), pool.begin([sample("9", "d")])
        assert [pool.finish([grading])[0].value for grading in (one, other)] == [0.5, 0.5]
        assert (len(list(tmp_path.iterdir())), pool.take_usage().cache_hits) == (3, 1)
        differing = [dict(prefill="p"), dict(language="zh"), dict(truncated=True)]
        pool.score([sample("6", **more) for more in differing])
        assert (len(list(tmp_path.iterdir())), pool.take_usage().cache_hits) == (6, 0)


def test_no_failure_is_kept_and_equal_samples_that_fail_are_each_named(tmp_path):
    def sample(name, response):
        return RewardRequest(name, "math", str(tmp_path), response, "")

    config = RewardConfig(workers=1, deadline_s=1.0)
    with RewardPool(config, counted) as pool:
        scores = pool.score([sample("1", "hangs"), sample("2", "hangs"), sample("3", "raises")])
        assert [score.detail for score in scores] == [
            "sample '1': grading passed the deadline of 1 s",
            "sample '2': grading passed the deadline of 1 s",
            "sample '3': the grader raised ValueError: bad",
        ]
        assert len(list(tmp_path.iterdir())) == 2
        pool.score([sample("4", "hangs"), sample("5", "raises")])
        assert len(list(tmp_path.iterdir())) == 4


def test_the_cache_forgets_the_least_recently_used(tmp_path):
    def graded(responses):
        before = len(list(tmp_path.iterdir()))
        pool.score([RewardRequest("x", "math", str(tmp_path), response, "") for response in responses])
        return len(list(tmp_path.iterdir())) - before

    with RewardPool(RewardConfig(workers=1, cache_entries=2), counted) as pool:
        assert [graded(one) for one in ("a", "b", "a", "c", "a", "b")] == [1, 1, 0, 1, 0, 1]
    with RewardPool(RewardConfig(workers=1, cache_entries=0), counted) as pool:
        assert [graded(one) for one in ("a", "a", "aa")] == [1, 1, 1]


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
