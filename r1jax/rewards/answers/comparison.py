"""Compares two values by their types: one function for each pair of types that can be equal.

Numbers are compared exactly, expressions by their values (evaluation.same), relations and intervals in a normal form;
letters must be the same. Comparison is symmetric. The docstring of a rule is part of its verdict's explanation.
"""

import re
from collections.abc import Callable
from fractions import Fraction

from r1jax.rewards.answers import evaluation, realsets, units
from r1jax.rewards.answers.classification import as_set
from r1jax.rewards.answers.evaluation import TooLarge, Undefined, letters
from r1jax.rewards.answers.formula import Node, number
from r1jax.rewards.answers.tokens import GREEK
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

MAX_MEMBERS = 60
# Nouns and adverbs after a number that do not name what it counts.
_NEUTRAL = frozenset(
    "total altogether each exactly only long wide tall high deep away old apart respectively in per hour a of".split()
)
_INDEXED = re.compile(r"[A-Za-z]_\{?\d+\}?")
_RULES: dict[tuple[type, type], Callable] = {}


def equal(first: Value, second: Value) -> bool:
    """Returns whether two values are the same answer. Raises TooLarge if that would take too long to decide."""
    return rule(first, second)[0]


def rule(first: Value, second: Value) -> tuple[bool, str]:
    """Returns (whether two values are the same answer, the rule that decided). Raises TooLarge as `equal` does."""
    if first == second:
        return True, "they are the same"
    for one, other in ((first, second), (second, first)):
        if (compare := _RULES.get((type(one), type(other)))) is not None:
            try:
                return compare(one, other), f"{one.type} with {other.type}: {compare.__doc__}"
            except Undefined as error:
                return False, f"{one.type} with {other.type}: {error}"
    return False, f"a {first.type} is no {second.type}"


def _for(first: type, *seconds: type):
    def register(function: Callable) -> Callable:
        for second in seconds:
            _RULES[first, second] = function
        return function

    return register


@_for(Quantity, Quantity)
def _quantities(first: Quantity, second: Quantity) -> bool:
    """values compared, units where both have one"""
    nouns = [value.nouns - _NEUTRAL for value in (first, second)]
    if all(nouns) and not nouns[0] & nouns[1]:
        return False
    measured = [bool(set(dict(value.unit)) - {"percent", "units"}) for value in (first, second)]
    if (nouns[0] and not measured[0] and measured[1]) or (nouns[1] and not measured[1] and measured[0]):
        return False
    general = [dict(value.unit).get("units") for value in (first, second)]
    if None not in general and general[0] != general[1]:
        return False
    one, other = ({key: power for key, power in value.unit if key != "units"} for value in (first, second))
    percents = [unit.pop("percent", None) for unit in (one, other)]
    if percents.count(None) == 1:
        if one or other:
            return evaluation.same(first.node, second.node)
        part, whole = (first, second) if percents[0] is not None else (second, first)
        return evaluation.same(part.node, whole.node) or evaluation.same(("div", part.node, number(100)), whole.node)
    if not one or not other:
        return evaluation.same(first.node, second.node)
    if {tuple(one), tuple(other)} == {("degrees",), ("rad",)}:
        turned = [
            ("deg", value.node) if "degrees" in unit else value.node for value, unit in ((first, one), (second, other))
        ]
        return evaluation.same(*turned)
    scale = units.ratio(units.unit(one), units.unit(other))
    if scale is None:
        return False
    return evaluation.same(first.node if scale == 1 else ("mul", number(scale), first.node), second.node)


