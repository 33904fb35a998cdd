r"""Inequalities of one variable as intervals: `3 < x \le 4` is `(3, 4]`."""

import re

_RELATION = re.compile(r"(<=|>=|[<>≤≥]|\\(?:[lg]e(?:q|qslant)?|[lg]t)(?![A-Za-z]))")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}|\bor\b|\\lor(?![A-Za-z])|\\cup(?![A-Za-z])")
_VARIABLE = re.compile(r"[A-Za-z]|\\[a-z]+")
_INFINITY = r"\infty"


def as_interval(text: str) -> tuple[str, str] | None:
    r"""Returns (variable, interval) of an inequality, or of several of one variable joined by "or"; else None.

    Chains must run one way, with the variable, one letter or command, in the middle.
    """
    pieces = [_piece(piece) for piece in _OR.split(text)]
    if None in pieces or len({variable for variable, _ in pieces}) > 1:
        return None
    return pieces[0][0], r" \cup ".join(interval for _, interval in pieces)


def _piece(text: str) -> tuple[str, str] | None:
    parts = [part.strip() for part in _RELATION.split(text)]
    if len(parts) not in (3, 5) or not all(parts):
        return None
    falling = {sign in (">", ">=", "≥") or sign.startswith("\\g") for sign in parts[1::2]}
    if len(falling) > 1:
        return None
    if falling == {True}:
        parts.reverse()
    if len(parts) == 3 and _VARIABLE.fullmatch(parts[0]):
        parts = [f"-{_INFINITY}", "<", *parts]
    elif len(parts) == 3:
        parts = [*parts, "<", _INFINITY]
    low, after_low, variable, before_high, high = parts
    if not _VARIABLE.fullmatch(variable):
        return None
    return variable, f"{'[' if _closed(after_low) else '('}{low}, {high}{']' if _closed(before_high) else ')'}"


def _closed(sign: str) -> bool:
    return sign in ("<=", ">=", "≤", "≥") or sign[:3] in (r"\le", r"\ge")
