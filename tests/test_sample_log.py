"""Claims about the samples of rollouts that are written for people: which, how many, and the same after a resume."""

import json

import numpy as np
import pytest

from r1jax.data.problems import Problem
from r1jax.rewards.compose import PART_NAMES
from r1jax.rl import sample_log
from r1jax.rl.journal import Rollout
from r1jax.rl.rollout import Advantages, EncodedPrompt
from r1jax.sampler.sample import RolloutSample
from r1jax.schema import WatchConfig


def test_best_and_worst_of_the_first_groups_are_chosen():
    rewards = np.asarray([0, 2, 1, 5, 5, 5, 3, 4, 4], np.float32)
    assert sample_log.chosen(rewards, 3, 99) == [1, 0, 3, 5, 7, 6]  # of equal ones the first and the last
    assert sample_log.chosen(rewards, 3, 3) == [1, 0, 3] and sample_log.chosen(rewards, 3, 0) == []
    assert sample_log.chosen(rewards, 1, 2) == [0, 1]  # groups of one have one response


@pytest.mark.parametrize("count", [2, 5, 8])
def test_a_rollout_that_is_dropped_is_never_kept_again_and_the_file_is_bounded(count):
    before = set()
    for newest in range(300):
        kept = sample_log.kept_rollouts(newest, count)
        assert kept - before == {newest} and len(kept) <= count
        assert kept >= set(range(max(newest + 1 - count // 2, 0), newest + 1))
        before = kept
    assert max(np.diff(sorted(before))) < 300 // max(count // 2 - 1, 1) * 2  # the run's beginning is there too
    assert 0 in before


def rows(update):
    return [{"text": f"response {update}.{number}"} for number in range(2)]


def log(folder, kept=4):
    return sample_log.SampleLog(folder, WatchConfig(rollouts_kept=kept), 3)


def test_a_resumed_run_ends_with_the_file_of_one_that_never_stopped(tmp_path):
    for name, starts in (("whole", range(0, 60, 3)), ("resumed", range(0, 45, 3))):
        written = log(tmp_path / name)
        written.begin(0)
        for start in starts:
            written.write(start, rows(start))
    for cursor in (24, 30):  # killed twice: each time it goes on from a checkpoint of some updates before
        resumed = log(tmp_path / "resumed")
        resumed.begin(cursor)
        for start in range(cursor, 60, 3):
            resumed.write(start, rows(start))
    whole, resumed = ((tmp_path / name / sample_log.SAMPLES_FILE).read_bytes() for name in ("whole", "resumed"))
    assert whole == resumed
    assert [json.loads(line)["update"] for line in whole.splitlines()] == [1, 1, 49, 49, 55, 55, 58, 58]


def test_nothing_is_written_where_no_sample_is_asked_for(tmp_path):
    sample_log.SampleLog(tmp_path, WatchConfig(rollout_samples=0), 3).write(0, rows(0))
    assert not list(tmp_path.iterdir())


def test_a_row_has_the_question_the_response_and_its_scores_and_long_texts_are_cut_in_the_middle():
    problem = Problem("p1", "math", "what is 6 * 7 ?", "42", source="book")
    prompt = EncodedPrompt(problem, np.arange(3), prefill="<think>")
    arrays = [np.zeros(3), np.zeros(5, np.int32), np.zeros(5), np.zeros(5)]
    terms = np.zeros((2, len(PART_NAMES)), np.float32)
    terms[1, PART_NAMES.index("accuracy")] = 1
    samples = [RolloutSample(0, index, *arrays, ("length", "stop")[index], 0) for index in range(2)]
    flags = np.ones(2, bool)
    rollout = Rollout(samples, terms, flags, 1)
    advantages = Advantages([np.zeros(5), np.full(5, 0.25)], np.asarray([np.nan, 1.1]), flags, flags, flags)
    long = f"start {'x' * 9000} end"
    first, second = sample_log.rows(
        [1, 0], rollout, advantages, [long, " 42 </think>"], [prompt] * 2, [["accuracy"], ["language"]]
    )
    assert first == {
        **{"problem_id": "p1", "task": "math", "source": "book", "prompt": "what is 6 * 7 ?", "answer": "42"},
        **{"text": "<think> 42 </think>", "tokens": 5, "truncated": False, "parts": {"accuracy": 1.0}},
        **{"scorable": True, "reward": 1.1, "advantage": 0.25},
    }
    assert second["parts"] == {"language": 0.0} and second["truncated"] and second["reward"] is None
    left_out = len("<think>" + long) - sample_log.TEXT_KEPT
    assert second["text"].startswith("<think>start x") and second["text"].endswith("x end")
    assert f"[…{left_out} characters left out…]" in second["text"]
    assert len(second["text"]) < sample_log.TEXT_KEPT + 50
