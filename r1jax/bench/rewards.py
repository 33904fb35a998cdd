"""Measure the reward pool: a batch of symbolic answers, the same with one sample whose grader hangs, and that batch again."""

import dataclasses
import time
from pathlib import Path

from r1jax.rewards.answers import math_answer
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import Config, RewardConfig

TASK, HANGS = "bench", "never graded"


def run(config: Config, workdir: Path) -> dict:
    """Returns {`plain`, `hanging`, `again`: figures of a batch, `deadline_s`, `extra_s`}, all of config.bench.samples.

    `plain` and `hanging` have a pool each, whose workers run before the clock starts; `again` is the batch of `hanging`
    a second time. `extra_s` is what the hang adds. `workdir` is not used. Raises ValueError for fewer than two samples.
    """
    if config.bench.samples < 2:
        raise ValueError(f"config.bench.samples={config.bench.samples} must be 2 or more: one hangs, others do not")
    own = (f"{TASK}={__name__}:accuracy",)
    reward = dataclasses.replace(config.reward, graders=(*config.reward.graders, *own))
    batch = [_request(number, f"\\boxed{{{number}\\sqrt{{12}}}}") for number in range(1, config.bench.samples + 1)]
    with_hang = [*batch[: len(batch) // 2], _request(0, HANGS), *batch[len(batch) // 2 + 1 :]]
    found = {}
    for name, requests in (("plain", batch), ("hanging", with_hang)):
        with RewardPool(reward) as pool:
            pool.score([_request(-1 - worker, "\\boxed{x}") for worker in range(4 * max(1, reward.workers))])
            pool.take_usage()
            found[name] = _measured(pool, requests)
            if name == "hanging":
                found["again"] = _measured(pool, requests)
    extra_s = found["hanging"]["seconds"] - found["plain"]["seconds"]
    figures = found | {"workers": reward.workers, "deadline_s": reward.deadline_s, "extra_s": extra_s}
    for name in found:
        print(f"{name}: {found[name]}")
    return figures


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns what the grader of mathematics says, or nothing, ever, for the response HANGS."""
    while request.response == HANGS:
        pass
    return math_answer.accuracy(request, config)


def _request(number: int, response: str) -> RewardRequest:
    return RewardRequest(f"sample {number}", TASK, "Simplify.", response, f"{2 * number}\\sqrt{{3}}")


def _measured(pool: RewardPool, requests: list[RewardRequest]) -> dict:
    started = time.perf_counter()
    scores = pool.score(requests)
    seconds, usage = time.perf_counter() - started, pool.take_usage()
    return {
        "seconds": seconds,
        "samples_per_s": len(requests) / seconds,
        "samples": len(requests),
        "right": sum(score.parts["accuracy"] for score in scores),
        "unscorable": [score.detail for score in scores if not score.scorable],
        "cache_hits": usage.cache_hits,
        "workers_started": usage.workers_started,
    }
