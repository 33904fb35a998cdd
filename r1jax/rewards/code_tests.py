"""Grades programs by their tests, in the sandbox.

A test of a function runs in one sandbox and the program in another; they exchange plain values (code_wire.py), so what the
program does to its own process changes no verdict. A test of a whole program gives it an input and compares what it
printed out here. Expected values never enter the program's sandbox.
"""

import ast
import builtins
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from r1jax.data.hashing import hash64
from r1jax.rewards.extraction import extract, fences
from r1jax.rewards.sandbox import PYTHON, Outcome, Program, Sandbox, open_sandbox
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

MAX_PROGRAM_CHARACTERS = 100_000
COMPILE_LIMITS = {"cpu_s": 20.0, "memory_bytes": 2 << 30, "output_bytes": 16 << 20, "file_bytes": 64 << 20}
COMPILE = "g++ -std=c++20 -O2 -pipe -o program main.cpp && cat program"
NO_COMPILER = "no C++ compiler here (apt-get install g++)"
GRACE = 0.8  # share of a sample's deadline that its tests may take in all, so that a slow program is a 0 and not a lost sample
_LANGUAGES = {"python": "python", "py": "python", "python3": "python", "cpp": "cpp", "c++": "cpp", "cc": "cpp"}
_LABEL = re.compile(r"[\w+#-]*")


@dataclass(frozen=True)
class Source:
    """A program as the model wrote it."""

    text: str
    language: str  # python or cpp


class MalformedTests(ValueError):
    """A row's tests cannot be used."""


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns a Score with value 1 if the response's program passes every test of the row, else 0.

    Malformed tests, and C++ without a compiler, give scorable False. Raises SandboxUnavailable where programs cannot be isolated.
    """
    try:
        tests = read_tests(request.reference, request.prompt)
    except MalformedTests as error:
        return Score(0.0, {}, False, f"malformed tests: {error}")
    source = extract_program(request.text)
    if source is None:
        return Score(0.0, {}, True, "no program found")
    if len(source.text) > MAX_PROGRAM_CHARACTERS:
        return Score(
            0.0, {}, True, f"the program has {len(source.text)} characters, more than {MAX_PROGRAM_CHARACTERS}"
        )
    if source.language == "cpp" and not has_compiler():
        return Score(0.0, {}, False, NO_COMPILER)
    if tests["kind"] == "stdin-stdout":
        failure = _whole_program_failure(source, tests, config)
    elif source.language != "python":
        failure = f"the tests call a Python function, the program is {source.language}"
    else:
        failure = _function_failure(source.text, tests, sandbox_of_sample(config))
    return Score(float(not failure), {}, True, failure or "all tests passed")


def has_compiler() -> bool:
    """Returns whether g++ is where the sandbox would find it."""
    return shutil.which("g++", path=os.defpath) is not None


def sandbox_of_sample(config: RewardConfig) -> Sandbox:
    """Returns the sandbox in which a sample's tests run once, with the time that its deadline leaves them."""
    wall_s = min(config.sandbox.wall_s, GRACE * config.deadline_s)
    return open_sandbox(config.sandbox).limited(wall_s=wall_s)


def extract_program(response: str) -> Source | None:
    """Returns the last Python or C++ block after the thought; the whole text if it has no blocks; None if there is no program.

    A block without a language is taken for Python if no other is found. A block that never closes is none.
    """
    if extract(response, "whole") is None:
        return None
    text = response.rpartition("</think>")[2].strip("\n")  # a bare function body begins with its indent
    blocks, opened = fences(text)
    for named in (True, False):
        for label, content in ((_LABEL.match(label)[0].lower(), content) for label, content in reversed(blocks)):
            if label in _LANGUAGES if named else not label:
                return Source(content, _LANGUAGES.get(label, "python"))
    return None if blocks or opened else Source(text, "python")