@_for(Named, Named)
def _named(first: Named, second: Named) -> bool:
    """the same name and value, or the same equation"""
    if first.parameters and second.parameters and len(first.parameters) == len(second.parameters):
        pairs = dict(zip(second.parameters, first.parameters, strict=True))
        if not _depends(first) and not _depends(second):
            return _plain_name(first.name) == _plain_name(second.name) and equal(first.value, second.value)
        if first.name.partition("(")[0] != second.name.partition("(")[0]:
            return False
        return equal(first.value, _renamed(second.value, pairs))
    if _one_name(first, second):
        return equal(first.value, second.value)
    one, other = first.equation, second.equation
    if one and other and min(len(_all_letters(one)), len(_all_letters(other))) > 1:
        return _equations(one, other)
    return False


def _depends(named: Named) -> bool:
    return isinstance(named.value, Quantity) and bool(letters(named.value.node) & set(named.parameters))


def _one_name(first: Named, second: Named) -> bool:
    one, other = _plain_name(first.name), _plain_name(second.name)
    if one == other:
        return True
    if first.parameters or second.parameters:
        return "y" in (one, other)
    short, long = sorted((one, other), key=len)
    return len(short) == 1 and len(long) > 3 and (short + long).isalpha() and long not in GREEK


def _plain_name(name: str) -> str:
    return name.replace("{", "").replace("}", "").replace(" ", "").replace("*", "").replace("mid", "|")


def _all_letters(equation: Node) -> frozenset[str]:
    return letters(equation[1]) | letters(equation[2][1])


def _renamed(value: Value, pairs: dict[str, str]) -> Value:
    def node(part):
        if isinstance(part, tuple) and part and part[0] == "sym":
            return ("sym", pairs.get(part[1], part[1]))
        return tuple(node(inner) for inner in part) if isinstance(part, tuple) else part

    return Quantity(node(value.node), value.unit, value.nouns) if isinstance(value, Quantity) else value


@_for(Named, Quantity, Several, RealSet, Matrix, Pieces, Text, Based, Clock, Date, Ratio, Choice)
def _named_value(first: Named, second: Value) -> bool:
    """the named value compared"""
    return equal(first.value, second)


@_for(Named, Relation)
def _named_relation(first: Named, second: Relation) -> bool:
    """equations that are multiples of each other, or a set that the named letter is in"""
    if isinstance(first.value, RealSet | Several) and _letter(second) == first.name:
        return equal(first.value, second)
    return first.equation is not None and _relations(Relation(first.equation[1], first.equation[2:]), second)


@_for(Several, Several)
def _several(first: Several, second: Several) -> bool:
    """members compared: in order for tuples, in any order for sets and lists"""
    kinds = {first.kind, second.kind}
    if len(first.members) != len(second.members) and "tuple" in kinds:
        return False
    if max(len(first.members), len(second.members)) > MAX_MEMBERS:
        raise TooLarge("too many members")
    if kinds == {"tuple"}:
        brackets = (first.opening, first.closing) == (second.opening, second.closing)
        return (brackets or len(first.members) != 2) and _in_order(first.members, second.members)
    if kinds == {"tuple", "set"}:
        return False
    mine, theirs = _system(first), _system(second)
    if "tuple" in kinds:
        pair, other = (first, second) if first.kind == "tuple" else (second, first)
        interval = len(pair.members) == 2 and (pair.opening, pair.closing) != ("(", ")")
        orders = _system(other)
        return not interval and _in_order(pair.members, orders[-1] if orders else other.members)
    named, other = (mine, second) if mine is not None else (theirs, first)
    if named is not None and (mine is None or theirs is None):
        return "set" not in kinds and any(_in_order(values, other.members) for values in named)
    points = all(isinstance(member, Several) for member in (*first.members, *second.members))
    return _in_any_order(first.members, second.members, "set" in kinds or points)


def _system(value: Several) -> list[tuple[Value, ...]] | None:
    """Returns the values of `x = 1, y = 2` as written and in the order of their names; None for anything else."""
    named = [member for member in value.members if isinstance(member, Named)]
    names = [member.name for member in named]
    if value.kind != "list" or len(names) != len(value.members) or len(set(names)) != len(names):
        return None
    if all(_INDEXED.fullmatch(name) for name in names) and len({name.partition("_")[0] for name in names}) == 1:
        return None  # x_1 and x_2 have no order
    orders = [named]
    if all(len(name) == 1 for name in names):
        orders.append(sorted(named, key=lambda member: member.name))
    return [tuple(member.value for member in members) for members in orders]


