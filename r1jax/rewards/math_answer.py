"""Finds the final answer in a response and compares it with the reference.

Numbers are compared exactly, as fractions, after parsing; everything else by math-verify (sympy). Nothing is compared as
a string before it is parsed, and no text is ever evaluated as code. `quick` needs neither sympy nor much time; `grade`
may take arbitrarily long on hostile input, so callers run it in a worker that can be killed (rewards/pool.py).
"""

import functools
import logging
import re
from fractions import Fraction
from typing import NamedTuple

from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

EXTRACTIONS = ("auto", "boxed", "answer_tag", "whole")
MAX_ANSWER_CHARACTERS = 1000  # a longer "answer" is wrong without a closer look
_MAX_NUMBER_CHARACTERS = 200

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_SCALAR = re.compile(rf"([+-]?)\s*({_DECIMAL})([eE][+-]?\d{{1,3}})?")
_MIXED_SLASH = re.compile(rf"([+-]?)\s*(?:(\d+)\s+)?({_DECIMAL})\s*/\s*([+-]?{_DECIMAL})")
_PART = rf"\s*(?:\{{\s*([+-]?{_DECIMAL})\s*\}}|(\d))"
_MIXED_LATEX = re.compile(rf"([+-]?)\s*(\d+)?\s*\\frac{_PART}{_PART}")
_LAST_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}.])[+-]\s?)?[$£€¥]?(?:\\[dt]?frac\{{-?\d+\}}\{{\d+\}}|{_DECIMAL}(?:\s?/\s?\d+)?)(?:\s?\\?%)?"
)
_TEXT_COMMAND = r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname)\s*"
_WHOLE_TEXT = re.compile(_TEXT_COMMAND + r"\{([^{}]*)\}")
_TRAILING_TEXT_UNIT = re.compile(r"\s*" + _TEXT_COMMAND + r"\{([^{}\d]*)\}\s*(?:\^\s*\{?\s*[23]\s*\}?)?$")
_TRAILING_WORDS = re.compile(r"^(.*?[\d}.])(\s*)([A-Za-z][A-Za-z .'/-]*)(?:\^\s*\{?\s*[23]\s*\}?)?$")
_BOX_OPENING = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BOX_EVENT = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
_LONG_WORD = re.compile(r"[A-Za-z]{3,}|[\u4e00-\u9fff]")
_HAN_UNIT = re.compile(r"(?<=[\d%])\s*(?:(?![十百千万亿])[\u4e00-\u9fff]){1,4}$")
_CLOCK = re.compile(r"\d{1,2}:\d{2}")
_BARE_WORD = re.compile(r"[A-Z]|[A-Za-z][A-Za-z-]+|[\u4e00-\u9fff]{1,8}")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°|\\degrees?\b")
_SPACES = re.compile(r"\\[!,;:> ]|\\q?quad\b|~")
_MATH_WORDS = frozenset("sin cos tan cot sec csc log ln exp sqrt pi max min lim mod gcd lcm inf infinity oo".split())
_SMALL_WORDS = frozenset("a an at in of on to".split())
_UNITS = frozenset(
    "mm cm km kg mg ml hr hrs mi ft lb lbs oz min mins sec secs mph kph dollar dollars cent cents euro euros pound pounds yen yuan "
    "percent degree degrees second seconds minute minutes hour hours day days week weeks month months year years inch "
    "inches foot feet yard yards mile miles meter meters metre metres centimeter centimeters kilometer kilometers liter "
    "liters litre litres gram grams kilogram kilograms ton tons unit units square cubic sq cu per point points people "
    "person times items ways students books".split()
)


class Number(NamedTuple):
    value: Fraction
    percent: bool  # a percent sign stood behind it


def extract(response: str, extraction: str) -> str | None:
    r"""Returns the answer's text in an assistant turn, or None if there is none.

    Only what follows the last `</think>` is read; a `<think>` that never closes leaves no answer.
    `answer_tag`: the last `<answer>...</answer>`, and a box inside it if there is one. `boxed`: the last complete
    `\boxed{...}`, braces balanced. `whole`: all of it. `auto`: the answer tag, else the box, else the last number.
    Raises ValueError for another `extraction`.
    """
    if extraction not in EXTRACTIONS:
        raise ValueError(f"extract: extraction={extraction!r} must be one of {', '.join(EXTRACTIONS)}")
    close = response.rfind("</think>")
    if response.rfind("<think>") > close:
        return None
    text = response[close + len("</think>") :] if close >= 0 else response
    if extraction == "whole":
        return text.strip() or None
    if extraction == "boxed":
        return _last_box(text)
    tagged = _last_answer_tag(text)
    if extraction == "answer_tag" or tagged is not None:
        return tagged
    boxed = _last_box(text)
    return boxed if boxed is not None else _last_number(text)