def read_tests(reference: str, prompt: str = "") -> dict:
    """Returns a row's tests in one of three shapes, by `kind`, each complete and of the right types.

    `python-check`: entry_point and code that defines check(candidate) (HumanEval); `python-asserts`: setup and asserts (MBPP);
    `stdin-stdout`: cases, pairs of input and output, and float_tolerance, None for none. That kind may also be written as a
    list of {input, output}, or as {inputs, outputs} (APPS, code_contests). Raises MalformedTests for anything else.
    """
    try:
        tests = json.loads(reference)
    except ValueError as error:
        raise MalformedTests(f"not JSON ({error})") from None
    if isinstance(tests, list):
        tests = {"kind": "stdin-stdout", "cases": tests}
    if not isinstance(tests, dict):
        raise MalformedTests(f"{reference[:60]!r} is no object or list")
    if "kind" not in tests and {"inputs", "outputs"} <= set(tests):
        tests = {**tests, "kind": "stdin-stdout", "cases": _paired(tests["inputs"], tests["outputs"])}
    seed = hash64("code tests", reference)
    if tests.get("kind") == "stdin-stdout":
        return {"kind": "stdin-stdout", "cases": _cases(tests.get("cases")), "float_tolerance": _tolerance(tests)}
    if tests.get("kind") == "python-check":
        prelude = prompt if _parses(prompt) else ""
        found = {"code": tests.get("code"), "entry_point": tests.get("entry_point"), "prompt": prelude}
        if not all(isinstance(value, str) for value in found.values()) or not str(found["entry_point"]).isidentifier():
            raise MalformedTests("python-check needs `code` and the name `entry_point`")
        if not _parses(found["code"]) or not _defines(found["code"], "check"):
            raise MalformedTests("`code` does not define check(candidate)")
        return {"kind": "python-check", "seed": seed, **found}
    if tests.get("kind") == "python-asserts":
        found = {"setup": tests.get("setup", ""), "asserts": tests.get("asserts")}
        if not isinstance(found["asserts"], list) or not found["asserts"]:
            raise MalformedTests("python-asserts needs a list `asserts` that is not empty")
        for code in (found["setup"], *found["asserts"]):
            if not isinstance(code, str) or not _parses(code):
                raise MalformedTests(f"{str(code)[:60]!r} is no Python code")
        names, modules = _names_of_program(found["setup"], found["asserts"])
        return {"kind": "python-asserts", "seed": seed, "names": names, "modules": modules, **found}
    raise MalformedTests(f"kind {tests.get('kind')!r} is none of python-check, python-asserts, stdin-stdout")


def outputs_equal(printed: str, expected: str, float_tolerance: float | None = None) -> bool:
    """Returns whether two outputs are equal, all of them, up to white space at the ends of lines and of the whole.

    With a tolerance, words that are both numbers may differ by it, absolutely or relative to the expected one.
    """
    ours, theirs = (_lines(text) for text in (printed, expected))
    if ours == theirs or float_tolerance is None or len(ours) != len(theirs):
        return ours == theirs
    pairs = [(one.split(), other.split()) for one, other in zip(ours, theirs, strict=True)]
    return all(
        len(one) == len(other) and all(_close(*words, float_tolerance) for words in zip(one, other, strict=True))
        for one, other in pairs
    )


def _function_failure(program: str, tests: dict, sandbox: Sandbox) -> str:
    """Returns why the program fails the tests of a function; "" when it passes."""
    wire = {"code_wire.py": companion("code_wire.py")}
    texts = {"prompt.py": tests.get("prompt", ""), "program.py": program}
    files = {name: text.encode("utf-8", "surrogatepass") for name, text in texts.items()}
    verdict, run = sandbox.converse(
        Program(
            [*PYTHON, "main.py"],
            wire | {"main.py": companion("code_driver.py"), "tests.json": json.dumps(tests).encode()},
        ),
        Program([*PYTHON, "main.py"], wire | {"main.py": companion("code_candidate.py")} | files),
    )
    try:
        told = json.loads(verdict.stdout)
    except ValueError:
        told = {"passed": False, "detail": "the tests gave no verdict"}
    if told["passed"] is True and verdict.status == 0 and not verdict.stopped_by:
        return ""
    return explained(told["detail"], run if run.stopped_by else replace(run, stopped_by=verdict.stopped_by))


