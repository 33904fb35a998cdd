"""Predicted output of a program: the answer must be the same literal, or the same lines, as the reference."""

import ast
import json
from typing import Any

from r1jax.rewards.answers import extraction
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

MAX_ANSWER_CHARACTERS = 10_000


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns a Score with value 1 if the answer is the reference's value, else 0; an empty reference gives scorable False.

    Both are read as a JSON or Python literal, tuples as lists; where either is none, both are compared as printed lines, without white space at
    their ends. Types count: 1 is not 1.0, and neither is True. Nothing is run.
    """
    if not request.reference.strip():
        return Score(0.0, {}, False, "the reference is empty")
    answer = extraction.final_answer(request.text, config.extraction)
    if answer is None:
        return Score(0.0, {}, True, "no answer found")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return Score(0.0, {}, True, f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARACTERS}")
    answer = unfenced(answer)
    found, wanted = _literal(answer), _literal(request.reference)
    same = (
        _lines(answer) == _lines(request.reference) if found is None or wanted is None else _same(found[0], wanted[0])
    )
    return Score(float(same), {}, True, f"answer {answer[:80]!r}, reference {request.reference[:80]!r}")


def _literal(text: str) -> tuple[object] | None:
    """Returns (value,) of a JSON or Python literal, None if the text is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return (read(text.strip()),)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list | tuple):
        same_length = isinstance(found, list | tuple) and len(found) == len(wanted)
        return same_length and all(map(_same, found, wanted))
    if type(found) is not type(wanted):
        return False
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_same(found[key], wanted[key]) for key in wanted)
    return found == wanted


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def unfenced(text: str) -> str:
    """Returns what stands inside the code fence around all of a text, or in its single backticks."""
    lines = text.strip().splitlines()
    if len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return text.strip("`") if len(lines) == 1 else text
