"""Reads plain numbers exactly, for the tiny world's equations and the options of multiple choice.

Answers of mathematics are read by answers/reading.py.
"""

import functools
import re
from fractions import Fraction
from typing import NamedTuple

_MAX_NUMBER_CHARACTERS = 200

_DECIMAL = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_SCALAR = re.compile(rf"([+-]?)\s*({_DECIMAL})([eE][+-]?\d{{1,3}})?")
_MIXED_SLASH = re.compile(rf"([+-]?)\s*(?:(\d+)\s+)?({_DECIMAL})\s*/\s*([+-]?{_DECIMAL})")
_PART = rf"\s*(?:\{{\s*([+-]?{_DECIMAL})\s*\}}|(\d))"
_MIXED_LATEX = re.compile(rf"([+-]?)\s*(\d+)?\s*\\frac{_PART}{_PART}")
TEXT_COMMAND = r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mbox|operatorname)(?![A-Za-z])\s*"
_WHOLE_TEXT = re.compile(TEXT_COMMAND + r"\{([^{}]*)\}")
_TRAILING_TEXT_UNIT = re.compile(r"\s*" + TEXT_COMMAND + r"\{([^{}\d]*)\}\s*(?:\^\s*\{?\s*[23]\s*\}?)?$")
_TRAILING_WORDS = re.compile(r"^(.*?[\d}.])(\s*)([A-Za-z][A-Za-z .'/-]*)(?:\^\s*\{?\s*[23]\s*\}?)?$")
_HAN_UNIT = re.compile(r"(?<=[\d%])\s*(?:(?![十百千万亿])[\u4e00-\u9fff]){1,4}$")
_POWER_OF_TEN = re.compile(r"(?<=[\d.])\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*\{?\s*([+-]?\d{1,3})\s*\}?$")
_VARIABLE = re.compile(r"[A-Za-z]\s*=\s*")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°|\\degrees?\b")
SPACES = re.compile(r"(?<!\\)\\[!,;:> ]|\\q?quad\b|~")
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
    percent: bool  # it was followed by a percent sign


@functools.lru_cache(maxsize=4096)
def parse_number(text: str, strict_units: bool = False) -> Number | None:
    r"""Returns the rational number that `text` writes, or None if it is anything else.

    Reads integers, decimals, thousands separators (`1,234`, `1{,}234`, `1\,234`), fractions (`3/4`, `\frac{3}{4}`),
    mixed numbers (`1\frac{4}{5}`, `1 4/5`), exponents up to three digits and powers of ten, in one pair of brackets
    and behind `x =`. Currency signs, degrees, `\text{...}` and unit words behind the number are dropped;
    `strict_units` (for references) drops known units only.
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
    text = _DEGREES.sub("", SPACES.sub(" ", text.replace("\\displaystyle", ""))).strip()
    if variable := _VARIABLE.match(text):
        text = text[variable.end() :]
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    return _POWER_OF_TEN.sub(r"e\1", text)


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
