"""Grades problems of reasoning-gym with the library's own scorers: an answer is right if its score is exactly 1."""

import json
from functools import lru_cache

from r1jax.core import errors
from r1jax.data import reasoning_gym as families
from r1jax.rewards.answers import extraction
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

MAX_ANSWER_CHARACTERS = 10_000


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns a Score with value 1 if the family's scorer gives the answer 1.0, else 0, without partial credit.

    The reference is JSON {"family", "answer", "metadata"} (data/reasoning_gym.py). A family that is unknown or
    excluded, and a reference whose own answer does not score 1.0, give scorable False. May be slow on hostile input:
    runs in a worker.
    """
    try:
        entry = _entry(request.prompt, request.reference)
    except ValueError as error:
        return Score(0.0, {}, False, str(error))
    answer = extraction.final_answer(request.text, config.extraction)
    if answer is None:
        return Score(0.0, {}, True, "no answer found")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return Score(0.0, {}, True, f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARACTERS}")
    detail = f"{entry['family']}: answer {answer[:80]!r}"
    try:
        credit = _dataset(entry["family"]).score_answer(answer, entry=entry)
    except Exception as error:  # some scorers raise on text they cannot read
        return Score(0.0, {}, True, f"{detail} cannot be read: {type(error).__name__}")
    return Score(float(credit == 1.0), {}, True, f"{detail} scores {credit:g}")


@lru_cache(maxsize=256)
def _entry(question: str, reference: str) -> dict:
    """Returns the library's entry of a reference. Raises ValueError if invalid, or if its answer does not score 1.0."""
    try:
        entry = {"question": question} | json.loads(reference)
        name, answer = entry["family"], entry["answer"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"the reference {reference[:80]!r} is not JSON with family, answer and metadata") from None
    families.require(name)
    try:
        credit = _dataset(name).score_answer(answer, entry=entry)
    except Exception as error:  # metadata of another form
        raise ValueError(f"the reference of {name} cannot be graded: {errors.named(error)}") from None
    if credit != 1.0:
        raise ValueError(f"the reference's own answer {str(answer)[:80]!r} scores {credit} in {name}, not 1")
    return entry


@lru_cache(maxsize=128)
def _dataset(family: str):
    import reasoning_gym

    return reasoning_gym.create_dataset(family, size=1, seed=0)
