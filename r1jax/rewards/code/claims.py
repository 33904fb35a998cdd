"""Checks the tests of a function by reading their source, without running them: can they run, and can they fail?

Every program passes tests that assert nothing, and none passes tests that cannot run; neither kind rewards a right
program.
"""

import ast
import builtins
import functools
import symtable
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PROGRAM = "solution"  # the module that tests may import the program's names from
_BUILTINS = frozenset(dir(builtins))
# Built-in names that no program is asked to define anew.
_UNEQUALLED = frozenset("bool callable hasattr id isinstance issubclass print type".split())
# Beginnings of the names of calls that may fail.
_FAILING = ("assert", "fail", "expect", "verify", "exit", "_exit", "quit", "main", "testmod")
_COMPARING = ("isclose", "allclose")
_COMPUTING = frozenset("abs bool dict float frozenset int len list max min round set sorted str sum tuple".split())
_NESTED = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.BoolOp, ast.IfExp, ast.Starred)
_ENDS = (ast.Return, ast.Raise, ast.Break, ast.Continue)


@functools.lru_cache(maxsize=64)
def parsed(code: str) -> ast.Module:
    """Returns the syntax tree of a Python program; it is shared, so do not change it. Raises SyntaxError."""
    return ast.parse(code)


@functools.lru_cache(maxsize=64)
def compiles(code: str) -> bool:
    """Returns whether a text is a Python program: it parses and has no `return` or `yield` outside functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            symtable.symtable(code, "tests", "exec")
            return not _returns(parsed(code))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


def _returns(node: ast.AST) -> bool:
    inside = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    return isinstance(node, ast.Return | ast.Yield) or any(
        _returns(child) for child in ast.iter_child_nodes(node) if not isinstance(child, inside)
    )


def never_runs(code: str, prelude: str = "", defined_elsewhere: Iterable[str] = (), complete: bool = False) -> str:
    """Returns why tests can never run, "" if no reason is found.

    Reasons are an import from outside the standard library and, with `complete`, a name that neither the tests, the
    code in `prelude` nor `defined_elsewhere` define.
    """
    texts = [text for text in (prelude, code) if text.strip()]
    for name in (name for text in texts for name in _imports(parsed(text))):
        if name.split(".")[0] not in sys.stdlib_module_names and name != PROGRAM:
            return f"they import {name!r}, and programs have the standard library only; leave the row out"
    if not complete or any("import *" in text or "globals(" in text or "exec(" in text for text in texts):
        return ""
    defined, used = set(defined_elsewhere), set()
    for text in texts:
        set_here, read = _global_names(text)
        defined |= set_here
        used |= read if text is code else set()
    missing = sorted(name for name in used - defined - _BUILTINS if not name.startswith("__"))
    return f"they use {missing[0]!r}, which nothing defines; define it in them, or leave the row out" if missing else ""


def imported_from_program(code: str) -> set[str]:
    """Returns the names under which tests import what the program defines."""
    nodes = [node for node in ast.walk(parsed(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.asname or alias.name for n in nodes for alias in n.names if getattr(n, "module", "") == PROGRAM}
    return names | {alias.asname or alias.name for n in nodes for alias in n.names if alias.name == PROGRAM}


def asserts_nothing(code: str, names: Iterable[str]) -> str:
    """Returns why no program can fail tests that test `names`, "" if no reason is found."""
    tree = parsed(code)
    if not any(isinstance(node, ast.Name) and node.id in {*names} for node in ast.walk(tree)):
        return "they never use what the program defines"
    if not any(_may_fail(node, {*names}) for node in ast.walk(tree)):
        return "they assert nothing"
    return ""


def surely_compare(code: str, names: Iterable[str], function: str = "") -> bool:
    """Returns whether an assertion that is certainly reached compares a result of one of `names` with a constant value.

    With `function` the body of that function is read, else the whole text. False does not mean that the tests are bad.
    """
    tree = parsed(code)
    body: Sequence[ast.stmt] = tree.body
    roots = set(names)
    if any(isinstance(node, ast.ClassDef) for node in ast.walk(tree)):
        return False
    if function:
        [*_, checked] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
        body, roots = checked.body, roots | {argument.arg for argument in checked.args.posonlyargs + checked.args.args}
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    return not stored & roots and _Scan(roots, set(), set()).compares(body)


def must_fail(body: Sequence[ast.stmt]) -> bool:
    """Returns whether the first unconditional statement that can end the tests fails for every program."""
    for statement in body:
        if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Constant):
            if not statement.test.value:
                return True
        elif isinstance(statement, ast.Raise):
            return True
        elif not isinstance(
            statement, ast.Expr | ast.Assign | ast.AnnAssign | ast.Import | ast.ImportFrom | ast.Assert
        ):
            return False
    return False


def tested_builtins(groups: Sequence[Sequence[ast.AST]]) -> set[str]:
    """Returns the built-in names that every test calls: the program may be asked to define them anew."""
    calls = [
        {node.func.id for node in group if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        for group in groups
    ]
    return set.intersection(*calls) - _UNEQUALLED


def _imports(tree: ast.AST) -> Iterable[str]:
    """Yields the modules imported outside `try`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."
        elif not isinstance(node, ast.Try | ast.If):
            yield from _imports(node)


