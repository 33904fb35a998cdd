"""Converts sets of real numbers to intervals: interval notation, inequalities of one letter, and their unions.

Inequalities are solved directly if the letter is isolated or linear, else by sympy.
"""

import itertools

from mpmath import mp

from r1jax.rewards.answers.evaluation import Undefined, letters, mentions, real
from r1jax.rewards.answers.formula import Node, number

Interval = tuple  # (low, whether low is included, high, whether high is included)
MAX_DEGREE = 12
_DIGITS = 100  # digits in which equal ends must agree
_WORKING_DIGITS = 140
_SPECIAL = {"R": ("", ""), "R^+": (0, False), "R_+": (0, False), "R^{+}": (0, False)}
_TURNED = {"<": ">", ">": "<", "le": "ge", "ge": "le", "ne": "ne", "=": "="}
_CURVED = frozenset(("fn", "pow", "root", "fact", "series", "integral", "app", "div"))
_WHOLE = [(-mp.inf, False, mp.inf, False)]


def intervals(node: Node) -> list[Interval]:
    """Returns the intervals of a node, disjoint and in order. Raises Undefined if it is no set of reals; TooLarge."""
    with mp.workdps(_WORKING_DIGITS):
        return _merged(_intervals(node))


def same(first: list[Interval], second: list[Interval]) -> bool:
    """Returns whether two lists of intervals are the same set."""
    if len(first) != len(second):
        return False
    with mp.workdps(_WORKING_DIGITS):
        return all(
            _close(a[0], b[0]) and _close(a[2], b[2]) and (a[1], a[3]) == (b[1], b[3])
            for a, b in zip(first, second, strict=True)
        )


def _close(first, second) -> bool:
    if mp.isinf(first) or mp.isinf(second):
        return first == second
    return abs(first - second) <= max(abs(first), abs(second)) * mp.mpf(10) ** -_DIGITS


def _intervals(node: Node) -> list[Interval]:
    kind = node[0]
    if kind == "tuple" and len(node[3]) == 2:
        low, high = (real(end) for end in node[3])
        if low > high or (low == high and (node[1], node[2]) != ("[", "]")):
            raise Undefined("ends of an interval")
        return [(low, node[1] == "[" and not mp.isinf(low), high, node[2] == "]" and not mp.isinf(high))]
    if kind == "set":
        return [(value, True, value, True) for value in map(real, node[1])]
    if kind == "field" and node[1] in _SPECIAL:
        low, closed = _SPECIAL[node[1]]
        return _WHOLE if low == "" else [(mp.mpf(low), closed, mp.inf, False)]
    if kind == "union":
        return _intervals(node[1]) + _intervals(node[2])
    if kind == "meet":
        return _met(_merged(_intervals(node[1])), _merged(_intervals(node[2])))
    if kind == "either":  # joined by a comma: their intersection, or their union if that is empty
        sides = [_merged(_intervals(part)) for part in node[1:]]
        return _met(*sides) or sides[0] + sides[1]
    if kind == "minus":
        return _met(_merged(_intervals(node[1])), _complement(_merged(_intervals(node[2]))))
    if kind == "rel":
        return _of_relations(node)
    if kind == "such":
        return _intervals(node[2])
    if kind == "list":
        shared = _WHOLE
        for part in node[1]:
            shared = _met(shared, _merged(_intervals(part)))
        return shared
    raise Undefined(f"{kind} is no set of numbers")


