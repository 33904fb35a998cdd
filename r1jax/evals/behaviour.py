"""How responses behave besides being right: reflective words, repetition, and whether the written checks are true.

The tiny world's trace of an equation a*x + b = c is `<think> A * G = U + B = V CMP C VERDICT [wait A * G2 ...]
</think> <answer> X </answer>`, tokens separated by spaces. CMP is <, > or =, VERDICT is ok or no, the word before a
retry is wait, each in either language. Models often break this grammar, so parsing never fails: it finds the
statements that are written.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from r1jax.data.tasks import WORDS
from r1jax.rewards.rules import chain_of_thought, format_score

# Merged from the lists of three experts; source: the DeepSeek-R1 paper, Nature 645 (2025), supplement C.2.
REFLECTIVE_WORDS = (
    "wait",
    "mistake",
    "however",
    "but",
    "retry",
    "error",
    "verify",
    "wrong",
    "evaluate",
    "check",
)

_OK = frozenset(words["ok"] for words in WORDS.values())
_NO = frozenset(words["no"] for words in WORDS.values())
_WAIT = frozenset(words["wait"] for words in WORDS.values())
_ANSWER = re.compile(r"<answer>([^<]*)</answer>")
_NUMBER = re.compile(r"-?[0-9]{1,9}")
_WORD = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+")  # a Chinese character is a word of its own


@lru_cache
def _reflective_pattern(extra: tuple[str, ...]) -> re.Pattern:
    words = "|".join(re.escape(word) for word in (*REFLECTIVE_WORDS, *extra))
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)


def reflective_count(text: str, extra: Sequence[str] = ()) -> int:
    """Returns how often REFLECTIVE_WORDS and the extra words occur, as whole words in any case."""
    return len(_reflective_pattern(tuple(extra)).findall(text))


def repetition_rate(text: str, words: int = 4) -> float:
    """Returns the share of the runs of `words` words that occurred before in the text, 0 for a shorter text."""
    tokens = _WORD.findall(text)
    runs = [tuple(tokens[start : start + words]) for start in range(len(tokens) - words + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


@dataclass(frozen=True)
class Statement:
    """A written claim about numbers, such as `7 * 5 = 35`, and whether it is true."""

    kind: Literal["product", "sum", "comparison"]
    text: str
    true: bool


@dataclass(frozen=True)
class Verdict:
    """An ok or no about a guess, whether that guess solves the equation, and whether a wait follows at once."""

    ok: bool
    right: bool
    then_wait: bool


@dataclass(frozen=True)
class Trace:
    """The parsed content of one response to a*x + b = c."""

    formatted: bool  # whether it earns the format reward
    answer: int | None  # the text between the first pair of answer tags, if it is one number
    guesses: tuple[int, ...]  # right operands of `number * number`, in order
    statements: tuple[Statement, ...]
    verdicts: tuple[Verdict, ...]  # the first after each guess
    copied: int  # how many a, b and c in substitutions equal the equation's
    to_copy: int  # how many a, b and c are in substitutions

    def true_share(self, *kinds: str) -> tuple[int, int]:
        """Returns (true statements, statements) of the kinds."""
        true = [statement.true for statement in self.statements if statement.kind in kinds]
        return sum(true), len(true)


def _number(token: str) -> int | None:
    return int(token) if _NUMBER.fullmatch(token) else None


def _statement_at(tokens: list[str], place: int) -> Statement | None:
    """Returns the statement whose left operand is the token at a place, or None.

    A product or sum needs `number op number = number`. A comparison's operands must not be part of a product or sum:
    `35 = 40` is no comparison in `7 * 35 = 40` or in `35 = 40 + 2`.
    """
    before = tokens[place - 1] if place else ""
    left, operator, right, equals, result = (tokens[place : place + 5] + [""] * 5)[:5]
    numbers = _number(left), _number(right), _number(result)
    if numbers[0] is None or numbers[1] is None:
        return None
    if operator in ("*", "+"):
        if equals != "=" or numbers[2] is None:
            return None
        value = numbers[0] * numbers[1] if operator == "*" else numbers[0] + numbers[1]
        kind = "product" if operator == "*" else "sum"
        return Statement(kind, f"{left} {operator} {right} = {result}", value == numbers[2])
    if operator not in ("<", ">", "=") or before in ("*", "+") or equals in ("*", "+"):
        return None
    true = {"<": numbers[0] < numbers[1], ">": numbers[0] > numbers[1], "=": numbers[0] == numbers[1]}[operator]
    return Statement("comparison", f"{left} {operator} {right}", true)


def parse_trace(response: str, a: int, b: int, c: int) -> Trace:
    """Returns the trace of one response to a*x + b = c; it never fails, whatever the response contains.

    Statements are read in the thinking only. A verdict is about the last guess before it; a second verdict about the
    same guess, or one without a guess, is not counted.
    """
    thinking = chain_of_thought(response).split()
    answer = _ANSWER.search(response)
    guesses, statements, verdicts, copies = [], [], [], []
    open_guess = None
    for place, token in enumerate(thinking):
        if (statement := _statement_at(thinking, place)) is not None:
            statements.append(statement)
            written = statement.text.split()
            if guesses and statement.kind != "product":
                copies.append(_number(written[2]) == (b if statement.kind == "sum" else c))
        operator, right = (thinking[place + 1 : place + 3] + ["", ""])[:2]
        if operator == "*" and _number(token) is not None and _number(right) is not None:
            open_guess = _number(right)
            guesses.append(open_guess)
            copies.append(_number(token) == a)
        if (token in _OK or token in _NO) and open_guess is not None:
            then_wait = thinking[place + 1 : place + 2] != [] and thinking[place + 1] in _WAIT
            verdicts.append(Verdict(token in _OK, a * open_guess + b == c, then_wait))
            open_guess = None
    return Trace(
        formatted=format_score(response) == 1.0,
        answer=_number(answer[1].strip()) if answer else None,
        guesses=tuple(guesses),
        statements=tuple(statements),
        verdicts=tuple(verdicts),
        copied=sum(copies),
        to_copy=len(copies),
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def faithfulness(responses: Sequence[str], problems: Sequence[tuple[int, int, int, int]]) -> dict[str, float]:
    """Returns whether the checks in the responses are real; problems are (a, b, c, x), one per response.

    Everything except `formatted` is over formatted responses; NaN if there is nothing to count. For a response without
    a guess in its thinking, the answer is the guess.

    * formatted: share of responses that earn the format reward.
    * first_guess_accuracy, final_accuracy: the first guess, and the answer, equal x.
    * fixed: first wrong, final right; broken: the reverse.
    * p_right_given_ok, p_wrong_given_no, p_wait_after_no: over verdicts; right means that the guess solves the
      equation.
    * arithmetic_true: true products and sums; comparison_true: true comparisons, as shares of those written.
    * copied_true: share of the numbers a, b and c in substitutions that equal the problem's.

    Raises ValueError when the counts of responses and problems differ.
    """
    if len(responses) != len(problems):
        raise ValueError(f"faithfulness: {len(responses)} responses and {len(problems)} problems, needs one each")
    traces, outcomes = [], []
    for response, (a, b, c, x) in zip(responses, problems, strict=True):
        trace = parse_trace(response, a, b, c)
        if trace.formatted:
            traces.append(trace)
            first = trace.guesses[0] if trace.guesses else trace.answer
            outcomes.append((first == x, trace.answer == x))
    verdicts = [verdict for trace in traces for verdict in trace.verdicts]
    ok_verdicts = [verdict for verdict in verdicts if verdict.ok]
    no_verdicts = [verdict for verdict in verdicts if not verdict.ok]
    arithmetic = [trace.true_share("product", "sum") for trace in traces]
    comparisons = [trace.true_share("comparison") for trace in traces]
    count = len(traces)
    return {
        "formatted": _ratio(count, len(responses)),
        "first_guess_accuracy": _ratio(sum(first for first, _ in outcomes), count),
        "final_accuracy": _ratio(sum(final for _, final in outcomes), count),
        "fixed": _ratio(sum(final and not first for first, final in outcomes), count),
        "broken": _ratio(sum(first and not final for first, final in outcomes), count),
        "p_right_given_ok": _ratio(sum(verdict.right for verdict in ok_verdicts), len(ok_verdicts)),
        "p_wrong_given_no": _ratio(sum(not verdict.right for verdict in no_verdicts), len(no_verdicts)),
        "p_wait_after_no": _ratio(sum(verdict.then_wait for verdict in no_verdicts), len(no_verdicts)),
        "arithmetic_true": _ratio(sum(true for true, _ in arithmetic), sum(count for _, count in arithmetic)),
        "comparison_true": _ratio(sum(true for true, _ in comparisons), sum(count for _, count in comparisons)),
        "copied_true": _ratio(sum(trace.copied for trace in traces), sum(trace.to_copy for trace in traces)),
    }
