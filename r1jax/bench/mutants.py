"""Makes programs with one small mistake from right ones, to measure tests with (mutation testing)."""

import ast
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from r1jax.data.hashing import hash64

_COMPARISONS = {
    **{ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt},
    **{
        ast.Eq: ast.NotEq,
        ast.NotEq: ast.Eq,
        ast.In: ast.NotIn,
        ast.NotIn: ast.In,
        ast.Is: ast.IsNot,
        ast.IsNot: ast.Is,
    },
}
_OPERATORS = {
    **{
        ast.Add: ast.Sub,
        ast.Sub: ast.Add,
        ast.Mult: ast.Add,
        ast.Div: ast.Mult,
        ast.FloorDiv: ast.Mult,
        ast.Mod: ast.Mult,
    },
    **{ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.LShift: ast.RShift},
    **{ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And},
}
KINDS = ("comparison flipped", "constant off by one", "operator swapped", "statement removed", "None returned")


class Mutant(NamedTuple):
    """A program's text with a mistake of one of KINDS at a line of the original."""

    kind: str
    line: int
    code: str


def mutants(code: str, first_line: int, count: int, key: int) -> list[Mutant]:
    """Returns up to `count` mutants of a program's lines from `first_line` on, of as many kinds as possible.

    The choice depends only on the program and the key. Raises SyntaxError for text that is no program.
    """
    tree = ast.parse(code)
    sites = [site for site in _sites(tree) if site[2] >= first_line]
    sites.sort(key=lambda site: hash64("mutant", key, *site))
    turns: dict[str, int] = {}
    order = []
    for site in sites:  # first one of every kind, then the second ones
        turns[site[0]] = turns.get(site[0], 0) + 1
        order.append((turns[site[0]], site))
    chosen = [site for _, site in sorted(order, key=lambda entry: entry[0])][:count]
    return [Mutant(kind, line, _mutated(tree, kind, index, place)) for kind, index, line, place in chosen]


def _sites(tree: ast.Module) -> Iterator[tuple[str, int, int, int]]:
    """Yields (kind, number of the node in ast.walk's order, line, place within the node)."""
    for index, node in enumerate(ast.walk(tree)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
            yield KINDS[0], index, line, 0
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield KINDS[1], index, line, 0
        elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _OPERATORS:
            yield KINDS[2], index, line, 0
        elif isinstance(node, ast.Return) and node.value is not None:
            yield KINDS[4], index, line, 0
        for place, statement in enumerate(
            getattr(node, "body", ()) if not isinstance(node, ast.Module | ast.Lambda | ast.IfExp) else ()
        ):
            text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            if isinstance(statement, ast.Assign | ast.AugAssign | ast.Expr | ast.If | ast.For | ast.While) and not text:
                yield KINDS[3], index, statement.lineno, place


def _mutated(tree: ast.Module, kind: str, index: int, place: int) -> str:
    tree = copy.deepcopy(tree)
    node: Any = list(ast.walk(tree))[index]  # of the class that `_sites` found for its kind
    if kind == KINDS[0]:
        node.ops[0] = _COMPARISONS[type(node.ops[0])]()
    elif kind == KINDS[1]:
        node.value += 1
    elif kind == KINDS[2]:
        node.op = _OPERATORS[type(node.op)]()
    elif kind == KINDS[3]:
        node.body[place] = ast.Pass()
    else:
        node.value = ast.Constant(None)
    return ast.unparse(ast.fix_missing_locations(tree))