def _whole_program_failure(source: Source, tests: dict, config: RewardConfig) -> str:
    """Returns why the program fails the first of its tests that it fails; "" when it passes them all."""
    sandbox = open_sandbox(config.sandbox)
    until = time.monotonic() + GRACE * config.deadline_s
    if source.language == "cpp":
        program = compile_cpp(source.text, config)
        if isinstance(program, str):
            return program
        command, files = ["./program"], {"program": program}
    else:
        command, files = [*PYTHON, "main.py"], {"main.py": source.text.encode("utf-8", "surrogatepass")}
    for number, (given, expected) in enumerate(tests["cases"], 1):
        left = until - time.monotonic()
        if left <= 0:
            return f"test {number} of {len(tests['cases'])}: no time left of the sample's {config.deadline_s:g} s"
        limited = sandbox.limited(wall_s=min(left, config.sandbox.wall_s))
        outcome = limited.run(command, files, given.encode("utf-8", "surrogatepass"))
        if outcome.status or outcome.stopped_by:
            return explained(f"test {number} of {len(tests['cases'])}: ended with status {outcome.status}", outcome)
        if not outputs_equal(outcome.stdout.decode(errors="replace"), expected, tests["float_tolerance"]):
            return (
                f"test {number} of {len(tests['cases'])}: printed {outcome.stdout[:80]!r}, expected {expected[:80]!r}"
            )
    return ""


def compile_cpp(text: str, config: RewardConfig) -> bytes | str:
    """Returns the compiled program, or why there is none. The compiler runs in a sandbox too."""
    if not has_compiler():
        return NO_COMPILER
    sandbox = open_sandbox(config.sandbox).limited(wall_s=GRACE * config.deadline_s, **COMPILE_LIMITS)
    outcome = sandbox.run(["sh", "-c", COMPILE], {"main.cpp": text.encode("utf-8", "surrogatepass")})
    return (
        outcome.stdout if outcome.status == 0 and not outcome.stopped_by else explained("it does not compile", outcome)
    )


def explained(what: str, outcome: Outcome) -> str:
    """Returns a reason with the limit that stopped a run, if one did, and the last line that it wrote to standard error."""
    words = outcome.stderr.decode(errors="replace").strip().splitlines()
    stopped = f"; stopped by the {outcome.stopped_by} limit" if outcome.stopped_by else ""
    return f"{what}{stopped}" + (f"; {words[-1][:200]}" if words else "")


def _names_of_program(setup: str, asserts: list[str]) -> tuple[list[str], list[str]]:
    """Returns the names in asserts that only the program can define, and the standard modules that they use.

    If there are no such names, those called in every assert: a program may be asked to define a built-in name anew.
    """
    groups = [list(ast.walk(ast.parse(code))) for code in (setup, *asserts)]
    nodes = [node for group in groups for node in group]
    own = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    own |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    own |= {(alias.asname or alias.name).split(".")[0] for node in imports for alias in node.names}
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    free = used - own - set(dir(builtins))
    owners = [node.value for node in nodes if isinstance(node, ast.Attribute)]
    modules = {owner.id for owner in owners if isinstance(owner, ast.Name)} & free & sys.stdlib_module_names
    calls = [{node.func.id for node in group if _calls_name(node)} for group in groups[1:]]
    return sorted(free - modules or set.intersection(*calls) - own), sorted(modules)


def _calls_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def _cases(cases: object) -> list[tuple[str, str]]:
    if not isinstance(cases, list) or not cases:
        raise MalformedTests("stdin-stdout needs a list `cases` that is not empty")
    for case in cases:
        if not isinstance(case, Mapping) or not all(isinstance(case.get(key), str) for key in ("input", "output")):
            raise MalformedTests(f"{str(case)[:60]!r} is no pair of texts `input` and `output`")
    return [(case["input"], case["output"]) for case in cases]


def _paired(inputs: object, outputs: object) -> list[dict]:
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or len(inputs) != len(outputs):
        raise MalformedTests("`inputs` and `outputs` are not lists of one length")
    return [{"input": given, "output": expected} for given, expected in zip(inputs, outputs, strict=True)]


def _tolerance(tests: dict) -> float | None:
    tolerance = tests.get("float_tolerance")
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 <= tolerance < 1):
        raise MalformedTests(f"float_tolerance {tolerance!r} is not a number from 0 to below 1")
    return tolerance


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _close(one: str, other: str, tolerance: float) -> bool:
    try:
        return one == other or math.isclose(float(one), float(other), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False


@lru_cache(maxsize=256)
def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


def _defines(code: str, name: str) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.parse(code).body)


@lru_cache
def companion(name: str) -> bytes:
    """Returns the source of a file that runs in the sandbox."""
    return Path(__file__).with_name(name).read_bytes()
