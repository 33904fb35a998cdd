"""Grades programs by their tests, in the sandbox.

A test of a function runs in one sandbox and the program in another. They exchange plain values (wire.py), so that
nothing the program does to its own process can change the verdict. A test of a whole program gives it an input; its
output is compared outside the sandbox. Expected values never enter the program's sandbox.
"""

import json
import math
import os
import shutil
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from r1jax.rewards.code.programs import SourceCode, extract_program
from r1jax.rewards.code.rows import MalformedTests, read_tests
from r1jax.rewards.sandbox.attack import open_sandbox
from r1jax.rewards.sandbox.run import PYTHON, Outcome, Program, Sandbox
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

MAX_PROGRAM_CHARACTERS = 100_000
COMPILE_LIMITS = {"cpu_s": 20.0, "memory_bytes": 2 << 30, "output_bytes": 16 << 20, "file_bytes": 64 << 20}
COMPILE = "g++ -std=c++20 -O2 -pipe -o program main.cpp && cat program"
NO_COMPILER = "no C++ compiler here (apt-get install g++)"
GRACE = 0.8  # share of a sample's deadline that its tests may take, so that a slow program gets 0 before the deadline
# Values that meaningless programs return from every function: tests check nothing if they pass with each of them.
_MEANINGLESS = ("'neither number nor list'", "None", "True", "-907.25")
_MEANINGLESS_PROGRAM = """
class _Object:
    def __init__(self, *_, **__): pass
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return lambda *_, **__: {value}
"""


