"""Evaluates expressions: to exact fractions if possible, else to numbers with enough digits to distinguish expressions.

Letters stand for positive numbers, drawn by their name. Work is bounded: a power, factorial or sum too large to
evaluate raises TooLarge, which is no value and so equals nothing.
"""

import hashlib
import math
from fractions import Fraction
from typing import Any

import mpmath
import mpmath.libmp
from mpmath import mp

from r1jax.rewards.answers.formula import Node

MAX_BITS = 60_000  # bits of an exact power or factorial
MAX_TERMS = 2_000  # terms of a sum or product
MAX_DIGITS = 1_500
MAX_STATED = 9  # digits of a numeral in an expression with an integral or an infinite series
MAX_STEPS = 15_000  # parts of an expression that are evaluated at one point of one comparison
BASE_DIGITS = 50  # working digits in addition to the range of magnitudes in an expression
MARGIN_DIGITS = 25  # of these, the digits in which equal expressions must agree
_APPROXIMATE_DIGITS = 40  # working digits of integrals and infinite series
_RANGES = ((0.15, 0.95), (1.1, 2.9), (3.0, 9.0))  # range of the letters' values at each point
POINTS = len(_RANGES)
SIGNED_POINTS = 3  # further points, with negative letters, for expressions that depend on signs
_SIGNED = frozenset(("abs", "floor", "ceil", "sgn", "max", "min"))
_INTEGER = frozenset(("binom", "doublefactorial"))
_PERIODIC = frozenset(("sin", "cos", "tan", "cot", "sec", "csc"))  # functions that divide large arguments by pi


class Undefined(ArithmeticError):
    """The expression has no value: a division by zero, or a form that is not evaluated."""


class TooLarge(ArithmeticError):
    """The value would take more work than a grader may spend."""


def exact(node: Node) -> Fraction | None:
    """Returns the value of a rational expression, None if it may not be rational. Raises Undefined or TooLarge."""
    kind = node[0]
    if kind == "num":
        return node[1]
    if kind not in _EXACT:
        return None
    return _EXACT[kind](node)


def _exact_all(nodes: tuple) -> list[Fraction] | None:
    values = []
    for node in nodes:
        value = exact(node)
        if value is None:
            return None
        values.append(value)
    return values


def _exact_add(node: Node) -> Fraction | None:
    values = _exact_all(node[1:])
    return None if values is None else sum(values, Fraction(0))


def _exact_mul(node: Node) -> Fraction | None:
    values = _exact_all(node[1:])
    return None if values is None else math.prod(values, start=Fraction(1))


def _exact_div(node: Node) -> Fraction | None:
    values = _exact_all(node[1:])
    if values is None:
        return None
    if values[1] == 0:
        raise Undefined("division by zero")
    return values[0] / values[1]


def _exact_pow(node: Node) -> Fraction | None:
    exponent = exact(node[2])
    if exponent is None or exponent.denominator != 1:
        return None
    base = exact(node[1])
    if base is None:
        return None
    if base == 0 and exponent <= 0:
        raise Undefined("power of zero")
    bits = max(abs(base.numerator).bit_length() - 1, base.denominator.bit_length() - 1)
    if bits * abs(exponent) > MAX_BITS:
        return None if bits * abs(exponent) < 10**7 else _too_large()
    return base ** int(exponent)


def _too_large() -> None:
    raise TooLarge("a power too large")


def _exact_fact(node: Node) -> Fraction | None:
    value = exact(node[1])
    if value is None:
        return None
    if value.denominator != 1 or value < 0:
        raise Undefined("factorial")
    return Fraction(math.factorial(int(value))) if value <= 5000 else None


def _exact_function(node: Node) -> Fraction | None:
    name = node[1]
    if name not in _RATIONAL_FUNCTIONS:
        return None
    values = _exact_all(node[2:])
    if values is None:
        return None
    if len(values) != _ARGUMENTS.get(name, len(values)) or not values:
        raise Undefined("number of arguments")
    if name in ("gcd", "lcm", "binom") and any(value.denominator != 1 for value in values):
        return None
    if name == "doublefactorial" and (values[0].denominator != 1 or not 0 <= values[0] <= 2000):
        return None
    if name == "binom" and not 0 <= values[1] <= values[0] <= 5000:
        return None
    if name == "mod" and values[1] == 0:
        raise Undefined("modulus zero")
    return Fraction(_RATIONAL_FUNCTIONS[name](*values))


