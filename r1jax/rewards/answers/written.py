"""Reads answers that are not formulas: times of day, dates, numerals in another base, the letter of an option."""

import re

from r1jax.rewards.answers import notation
from r1jax.rewards.answers.values import (
    Based,
    Choice,
    Clock,
    Date,
    Value,
)

TEXT_BRACES = re.compile(r"\\(?:text|mathrm|operatorname|mathbf)\s*\{([^{}]*)\}")


_CLOCK = re.compile(
    r"(\d{1,2}):(\d{2})(?::00)?\s*(?:([ap])\s*\.?\s*m\.?|(noon|midnight|o'clock|hours|hrs?))?", re.IGNORECASE
)
_HOUR = re.compile(r"(\d{1,2})\s*([ap])\s*\.?\s*m\.?", re.IGNORECASE)
_ISO_DATE = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})")
_MONTHS = "january february march april may june july august september october november december".split()
_WRITTEN_DATE = re.compile(
    r"([a-z]{3,9})\.?\s+(\d{1,2})(?:st|nd|rd|th)?,?\s+(\d{4})|(\d{1,2})(?:st|nd|rd|th)?\s+([a-z]{3,9})\.?,?\s+(\d{4})",
    re.IGNORECASE,
)
_HAN_DATE = re.compile(r"(\d{4})年(\d{1,2})月(\d{1,2})[日号]")
_SLASH_DATE = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")
_SPOKEN_BASE = re.compile(r"([0-9][0-9A-Fa-f]*)\s*\(?\s*(?:in\s+)?base\s*-?\s*(\d{1,2})\s*\)?", re.IGNORECASE)
_BASED = re.compile(r"\(?((?=[0-9A-F]*\d|[A-F]{2,})[0-9A-Fa-f]+)\)?_\{?\(?\s*(?:base\s*)?(\d{1,2})\s*\)?\}?")
_CHOICE = re.compile(r"\(\s*([A-J])\s*\)")


def whole_form(text: str) -> Value | None:
    """Returns the value of a time of day, a date, a numeral in another base or an option letter, else None."""
    plain = TEXT_BRACES.sub(r"\1", notation.without_delimiters(text)).strip()
    if clock := _CLOCK.fullmatch(plain):
        hours, minutes = int(clock[1]), int(clock[2])
        if hours < 25 and minutes < 60:
            half = {"noon": "p", "midnight": "a"}.get((clock[4] or "").lower(), (clock[3] or "").lower())
            return _clock(hours, minutes, half)
    if hour := _HOUR.fullmatch(plain):
        return _clock(int(hour[1]), 0, hour[2].lower())
    if date := _ISO_DATE.fullmatch(plain) or _HAN_DATE.fullmatch(plain.replace(" ", "")):
        return Date(int(date[1]), int(date[2]), int(date[3]))
    if date := _SLASH_DATE.fullmatch(plain):
        return Date(int(date[3]), int(date[1]), int(date[2]))
    if date := _WRITTEN_DATE.fullmatch(plain):
        name = (date[1] or date[5]).lower()
        months = [place for place, month in enumerate(_MONTHS, 1) if month.startswith(name[:3]) and len(name) >= 3]
        if months:
            return Date(int(date[3] or date[6]), months[0], int(date[2] or date[4]))
    if spoken := _SPOKEN_BASE.fullmatch(plain):
        return Based(spoken[1].upper().lstrip("0") or "0", int(spoken[2]))
    if based := _BASED.fullmatch(plain.replace(" ", "")):
        return Based(based[1].upper().lstrip("0") or "0", int(based[2]))
    if (choice := _CHOICE.fullmatch(plain)) and r"\text" in text or (choice and r"\mathrm" in text):
        return Choice(choice[1])
    return None


def _clock(hours: int, minutes: int, half: str) -> Clock:
    if half:
        return Clock((hours % 12 + (12 if half == "p" else 0)) * 60 + minutes, f"{half}m")
    return Clock(hours * 60 + minutes, "pm" if hours > 12 else "")