def _in_order(first: tuple[Value, ...], second: tuple[Value, ...]) -> bool:
    return len(first) == len(second) and all(equal(one, other) for one, other in zip(first, second, strict=True))


def _in_any_order(first: tuple[Value, ...], second: tuple[Value, ...], as_sets: bool) -> bool:
    if as_sets:
        return all(any(_same_member(one, other) for other in second) for one in first) and all(
            any(_same_member(one, other) for other in first) for one in second
        )
    left = list(second)
    for one in first:
        place = next((place for place, other in enumerate(left) if _same_member(one, other)), None)
        if place is None:
            return False
        left.pop(place)
    return not left


def _same_member(one: Value, other: Value) -> bool:
    """Returns whether two members are equal; a set of one member does not equal that member here."""
    sets = [isinstance(value, Several) and value.kind == "set" for value in (one, other)]
    return sets[0] == sets[1] and equal(one, other)


@_for(Several, Quantity)
def _several_quantity(first: Several, second: Quantity) -> bool:
    """a set of one member, or a vector in its basis"""
    if first.kind == "set" and len(first.members) == 1:
        return equal(first.members[0], second)
    vector = _vector(second.node)
    if first.kind == "tuple" and vector is not None:
        parts = vector[: len(first.members)]
        rest = vector[len(parts) :]
        return (
            len(first.members) in (2, 3)
            and _in_order(first.members, tuple(map(Quantity, parts)))
            and all(evaluation.same(part, number(0)) for part in rest)
        )
    return False


def _vector(node: Node) -> list[Node] | None:
    """Returns the components of an expression in i, j, k with arrows; None for another one."""
    names = ("basis i", "basis j", "basis k")
    if not letters(node) & set(names):
        return None
    return [_with_basis(node, name) for name in names]


def _with_basis(node, name: str):
    if isinstance(node, tuple) and node and node[0] == "sym" and str(node[1]).startswith("basis "):
        return number(1 if node[1] == name else 0)
    return tuple(_with_basis(part, name) if isinstance(part, tuple) else part for part in node)


@_for(Several, RealSet, Relation)
def _several_real(first: Several, second: RealSet | Relation) -> bool:
    """intervals compared"""
    node = as_set(first) or _as_union(first)
    if node is None:
        return False
    return realsets.same(realsets.intervals(node), _intervals(second))


def _as_union(value: Several) -> Node | None:
    """Returns the union of the intervals of a list, "(0, 1) or (2, 3)"; None for other lists."""
    several = [member for member in value.members if isinstance(member, Several)]
    pairs = [member for member in several if member.kind == "tuple" and len(member.members) == 2]
    if value.kind != "list" or not pairs or len(pairs) != len(value.members):
        return None
    node = None
    for pair in pairs:
        part = as_set(pair)
        if part is None:
            return None
        node = part if node is None else ("union", node, part)
    return node


def _intervals(value: RealSet | Relation) -> list:
    if isinstance(value, RealSet):
        return realsets.intervals(value.node)
    return realsets.intervals(("rel", value.first, *value.sides))


@_for(RealSet, RealSet, Relation)
def _real_sets(first: RealSet, second: RealSet | Relation) -> bool:
    """intervals compared, of the same letter"""
    names = [_letter(value) for value in (first, second)]
    if all(names) and names[0] != names[1]:
        return False
    return realsets.same(_intervals(first), _intervals(second))


def _letter(value: RealSet | Relation) -> str:
    if isinstance(value, RealSet):
        return value.letter
    names = frozenset().union(letters(value.first), *(letters(side) for _, side in value.sides))
    return next(iter(names)) if len(names) == 1 else "?" if not names else "several"


