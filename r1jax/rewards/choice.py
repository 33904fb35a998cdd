"""Multiple choice: the response must name exactly the reference's option, by its letter, its text or both."""

import re
from collections.abc import Mapping

from r1jax.rewards import extraction, number
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

MAX_ANSWER_CHARACTERS = 1000  # a longer "answer" is wrong without a closer look
LETTERS = "ABCDEFGHIJ"
_OPTION_LINE = re.compile(r"[ \t]*\(?([A-J])[.):][ \t]*(.*)")
_LABEL = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,)]*")
_LABEL_AND_TEXT = re.compile(r"(?:[(\[]([A-J])[)\]][.:]?|([A-J])[.):])\s*(\S.*)", re.DOTALL)
_STATEMENT = re.compile(r"\b(?:answer|option|choice)\b[ \t]*(?:is\b|:)[ \t]*:?\s*([^\n]+)", re.IGNORECASE)
_WRAPPING = str.maketrans("", "", "$*`\"'“”")


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns a Score with value 1 if the response names the reference's option and no other, else 0.

    The reference is an option's letter, alone or before its text. The options' texts are read from the lines of the prompt
    that begin `A.`, `(A)`, `A)` or `A:`. With extraction `auto` the answer stands in an answer tag, else in a box, else behind the last
    "answer is", else in the last line. A reference that is no option gives scorable False.
    """
    options = read_options(request.prompt)
    gold = choose(request.reference, {}) or choose(request.reference, options)
    if gold is None or (options and gold not in options):
        return Score(
            0.0, {}, False, f"the reference {request.reference[:80]!r} is none of the options {', '.join(options)}"
        )
    answer = _answer(request.text, config.extraction)
    if answer is None:
        return Score(0.0, {}, True, "no answer found")
    found = choose(answer, options)
    return Score(float(found == gold), {}, True, f"answer {answer[:80]!r} is option {found}, reference {gold}")


def named_option(request: RewardRequest, config: RewardConfig) -> str | None:
    """Returns the letter of the one option that a response names, as `accuracy` reads it; None if it names none or several."""
    answer = _answer(request.text, config.extraction)
    return None if answer is None else choose(answer, read_options(request.prompt))


def read_options(prompt: str) -> dict[str, str]:
    """Returns the text of each option by its letter: of the last block of lines that begin A, B, C... in order, if there are 2."""
    options: dict[str, str] = {}
    block: dict[str, str] = {}
    for line in prompt.splitlines():
        match = _OPTION_LINE.match(line)
        if match and match[1] == "A":
            block = {}
        if match and match[1] == LETTERS[len(block) : len(block) + 1]:
            block[match[1]] = match[2].strip()
            options = block if len(block) > 1 else options
        elif block and line.strip():
            last = LETTERS[len(block) - 1]
            block[last] = f"{block[last]}\n{line.strip()}"
    return options


def choose(answer: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter of the one option that an answer names, or None if it names none or several.

    A capital letter is a label before it is an option's text; a small one is a label only if it is no option's text.
    """
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return None
    text = extraction.without_lead(_bare(answer))
    for whole in (_bare(answer), text):
        if (exact := _by_text(whole, options)) and not re.fullmatch(r"[A-J]", whole):
            return exact
    if label := _LABEL.fullmatch(text):
        letter = label[1].upper()
        if label[1].isupper() or not _by_text(text, options):
            return letter if letter in (options or LETTERS) else None
    if labelled := _LABEL_AND_TEXT.fullmatch(text):
        letter, rest = labelled[1] or labelled[2], labelled[3]
        return letter if _says_only(rest, letter, options) else None
    return _by_text(text, options)


def _answer(response: str, where: str) -> str | None:
    """Returns what `extraction.extract` finds; for `auto` without tag and box, the last statement of an answer or the last line."""
    if where != "auto":
        return extraction.extract(response, where)
    tagged = extraction.extract(response, "answer_tag") or extraction.extract(response, "boxed")
    if tagged is not None:
        return tagged
    text = extraction.extract(response, "whole")
    if text is None:
        return None
    statements = _STATEMENT.findall(text)
    return statements[-1] if statements else text.splitlines()[-1]


def _says_only(rest: str, letter: str, options: Mapping[str, str]) -> bool:
    """Returns whether the text behind a label is its option's, or at least names no other option."""
    if _plain(rest) == _plain(options.get(letter, "")):
        return True
    others = [key for key in (options or LETTERS) if key != letter]
    if _by_text(rest, options) in others or set(re.findall(r"\b[A-J]\b", rest)) & set(others):
        return False
    padded = f" {_plain(rest)} "
    return not any(options.get(key) and f" {_plain(options[key])} " in padded for key in others)


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter of the only option with the given text, or else with its number; else None.

    Capitals count where they tell options apart.
    """
    for read in (_plain, lambda text: _plain(text).casefold(), number.parse_number):
        if value := read(text):
            same = [letter for letter, option in options.items() if read(option) == value]
            if same:
                return same[0] if len(same) == 1 else None
    return None


def _plain(text: str) -> str:
    """Returns a text without emphasis, final period and white space beyond single spaces."""
    return " ".join(_bare(text).split())


def _bare(text: str) -> str:
    text = re.sub(number.TEXT_COMMAND + r"\{([^{}]*)\}", r"\1", text)
    for mark in ("\\(", "\\)", "\\[", "\\]", "\\left", "\\right"):
        text = text.replace(mark, "")
    return number.SPACES.sub(" ", text.translate(_WRAPPING)).strip().rstrip(".").strip()
