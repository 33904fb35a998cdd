"""Reads the tests of a row, and refuses, before anything is run, those that no program or every program would pass."""

import ast
import builtins
import functools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from r1jax.data import program_tests
from r1jax.data.hashing import hash64
from r1jax.rewards.code import claims as code_claims

LANGUAGES = ("python", "python3", "py", "cpp", "c++", "any")  # values of a row's field `language`
_FIELDS = {  # kind -> the fields of tests that are read
    "python-check": ("code", "entry_point"),
    "python-asserts": ("setup", "asserts"),
    "stdin-stdout": ("cases", "test_cases", "inputs", "outputs", "float_tolerance", *program_tests.TYPES),
}
_EITHER = re.escape(program_tests.EITHER).replace(re.escape("{name}"), r"\w+")
_GENERATED = re.compile(
    f"(?:{re.escape(program_tests.SAME)}|{re.escape(program_tests.SAME_OR_ONLY)})(?:{_EITHER})?", re.DOTALL
)
# A `check` for tests that have none: it runs every test method of the classes, then every test function.
_RUN_UNIT_TESTS = """
def check(candidate):
    import unittest
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    suite = unittest.TestSuite(load(case) for case in [{classes}])
    result = unittest.TestResult()
    suite.run(result)
    assert result.wasSuccessful(), (result.failures + result.errors)[0][1].strip().splitlines()[-1]
    for test in [{functions}]:
        test()
"""


class MalformedTests(ValueError):
    """A row's tests cannot be used."""


@functools.lru_cache(maxsize=16)  # the samples of one prompt come together
def read_tests(reference: str, prompt: str = "") -> dict:
    """Returns a row's tests as one of three kinds, complete and of the right types.

    - `python-check` has an entry_point and code that defines check(candidate) (HumanEval) or unit tests.
    - `python-asserts` has setup and asserts (MBPP). It may be written as a list of asserts. Cases that call a function
      (LiveCodeBench's functional ones, APPS' fn_name) become this kind.
    - `stdin-stdout` has cases, pairs of input and output, and float_tolerance, which may be None. It may be written
      as a list of {input, output}, or as {inputs, outputs} (APPS, code_contests).

    The first two have `sure`, whether their text shows that some program fails them. Raises MalformedTests for anything
    else: unknown fields, tests that assert nothing, and tests that can never run.
    """
    try:
        tests: Any = json.loads(reference)
    except (ValueError, RecursionError) as error:
        raise MalformedTests(f"not JSON ({error})") from None
    if isinstance(tests, list) and tests and all(isinstance(one, str) for one in tests):
        tests = {"kind": "python-asserts", "asserts": tests}
    try:
        tests = program_tests.as_calls(tests, {})
        if isinstance(tests, list):
            tests = {"kind": "stdin-stdout", "cases": tests}
        if not isinstance(tests, Mapping):
            raise MalformedTests(f"{reference[:60]!r} is no object or list")
        if "kind" not in tests and {"inputs", "outputs"} <= set(tests):
            tests = {**tests, "kind": "stdin-stdout"}
        kind: Any = tests.get("kind")
        if kind not in _FIELDS:
            raise MalformedTests(f"kind {kind!r} is none of {', '.join(_FIELDS)}")
        program_tests.refuse_unknown(tests, ("kind", "language", *_FIELDS[kind]))
        if str(tests.get("language") or "any").lower() not in LANGUAGES:
            raise MalformedTests(f"field 'language' is {tests['language']!r}; programs are Python or C++")
        readers = {"python-check": _read_check, "python-asserts": _read_asserts, "stdin-stdout": _read_cases}
        fields = readers[kind](tests, prompt)
    except MalformedTests:
        raise
    except ValueError as error:
        raise MalformedTests(str(error)) from None
    return {"kind": kind, **fields} | ({"seed": hash64("code tests", reference)} if kind != "stdin-stdout" else {})


def _read_check(tests: Mapping, prompt: str) -> dict:
    code, entry = tests.get("code"), tests.get("entry_point")
    if not isinstance(code, str) or not isinstance(entry, str) or not entry.isidentifier():
        raise MalformedTests("python-check needs `code` and the name `entry_point`")
    if not code_claims.compiles(code):
        raise MalformedTests("`code` is no Python program")
    checks = [n for n in code_claims.parsed(code).body if isinstance(n, ast.FunctionDef) and n.name == "check"]
    if not checks:
        code, checks = _with_check(code)
    checked = checks[-1].args
    taken = [argument.arg for argument in checked.posonlyargs + checked.args]
    required = len(taken) - len(checked.defaults)
    if required > 1 or not (taken or checked.vararg) or any(default is None for default in checked.kw_defaults):
        raise MalformedTests("`check` must take one argument, the function that is tested")
    names = {entry, *taken[:1], *([checked.vararg.arg] if checked.vararg else ())}
    names |= code_claims.imported_from_program(code)
    prelude = prompt if code_claims.compiles(prompt) else ""
    _refuse(code_claims.never_runs(code, prelude, (entry, "check"), complete=True))
    _refuse(code_claims.asserts_nothing(code, names))
    if code_claims.must_fail(checks[-1].body):
        raise MalformedTests("they fail whatever the program does")
    sure = code_claims.surely_compare(code, names, "check")
    return {"code": code, "entry_point": entry, "prompt": prelude, "sure": sure}


