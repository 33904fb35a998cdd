"""Compares the final answer of a response with the reference, in four steps.

Find the answer's text (extraction.py), bring it to one notation (answers/notation.py), read it as a typed value
(answers/reading.py) and compare the values by their types (answers/comparison.py). No text is ever evaluated as code,
and the work on one answer is bounded: what is too large to decide is wrong.
"""

import dataclasses
import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from r1jax.rewards.answers import comparison, evaluation, notation, reading, words
from r1jax.rewards.answers.choice import choose
from r1jax.rewards.answers.extraction import extract, reference_answer, without_dollars, without_lead
from r1jax.rewards.answers.number import parse_number
from r1jax.rewards.answers.tokens import Unreadable
from r1jax.rewards.answers.values import Based, Choice, Clock, Date, Quantity, Several, Text, Value
from r1jax.rewards.answers.written import TEXT_BRACES
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

MAX_ANSWER_CHARACTERS = reading.MAX_CHARACTERS  # a longer answer is wrong and is not read
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_AT_ONCE = (Text, Choice, Clock, Date, Based)  # types that are compared at once


@dataclass(frozen=True)
class Explanation:
    """How a response was graded: the texts of answer and reference, their notations and values, rule and verdict."""

    answer: str | None
    reference: str
    answer_notation: str
    reference_notation: str
    answer_value: Value | None
    reference_value: Value | None
    rule: str
    verdict: bool | None  # None: the reference cannot be graded


def grade(response: str, reference: str, extraction: str) -> Score:
    """Returns a Score with value 1 if the answer in `response` equals `reference`, else 0.

    An empty or unreadable reference gives scorable False. Raises ValueError for an unknown `extraction`.
    """
    explanation = explain(response, reference, extraction)
    if explanation.verdict is None:
        return Score(0.0, {"accuracy": 0.0}, False, explanation.rule)
    value = 1.0 if explanation.verdict else 0.0
    if explanation.answer is None:
        return Score(value, {"accuracy": value}, True, "no answer found")
    detail = f"answer {_shorten(explanation.answer)}, reference {_shorten(explanation.reference)}: {explanation.rule}"
    return Score(value, {"accuracy": value}, True, detail)


def quick(response: str, reference: str, extraction: str) -> Score | None:
    """Returns what `grade` returns if answer and reference are plain numbers or words, else None."""
    gold = reference_answer(reference)
    try:
        value = _gold(gold)
    except Unreadable:
        return grade(response, reference, extraction)
    if isinstance(value, _AT_ONCE) or _rational(value):
        answer = _answer(response, extraction)
        if answer is None or len(answer) > MAX_ANSWER_CHARACTERS:
            return grade(response, reference, extraction)
        try:
            answer_value = reading.read(answer)
        except Unreadable:
            return grade(response, reference, extraction)
        if isinstance(answer_value, _AT_ONCE) or _rational(answer_value):
            return grade(response, reference, extraction)
    return None


def explain(response: str, reference: str, extraction: str) -> Explanation:
    """Returns how a response is graded. Raises ValueError for an unknown `extraction`."""
    gold = reference_answer(reference)
    answer = _answer(response, extraction)
    spelled = notation.normalise(answer[:MAX_ANSWER_CHARACTERS]) if answer else ""
    texts = (answer, gold, spelled, notation.normalise(gold[:MAX_ANSWER_CHARACTERS]))
    if not gold:
        return Explanation(*texts, None, None, "the reference is empty", None)
    try:
        wanted = _gold(gold)
    except Unreadable as error:
        return Explanation(*texts, None, None, f"the reference {_shorten(gold)} cannot be graded: {error}", None)
    if answer is None:
        return Explanation(*texts, None, wanted, "no answer found", False)
    if isinstance(wanted, Choice) and len(answer) <= MAX_ANSWER_CHARACTERS:
        plain = notation.without_wrapping(spelled)
        denied = any(words.changes(word) for word in re.findall(r"[a-z']+|[\u4e00-\u9fff]+", answer.lower()))
        plain = TEXT_BRACES.sub(r"\1", plain).strip("{} ")
        verdict = not denied and wanted.letter in (choose(answer, {}), choose(plain, {}))
        return Explanation(*texts, Text(spelled), wanted, "choice: the one letter that the answer names", verdict)
    try:
        value = reading.read(answer)
    except Unreadable as error:
        return Explanation(*texts, None, wanted, f"the answer cannot be read: {error}", False)
    if isinstance(wanted, Quantity) and isinstance(value, Based) and value.base == 10 and value.digits.isdigit():
        value = Quantity(("num", Fraction(value.digits)))
    if isinstance(wanted, Quantity) and isinstance(value, Based):
        return Explanation(*texts, value, wanted, "digits in another base than ten are another number", False)
    verdict, rule = _compared(wanted, value)
    if (
        not verdict
        and isinstance(wanted, Text)
        and wanted in (reading.words_of(answer), reading.words_behind_is(answer))
    ):
        return Explanation(*texts, wanted, wanted, "text: the same words", True)
    other = (
        None
        if verdict
        else _with_plain_units(wanted, value, gold, answer) or _with_decimal_comma(wanted, value, gold, answer)
    )
    if other is not None:
        wanted, value = other
        verdict, rule = _compared(wanted, value)
    return Explanation(*texts, value, wanted, rule, verdict)