_ARGUMENTS = {"doublefactorial": 1, "abs": 1, "floor": 1, "ceil": 1, "sgn": 1, "mod": 2, "binom": 2}
_RATIONAL_FUNCTIONS = {
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "max": lambda *values: max(values),
    "min": lambda *values: min(values),
    "sgn": lambda value: (value > 0) - (value < 0),
    "doublefactorial": lambda value: math.prod(range(int(value), 0, -2)),
    "gcd": lambda *values: math.gcd(*map(int, values)),
    "lcm": lambda *values: math.lcm(*map(int, values)),
    "mod": lambda value, modulus: value % modulus,
    "binom": lambda top, bottom: math.comb(int(top), int(bottom)),
}
_EXACT = {
    "neg": lambda node: None if (value := exact(node[1])) is None else -value,
    "add": _exact_add,
    "mul": _exact_mul,
    "div": _exact_div,
    "pow": _exact_pow,
    "fact": _exact_fact,
    "fn": _exact_function,
}


def letters(node: Node) -> frozenset[str]:
    """Returns the names of the free letters of a node."""
    if node[0] == "sym":
        return frozenset((node[1],))
    if node[0] in ("num", "const", "field", "based"):
        return frozenset()
    if node[0] in ("series", "integral"):
        bound, rest = (node[2], node[3:]) if node[0] == "series" else (node[1], node[2:])
        return frozenset().union(*map(letters, rest)) - letters(bound)
    if node[0] == "app":
        return frozenset((node[1],)).union(*map(letters, node[2:]))
    return frozenset().union(*(letters(part) for part in _parts(node)))


def _parts(node: Node):
    for part in node[1:]:
        if isinstance(part, tuple) and part:
            if isinstance(part[0], str):
                yield part
            else:
                yield from (inner for inner in part if isinstance(inner, tuple) and inner and isinstance(inner[0], str))


def mentions(node: Node, kinds: frozenset) -> bool:
    """Returns whether a node contains a node, or a function, of one of the kinds."""
    if node[0] in kinds or (node[0] == "fn" and node[1] in kinds):
        return True
    return any(mentions(part, kinds) for part in _parts(node))


def _whole_letters(node: Node) -> frozenset[str]:
    """Returns the letters that must be whole numbers: those in bounds, factorials and binomial coefficients."""
    if node[0] == "series":
        return letters(node[3]) | letters(node[4]) | _whole_letters(node[5])
    whole = frozenset()
    if node[0] == "fact" or (node[0] == "fn" and node[1] in _INTEGER):
        whole = frozenset().union(*(letters(part) for part in _parts(node)))
    return whole.union(*(_whole_letters(part) for part in _parts(node)))


def _drawn(name: str, point: int, whole: bool):
    draw = int.from_bytes(hashlib.sha256(f"{name}|{point}".encode()).digest()[:12], "big")
    if whole:
        return mp.mpf(2 + draw % 5 + 2 * (point % POINTS))
    low, high = _RANGES[point % POINTS]
    value = mp.mpf(low) + (mp.mpf(high) - low) * draw / mp.mpf(1 << 96)
    negative = point >= POINTS and (point == POINTS or draw % 2)
    if point == POINTS + SIGNED_POINTS - 1:
        value = value * 211  # larger than the numbers to which a maximum may compare it
    return -value if negative else value