def _with_check(code: str) -> tuple[str, list[ast.FunctionDef]]:
    """Returns (code with a `check` that runs its unit tests, [that function]). Raises MalformedTests if it has none."""
    body = code_claims.parsed(code).body
    classes = [n.name for n in body if isinstance(n, ast.ClassDef) and any("TestCase" in ast.dump(b) for b in n.bases)]
    functions = [
        n.name
        for n in body
        if isinstance(n, ast.FunctionDef) and n.name.startswith("test") and not (n.args.args or n.args.posonlyargs)
    ]
    if not classes and not functions:
        raise MalformedTests("`code` defines neither check(candidate) nor unit tests")
    code = code + "\n" + _RUN_UNIT_TESTS.format(classes=", ".join(classes), functions=", ".join(functions))
    check = code_claims.parsed(code).body[-1]
    assert isinstance(check, ast.FunctionDef)
    return code, [check]


def _read_asserts(tests: Mapping, prompt: str) -> dict:
    setup, asserts = tests.get("setup") or "", tests.get("asserts")
    if not isinstance(asserts, list) or not asserts:
        raise MalformedTests("python-asserts needs a list `asserts` that is not empty")
    for code in (setup, *asserts):
        if not isinstance(code, str) or not code_claims.compiles(code):
            raise MalformedTests(f"{str(code)[:60]!r} is no Python code")
    names, modules = names_of_program(setup, asserts)
    every = "\n".join((setup, *asserts))
    _refuse(code_claims.never_runs(every))
    tested = {*names} | code_claims.imported_from_program(every)
    _refuse(code_claims.asserts_nothing(every, tested))
    if code_claims.must_fail(code_claims.parsed("\n".join(asserts)).body):
        raise MalformedTests("they fail whatever the program does")
    generated = _GENERATED.fullmatch(setup) and asserts[0].startswith("assert _same(")
    sure = bool(generated) or code_claims.surely_compare(every, tested)
    return {"setup": setup, "asserts": asserts, "names": names, "modules": modules, "sure": sure}


def _read_cases(tests: Mapping, prompt: str) -> dict:
    cases = tests.get("cases", tests.get("test_cases"))
    if cases is None and "inputs" in tests:
        cases = _paired(tests["inputs"], tests.get("outputs"))
    return {"cases": _cases(cases), "float_tolerance": _tolerance(tests)}


def _refuse(reason: str) -> None:
    if reason:
        raise MalformedTests(reason)


def names_of_program(setup: str, asserts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns (names in asserts that only the program can define, standard modules that the asserts use).

    If there are no such names, they are the built-in names called in every assert, which the program may define anew.
    """
    groups = [list(ast.walk(code_claims.parsed(code))) for code in (setup, *asserts)]
    nodes = [node for group in groups for node in group]
    defined = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    defined |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    defined |= {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    free = used - defined - set(dir(builtins))
    owners = [node.value for node in nodes if isinstance(node, ast.Attribute)]
    modules = {owner.id for owner in owners if isinstance(owner, ast.Name)} & free & sys.stdlib_module_names
    return sorted(free - modules or code_claims.tested_builtins(groups[1:]) - defined), sorted(modules)


def _cases(cases: object) -> list[tuple[str, str]]:
    if not isinstance(cases, list) or not cases:
        raise MalformedTests("stdin-stdout needs a list `cases` that is not empty")
    for case in cases:
        if not isinstance(case, Mapping) or not all(isinstance(case.get(key), str) for key in ("input", "output")):
            raise MalformedTests(f"{str(case)[:60]!r} is no pair of texts `input` and `output`")
        program_tests.refuse_unknown(case, ("input", "output", *program_tests.TYPES))
    return [(case["input"], case["output"]) for case in cases]


def _paired(inputs: object, outputs: object) -> list[dict]:
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise MalformedTests("`inputs` and `outputs` are not lists of one length")
    return [{"input": input_text, "output": expected} for input_text, expected in zip(inputs, outputs, strict=True)]


def _tolerance(tests: Mapping) -> float | None:
    tolerance = tests.get("float_tolerance")
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 <= tolerance < 1):
        raise MalformedTests(f"float_tolerance {tolerance!r} is not a number from 0 to below 1")
    return tolerance