def quick(response: str, reference: str, extraction: str) -> Score | None:
    """Returns the Score as `grade` does if plain numbers or words decide it, else None (math-verify is needed)."""
    gold = reference_answer(reference)
    if not gold:
        return _unscorable("the reference is empty")
    answer = extract(response, extraction)
    number = parse_number(gold, strict_units=True)
    words = None if number is not None else _text_answer(gold)
    if number is None and words is None:
        if _long_words(gold) > 1:
            return _unscorable(f"the reference {_shorten(gold)} is prose, not an answer")
        return None
    if answer is None:
        return _verdict(False, "no answer found")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return _verdict(False, f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARACTERS}")
    detail = f"answer {_shorten(answer)}, reference {_shorten(gold)}"
    if words is not None:
        return _verdict(_words(answer) == words, detail)
    found = parse_number(answer)
    if found is None and _long_words(answer):
        found = _only_number(answer)
        if found is None:
            return _verdict(False, f"{detail}: not one number")
    return None if found is None else _verdict(_equal(found, number), detail)


def grade(response: str, reference: str, extraction: str) -> Score:
    """Returns a Score with value 1 if the answer in `response` equals `reference`, else 0.

    An empty or unreadable reference gives scorable False. Has no time limit of its own. Raises ValueError for an unknown `extraction`.
    """
    score = quick(response, reference, extraction)
    if score is not None:
        return score
    gold = reference_answer(reference)
    parsed_gold = _parse_gold(gold)
    if not parsed_gold:
        return _unscorable(f"the reference {_shorten(gold)} cannot be parsed")
    answer = extract(response, extraction)
    if answer is None:
        return _verdict(False, "no answer found")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return _verdict(False, f"the answer has {len(answer)} characters, more than {MAX_ANSWER_CHARACTERS}")
    detail = f"answer {_shorten(answer)}, reference {_shorten(gold)}"
    parsed_answer = _parse(answer)
    if not parsed_answer:
        return _verdict(False, f"{detail}: the answer cannot be parsed")
    from math_verify import verify

    return _verdict(bool(verify(list(parsed_gold), parsed_answer, timeout_seconds=None)), detail)


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns the Score of `grade` for a request, its answer found by `config.extraction`."""
    return grade(request.text, request.reference, config.extraction)


def load() -> None:
    """Imports math-verify and sympy, so that the first `grade` is not the one that waits for it."""
    _parse("$\\frac{x}{2}$")


def reference_answer(reference: str) -> str:
    r"""Returns the final answer of a reference: after GSM8K's last `####`, or the last `\boxed{}`, or all of it."""
    text = reference.rsplit("####", 1)[-1].strip() if "####" in reference else reference.strip()
    boxed = _last_box(text)
    text = text if boxed is None else boxed
    if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def parse_number(text: str, strict_units: bool = False) -> Number | None:
    r"""Returns the rational number that `text` writes, or None if it is anything else.

    Reads integers, decimals, thousands separators (`1,234`, `1{,}234`, `1\,234`), fractions (`3/4`, `\frac{3}{4}`), mixed numbers
    (`1\frac{4}{5}`, `1 4/5`) and exponents up to three digits. Currency signs, degrees, `\text{...}` and unit words
    behind the number are dropped; `strict_units` (for references) drops known units only.
    """
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    text = _normalize(text)
    whole = _WHOLE_TEXT.fullmatch(text)
    text = whole[1].strip() if whole else _TRAILING_TEXT_UNIT.sub("", text)
    text = text.rstrip(" .。") if not re.fullmatch(r"\d+\.", text) else text[:-1]
    text = _HAN_UNIT.sub("", text)
    words = _TRAILING_WORDS.match(text)
    percent = False
    if words:
        if not _are_units(words[3], bool(words[2]), strict_units):
            return None
        percent = "percent" in words[3].lower().split()
        text = words[1]
    if text.endswith("%"):
        percent, text = True, text[:-1].rstrip()
    value = _parse_fraction(text)
    return None if value is None else Number(value, percent)