def _compared(wanted: Value, value: Value) -> tuple[bool, str]:
    try:
        return comparison.rule(wanted, value)
    except evaluation.TooLarge as error:
        return False, f"too large to decide: {error}"
    except RecursionError:
        return False, "too deep to decide"


def _with_plain_units(wanted: Value, value: Value, gold: str, answer: str) -> tuple[Value, Value] | None:
    """Returns both values if one has a unit and letters of the other can be one (`3 m`, `3 meters`), else None."""
    if not (isinstance(wanted, Quantity) and isinstance(value, Quantity)) or bool(wanted.unit) == bool(value.unit):
        return None
    try:
        if wanted.unit:
            sides = wanted, reading.read(answer, plain_units=True)
        else:
            sides = reading.read(gold, reference=True, plain_units=True), value
    except Unreadable:
        return None
    return sides if all(isinstance(side, Quantity) and side.unit for side in sides) else None


def _with_decimal_comma(wanted: Value, value: Value, gold: str, answer: str) -> tuple[Value, Value] | None:
    """Returns both values if one is a number and the other, such as `1,22`, can be read as a decimal; else None."""
    sides = [(wanted, gold), (value, answer)]
    for (number, _), (pair, text) in (sides, sides[::-1]):
        if isinstance(number, Quantity) and isinstance(pair, Several) and _DECIMAL_COMMA.fullmatch(text):
            decimal = dataclasses.replace(number, node=("num", Fraction(text.replace(",", "."))), unit=())
            return (decimal, value) if pair is wanted else (wanted, decimal)
    return None


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns the Score of `grade` for a request, with the extraction of the config."""
    return grade(request.text, request.reference, config.extraction)


def load() -> None:
    """Imports what comparisons need, so that this does not count against the first sample's deadline."""
    grade("<answer>x^2 < 2</answer>", r"-\sqrt{2} < x < \sqrt{2}", "answer_tag")
    grade("<answer>5 cm</answer>", r"5 \text{ mm}", "answer_tag")


@functools.lru_cache(maxsize=1024)
def _gold(text: str) -> Value:
    """Returns the value of a reference. Raises Unreadable if it cannot be read, or is too large to evaluate."""
    value = reading.read(text, reference=True)
    if isinstance(value, Quantity) and value.type == "number":
        try:
            if evaluation.exact(value.node) is None:
                evaluation.values([value.node], 0)
        except evaluation.TooLarge as error:
            raise Unreadable(str(error)) from None
        except ArithmeticError:
            pass  # a division by zero equals itself
    return value


def _answer(response: str, where: str) -> str | None:
    answer = extract(response, where)
    return None if answer is None else without_dollars(without_lead(answer).rstrip(" .")) or None


def _rational(value: Value) -> bool:
    """Returns whether a value is a fraction that is computed at once."""
    if not isinstance(value, Quantity):
        return False
    try:
        return evaluation.exact(value.node) is not None
    except ArithmeticError:
        return False


def _shorten(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= limit else line[: limit - 3] + "...")


__all__ = [
    "MAX_ANSWER_CHARACTERS",
    "Explanation",
    "accuracy",
    "explain",
    "extract",
    "grade",
    "load",
    "parse_number",
    "quick",
    "reference_answer",
]
