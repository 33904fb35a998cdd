"""Compares the final answer of a response with the reference.

Numbers are compared exactly, as fractions, after parsing; everything else by math-verify (sympy). Nothing is compared as
a string before it is parsed, and no text is ever evaluated as code. `quick` needs neither sympy nor much time; `grade`
may take arbitrarily long on hostile input, so callers run it in a worker that can be killed (rewards/pool.py).
"""

import functools
import logging
import re

from r1jax.rewards.choice import choose
from r1jax.rewards.extraction import extract, reference_answer, without_dollars, without_lead
from r1jax.rewards.inequality import as_interval
from r1jax.rewards.number import (
    MATH_WORDS,
    SPACES,
    TEXT_COMMAND,
    TRAILING_TEXT_UNIT,
    WHOLE_TEXT,
    equal,
    only_number,
    parse_number,
)
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

MAX_ANSWER_CHARACTERS = 1000  # a longer "answer" is wrong without a closer look
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
_LONG_WORD = re.compile(r"[A-Za-z]{3,}|[\u4e00-\u9fff]")
_CLOCK = re.compile(r"\d{1,2}:\d{2}")
_BASED = re.compile(r"(\d+)_\{?(\d+)\}?")  # digits in a base, 52_8; math-verify would drop the base
_OPTION = re.compile(TEXT_COMMAND + r"\{\s*\(([A-J])\)\s*\}")
_PRODUCT = re.compile(r"(?<=\d)\s*(?=\(|\\left\s*\()")
# Hyphens join words, and not letters that stand for numbers.
_BARE_WORD = re.compile(r"[A-Z]|[A-Za-z]{2,}|(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z-]+|[\u4e00-\u9fff]{1,8}")


def quick(response: str, reference: str, extraction: str) -> Score | None:
    """Returns the Score as `grade` does if plain numbers or words decide it, else None (math-verify is needed)."""
    gold = reference_answer(reference)
    if not gold:
        return _unscorable("the reference is empty")
    answer = _answer(response, extraction)
    number = parse_number(gold, strict_units=True)
    words = None if number is not None else _text_answer(gold)
    based = _BASED.fullmatch(_compact(gold))
    if number is None and words is None and based is None:
        if _long_words(gold) > 1:
            return _unscorable(f"the reference {_shorten(gold)} is prose, not an answer")
        return None
    if answer is None:
        return _verdict(False, "no answer found")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return _verdict(False, f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARACTERS}")
    detail = f"answer {_shorten(answer)}, reference {_shorten(gold)}"
    if based is not None:
        found = _BASED.fullmatch(_compact(answer))
        digits = found[1] if found else _compact(answer)  # without a base it is the question's
        return _verdict(digits == based[1] and (found is None or found[2] == based[2]), detail)
    if letter := _OPTION.fullmatch(gold):
        return _verdict(choose(answer, {}) == letter[1], detail)
    if words is not None:
        return _verdict(_words(answer) == words, detail)
    found = parse_number(answer)
    if found is None and _long_words(answer):
        found = only_number(answer)
        if found is None:
            return _verdict(False, f"{detail}: not one number")
    return None if found is None else _verdict(equal(found, number), detail)


def grade(response: str, reference: str, extraction: str) -> Score:
    """Returns a Score with value 1 if the answer in `response` equals `reference`, else 0.

    An empty or unreadable reference gives scorable False. Has no time limit of its own. Raises ValueError for an unknown `extraction`.
    """
    score = quick(response, reference, extraction)
    if score is not None:
        return score
    gold = reference_answer(reference)
    if not _parse_gold(gold):
        return _unscorable(f"the reference {_shorten(gold)} cannot be parsed")
    answer = _answer(response, extraction)
    if answer is None:
        return _verdict(False, "no answer found")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return _verdict(False, f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARACTERS}")
    detail = f"answer {_shorten(answer)}, reference {_shorten(gold)}"
    comparable_gold, comparable_answer = _in_one_notation(gold, answer)
    parsed_answer = _parse(comparable_answer)
    if not parsed_answer:
        return _verdict(False, f"{detail}: the answer cannot be parsed")
    from math_verify import verify

    return _verdict(bool(verify(list(_parse_gold(comparable_gold)), parsed_answer, timeout_seconds=None)), detail)


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns the Score of `grade` for a request, its answer found by `config.extraction`."""
    return grade(request.text, request.reference, config.extraction)


def load() -> None:
    """Imports what math-verify and sympy import when two expressions differ: no sample's deadline pays for it."""
    grade("<answer>x + 1</answer>", r"\sqrt{2} y", "answer_tag")