@_for(Relation, Relation)
def _relations(first: Relation, second: Relation) -> bool:
    """relations in one form: multiples of each other, or the same interval"""
    if len(first.sides) == len(second.sides) == 1:
        verdict = _one_relation(first, second)
        if verdict is not None:
            return verdict
    if [sign for sign, _ in first.sides] == [sign for sign, _ in second.sides]:
        sides = zip(
            (first.first, *(s for _, s in first.sides)), (second.first, *(s for _, s in second.sides)), strict=True
        )
        if all(_same_side(one, other) for one, other in sides):
            return True
    names = [_letter(first), _letter(second)]
    if names[0] != names[1] or names[0] in ("several", "?"):
        return False
    return realsets.same(_intervals(first), _intervals(second))


def _same_side(one: Node, other: Node) -> bool:
    try:
        return evaluation.same(one, other)
    except Undefined:
        return one == other


def _one_relation(first: Relation, second: Relation) -> bool | None:
    """Returns whether two relations with one sign each are equivalent; None if their forms do not decide."""
    (sign, right), (other_sign, other_right) = first.sides[0], second.sides[0]
    if (sign == "=") != (other_sign == "="):
        return False
    if (sign == "ne") != (other_sign == "ne"):
        return None
    if sign not in ("=", "ne", "<", ">", "le", "ge"):
        return sign == other_sign and _same_side(first.first, second.first) and _same_side(right, other_right)
    ratio = evaluation.constant_ratio(("add", first.first, ("neg", right)), ("add", second.first, ("neg", other_right)))
    if sign == "=":
        return ratio is not None or _same_numerators(first, second)
    if sign == "ne":
        return True if ratio is not None else None
    if ratio is None:
        return None
    turned = {"<": ">", ">": "<", "le": "ge", "ge": "le"}
    return (sign if ratio > 0 else turned[sign]) == other_sign


def _equations(first: Node, second: Node) -> bool:
    return _one_relation(Relation(first[1], first[2:]), Relation(second[1], second[2:])) is True


def _same_numerators(first: Relation, second: Relation) -> bool:
    """Returns whether two rational equations, with fractions cleared, are multiples of each other."""
    import sympy

    from r1jax.rewards.answers.symbolic import to_sympy

    differences = [("add", value.first, ("neg", value.sides[0][1])) for value in (first, second)]
    names = letters(differences[0]) | letters(differences[1])
    if not any(evaluation.mentions(difference, frozenset(("div",))) for difference in differences) or len(names) > 6:
        return False
    symbols = {name: sympy.Symbol(f"x{place}", positive=True) for place, name in enumerate(sorted(names))}
    numerators = [sympy.fraction(sympy.together(to_sympy(difference, symbols)))[0] for difference in differences]
    ratio = sympy.cancel(numerators[0] / numerators[1]) if numerators[1] != 0 else sympy.Integer(0)
    return bool(ratio.is_number and ratio != 0)


@_for(Matrix, Matrix)
def _matrices(first: Matrix, second: Matrix) -> bool:
    """entries compared"""
    if [len(row) for row in first.rows] != [len(row) for row in second.rows]:
        return False
    return all(
        evaluation.same(one, other)
        for a, b in zip(first.rows, second.rows, strict=True)
        for one, other in zip(a, b, strict=True)
    )


@_for(Matrix, Several)
def _matrix_several(first: Matrix, second: Several) -> bool:
    """a vector as a tuple"""
    entries = [cell for row in first.rows for cell in row]
    single = len(first.rows) == 1 or len(first.rows[0]) == 1
    return (
        single
        and second.kind == "tuple"
        and second.opening == "("
        and _in_order(tuple(map(Quantity, entries)), second.members)
    )


