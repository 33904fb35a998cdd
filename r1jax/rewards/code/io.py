"""Grades a predicted output of a program: the answer must be the same literal, or the same lines, as the reference."""

import ast
import json
from typing import Any

from r1jax.rewards.answers import extraction
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

MAX_ANSWER_CHARACTERS = 10_000


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns a Score with value 1 if the answer is the reference's value, else 0.

    Both are read as JSON or Python literals, tuples as lists. If either is not a literal, both are compared as printed
    lines, without white space at their ends. Types count: 1, 1.0 and True are different. Nothing is run. An empty
    reference gives scorable False.
    """
    if not request.reference.strip():
        return Score(0.0, {}, False, "the reference is empty")
    answer = extraction.final_answer(request.text, config.extraction)
    if answer is None:
        return Score(0.0, {}, True, "no answer found")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return Score(0.0, {}, True, f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARACTERS}")
    answer = unfenced(answer)
    answer_value, reference_value = _literal(answer), _literal(request.reference)
    same = (
        _lines(answer) == _lines(request.reference)
        if answer_value is None or reference_value is None
        else _same(answer_value[0], reference_value[0])
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


def _same(answer: Any, reference: Any) -> bool:
    if isinstance(reference, list | tuple):
        same_length = isinstance(answer, list | tuple) and len(answer) == len(reference)
        return same_length and all(map(_same, answer, reference))
    if type(answer) is not type(reference):
        return False
    if isinstance(reference, dict):
        return answer.keys() == reference.keys() and all(_same(answer[key], reference[key]) for key in reference)
    return answer == reference


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def unfenced(text: str) -> str:
    """Returns a text without the code fence, or the single backticks, around all of it."""
    lines = text.strip().splitlines()
    if len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return text.strip("`") if len(lines) == 1 else text