def _answer(response: str, where: str) -> str | None:
    answer = extract(response, where)
    return None if answer is None else without_dollars(without_lead(answer).rstrip(" ."))


def _compact(text: str) -> str:
    for mark in ("\\displaystyle", "\\(", "\\)", "\\[", "\\]", "$", " "):
        text = text.replace(mark, "")
    return SPACES.sub("", text).rstrip(".")


def _in_one_notation(gold: str, answer: str) -> tuple[str, str]:
    """Returns both texts, as intervals where they are inequalities: math-verify does not compare one notation with the other."""
    intervals = as_interval(gold), as_interval(answer)
    if all(intervals) and intervals[0][0] != intervals[1][0]:
        return gold, answer
    return intervals[0][1] if intervals[0] else gold, intervals[1][1] if intervals[1] else answer


def _text_answer(gold: str) -> str | None:
    r"""Returns the words of a reference that is `\text{...}`, one bare word, an option letter or a time of day; else None."""
    bare = SPACES.sub("", gold).strip("(). ")
    if WHOLE_TEXT.fullmatch(gold.rstrip(" ,.")) or _BARE_WORD.fullmatch(bare) or _CLOCK.fullmatch(bare):
        return _words(gold) or None
    return None


def _words(text: str) -> str:
    text = re.sub(TEXT_COMMAND, "", text)
    return " ".join(re.findall(r"\d+:\d+|[^\W_]+", text)).casefold()


def _long_words(text: str) -> int:
    """Returns how many words of three letters or more (not names of functions) and Han characters a text has; 0 with LaTeX."""
    if _LATEX_COMMAND.search(text):
        return 0
    return sum(word not in MATH_WORDS for word in _LONG_WORD.findall(text.lower()))


@functools.lru_cache(maxsize=256)
def _parse_gold(gold: str) -> tuple:
    return tuple(_parse(gold, sentence=False))


def _parse(text: str, sentence: bool = True) -> list:
    """Returns what math-verify reads in an answer: a list of one sympy object, empty if it cannot be parsed.

    With `sentence` a text of words is searched for a formula; otherwise all of it must be one.
    """
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    text = _PRODUCT.sub(r" \\cdot ", text.replace("\\$", "").rstrip(" ,."))
    delimited = "$" in text or "\\(" in text or "\\[" in text
    if not delimited:
        text = TRAILING_TEXT_UNIT.sub("", text)
    searched = delimited or (sentence and _long_words(text) > 0)
    # It reads 2(3) as a mixed number, 2 + 3, so products get their sign (_PRODUCT).
    # Its units include names of variables (2t would be read as 2), so they stay off.
    normalization = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    targets = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)]
    if searched:
        targets.append(ExprExtractionConfig())
    source = text if searched else f"${text}$"
    return parse(source, targets, fallback_mode="no_fallback", parsing_timeout=None)


def _verdict(correct: bool, detail: str) -> Score:
    value = 1.0 if correct else 0.0
    return Score(value, {"accuracy": value}, True, detail)


def _unscorable(detail: str) -> Score:
    return Score(0.0, {"accuracy": 0.0}, False, detail)


def _shorten(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= limit else line[: limit - 3] + "...")
