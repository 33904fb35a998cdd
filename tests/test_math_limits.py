"""Hostile mathematics costs its own sample's deadline or memory, never the trainer's."""

import threading
import time

from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig

HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "power": "x^{10^{10}} (7^{7^{7^{7}}})",
    "factorial": "(10^{9})!",
    "product": "\\prod_{n=1}^{10^{9}} n",
    "nested fractions": "\\frac{1}{" * 60 + "2" + "}" * 60,
    "nested brackets": "(" * 450 + "1" + ")" * 450,
    "nested roots": "\\sqrt{" * 90 + "x" + "}" * 90,
    "expansion": "(x+y+z+w+1)^{4000} - 1",
    "open braces": "{" * 990,
    "slashes": "1/" * 490,
    "commas": "1," * 490,
    "spaces": "1 " * 490,
}
SECONDS = 3.0


def request(name, answer, reference="\\sqrt{2}"):
    return RewardRequest(name, "math", "", f"\\boxed{{{answer}}}", reference)


def test_hostile_answers_earn_nothing_within_their_deadlines_and_a_right_one_still_does():
    requests = [request(name, answer) for name, answer in HOSTILE.items()] + [request("right", "2^{1/2}")]
    with RewardPool(RewardConfig(workers=2, deadline_s=SECONDS)) as pool:
        pool.score([request("warm", "\\sqrt{3}")])
        started = time.monotonic()
        *scores, right = pool.score(requests)
        seconds = time.monotonic() - started
    found = {name: (score.parts["accuracy"], score.scorable) for name, score in zip(HOSTILE, scores, strict=True)}
    assert found == dict.fromkeys(HOSTILE, (0.0, True))
    assert (right.scorable, right.parts["accuracy"]) == (True, 1.0), right.detail
    assert seconds < len(requests) * (SECONDS + 5.0)  # a killed worker is replaced


def test_deadlines_hold_outside_the_main_thread():
    scores = []
    with RewardPool(RewardConfig(workers=1, deadline_s=SECONDS)) as pool:
        hostile = [request("tower", HOSTILE["tower"], "\\sqrt{2}")]
        thread = threading.Thread(target=lambda: scores.extend(pool.score(hostile)), daemon=True)
        thread.start()
        thread.join(60.0)
    assert not thread.is_alive()
    assert (scores[0].scorable, scores[0].parts["accuracy"]) == (True, 0.0)
