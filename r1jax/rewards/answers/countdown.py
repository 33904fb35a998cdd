"""Grades Countdown: an arithmetic expression that uses each given number exactly once must equal the target."""

import ast
import json
import operator
from collections.abc import Callable
from fractions import Fraction

from r1jax.rewards.answers import extraction
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

MAX_ANSWER_CHARACTERS = 200
_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS = {"×": "*", "÷": "/", "−": "-", "\\times": "*", "\\cdot": "*", "\\div": "/", "$": ""}


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns a Score with value 1 if the answer is such an expression, else 0.

    The reference is JSON {"numbers": [integers], "target": integer}. Only + - * / and brackets are read; the
    expression is walked in exact fractions, never run. A reference of another form gives scorable False.
    """
    try:
        puzzle = json.loads(request.reference)
        numbers, target = sorted(map(int, puzzle["numbers"])), int(puzzle["target"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return Score(0.0, {}, False, f"the reference {request.reference[:80]!r} is not JSON with numbers and a target")
    answer = extraction.final_answer(request.text, config.extraction)
    if answer is None:
        return Score(0.0, {}, True, "no answer found")
    read = evaluate(answer)
    if read is None:
        return Score(0.0, {}, True, f"the answer {answer[:80]!r} is no expression of + - * /")
    value, used = read
    detail = f"the answer {answer[:80]!r} is {value}, target {target}, numbers {numbers}"
    return Score(float(value == target and sorted(used) == numbers), {}, True, detail)


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """Returns (value, whole numbers used) of an expression of + - * / and brackets, None if it is anything else."""
    if len(expression) > MAX_ANSWER_CHARACTERS:
        return None
    for sign, plain in _SIGNS.items():
        expression = expression.replace(sign, plain)
    used: list[int] = []
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, used)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    raise ValueError(f"{type(node).__name__} is no part of an expression")