def _merged(some: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for low, low_in, high, high_in in sorted(some, key=lambda part: (part[0], not part[1])):
        if merged:
            last = merged[-1]
            touching = low < last[2] or (_close(low, last[2]) and (low_in or last[3]))
            if touching:
                if high > last[2] and not _close(high, last[2]):
                    merged[-1] = (last[0], last[1], high, high_in)
                elif _close(high, last[2]):
                    merged[-1] = (last[0], last[1], last[2], last[3] or high_in)
                continue
        merged.append((low, low_in, high, high_in))
    return merged


def _complement(some: list[Interval]) -> list[Interval]:
    gaps, low, low_in = [], -mp.inf, False
    for part in some:
        if part[0] > low or (part[0] == low and low_in and not part[1]):
            gaps.append((low, low_in, part[0], not part[1] and not mp.isinf(part[0])))
        low, low_in = part[2], not part[3]
    if low < mp.inf:
        gaps.append((low, low_in and not mp.isinf(low), mp.inf, False))
    return gaps


def _met(first: list[Interval], second: list[Interval]) -> list[Interval]:
    shared = []
    for a in first:
        for b in second:
            low, low_in = (a[0], a[1] and b[1]) if a[0] == b[0] else max((a[:2], b[:2]), key=lambda end: end[0])
            high, high_in = (a[2], a[3] and b[3]) if a[2] == b[2] else min((a[2:], b[2:]), key=lambda end: end[0])
            if low < high or (low == high and low_in and high_in):
                shared.append((low, low_in, high, high_in))
    return shared


def _of_relations(node: Node) -> list[Interval]:
    """Returns the solution set of a chain of relations of one letter."""
    names = frozenset().union(letters(node[1]), *(letters(side) for _, side in node[2:] if side[0] != "field"))
    if len(names) != 1:
        raise Undefined("relations of one letter only")
    name = next(iter(names))
    left, solution = node[1], _WHOLE
    for sign, right in node[2:]:
        solution = _met(solution, _merged(_of_one(left, sign, right, name)))
        left = right
    return solution


def _of_one(left: Node, sign: str, right: Node, name: str) -> list[Interval]:
    letter = ("sym", name)
    if sign in ("in", "notin") and left != letter:
        raise Undefined("an expression in a set")
    if sign == "in":
        return _intervals(right)
    if sign == "notin":
        return _complement(_merged(_intervals(right)))
    if sign not in _TURNED:
        raise Undefined(f"{sign} is no order")
    if right == letter and name not in letters(left):
        left, sign, right = right, _TURNED[sign], left
    if left == letter and name not in letters(right):
        return _from(sign, real(right))
    difference = ("add", left, ("neg", right))
    if not mentions(difference, _CURVED):
        at = [_at(difference, name, value) for value in (0, 1, 2, -3)]
        slope = at[1] - at[0]
        if slope and all(_close_to_zero(at[i] - at[0] - value * slope, at) for i, value in ((2, 2), (3, -3))):
            return _from(sign if slope > 0 else _TURNED[sign], -at[0] / slope)
    return _solved(left, sign, right, name)


def _close_to_zero(value, scale) -> bool:
    return abs(value) <= max(map(abs, scale)) * mp.mpf(10) ** -_DIGITS


def _at(node: Node, name: str, value: int):
    return real(_put(node, name, number(value)))


def _put(node, name: str, value: Node):
    if node == ("sym", name):
        return value
    return tuple(_put(part, name, value) if isinstance(part, tuple) else part for part in node)


def _from(sign: str, bound) -> list[Interval]:
    if sign in ("<", "le"):
        return [(-mp.inf, False, bound, sign == "le")]
    if sign in (">", "ge"):
        return [(bound, sign == "ge", mp.inf, False)]
    if sign == "ne":
        return [(-mp.inf, False, bound, False), (bound, False, mp.inf, False)]
    return [(bound, True, bound, True)]


def _solved(left: Node, sign: str, right: Node, name: str) -> list[Interval]:
    import sympy

    from r1jax.rewards.answers.symbolic import to_sympy

    symbol = sympy.Symbol("x", real=True)
    difference = to_sympy(("add", left, ("neg", right)), {name: symbol})
    if difference.has(sympy.I, sympy.zoo, sympy.nan, sympy.oo):
        raise Undefined("an inequality of other than real numbers")
    top, bottom = sympy.fraction(sympy.together(difference))
    if all(part.is_polynomial(symbol) for part in (top, bottom)):
        return _of_signs(top, bottom, sign, symbol)
    kinds = {"<": sympy.Lt, ">": sympy.Gt, "le": sympy.Le, "ge": sympy.Ge, "ne": sympy.Ne, "=": sympy.Eq}
    try:
        solution = sympy.solveset(kinds[sign](difference, 0), symbol, sympy.S.Reals)
    except (NotImplementedError, ValueError, TypeError, AttributeError):
        raise Undefined("not solved") from None
    return _from_sympy(solution)


def _of_signs(top, bottom, sign: str, symbol) -> list[Interval]:
    """Returns where a quotient of two polynomials has the wanted sign, which is constant between its roots."""
    zeros, poles = _roots(top, symbol), _roots(bottom, symbol)
    ends = [-mp.inf, *sorted(zeros + poles), mp.inf]
    wanted = {"<": (-1,), "le": (-1, 0), ">": (1,), "ge": (1, 0), "ne": (-1, 1), "=": (0,)}[sign]
    solution = [
        (zero, True, zero, True) for zero in zeros if 0 in wanted and not any(_close(zero, pole) for pole in poles)
    ]
    for low, high in itertools.pairwise(ends):
        if mp.isinf(low) or mp.isinf(high):
            inner = 0 if mp.isinf(low) and mp.isinf(high) else high - 1 if mp.isinf(low) else low + 1
        else:
            inner = (low + high) / 2
        if _sign_at(top, symbol, inner) * _sign_at(bottom, symbol, inner) in wanted:
            solution.append((low, False, high, False))
    return solution


def _sign_at(polynomial, symbol, value) -> int:
    import sympy

    return int(sympy.sign(polynomial.subs(symbol, sympy.Rational(mp.nstr(mp.mpf(value), 30))).evalf(20)))


def _roots(polynomial, symbol) -> list:
    """Returns the distinct real roots of a polynomial."""
    import sympy

    poly = sympy.Poly(polynomial, symbol)
    if poly.degree() < 1:
        return []
    if poly.degree() > MAX_DEGREE or not (poly.domain.is_QQ or poly.domain.is_ZZ):
        raise Undefined("an inequality too large to solve")
    coefficients = [mp.mpf(str(sympy.N(value, mp.dps))) for value in poly.sqf_part().all_coeffs()]
    roots = mp.polyroots(coefficients, maxsteps=300, extraprec=300)
    return [mp.re(root) for root in roots if abs(mp.im(root)) < mp.mpf(10) ** -_DIGITS]


def _from_sympy(solution) -> list[Interval]:
    import sympy

    def end_of(end):
        if end in (sympy.oo, -sympy.oo):
            return mp.inf if end == sympy.oo else -mp.inf
        if not end.is_number or end.is_real is False:
            raise Undefined("ends that are no numbers")
        return mp.mpf(str(sympy.N(end, mp.dps)))

    if solution is sympy.S.EmptySet:
        return []
    if solution is sympy.S.Reals:
        return _WHOLE
    if isinstance(solution, sympy.Interval):
        return [(end_of(solution.start), not solution.left_open, end_of(solution.end), not solution.right_open)]
    if isinstance(solution, sympy.FiniteSet):
        return [(end_of(value), True, end_of(value), True) for value in solution]
    if isinstance(solution, sympy.Union):
        return [interval for part in solution.args for interval in _from_sympy(part)]
    if isinstance(solution, sympy.Complement):
        return _met(_merged(_from_sympy(solution.args[0])), _complement(_merged(_from_sympy(solution.args[1]))))
    raise Undefined("a set that is no union of intervals")