def _normalize(text: str) -> str:
    text = text.strip().strip("*").strip()
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2]
    for old, new in (("−", "-"), ("\\%", "%"), ("\\$", ""), ("$", ""), ("{,}", ","), ("\\left", ""), ("\\right", "")):
        text = text.replace(old, new)
    text = text.translate(str.maketrans("", "", "£€¥￥"))
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r",\s*\\!\s*(?=\d{3})", ",", text)
    text = re.sub(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))", "", text)
    return _DEGREES.sub("", _SPACES.sub(" ", text)).strip()


def _parse_fraction(text: str) -> Fraction | None:
    scalar = _SCALAR.fullmatch(text)
    if scalar:
        value = Fraction(scalar[2].replace(",", "").rstrip(".") + (scalar[3] or ""))
        return -value if scalar[1] == "-" else value
    slash = _MIXED_SLASH.fullmatch(text)
    latex = None if slash else _MIXED_LATEX.fullmatch(text)
    if slash:
        sign, whole, top, bottom = slash.groups()
    elif latex:
        sign, whole = latex[1], latex[2]
        top, bottom = latex[3] or latex[4], latex[5] or latex[6]
    else:
        return None
    denominator = Fraction(bottom.replace(",", "").rstrip("."))
    if denominator == 0:
        return None
    value = Fraction(top.replace(",", "").rstrip(".")) / denominator + int(whole or 0)
    return -value if sign == "-" else value


def _are_units(text: str, spaced: bool, strict: bool) -> bool:
    words = re.findall(r"[A-Za-z]+", text.lower())
    if any(word in _MATH_WORDS and word not in _UNITS for word in words):
        return False
    if strict or not spaced:
        return all(word in _UNITS for word in words)
    return all(len(word) >= 3 or word in _UNITS or word in _SMALL_WORDS for word in words)


def _equal(answer: Number, gold: Number) -> bool:
    """A percent sign on one side only may be a unit (50% for 50) or a factor (50% for 0.5)."""
    if answer.percent == gold.percent:
        return answer.value == gold.value
    scaled = (answer.value / 100, gold.value) if answer.percent else (answer.value, gold.value / 100)
    return answer.value == gold.value or scaled[0] == scaled[1]


def _only_number(text: str) -> Number | None:
    """Returns the one number of a sentence, or the one behind its last `=`; None if there are several or none."""
    if re.search(r"[+*^_{}]", text):
        return None
    numbers = {parse_number(match[0]) for match in _LAST_NUMBER.finditer(text.rsplit("=", 1)[-1])} - {None}
    return numbers.pop() if len(numbers) == 1 else None


def _last_number(text: str) -> str | None:
    last = None
    for match in _LAST_NUMBER.finditer(text):
        last = match[0]
    return None if last is None else last.strip().rstrip(".")


def _last_answer_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start < 0:
        return None
    content = text[start + len("<answer>") : end].strip()
    boxed = _last_box(content)
    return (content if boxed is None else boxed) or None


def _last_box(text: str) -> str | None:
    """One pass over the braces, so that unbalanced text of any length costs linear time."""
    if not _BOX_OPENING.search(text):
        return None
    stack: list[int] = []  # start of a box's content, or -1 for another brace
    best, span = -1, (0, 0)
    for event in _BOX_EVENT.finditer(text):
        token = event[0]
        if token == "}":
            start = stack.pop() if stack else -1
            if start > best:
                best, span = start, (start, event.start())
        elif token == "{" or len(token) > 2:
            stack.append(event.end() if len(token) > 2 else -1)
    return text[span[0] : span[1]].strip() or None if best >= 0 else None


def _text_answer(gold: str) -> str | None:
    r"""Returns the words of a reference that is `\text{...}`, one bare word, an option letter or a time of day; else None."""
    bare = _SPACES.sub("", gold).strip("(). ")
    if _WHOLE_TEXT.fullmatch(gold.rstrip(" ,.")) or _BARE_WORD.fullmatch(bare) or _CLOCK.fullmatch(bare):
        return _words(gold) or None
    return None


def _words(text: str) -> str:
    text = re.sub(_TEXT_COMMAND, "", text)
    return " ".join(re.findall(r"[^\W_]+", text)).casefold()


def _long_words(text: str) -> int:
    """Returns how many words of three letters or more (not names of functions) and Han characters a text has; 0 with LaTeX."""
    if _LATEX_COMMAND.search(text):
        return 0
    return sum(word not in _MATH_WORDS for word in _LONG_WORD.findall(text.lower()))


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

    text = text.replace("\\$", "").rstrip(" ,.")
    delimited = "$" in text or "\\(" in text or "\\[" in text
    if not delimited:
        text = _TRAILING_TEXT_UNIT.sub("", text)
    searched = delimited or (sentence and _long_words(text) > 0)
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
