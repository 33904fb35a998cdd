"""Writes values and nodes as readable text: numbers as fractions, formulas in plain notation."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from r1jax.rewards.answers import evaluation
from r1jax.rewards.answers.formula import Node
from r1jax.rewards.answers.units import Unit
from r1jax.rewards.answers.values import (
    Based,
    Choice,
    Clock,
    Congruence,
    Date,
    Matrix,
    Named,
    Pieces,
    Quantity,
    Ratio,
    RealSet,
    Relation,
    Several,
    Text,
    Value,
)

MAX_CHARACTERS = 200  # a longer text is cut and ends in "..."
_MAX_BITS = 2000  # larger numbers are written as a power of ten
_SUM, _PRODUCT, _POWER, _ATOM = range(4)  # precedence of a node
_SIGNS = {"le": "≤", "ge": "≥", "ne": "≠", "in": "∈", "notin": "∉", "approx": "≈", "equiv": "≡", "cong": "≅", "to": "→"}
_SIGNS |= {"subset": "⊂", "subseteq": "⊆", "propto": "∝", "perp": "⊥", "parallel": "∥"}
_SETS = {"union": "∪", "meet": "∩", "minus": "∖", "either": "or"}
_UNITS = {"percent": "%", "dollar": "$", "degrees": "°", "celsius": "°C", "fahrenheit": "°F"}


def show(value: Value) -> str:
    """Returns a value as text of at most MAX_CHARACTERS; a rational number is written as a fraction."""
    text = _SHOWN[type(value)](value)
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 3]}..."


def spell(node: Node) -> str:
    """Returns a node as a plain formula: `sqrt(3)/2`, `2*x + 1`, `(0, 9) ∪ (9, 36)`."""
    return _spelled(node)[0]


def _quantity(value: Quantity) -> str:
    nouns = f"({', '.join(sorted(value.nouns))})" if value.nouns else ""
    unit = "".join(f" {part}" for part in (_unit(value.unit), nouns) if part)
    try:
        exact = evaluation.exact(value.node)
    except ArithmeticError:
        exact = None
    return (spell(value.node) if exact is None else _number(exact)) + unit


def _unit(unit: Unit) -> str:
    """Returns a unit as `kg*m^2/s`."""
    above = [_unit_power(key, power) for key, power in unit if power > 0]
    below = [_unit_power(key, -power) for key, power in unit if power < 0]
    return "*".join(above) + "".join(f"/{part}" for part in below)


def _unit_power(key: str, power: Fraction) -> str:
    name = _UNITS.get(key, key.replace(" ", ""))
    return name if power == 1 else f"{name}^{power}"


def _several(value: Several) -> str:
    members = ", ".join(map(show, value.members))
    opening, closing = {"set": "{}", "list": ("", "")}.get(value.kind, (value.opening, value.closing))
    return f"{opening}{members}{closing}"


def _relation(value: Relation) -> str:
    return spell(("rel", value.first, *value.sides))


def _clock(value: Clock) -> str:
    hours, minutes = divmod(value.minutes, 60)
    return f"{hours}:{minutes:02d}" + (f" ({value.half})" if value.half else "")


def _pieces(value: Pieces) -> str:
    return "; ".join(f"{show(piece)} if {show(condition)}" for piece, condition in value.rows)


_SHOWN: dict[type, Callable[[Any], str]] = {
    Quantity: _quantity,
    Several: _several,
    RealSet: lambda value: (
        spell(value.node) + (f" of {value.letter}" if value.letter and value.node[0] != "rel" else "")
    ),
    Relation: _relation,
    Named: lambda value: f"{value.name} = {show(value.value)}",
    Matrix: lambda value: spell(("matrix", value.rows)),
    Pieces: _pieces,
    Congruence: lambda value: spell(("congruent", value.first, value.second, value.modulus)),
    Based: lambda value: f"{value.digits} in base {value.base}",
    Clock: _clock,
    Date: lambda value: f"{value.year:04d}-{value.month:02d}-{value.day:02d}",
    Ratio: lambda value: spell(("ratio", value.parts)),
    Text: lambda value: repr(value.words),
    Choice: lambda value: f"option {value.letter}",
}


def _number(value: Fraction) -> str:
    """Returns a fraction written out, or its power of ten if it is long."""
    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    if bits <= _MAX_BITS:
        return str(value)
    power = round((value.numerator.bit_length() - value.denominator.bit_length()) * 0.30103)
    return f"{'-' if value < 0 else ''}about 10^{power}"


def _spelled(node: Node) -> tuple[str, int]:
    """Returns (text, precedence) of a node."""
    kind = node[0]
    if kind == "num":
        text = _number(node[1])
        return text, _ATOM if text.isdigit() else _PRODUCT
    if kind in ("sym", "const"):
        return {"inf": "∞"}.get(node[1], node[1]), _ATOM
    if kind in _FORMS:
        return _FORMS[kind](node)
    if kind in _SETS:
        left, *others = node[1:]
        first = spell(left) if left[0] == kind else _within(left, _PRODUCT)
        return f" {_SETS[kind]} ".join((first, *(_within(part, _PRODUCT) for part in others))), _SUM
    return f"{kind}({', '.join(str(part) for part in node[1:])})", _ATOM


def _within(node: Node, least: int) -> str:
    """Returns a node as part of another one, in brackets if its precedence is below `least`."""
    text, binding = _spelled(node)
    return text if binding >= least else f"({text})"


def _add(node: Node) -> tuple[str, int]:
    text = _within(node[1], _SUM)
    for term in node[2:]:
        sign, part = ("-", term[1]) if term[0] == "neg" else ("+", term)
        if term[0] == "plusminus":
            sign, part = "±" if term[1] > 0 else "∓", term[2]
        text += f" {sign} {_within(part, _PRODUCT)}"
    return text, _SUM


def _list_of(nodes: tuple) -> str:
    return ", ".join(map(spell, nodes))


def _rel(node: Node) -> tuple[str, int]:
    return spell(node[1]) + "".join(f" {_SIGNS.get(sign, sign)} {spell(side)}" for sign, side in node[2:]), _SUM


def _root(node: Node) -> tuple[str, int]:
    index = spell(node[1])
    return f"sqrt({spell(node[2])})" if index == "2" else f"root({index}, {spell(node[2])})", _ATOM


def _over(name: str, body: Node, letter: Node, low: Node, high: Node) -> tuple[str, int]:
    return f"{name}({spell(body)}, {spell(letter)} = {spell(low)} to {spell(high)})", _ATOM


def _listed(node: Node) -> tuple[str, int]:
    text = spell(node[1][0])
    for joint, item in zip(node[2], node[1][1:], strict=False):
        text += (", " if joint == "," else f" {joint} ") + spell(item)
    return text, _SUM


_FORMS = {
    "neg": lambda node: (f"-{_within(node[1], _PRODUCT)}", _SUM),
    "plusminus": lambda node: (f"{'±' if node[1] > 0 else '∓'}{_within(node[2], _PRODUCT)}", _SUM),
    "add": _add,
    "mul": lambda node: ("*".join(_within(part, _PRODUCT) for part in node[1:]), _PRODUCT),
    "div": lambda node: (f"{_within(node[1], _PRODUCT)}/{_within(node[2], _POWER)}", _PRODUCT),
    "pow": lambda node: (f"{_within(node[1], _ATOM)}^{_within(node[2], _ATOM)}", _POWER),
    "root": _root,
    "fn": lambda node: (f"{node[1]}({_list_of(node[2:])})", _ATOM),
    "app": lambda node: (f"{node[1]}({_list_of(node[2:])})", _ATOM),
    "fact": lambda node: (f"{_within(node[1], _ATOM)}!", _POWER),
    "deg": lambda node: (f"{_within(node[1], _ATOM)}°", _POWER),
    "series": lambda node: _over(node[1], node[5], node[2], node[3], node[4]),
    "integral": lambda node: _over("integral", node[4], node[1], node[2], node[3]),
    "tuple": lambda node: (f"{node[1]}{_list_of(node[3])}{node[2]}", _ATOM),
    "set": lambda node: (f"{{{_list_of(node[1])}}}", _ATOM),
    "such": lambda node: (f"{{{spell(node[1])} | {spell(node[2])}}}", _ATOM),
    "matrix": lambda node: (f"[{', '.join(f'[{_list_of(row)}]' for row in node[1])}]", _ATOM),
    "cases": lambda node: (f"{{{'; '.join(map(_list_of, node[1]))}}}", _ATOM),
    "field": lambda node: (node[1], _ATOM),
    "unit": lambda node: (f"{_within(node[1], _PRODUCT)} {_unit(node[2])}", _PRODUCT),
    "ratio": lambda node: (":".join(_within(part, _PRODUCT) for part in node[1]), _SUM),
    "based": lambda node: (f"{node[1]}_{node[2]}", _ATOM),
    "rel": _rel,
    "congruent": lambda node: (f"{spell(node[1])} ≡ {spell(node[2])} mod {_within(node[3], _PRODUCT)}", _SUM),
    "list": _listed,
}