class Evaluator:
    """Evaluates nodes at one point, and records the range of magnitudes that occur."""

    def __init__(self, point: int, whole: frozenset[str]):
        self.point, self.whole = point, whole
        self.bound: dict[str, object] = {}
        self.low, self.high = 0, 0  # range of magnitudes, as powers of ten
        self.steps = 0
        self.approximate = False

    def value(self, node: Node):
        """Returns the complex value of a node. Raises Undefined or TooLarge."""
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TooLarge("too many parts")
        method = getattr(self, f"_{node[0]}", None)
        if method is None:
            raise Undefined(f"{node[0]} is no expression")
        try:
            value = method(node)
        except (ZeroDivisionError, ValueError, mpmath.libmp.NoConvergence, TypeError, NotImplementedError):
            raise Undefined(node[0]) from None
        except (OverflowError, MemoryError):
            raise TooLarge(node[0]) from None
        if mp.isnan(value):
            raise Undefined(node[0])
        self._see(value)
        return value

    def _see(self, value) -> None:
        if value and mp.isfinite(value):
            magnitude = int(mp.mag(value) * 0.30103)
            self.low, self.high = min(self.low, magnitude), max(self.high, magnitude)

    def _num(self, node: Node):
        value = node[1]
        self.low = min(self.low, -int(value.denominator.bit_length() * 0.30103))
        return mp.mpf(value.numerator) / value.denominator

    def _sym(self, node: Node):
        if node[1] in self.bound:
            return self.bound[node[1]]
        if node[1] in ("?", "...") or node[1].startswith("basis ") and node[1] not in ("basis i", "basis j", "basis k"):
            raise Undefined("no letter")
        return _drawn(node[1], self.point, node[1] in self.whole)

    def _const(self, node: Node):
        if node[1] in self.bound:
            return self.bound[node[1]]
        return {"pi": mp.pi, "e": mp.e, "i": mp.mpc(0, 1), "inf": mp.inf}[node[1]] + 0

    def _neg(self, node: Node):
        return -self.value(node[1])

    def _add(self, node: Node):
        terms = [self.value(part) for part in node[1:]]
        total = mp.fsum(terms) if all(isinstance(term, mp.mpf) for term in terms) else sum(terms, mp.mpc(0))
        return self._chopped(total, max(map(abs, terms)))

    def _chopped(self, value, scale):
        """Returns a value without its real or imaginary part where that is only rounding error at `scale`."""
        if not mp.isfinite(value) or not mp.isfinite(scale):
            return value
        noise = scale * mp.mpf(10) ** (15 - mp.dps)
        if abs(value) <= noise:
            return mp.mpf(0)
        if isinstance(value, mp.mpc) and abs(value.imag) <= noise:
            return value.real
        return value

    def _mul(self, node: Node):
        product = mp.mpf(1)
        for part in node[1:]:
            product = product * self.value(part)
        return self._chopped(product, abs(product))

    def _div(self, node: Node):
        top, bottom = self.value(node[1]), self.value(node[2])
        if bottom == 0:
            raise Undefined("division by zero")
        quotient = top / bottom
        return self._chopped(quotient, abs(quotient))

    def _pow(self, node: Node):
        base, exponent = self.value(node[1]), self.value(node[2])
        if (
            self.approximate
            and mp.isfinite(base)
            and mp.isfinite(exponent)
            and base
            and mp.re(exponent * mp.log(base)) < -(10**4)
        ):
            return mp.mpf(0)  # far out in an integral
        if base == 0:
            if mp.re(exponent) > 0:
                return mp.mpf(0)
            raise Undefined("power of zero")
        if not mp.isfinite(base) or not mp.isfinite(exponent):
            return base**exponent
        if abs(exponent) * max(1, abs(mp.mag(base))) > 10**8:
            raise TooLarge("a power too large")
        if isinstance(base, mp.mpf) and base < 0 and (ratio := exact(node[2])) is not None and ratio.denominator % 2:
            size = (-base) ** exponent
            return -size if ratio.numerator % 2 else size
        power = base**exponent
        return self._chopped(power, abs(power))

    def _root(self, node: Node):
        index, base = self.value(node[1]), self.value(node[2])
        whole = exact(node[1])
        if (
            isinstance(base, mp.mpf)
            and base < 0
            and whole is not None
            and whole.denominator == 1
            and whole.numerator % 2
        ):
            return -((-base) ** (1 / index))
        if index == 2:
            return mp.sqrt(base)
        if base == 0:
            return mp.mpf(0)
        return base ** (1 / index)

    def _fact(self, node: Node):
        value = self.value(node[1])
        if abs(value) > 10**7:
            raise TooLarge("a factorial too large")
        if isinstance(value, mp.mpf) and 0 <= value <= 5000 and value == int(value):
            return mp.mpf(math.factorial(int(value)))
        return mp.gamma(value + 1)

    def _deg(self, node: Node):
        return self.value(node[1]) * mp.pi / 180

    def _app(self, node: Node):
        """Returns the value of an unknown function: a smooth function that is chosen by its name."""
        inner = mp.mpf(1)
        for place, part in enumerate(node[2:]):
            inner += self.value(part) * _drawn(f"{node[1]} {place}", self.point, False)
        return mp.exp(mp.sin(inner))

    def _fn(self, node: Node):
        name = node[1]
        if name == "det":
            return self._determinant(node[2])
        if name in ("trace",):
            raise Undefined(name)
        values = [self.value(part) for part in node[2:]]
        if name in _PERIODIC and mp.isfinite(values[0]) and values[0] and mp.mag(values[0]) * 0.30103 > MAX_DIGITS:
            raise TooLarge(f"{name} of a number too large")
        value = _FUNCTIONS[name](*values)
        scale = (
            max([mp.mpf(1), *map(abs, values)]) if name in ("sin", "cos", "tan", "log", "ln", "log10") else abs(value)
        )
        return self._chopped(value, scale)

    def _determinant(self, node: Node):
        if node[0] != "matrix" or len(node[1]) != len(node[1][0]) or len(node[1]) > 6:
            raise Undefined("determinant")
        return mp.det(mp.matrix([[self.value(cell) for cell in row] for row in node[1]]))

    def _series(self, node: Node):
        _, kind, letter, low, high, body = node
        first, last = self.value(low), self.value(high)
        if mp.isinf(last):
            return self._infinite(kind, letter, first, body)
        count = last - first
        if mp.im(count) or count != int(count) or count < -1:
            raise Undefined("bounds")
        if count > MAX_TERMS:
            raise TooLarge("a sum too long")
        saved = dict(self.bound)
        total = mp.mpf(0 if kind == "sum" else 1)
        for step in range(int(count) + 1):
            self.bound[letter[1]] = first + step
            term = self.value(body)
            total = total + term if kind == "sum" else total * term
        self.bound = saved
        return total

    def _infinite(self, kind: str, letter: Node, first, body: Node):
        self.approximate = True
        saved, seen = dict(self.bound), (self.low, self.high)

        def term(place):
            self.bound[letter[1]] = place
            return self.value(body)

        self._require_convergence(term, first)
        with mp.workdps(_APPROXIMATE_DIGITS):
            find = mp.nsum if kind == "sum" else mp.nprod
            limit = find(term, [first, mp.inf])
        self.bound, (self.low, self.high) = saved, seen
        return limit

    def _require_convergence(self, term, first) -> None:
        """Raises Undefined for a series whose late terms are not small, since its partial sums do not converge."""
        far = [term(first + 100_000 + step) for step in range(2)]
        alternating = mp.re(far[0]) * mp.re(far[1]) < 0
        if abs(far[0]) > (mp.mpf("0.1") if alternating else mp.mpf("0.02") / 100_000):
            raise Undefined("a series that does not converge")

    def _integral(self, node: Node):
        self.approximate = True
        _, letter, low, high, body = node
        saved, seen = dict(self.bound), (self.low, self.high)

        def integrand(at):
            self.bound[letter[1]] = at
            return self.value(body)

        with mp.workdps(_APPROXIMATE_DIGITS):
            area = mp.quad(integrand, [self.value(low), self.value(high)])
        self.bound, (self.low, self.high) = saved, seen
        return area


