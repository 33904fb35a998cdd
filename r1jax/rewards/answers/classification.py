"""Turns nodes (formula.py) into typed values (values.py)."""

import dataclasses
from fractions import Fraction

from mpmath import mp

from r1jax.rewards.answers import units
from r1jax.rewards.answers.evaluation import letters, mentions, real, same
from r1jax.rewards.answers.formula import Node
from r1jax.rewards.answers.tokens import (
    Unreadable,
)
from r1jax.rewards.answers.values import (
    Based,
    Congruence,
    Matrix,
    Named,
    Pieces,
    Quantity,
    Ratio,
    RealSet,
    Relation,
    Several,
    Value,
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One of several values side by side, with the node from which it was read, if there is one."""

    value: Value
    node: Node | None = None


def classified(node: Node) -> Value:
    """Returns the value of a node. Raises Unreadable for a node that is not an answer."""
    kind = node[0]
    if kind == "unit":
        return _united(node)
    if kind in ("mul", "div", "neg", "add") and mentions(node, frozenset(("unit",))):
        return _with_inner_unit(node)
    if kind in _CLASSES:
        return _CLASSES[kind](node)
    if _has_matrix(node):
        return _scaled_matrix(node)
    if mentions(node, frozenset(("tuple", "set", "union", "meet", "minus", "rel", "list"))):
        return _around_sets(node)
    if mentions(node, frozenset(("plusminus",))):
        return Several("list", tuple(map(Quantity, _with_signs(node))))
    if mentions(node, frozenset(("deg",))):
        plain, has_degrees = _without_degrees(node)
        return Quantity(plain, units.unit({"degrees": Fraction(1)}) if has_degrees else ())
    return Quantity(node)


def _united(node: Node) -> Value:
    inner = classified(node[1])
    if isinstance(inner, Quantity):
        return dataclasses.replace(inner, unit=node[2])
    if isinstance(inner, Several):
        members = tuple(
            dataclasses.replace(m, unit=m.unit or node[2]) if isinstance(m, Quantity) else m for m in inner.members
        )
        return dataclasses.replace(inner, members=members)
    return inner


def _with_inner_unit(node: Node) -> Value:
    """Returns the value of an expression such as 2(3 cm)/2, whose one inner unit is the unit of the whole."""
    inner_units: list[units.Unit] = []

    def plain(part):
        if isinstance(part, tuple) and part and part[0] == "unit":
            inner_units.append(part[2])
            return plain(part[1])
        return tuple(plain(inner) if isinstance(inner, tuple) else inner for inner in part)

    inner = plain(node)
    if len(set(inner_units)) != 1 or (len(inner_units) > 1 and node[0] != "add"):
        raise Unreadable("several units")
    return _united(("unit", inner, inner_units[0]))


def _around_sets(node: Node) -> Value:
    """Returns the value of a point with its name, A(1, 2). Raises Unreadable for other expressions with sets."""
    point = node[0] == "mul" and node[1][0] == "sym" and node[2][0] == "tuple" and node[1][1][:1].isupper()
    if point:
        return classified(node[2])
    raise Unreadable("a set inside an expression")


def _with_signs(node: Node) -> list[Node]:
    r"""Returns the expressions for both signs of \pm; for several \pm all combinations, with \mp only two."""
    signs = _signs(node)
    if len(signs) == 1 or -1 in signs or len(signs) > 3:
        return [_with_sign(node, sign) for sign in (1, -1)]
    expressions = [node]
    for _ in signs:
        expressions = [_first_sign(one, sign)[0] for one in expressions for sign in (1, -1)]
    return expressions


def _signs(node) -> list[int]:
    signs = [node[1]] if isinstance(node, tuple) and node and node[0] == "plusminus" else []
    for part in node if isinstance(node, tuple) else ():
        signs += _signs(part)
    return signs


def _first_sign(node, sign: int):
    """Returns (node with its first plus-minus sign replaced by `sign`, whether it had one)."""
    if not isinstance(node, tuple):
        return node, False
    if node and node[0] == "plusminus":
        return (node[2] if sign > 0 else ("neg", node[2])), True
    parts, done = [], False
    for part in node:
        if not done:
            part, done = _first_sign(part, sign)
        parts.append(part)
    return tuple(parts), done


def _with_sign(node: Node, sign: int) -> Node:
    if not isinstance(node, tuple):
        return node
    if node and node[0] == "plusminus":
        inner = _with_sign(node[2], sign)
        return inner if node[1] * sign > 0 else ("neg", inner)
    return tuple(_with_sign(part, sign) if isinstance(part, tuple) else part for part in node)


def _without_degrees(node: Node) -> tuple[Node, bool]:
    """Returns (node without degree signs outside of function arguments, whether it had any)."""
    if node[0] == "deg":
        return node[1], True
    if node[0] == "fn" or node[0] in ("num", "sym", "const"):
        return node, False
    parts = [
        (_without_degrees(part) if isinstance(part, tuple) and part and isinstance(part[0], str) else (part, False))
        for part in node[1:]
    ]
    return (node[0], *(part for part, _ in parts)), any(had_degrees for _, had_degrees in parts)


def _several(node: Node) -> Value:
    if node[0] == "set":
        return Several("set", _flat(classified(item) for item in node[1]))
    return Several("tuple", tuple(classified(item) for item in node[3]), node[1], node[2])


def _flat(values) -> tuple[Value, ...]:
    members = []
    for value in values:
        members += value.members if isinstance(value, Several) and value.kind == "list" else (value,)
    return tuple(members)


def _listed(node: Node) -> Value:
    return joined([Part(classified(item), item) for item in node[1]], ["," if j == "," else j for j in node[2]])


def _united_sets(node: Node) -> Value:
    sides = [classified(side) for side in node[1:3]]
    if node[0] == "union" and any(isinstance(side, Several) and side.kind == "set" for side in sides):
        sets = [side if isinstance(side, Several) else Several("set", (side,)) for side in sides]  # {3} reads as 3
        if all(side.kind == "set" for side in sets):
            return Several("set", sets[0].members + sets[1].members)
    return RealSet(node)


def _relation(node: Node) -> Value:
    first, sides = node[1], node[2:]
    signs = [sign for sign, _ in sides]
    if set(signs) <= {"=", "approx", "equiv", "cong"}:
        equal = [side for sign, side in sides if sign == "="]
        if not equal and not letters(first):
            if not agree([first, *(side for _, side in sides)]):
                raise Unreadable("sides that are not nearly equal")
            return classified(first)
        last = equal[-1] if equal else sides[0][1]
        everything = [first, *equal] if equal else [first, last]
        if not any(letters(side) for side in everything) and not agree(everything):
            return Relation(first, tuple(("=", side) for side in everything[1:]))
        if (
            _is_identity(everything)
            or not any(letters(side) for side in everything)
            and not any(mentions(side, _SETS) for side in everything)
        ):
            return classified(last)
        if any(mentions(side, _SETS) or side[0] == "matrix" for side in everything):
            if (
                first[0] == last[0] == "tuple"
                and len(first[3]) == len(last[3])
                and all(name[0] == "sym" for name in first[3])
            ):
                return Several(
                    "list",
                    tuple(Named(name[1], classified(item), None) for name, item in zip(first[3], last[3], strict=True)),
                )
            if first[0] == "sym" or letters(first):
                return Named(str(first[1]), classified(last), None)
            raise Unreadable("sets on both sides")
        if first[0] == "sym" and agree([side for _, side in sides if not letters(side)]):
            return Named(first[1], classified(last), ("rel", first, ("=", last)))
        return Relation(first, tuple(("=", side) for side in equal) or (("=", last),))
    if signs == ["in"] and first[0] == "sym":
        return Named(first[1], classified(sides[0][1]), None)
    if signs == ["in"] and first[0] in ("const", "app", "tuple"):
        return classified(sides[0][1])
    first, sides = _without_application(first, sides)
    for _, side in sides:
        if side[0] in ("unit", "deg"):
            sides = tuple((sign, side[1] if side[0] in ("unit", "deg") else side) for sign, side in sides)
    return Relation(first, tuple(sides))


def agree(sides: list[Node]) -> bool:
    """Returns whether numbers that are written as equal agree within 2%, which allows for rounding."""
    numbers = []
    for side in sides:
        try:
            numbers.append(real(side))
        except (ArithmeticError, AttributeError):
            continue  # a set, or an expression that is not evaluated
    finite = [value for value in numbers if mp.isfinite(value)]
    return all(abs(value - finite[0]) <= abs(finite[0]) / 50 for value in finite[1:])


def _is_identity(sides: list[Node]) -> bool:
    """Returns whether sides with letters are one expression in several forms; the last form is the answer then."""
    if sides[0][0] == "sym" or not letters(sides[0]):
        return False
    try:
        return all(same(sides[0], side) for side in sides[1:])
    except ArithmeticError:
        return False


def _without_application(first: Node, sides) -> tuple[Node, tuple]:
    """Returns the first side and the others with f(x), as in `0 < f(x) < 1`, replaced by one letter."""
    applications = {part for part in (first, *(side for _, side in sides)) if part[0] == "app"}
    if len(applications) != 1:
        return first, tuple(sides)
    application = applications.pop()
    letter = ("sym", f"{application[1]}()")
    return letter if first == application else first, tuple(
        (sign, letter if side == application else side) for sign, side in sides
    )


_SETS = frozenset(("tuple", "set", "union", "meet", "minus", "field", "such"))


def _such(node: Node) -> Value:
    inner, conditions = node[1], node[2]
    if inner[0] == "rel" and inner[2] != ("in", ("field", "R")):
        raise Unreadable("a set of other numbers")
    return classified(conditions)


def _matrix(node: Node) -> Value:
    return Matrix(node[1])


def _has_matrix(node) -> bool:
    """Returns whether a node contains a matrix outside of a determinant or trace."""
    if not isinstance(node, tuple) or node[:2] in (("fn", "det"), ("fn", "trace")):
        return False
    return node[:1] == ("matrix",) or any(map(_has_matrix, node))


def _scaled_matrix(node: Node) -> Matrix:
    kind = node[0]
    if kind == "matrix":
        return Matrix(node[1])
    if kind == "add":
        return _matrix_sum([_scaled_matrix(term) for term in node[1:]])
    if kind == "mul" and all(_has_matrix(part) for part in node[1:]):
        return _matrix_product(_scaled_matrix(node[1]), _scaled_matrix(node[2]))
    if kind == "neg":
        return _each(_scaled_matrix(node[1]), lambda cell: ("neg", cell))
    if kind == "div" and not _has_matrix(node[2]):
        return _each(_scaled_matrix(node[1]), lambda cell: ("div", cell, node[2]))
    if kind == "mul" and not _has_matrix(node[1]):
        return _each(_scaled_matrix(node[2]), lambda cell: ("mul", node[1], cell))
    if kind == "mul" and not _has_matrix(node[2]):
        return _each(_scaled_matrix(node[1]), lambda cell: ("mul", node[2], cell))
    raise Unreadable("an expression of matrices")


def _matrix_sum(terms: list[Matrix]) -> Matrix:
    if len({(len(term.rows), len(term.rows[0])) for term in terms}) != 1:
        raise Unreadable("matrices of different shapes")
    return Matrix(
        tuple(
            tuple(("add", *cells) for cells in zip(*rows, strict=True))
            for rows in zip(*(t.rows for t in terms), strict=True)
        )
    )


def _matrix_product(first: Matrix, second: Matrix) -> Matrix:
    if len(first.rows[0]) != len(second.rows) or len(second.rows) > 6:
        raise Unreadable("matrices that do not multiply")
    columns = list(zip(*second.rows, strict=True))
    return Matrix(
        tuple(
            tuple(("add", *(("mul", a, b) for a, b in zip(row, column, strict=True))) for column in columns)
            for row in first.rows
        )
    )


def _each(matrix: Matrix, change) -> Matrix:
    return Matrix(tuple(tuple(change(cell) for cell in row) for row in matrix.rows))


def _cases(node: Node) -> Value:
    rows = node[1]
    if all(len(row) == 1 for row in rows):
        parts = []
        for (cell,) in rows:
            parts.append(Part(classified(cell), cell))
        return joined(parts, ["and"] * (len(parts) - 1))
    if all(len(row) == 2 for row in rows):
        return Pieces(tuple((classified(value), classified(condition)) for value, condition in rows))
    raise Unreadable("cases")


_CLASSES = {
    "set": _several, "tuple": _several, "list": _listed, "union": _united_sets, "meet": _united_sets, "minus": _united_sets,
    "field": lambda node: RealSet(node), "rel": _relation, "such": _such, "matrix": _matrix, "cases": _cases,
    "ratio": lambda node: Ratio(tuple(part for part in node[1])), "based": lambda node: Based(node[1], node[2]),
    "congruent": lambda node: Congruence(*node[1:]),
}  # fmt: skip


def joined(parts: list[Part], joints: list[str]) -> Value:
    """Returns the value of several answers side by side; conditions on the first are dropped, names are shared."""
    first = parts[0]
    if (narrowed := _narrowed(parts)) is not None:
        return narrowed
    kept = [first, *(part for part in parts[1:] if not _conditions(part, first))]
    if len(kept) == 1:
        return first.value
    values = [part.value for part in kept]
    relations = [value for value in values if isinstance(value, Relation)]
    if len(relations) == len(values) and (combined := _combined(relations, joints)) is not None:
        return combined
    if any(_is_pair(value) for value in values):  # (x, y) = (5, 8) and (8, 5)
        values = [_as_tuple(value) for value in values]
    named, names = values[0], [value.name if isinstance(value, Named) else "" for value in values]
    if isinstance(named, Named) and named.name and all(name in (named.name, "") for name in names):
        members = _flat(value.value if isinstance(value, Named) else value for value in values)
        return Named(named.name, Several("list", members), None, named.parameters)
    return Several("list", _flat(values))


def _narrowed(parts: list[Part]) -> RealSet | None:
    r"""Returns the set of `x \in R, x \ne 1`, a membership and relations of one letter; None for anything else."""
    named = parts[0].value
    if not isinstance(named, Named) or not isinstance(named.value, RealSet | Several) or len(parts) < 2:
        return None
    relations = []
    for part in parts[1:]:
        if not isinstance(part.value, Relation) or _letters_in(part.value) != {named.name}:
            return None
        relations.append(part.value)
    inner = named.value
    node = inner.node if isinstance(inner, RealSet) else as_set(inner)
    if node is None:
        return None
    for relation in relations:
        node = ("meet", node, ("rel", relation.first, *relation.sides))
    return RealSet(node, named.name)


def _letters_in(relation: Relation) -> frozenset[str]:
    return frozenset().union(*(letters(side) for side in (relation.first, *(side for _, side in relation.sides))))


def as_set(value: Several) -> Node | None:
    """Returns the node of an interval or set of numbers; None for other members."""
    nodes = tuple(member.node for member in value.members if isinstance(member, Quantity))
    if len(nodes) != len(value.members):
        return None
    if value.kind == "tuple":
        return ("tuple", value.opening, value.closing, nodes)
    return ("set", nodes) if value.kind == "set" else None


def _is_pair(value: Value) -> bool:
    return isinstance(value, Several) and value.kind == "tuple"


def _as_tuple(value: Value) -> Value:
    """Returns the values of `(x, y) = (5, 8)` as a tuple; any other value unchanged."""
    if not isinstance(value, Several) or value.kind != "list":
        return value
    named = tuple(member.value for member in value.members if isinstance(member, Named))
    return Several("tuple", named, "(", ")") if len(named) == len(value.members) else value


def _conditions(part: Part, first: Part) -> bool:
    """Returns whether a part is a condition on the letters of the first one: `n \\in Z` after `2n`."""
    if isinstance(first.value, Relation) or part.node is None or part.node[0] != "rel":
        return False
    if all(sign == "=" for sign, _ in part.node[2:]) or any(
        sign == "in" and side[0] == "set" for sign, side in part.node[2:]
    ):
        return False
    if isinstance(first.value, Named):
        known = frozenset(first.value.parameters) | {first.value.name}
        known |= _letters_of(first.value.value)
        if isinstance(first.value.value, Quantity) and not letters(first.value.value.node):
            return False
    else:
        known = _letters_of(first.value)
    mine = frozenset().union(
        *(letters(side) for side in (part.node[1], *(side for _, side in part.node[2:])) if side[0] != "field")
    )
    return bool(mine & known)


def _letters_of(value: Value) -> frozenset[str]:
    if isinstance(value, Quantity):
        return letters(value.node)
    if isinstance(value, Several):
        return frozenset().union(*map(_letters_of, value.members))
    return frozenset()


def _combined(relations: list[Relation], joints: list[str]) -> Value | None:
    """Returns inequalities of one letter as one set: their union if joined by "or", else their intersection."""
    names = frozenset().union(*(letters(side) for r in relations for side in (r.first, *(side for _, side in r.sides))))
    inequalities = all(sign in ("<", ">", "le", "ge", "ne") for relation in relations for sign, _ in relation.sides)
    if len(names) != 1 or not inequalities:
        return None
    kind = "union" if "or" in joints else "meet" if "and" in joints else "either"
    node = ("rel", relations[0].first, *relations[0].sides)
    for relation in relations[1:]:
        node = (kind, node, ("rel", relation.first, *relation.sides))
    return RealSet(node, next(iter(names)))
