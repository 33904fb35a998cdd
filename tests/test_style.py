"""Rules of style that a machine can check (CONTRIBUTING.md)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LONGEST = 80  # lines of a function
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SOURCES = sorted(path for folder in ("r1jax", "configs", "kernels") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_are_at_most_80_lines_long(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, FUNCTIONS)]
    assert [node.name for node in nodes if node.end_lineno - node.lineno + 1 > LONGEST] == []


@pytest.mark.parametrize("folder", ["r1jax", "kernels"])
def test_every_module_begins_with_what_it_is_for(folder):
    modules = [path for path in (ROOT / folder).rglob("*.py") if path.read_text(encoding="utf-8").strip()]
    assert [path.name for path in modules if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []
