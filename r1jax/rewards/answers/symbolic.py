"""Converts nodes to sympy expressions, for comparisons that need a symbolic solution."""

from collections.abc import Mapping

from r1jax.rewards.answers.evaluation import Undefined
from r1jax.rewards.answers.formula import Node

MAX_POWER = 12
MAX_PARTS = 80
_SAME = frozenset("sin cos tan cot sec csc sinh cosh tanh floor".split())
_NAMES = {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "ln": "log",
    "log": "log",
    "abs": "Abs",
    "ceil": "ceiling",
    "max": "Max",
    "min": "Min",
}


def size(node) -> int:
    """Returns the number of nodes in a node, itself included."""
    return 1 + sum(size(part) for part in node if isinstance(part, tuple))


def to_sympy(node: Node, symbols: Mapping[str, object]):
    """Returns the sympy expression of a node; `symbols` maps its letters. Raises Undefined for anything else."""
    import sympy

    if size(node) > MAX_PARTS:
        raise Undefined("an expression too large to solve")
    kind = node[0]
    if kind == "num":
        return sympy.Rational(node[1].numerator, node[1].denominator)
    if kind == "sym":
        if node[1] not in symbols:
            raise Undefined(f"letter {node[1]}")
        return symbols[node[1]]
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "inf": sympy.oo}[node[1]]
    if kind not in ("neg", "add", "mul", "div", "pow", "root", "fn", "deg"):
        raise Undefined(kind)
    if kind == "fn":
        parts = [to_sympy(part, symbols) for part in node[2:]]
        name = _NAMES.get(node[1], node[1] if node[1] in _SAME else "")
        if not name:
            raise Undefined(node[1])
        return getattr(sympy, name)(*parts)
    parts = [to_sympy(part, symbols) for part in node[1:]]
    if kind == "pow" and parts[1].is_number and abs(parts[1]) > MAX_POWER:
        raise Undefined("a power too large to solve")
    return {
        "neg": lambda: -parts[0],
        "add": lambda: sympy.Add(*parts),
        "mul": lambda: sympy.Mul(*parts),
        "div": lambda: parts[0] / parts[1],
        "pow": lambda: parts[0] ** parts[1],
        "root": lambda: sympy.real_root(parts[1], parts[0]) if parts[1].is_number else parts[1] ** (1 / parts[0]),
        "deg": lambda: parts[0] * sympy.pi / 180,
    }[kind]()