def _global_names(code: str) -> tuple[set[str], set[str]]:
    """Returns (global names that a text defines, global names that it reads)."""
    defined, used = set(), set()
    tables = [symtable.symtable(code, "tests", "exec")]
    top = tables[0]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            if table is top or symbol.is_declared_global():
                if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
                    defined.add(symbol.get_name())
            if symbol.is_referenced() and (table is top or symbol.is_global()):
                used.add(symbol.get_name())
    return defined, used


def _may_fail(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.Assert):
        exists = isinstance(node.test, ast.Name) and node.test.id in names  # a function is true
        return not (exists or _always_true(node.test))
    if isinstance(node, ast.Call):
        return _called(node).lower().startswith(_FAILING)
    return isinstance(node, ast.Raise)


def _always_true(test: ast.expr) -> bool:
    """Returns whether a condition is a constant that holds."""
    if isinstance(test, ast.Tuple):
        return bool(test.elts)
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        return any(map(_always_true, test.values))
    if isinstance(test, ast.BoolOp):
        return all(map(_always_true, test.values))
    if isinstance(test, ast.Lambda | ast.JoinedStr):
        return True
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        same = ast.dump(test.left) == ast.dump(test.comparators[0])
        if same and isinstance(test.ops[0], ast.Eq | ast.Is | ast.LtE | ast.GtE):
            return True  # both sides are the same text
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return isinstance(test.operand, ast.Constant) and not test.operand.value
    return isinstance(test, ast.Constant) and bool(test.value)


@dataclass
class _Scan:
    """What is known about names while statements are read in order."""

    program: set[str]  # functions of the program
    returned: set[str]  # variables that hold what those returned
    plain: set[str]  # variables that hold values made of constants

    def compares(self, body: Sequence[ast.stmt]) -> bool:
        """Returns whether an assertion that is certainly reached compares a returned value with a plain one."""
        for statement in body:
            if isinstance(statement, _ENDS):
                return False
            if isinstance(statement, ast.Assert) and self._condition(statement.test):
                return True
            if isinstance(statement, ast.Assign | ast.For):
                self._bind(statement)
            if isinstance(statement, ast.For) and _full(statement.iter) and self.compares(statement.body):
                return True
            if any(isinstance(node, ast.Return | ast.Raise) for node in ast.walk(statement)):
                return False
        return False

    def _bind(self, statement: ast.Assign | ast.For) -> None:
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        value = statement.value if isinstance(statement, ast.Assign) else statement.iter
        names = {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        self.returned -= names
        self.plain -= names
        if self._returned(value):
            self.returned |= names
        elif self._is_plain(value):
            self.plain |= names

    def _condition(self, test: ast.expr) -> bool:
        """Returns whether a condition compares a returned value with a plain one, or tests whether it is true."""
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return any(map(self._condition, test.values))
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self._condition(test.operand)
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            sides = [test.left, test.comparators[0]]
        elif isinstance(test, ast.Call) and _called(test) in _COMPARING:
            sides = test.args[:2]
        else:
            direct = isinstance(test, ast.Call) and _root(test) in self.program
            return direct or (isinstance(test, ast.Name) and test.id in self.returned)
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is | ast.IsNot | ast.NotEq):
            if any(isinstance(side, ast.Call) and _root(side) not in self.program for side in sides):
                return False  # a value computed from a result is never None
        from_program = [self._returned(side) or self._holds_returned(side) for side in sides]
        return from_program in ([True, False], [False, True]) and self._is_plain(sides[from_program.index(False)])

    def _returned(self, node: ast.expr) -> bool:
        """Returns whether an expression is a returned value, a part of one, or computed from one."""
        match node:
            case ast.Call() if _root(node) in self.program:
                return True
            case ast.Name():
                return node.id in self.returned
            case ast.Subscript() | ast.Attribute():
                return self._returned(node.value)
            case ast.Call(func=ast.Attribute(value=value)):
                return self._returned(value)
            case ast.Call(func=ast.Name(id=name)) if name in _COMPUTING and node.args:
                return self._returned(node.args[0])
            case ast.BinOp():
                return self._returned(node.left) or self._returned(node.right)
            case ast.UnaryOp():
                return self._returned(node.operand)
        return False

    def _holds_returned(self, node: ast.expr) -> bool:
        return isinstance(node, ast.List | ast.Tuple) and any(map(self._returned, node.elts))

    def _is_plain(self, node: ast.expr) -> bool:
        """Returns whether an expression has only constants, built-in names and names of plain values."""
        if any(isinstance(part, (*_NESTED, ast.NamedExpr, ast.Await, ast.Yield)) for part in ast.walk(node)):
            return False
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        return names <= (_BUILTINS | {"math"} | self.plain) - self.program - self.returned


def _full(iterated: ast.expr) -> bool:
    return isinstance(iterated, ast.List | ast.Tuple) and any(not isinstance(one, ast.Starred) for one in iterated.elts)


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _root(node: ast.expr) -> str:
    """Returns the name at which a chain of calls and attributes begins; "" for another expression."""
    while isinstance(node, ast.Call | ast.Attribute):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""