@_for(Matrix, Quantity)
def _matrix_quantity(first: Matrix, second: Quantity) -> bool:
    """a vector in its basis"""
    entries = tuple(Quantity(cell) for row in first.rows for cell in row)
    single = len(first.rows) == 1 or len(first.rows[0]) == 1
    return single and _several_quantity(Several("tuple", entries, "(", ")"), second)


@_for(Pieces, Pieces)
def _pieces(first: Pieces, second: Pieces) -> bool:
    """values and conditions compared, in any order"""
    rows = [tuple(Several("tuple", row, "(", ")") for row in value.rows) for value in (first, second)]
    return len(rows[0]) == len(rows[1]) and _in_any_order(rows[0], rows[1], False)


@_for(Congruence, Congruence)
def _congruences(first: Congruence, second: Congruence) -> bool:
    """the same residue of the same modulus"""
    if not evaluation.same(first.modulus, second.modulus) or not evaluation.same(first.first, second.first):
        return False
    difference = evaluation.exact(("div", ("add", first.second, ("neg", second.second)), first.modulus))
    return difference is not None and difference.denominator == 1


@_for(Based, Based)
def _based(first: Based, second: Based) -> bool:
    """digits and base"""
    return first == second


@_for(Based, Quantity, Text)
def _based_quantity(first: Based, second: Quantity | Text) -> bool:
    """digits without a base are in the base that was asked for"""
    if isinstance(second, Text):
        return second.words.replace(" ", "").upper() == first.digits
    return (
        second.node == number(Fraction(int(first.digits)))
        if first.digits.isdigit()
        else _spelling(second.node).upper() == first.digits
    )


@_for(Clock, Clock)
def _clocks(first: Clock, second: Clock) -> bool:
    """the same time of day"""
    if first.half and second.half:
        return first.minutes == second.minutes
    return first.minutes % 720 == second.minutes % 720 if first.half or second.half else first == second


@_for(Clock, Ratio, Quantity)
def _clock_ratio(first: Clock, second: Value) -> bool:
    """a time written as a ratio"""
    if first.half:
        return False
    parts = (number(first.minutes // 60), number(first.minutes % 60))
    return equal(Ratio(parts), second)


@_for(Ratio, Ratio)
def _ratios(first: Ratio, second: Ratio) -> bool:
    """parts in proportion"""
    if len(first.parts) != len(second.parts):
        return False
    a, b = first.parts, second.parts
    if any(all(evaluation.exact(part) == 0 for part in parts) for parts in (a, b)):
        return False  # 0:0 is in no proportion
    return all(evaluation.same(("mul", a[place], b[0]), ("mul", b[place], a[0])) for place in range(1, len(a)))


@_for(Ratio, Quantity)
def _ratio_quantity(first: Ratio, second: Quantity) -> bool:
    """a ratio of two as their quotient"""
    return len(first.parts) == 2 and not second.unit and evaluation.same(("div", *first.parts), second.node)


@_for(Text, Quantity)
def _text_quantity(first: Text, second: Quantity) -> bool:
    """letters that spell the word"""
    spelling = _spelling(second.node)
    return spelling.isalpha() and not second.unit and spelling.casefold() == first.words


@_for(Choice, Quantity)
def _choice_quantity(first: Choice, second: Quantity) -> bool:
    """the option's letter"""
    return second.node == ("sym", first.letter)


@_for(Choice, Text)
def _choice_text(first: Choice, second: Text) -> bool:
    """the option's letter"""
    return second.words == first.letter.casefold()


def _spelling(node: Node) -> str:
    """Returns the letters of a product of letters, in order; "" for anything else."""
    if node[0] in ("sym", "const") and len(node[1]) == 1:
        return node[1]
    if node[0] == "num" and node[1].denominator == 1:
        return str(node[1])
    if node[0] == "mul":
        parts = [_spelling(part) for part in node[1:]]
        return "".join(parts) if all(parts) else ""
    return ""