def _log(value, base=None):
    return mp.log(value) if base is None else mp.log(value) / mp.log(base)


def _binomial(top, bottom):
    if abs(top) > 10**6 or abs(bottom) > 10**6:
        raise TooLarge("a binomial coefficient too large")
    return mp.binomial(top, bottom)


_FUNCTIONS = {
    "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc, "arcsin": mp.asin, "arccos": mp.acos,
    "arctan": mp.atan, "arccot": mp.acot, "arcsec": mp.asec, "arccsc": mp.acsc, "sinh": mp.sinh, "cosh": mp.cosh, "tanh": mp.tanh,
    "coth": mp.coth, "sech": mp.sech, "csch": mp.csch, "arsinh": mp.asinh, "arcosh": mp.acosh, "artanh": mp.atanh, "ln": mp.log,
    "log": _log, "log10": mp.log10, "doublefactorial": mp.fac2, "abs": abs, "floor": mp.floor, "ceil": mp.ceil, "binom": _binomial, "max": lambda *v: max(v),
    "min": lambda *v: min(v), "sgn": mp.sign, "mod": lambda a, b: a - b * mp.floor(a / b), "gcd": lambda *v: mp.mpf(math.gcd(*map(_whole, v))),
    "lcm": lambda *v: mp.mpf(math.lcm(*map(_whole, v))),
}  # fmt: skip


