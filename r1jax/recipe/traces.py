"""Sampling a policy's traces and keeping the good ones, with counts of how many pass each check (P2 B.3.2, B.3.3)."""

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.data.hashing import hash64
from r1jax.data.prompts import keyed_permutation
from r1jax.evals.behaviour import repetition_rate
from r1jax.evals.benchmarks import Response
from r1jax.recipe import evaluate
from r1jax.recipe.drafts import Counts, scored, tally
from r1jax.recipe.judging import JudgePool
from r1jax.recipe.parts import SamplingParts
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import Score
from r1jax.rl.rollout import EncodedPrompt
from r1jax.sampler.build import build_sampler
from r1jax.sampler.sample import SamplingParams
from r1jax.schema import RewardConfig

MAX_REPETITION = 0.2  # share of repeated eight-word runs above which a trace counts as a loop
ONE_LANGUAGE = "one language"

Check = tuple[str, Callable[[Response], bool]]


def sample(
    settings: SamplingParts,
    tokenizer: Tokenizer,
    mesh: Mesh,
    train: list[EncodedPrompt],
    params: Any,
    count: int,
    samples: int,
    temperature: float,
    pool: RewardPool | JudgePool | None = None,
) -> list[Response]:
    """Returns `samples` traces of each of `count` training prompts, which are the first in a keyed order of all.

    They are graded by `pool`, which stays open, or without one by the rule verifiers.
    """
    order = keyed_permutation(len(train), hash64(settings.stage, settings.seed, "prompts"))[:count]
    sampler = build_sampler(settings.network, settings.sampler, mesh, tokenizer)
    longest = settings.sampler.max_new_tokens
    sampling = SamplingParams(temperature, max_new_tokens=longest, stop_ids=tokenizer.stop_ids)
    with contextlib.nullcontext(pool) if pool else RewardPool(settings.reward) as pool:
        chosen = [train[i] for i in order]
        ask = functools.partial(evaluate.respond, settings.seed, settings.stage, tokenizer, sampler, pool)
        return ask(chosen, sampler.engine.load_params(params), sampling, samples, "sample")


def basic_checks(min_language_consistency: float) -> list[Check]:
    """Returns the checks that every good trace passes: right, well formed, of one language, no loop."""
    return [
        ("right", lambda r: r.scorable and r.parts["accuracy"] == 1.0),
        ("well formed", lambda r: r.parts["format"] == 1.0),
        (ONE_LANGUAGE, lambda r: r.parts["language"] >= min_language_consistency),
        ("no loop", lambda r: repetition_rate(r.text, 8) <= MAX_REPETITION),
    ]


def passing(responses: list[Response], checks: list[Check], counts: Counts) -> list[tuple[int, Response]]:
    """Returns (number, response) of those that pass every check in order; `counts` gets numbers by check and task."""
    tally(counts, "sampled", (response.problem.task for response in responses))
    kept = list(enumerate(responses))
    for name, check in checks:
        kept = [(number, response) for number, response in kept if check(response)]
        tally(counts, name, (response.problem.task for _, response in kept))
    return kept


def regrade(rows: list[tuple[Response, str]], reward: RewardConfig) -> list[Score]:
    """Returns the scores of rewritten texts of responses, each by its own task's grader."""
    with RewardPool(reward) as pool:
        return scored([response.request(text) for response, text in rows], pool)


def capped(
    rows: list, per_prompt: int, most: int | None = None, row_of: Callable[[Any], dict] = lambda row: row
) -> list:
    """Returns the rows without repeated texts, at most `per_prompt` of one prompt and `most` in all, in order.

    `row_of` returns {id, prompt, response} of an entry of `rows`.
    """
    used: Counter = Counter()
    seen: set[tuple[str, str]] = set()
    kept = []
    for entry in rows:
        row = row_of(entry)
        key = (json.dumps(row["prompt"]), row["response"])
        if key in seen or used[row["id"]] >= per_prompt or len(kept) == most:
            continue
        seen.add(key)
        used[row["id"]] += 1
        kept.append(entry)
    return kept


def source(teacher: str, number: int, samples: int, trace: str) -> dict:
    """Returns the provenance of an example: its teacher, the number of its sample, and its text before any edit."""
    return {"teacher": teacher, "sample": number % samples, "trace": trace}