def accuracy(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns a Score with value 1 if the response's program passes every test of the row, else 0.

    Malformed tests, tests that check nothing, and C++ without a compiler give scorable False. A program in a language
    other than Python and C++ gets 0. Raises SandboxUnavailable where programs cannot be isolated.
    """
    try:
        tests = read_tests(request.reference, request.prompt)
    except MalformedTests as error:
        return Score(0.0, {}, False, f"malformed tests: {error}")
    source = extract_program(request.text)
    if source is None:
        return Score(0.0, {}, True, "no program found")
    if source.language not in ("python", "cpp"):
        return Score(0.0, {}, True, f"the program is in {source.language}, and only Python and C++ can be run")
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
    if not failure and not tests.get("sure", True):
        if reason := checks_nothing(request.reference, request.prompt, config):
            return Score(0.0, {}, False, f"malformed tests: {reason}")
    return Score(float(not failure), {}, True, failure or "all tests passed")


@lru_cache(maxsize=256)
def checks_nothing(reference: str, prompt: str, config: RewardConfig) -> str:
    """Returns why every program passes a row's tests of a function, "" if meaningless programs fail them.

    Nothing is run if the text of the tests shows that they compare results. Raises MalformedTests, SandboxUnavailable.
    """
    tests = read_tests(reference, prompt)
    if tests["kind"] == "stdin-stdout" or tests["sure"]:
        return ""
    sandbox = sandbox_of_sample(config)
    for value in _MEANINGLESS:
        if _function_failure(_meaningless(tests, value), tests, sandbox):
            return ""
    return "they check nothing: functions that always return None, True or a text pass them"


def _meaningless(tests: dict, value: str) -> str:
    """Returns a program that defines every tested name, as a class if it begins with a capital, else as a function."""
    lines = [_MEANINGLESS_PROGRAM.format(value=value)]
    for name in tests.get("names") or [tests["entry_point"]]:
        one = f"class {name}(_Object): pass" if name[0].isupper() else f"def {name}(*_, **__): return {value}"
        lines.append(one)
    return "\n".join(lines)


def has_compiler() -> bool:
    """Returns whether g++ is in the PATH of the sandbox."""
    return shutil.which("g++", path=os.defpath) is not None


def sandbox_of_sample(config: RewardConfig) -> Sandbox:
    """Returns the sandbox for one run of a sample's tests, with a time limit that fits into the sample's deadline."""
    wall_s = min(config.sandbox.wall_s, GRACE * config.deadline_s)
    return open_sandbox(config.sandbox).limited(wall_s=wall_s)


def outputs_equal(printed: str, expected: str, float_tolerance: float | None = None) -> bool:
    """Returns whether two outputs are equal, apart from white space at the ends of lines and of the output.

    With a tolerance, two words that are numbers may differ by it, absolutely or relatively.
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
    wire = {"code_wire.py": companion("wire.py")}
    texts = {"prompt.py": tests.get("prompt", ""), "program.py": program}
    files = {name: text.encode("utf-8", "surrogatepass") for name, text in texts.items()}
    tests_run, program_run = sandbox.converse(
        Program(
            [*PYTHON, "main.py"],
            wire | {"main.py": companion("driver.py"), "tests.json": json.dumps(tests).encode()},
        ),
        Program([*PYTHON, "main.py"], wire | {"main.py": companion("candidate.py")} | files),
    )
    verdict: dict[str, Any]
    try:
        verdict = json.loads(tests_run.stdout)
    except ValueError:
        verdict = {"passed": False, "detail": "the tests gave no verdict"}
    if verdict["passed"] is True and tests_run.status == 0 and not tests_run.stopped_by:
        return ""
    return explained(
        verdict["detail"],
        program_run if program_run.stopped_by else replace(program_run, stopped_by=tests_run.stopped_by),
    )


def _whole_program_failure(source: SourceCode, tests: dict, config: RewardConfig) -> str:
    """Returns why the program fails the first test that it does not pass; "" when it passes them all."""
    sandbox = open_sandbox(config.sandbox)
    until = time.monotonic() + GRACE * config.deadline_s
    if source.language == "cpp":
        program = compile_cpp(source.text, config)
        if isinstance(program, str):
            return program
        command, files = ["./program"], {"program": program}
    else:
        command, files = [*PYTHON, "main.py"], {"main.py": source.text.encode("utf-8", "surrogatepass")}
    for number, (input_text, expected) in enumerate(tests["cases"], 1):
        left = until - time.monotonic()
        if left <= 0:
            return f"test {number} of {len(tests['cases'])}: no time left of the sample's {config.deadline_s:g} s"
        limited = sandbox.limited(wall_s=min(left, config.sandbox.wall_s))
        outcome = limited.run(command, files, input_text.encode("utf-8", "surrogatepass"))
        if outcome.status or outcome.stopped_by:
            return explained(f"test {number} of {len(tests['cases'])}: ended with status {outcome.status}", outcome)
        if not outputs_equal(outcome.stdout.decode(errors="replace"), expected, tests["float_tolerance"]):
            return (
                f"test {number} of {len(tests['cases'])}: printed {outcome.stdout[:80]!r}, expected {expected[:80]!r}"
            )
    return ""


def compile_cpp(text: str, config: RewardConfig) -> bytes | str:
    """Returns the compiled program, or the reason why there is none. The compiler runs in a sandbox too."""
    if not has_compiler():
        return NO_COMPILER
    sandbox = open_sandbox(config.sandbox).limited(wall_s=GRACE * config.deadline_s, **COMPILE_LIMITS)
    outcome = sandbox.run(["sh", "-c", COMPILE], {"main.cpp": text.encode("utf-8", "surrogatepass")})
    return (
        outcome.stdout if outcome.status == 0 and not outcome.stopped_by else explained("it does not compile", outcome)
    )


def explained(what: str, outcome: Outcome) -> str:
    """Returns `what`, followed by the limit that stopped the run, if any, and the last line of its standard error."""
    words = outcome.stderr.decode(errors="replace").strip().splitlines()
    stopped = f"; stopped by the {outcome.stopped_by} limit" if outcome.stopped_by else ""
    return f"{what}{stopped}" + (f"; {words[-1][:200]}" if words else "")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _close(one: str, other: str, tolerance: float) -> bool:
    try:
        return one == other or math.isclose(float(one), float(other), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False


@lru_cache
def companion(name: str) -> bytes:
    """Returns the source of a file of this folder that runs in the sandbox."""
    return Path(__file__).with_name(name).read_bytes()