def _whole(value) -> int:
    if value != int(value):
        raise Undefined("not whole")
    return int(value)


def _stated(node: Node) -> int:
    """Returns the number of digits of the longest numeral in a node; its last digit may be all that differs."""
    if node[0] == "num":
        return int(max(node[1].numerator.bit_length(), node[1].denominator.bit_length()) * 0.30103) + 1
    return max(map(_stated, _parts(node)), default=0)


def values(nodes: list[Node], point: int, spread: int = 0) -> tuple[list, object]:
    """Returns (values, tolerance) of several expressions at one point, with enough digits to distinguish them.

    Values of equal expressions differ by less than the tolerance. It is smaller by twice as many digits as the longest
    numeral has, and by `spread` times the range of magnitudes. Raises Undefined or TooLarge.
    """
    whole = frozenset().union(*map(_whole_letters, nodes))
    stated = 2 * max(map(_stated, nodes))
    digits = max(BASE_DIGITS + stated, mp.dps)
    while True:
        with mp.workdps(digits):
            evaluator = Evaluator(point, whole)
            evaluated = [evaluator.value(node) for node in nodes]
            magnitudes = evaluator.high - evaluator.low
            needed = BASE_DIGITS + stated + (1 + 2 * spread) * magnitudes
            if needed <= digits + 5:
                exact_digits = MARGIN_DIGITS + stated + spread * magnitudes
                if evaluator.approximate and stated > 2 * MAX_STATED:
                    raise TooLarge("numerals longer than an integral or series is evaluated to")
                margin = _APPROXIMATE_DIGITS - 15 if evaluator.approximate else exact_digits
                return evaluated, mp.mpf(10) ** (evaluator.low - margin)
        if needed > MAX_DIGITS * (1 + spread) or BASE_DIGITS + magnitudes > MAX_DIGITS:
            raise TooLarge("magnitudes too far apart")
        digits = needed + 10


def points(nodes: list[Node]) -> range:
    """Returns the points at which expressions are compared: one if there are no letters, more if signs matter."""
    if not any(letters(node) for node in nodes):
        return range(1)
    return range(POINTS + (SIGNED_POINTS if any(mentions(node, _SIGNED) for node in nodes) else 0))


def same(first: Node, second: Node) -> bool:
    """Returns whether two expressions are equal for all values of their letters (positive ones if signs do not matter).

    Raises TooLarge if that would take too long to decide.
    """
    if first == second:
        return True
    try:
        exact_values = exact(first), exact(second)
        if None not in exact_values:
            return exact_values[0] == exact_values[1]
    except Undefined:
        return False
    met = False
    for point in points([first, second]):
        try:
            (one, other), tolerance = values([first, second], point)
        except Undefined:
            if _defined(first, point) or _defined(second, point):
                return False
            continue
        if not (mp.isfinite(one) and mp.isfinite(other)):
            if one != other:
                return False
        elif abs(one - other) > tolerance:
            return False
        met = True
    return met


def _defined(node: Node, point: int) -> bool:
    try:
        values([node], point)
    except Undefined:
        return False
    return True


def constant_ratio(first: Node, second: Node) -> Any:
    """Returns first / second if that is the same number, not 0, for all values of the letters; else None."""
    ratio = None
    met = 0
    for point in range(POINTS + SIGNED_POINTS):
        try:
            (one, other), tolerance = values([first, second], point, spread=2)
        except Undefined:
            continue
        if one == 0 or other == 0 or not mp.isfinite(one) or not mp.isfinite(other):
            return None
        with mp.workdps(BASE_DIGITS + int(-mp.log10(tolerance))):
            here = one / other
            if isinstance(here, mp.mpc):
                if abs(here.imag) > abs(here.real) * tolerance:
                    return None
                here = here.real
            if ratio is not None and abs(here - ratio) > abs(ratio) * tolerance:
                return None
        ratio, met = here, met + 1
    return ratio if met >= 2 else None


def real(node: Node):
    """Returns the real, possibly infinite value of an expression without letters. Raises Undefined or TooLarge."""
    if letters(node):
        raise Undefined("letters")
    (value,), _ = values([node], 0)
    if isinstance(value, mp.mpc):
        if value.imag:
            raise Undefined("not real")
        value = value.real
    return value
