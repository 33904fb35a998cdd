"""Grades multiple choice: the response must name exactly the reference's option, by its letter, its text or both."""

import functools
import re
from collections.abc import Mapping

from r1jax.rewards.answers import choice_statements, extraction, number
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

MAX_ANSWER_CHARACTERS = 1000  # a longer answer is wrong and is not read
LETTERS = "ABCDEFGHIJ"
_OPTION_LINE = re.compile(r"[ \t]*\(?([A-J])[.):][ \t]*(.*)")
_LABEL = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,)]*")
_LABEL_AND_TEXT = re.compile(r"(?:[(\[]([A-J])[)\]][.:]?|([A-J])[.):])\s*(\S.*)", re.DOTALL)
_ASKS_FALSE = re.compile(
    r"\b(?:not|false|incorrect|incorrectly|wrong|except|least|untrue|never|cannot|isn['’]t|doesn['’]t)\b[^\n]*(?:[?:.]|$)|不正确|错误|不是|不属于|不符合|不能|有误",
    re.IGNORECASE | re.MULTILINE,
)
_WRAPPING = str.maketrans("", "", "$*`\"'“”")


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns a Score with value 1 if the response names the reference's option and no other, else 0.

    The reference is an option's letter, alone or before its text. The options' texts are read from the lines of the
    prompt that begin `A.`, `(A)`, `A)` or `A:`. With extraction `auto` the answer is read from an answer tag, else
    from a box, else from the last statement of the text, else from its last line. A reference that is no option gives
    scorable False.
    """
    options = read_options(request.prompt)
    gold = gold_letter(request.reference, options)
    if gold is None:
        return Score(
            0.0, {}, False, f"the reference {request.reference[:80]!r} is none of the options {', '.join(options)}"
        )
    answer, marked = _answer(request.text, config.extraction)
    if answer is None:
        return Score(0.0, {}, True, "no answer found")
    letter = named(answer, options, marked, asks_false(request.prompt))
    shown = answer[:80] if marked else answer[-80:]
    return Score(float(letter == gold), {}, True, f"answer {shown!r} is option {letter}, reference {gold}")


def gold_letter(reference: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter of the option that a reference gives by letter or text; None if it is none of the options."""
    gold = choose(reference, {}) or choose(reference, options)
    return None if options and gold not in options else gold


def named_option(request: RewardRequest, config: RewardConfig) -> str | None:
    """Returns the letter of the one option that a response names for `accuracy`; None if it names none or several."""
    answer, marked = _answer(request.text, config.extraction)
    return None if answer is None else named(answer, read_options(request.prompt), marked, asks_false(request.prompt))


def named(answer: str, options: Mapping[str, str], marked: bool = True, false: bool = False) -> str | None:
    """Returns the letter of the one option that an answer names, by `choose` or by the claims of its sentences.

    An answer that is `marked`, by a tag or box, may claim no other option. Of a whole text the last line counts if it
    is an option, else the last claim; of one without claims a first line that is an option, if the rest is about no
    other. `false` is whether the question asks for what is false.
    """
    if direct := choose(answer, options):
        return direct
    labelled = _LABEL_AND_TEXT.fullmatch(_bare(answer))
    if labelled and _by_text(labelled[3], options) not in (None, labelled[1] or labelled[2]):
        return None  # one option's letter before another one's text is a contradiction
    text, known = choice_statements.plain(answer), options or LETTERS
    lines = [line for line in text.split("\n") if line]
    if not lines or (marked and len(answer) > MAX_ANSWER_CHARACTERS):
        return None
    read = functools.partial(choose, options=options)
    question = choice_statements.Question(known, read, false)
    if marked:
        claims, letter = choice_statements.decided(text, question, agree=True)
        return letter if claims or len(lines) > 1 else choice_statements.opening(text, question)
    last = read(lines[-1])
    listed = last and len(lines) > 1 and read(lines[-2]) not in (None, last)  # a repeated list of the options
    if last and not listed:
        return last
    claims, letter = choice_statements.decided(text, question)
    if claims:
        return letter
    first = read(choice_statements.plain(answer.strip().split("\n", 1)[0][:MAX_ANSWER_CHARACTERS]))
    if first and {*choice_statements.letters_of("\n".join(lines[1:]), known)} <= {first}:
        return first
    return last or choice_statements.opening(lines[-1], question)


def asks_false(prompt: str) -> bool:
    """Returns whether a question asks for the option that is false, missing or least fitting."""
    question = re.split(r"\n[ \t]*\(?A[.):]", prompt, maxsplit=1)[0]
    return _ASKS_FALSE.search(question) is not None


def read_options(prompt: str) -> dict[str, str]:
    """Returns {letter: text} of the last block of at least two lines that begin with A, B, C... in order."""
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

    A capital letter is read as a label first, a small one only if it is not the text of an option.
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
        if _plain(rest) == _plain(options.get(letter, "")):
            return letter
        claim = choice_statements.plain(f"{letter}: {rest}")
        agrees = _says_only(rest, letter, options) and not choice_statements.contradicts(
            claim, letter, options or LETTERS
        )
        return letter if agrees else None
    return _by_text(text, options)


def _answer(response: str, where: str) -> tuple[str | None, bool]:
    """Returns (answer, whether a tag or box marks it); for `auto` without either it is all text after the thought."""
    if where in ("boxed", "answer_tag"):
        return extraction.extract(response, where), True
    marked = extraction.extract(response, "answer_tag") or extraction.extract(response, "boxed")
    if where == "auto" and marked is not None:
        return marked, True
    return extraction.extract(response, "whole"), False


def _says_only(rest: str, letter: str, options: Mapping[str, str]) -> bool:
    """Returns whether the text after a label is that of its option, or at least names no other option."""
    others = [key for key in (options or LETTERS) if key != letter]
    if _by_text(rest, options) in others or set(re.findall(r"\b[A-J]\b", rest)) & set(others):
        return False
    padded = f" {_plain(rest)} "
    return not any(options.get(key) and f" {_plain(options[key])} " in padded for key in others)


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    """Returns the letter of the only option with this text, or with the same number; else None.

    Case is ignored unless options differ only in case.
    """
    for read in (_plain, lambda text: _plain(text).casefold(), number.parse_number):
        if value := read(text):
            same = [letter for letter, option in options.items() if read(option) == value]
            if same:
                return same[0] if len(same) == 1 else None
    return None


@functools.lru_cache(maxsize=4096)
def _plain(text: str) -> str:
    """Returns a text without emphasis, final period and white space beyond single spaces."""
    return " ".join(_bare(text).split())


@functools.lru_cache(maxsize=4096)  # options are read again for each of a problem's samples
def _bare(text: str) -> str:
    text = re.sub(number.TEXT_COMMAND + r"\{([^{}]*)\}", r"\1", text)
    for mark in ("\\(", "\\)", "\\[", "\\]", "\\left", "\\right"):
        text = text.replace(mark, "")
    return number.SPACES.sub(" ", text.translate(_WRAPPING)).strip().rstrip(".").strip()
