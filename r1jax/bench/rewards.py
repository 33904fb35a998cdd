"""Measure the reward pool: a batch of symbolic answers, then twice a batch with a sample whose grader hangs."""

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
    a second time. `extra_s` is the time that the hang adds. `workdir` is not used. Raises ValueError for fewer than two
    samples.
    """
    if config.bench.samples < 2:
        raise ValueError(f"config.bench.samples={config.bench.samples} must be 2 or more: one hangs, others do not")
    hanging_grader = (f"{TASK}={__name__}:accuracy",)
    reward = dataclasses.replace(config.reward, graders=(*config.reward.graders, *hanging_grader))
    batch = [_request(number, f"\\boxed{{{number}\\sqrt{{12}}}}") for number in range(1, config.bench.samples + 1)]
    with_hang = [*batch[: len(batch) // 2], _request(0, HANGS), *batch[len(batch) // 2 + 1 :]]
    by_batch = {}
    for name, requests in (("plain", batch), ("hanging", with_hang)):
        with RewardPool(reward) as pool:
            pool.score([_request(-1 - worker, "\\boxed{x}") for worker in range(4 * max(1, reward.workers))])
            pool.take_usage()
            by_batch[name] = _measured(pool, requests)
            if name == "hanging":
                by_batch["again"] = _measured(pool, requests)
    extra_s = by_batch["hanging"]["seconds"] - by_batch["plain"]["seconds"]
    figures = by_batch | {"workers": reward.workers, "deadline_s": reward.deadline_s, "extra_s": extra_s}
    for name in by_batch:
        print(f"{name}: {by_batch[name]}")
    return figures


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns the score of the math grader; for the response HANGS it never returns."""
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
