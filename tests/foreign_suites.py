"""Reads the cases of other graders' own tests where they ship: in an installed package or in a source archive.

Nothing of them is kept here. An archive is fetched once, with pip, into the cache folder of the tests.
"""

import ast
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tarfile
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import conftest

from r1jax.data import jsonl

FOLDER = conftest.HOME / "suites"
DISPUTES = pathlib.Path(__file__).parent / "foreign_disputes.jsonl"
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_SENTENCE = re.compile(r"[A-Za-z]{3,}\W+[A-Za-z]{2,}")
_NO_MATHEMATICS = re.compile(
    r"\\(?:langle|rangle|mathit|imaginaryunit|adjugate)"
)  # quantum states, words, sympy's own commands
_SPELLED = re.compile(r"_\{[A-Za-z]{3,}\}")  # a Greek letter of a name, printed as a word
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[^{}\\]*\})?")


@dataclass(frozen=True)
class Pair:
    """One case: the suite's `answer` is worth the mark for `reference`, or it is not."""

    reference: str
    answer: str
    expected: bool
    bare: bool  # the answer is no sentence and has no box, so it may also be put in one
    whole: bool = True  # it may be graded as it stands, as a whole response

    @property
    def key(self) -> str:
        """Returns what names the pair in foreign_disputes.jsonl."""
        return hashlib.sha256(f"{self.reference}\0{self.answer}\0{self.expected:d}".encode()).hexdigest()[:12]

    def responses(self) -> Iterator[tuple[str, str]]:
        """Yields (extraction, response): as the answer stands, and in a box."""
        if self.whole:
            yield "auto", self.answer
        if self.bare:
            yield "boxed", f"\\boxed{{{without_delimiters(self.answer)}}}"


def without_delimiters(text: str) -> str:
    """Returns a text without the one pair of delimiters of mathematics around all of it."""
    text = text.strip()
    for start, end in _DELIMITERS:
        inner = text[len(start) : -len(end)]
        if text.startswith(start) and text.endswith(end) and inner and start not in inner:
            return inner.strip()
    return text


def pair(reference: str, answer: str, expected: bool) -> Pair:
    inner = without_delimiters(answer)
    delimited = any(start in inner for start, _ in _DELIMITERS)
    sentence = delimited or "\n" in inner or _SENTENCE.search(_COMMAND.sub(" ", inner))
    return Pair(reference, answer, bool(expected), "\\boxed" not in answer and not sentence)


def archive(package: str, version: str) -> pathlib.Path:
    """Returns the path of a package's source archive; skips the test without one, and fails it when CI=true."""
    path = FOLDER / f"{package.replace('-', '_')}-{version}.tar.gz"
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", package, "--dest", str(FOLDER), f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode or not path.exists():
            conftest.unavailable(f"no source of {package} {version}: {done.stderr.strip().splitlines()[-1:]}")
    return path


def modules(package: str, version: str, ending: str) -> Iterator[ast.Module]:
    """Yields the parsed Python files of a source archive whose paths match `ending`, a regular expression."""
    with tarfile.open(archive(package, version)) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            if member.isfile() and re.search(ending, member.name):
                yield ast.parse(files.extractfile(member).read())


def parametrized(tree: ast.Module) -> Iterator[tuple[str, dict[str, typing.Any]]]:
    """Yields (test, {argument: value}) of the literal rows of every parametrize list of one file."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for mark in function.decorator_list:
            if not (isinstance(mark, ast.Call) and getattr(mark.func, "attr", "") == "parametrize"):
                continue
            names = ast.literal_eval(mark.args[0])
            names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
            for row in mark.args[1].elts:
                yield from ((function.name, values) for values in _row(names, row))


def _row(names: list[str], row: ast.expr) -> list[dict[str, typing.Any]]:
    cells = row.args if isinstance(row, ast.Call) else row.elts if isinstance(row, ast.Tuple) else [row]
    try:
        return [dict(zip(names, map(ast.literal_eval, cells), strict=True))]
    except ValueError:  # a value that the file computes
        return []


def asserted(tree: ast.Module, function: str) -> Iterator[tuple[list[str], bool]]:
    """Yields (arguments, truth) of each `assert f(a, b)`, with `not` or `is True` or `is False`, for literal texts.

    A call of one argument around a literal is looked through.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assert):
            continue
        test, truth = node.test, True
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test, truth = test.operand, False
        if isinstance(test, ast.Compare) and isinstance(test.comparators[0], ast.Constant):
            test, truth = test.left, truth == test.comparators[0].value
        if isinstance(test, ast.Call) and getattr(test.func, "id", "") == function:
            texts = [cell.args[0] if isinstance(cell, ast.Call) and cell.args else cell for cell in test.args]
            if all(isinstance(cell, ast.Constant) and isinstance(cell.value, str) for cell in texts):
                yield [cell.value for cell in texts], truth


def math_verify() -> Iterator[Pair]:
    """Yields the pairs of math-verify's tests."""
    for tree in modules("math-verify", "0.9.0", r"/tests/test_\w+\.py$"):
        for _, row in parametrized(tree):
            if {"gold", "pred"} <= set(row):
                yield pair(row["gold"], row["pred"], row.get("expected", row.get("result")))


def lm_eval() -> Iterator[Pair]:
    """Yields the pairs of lm-evaluation-harness's tests of its grader for MATH."""
    for tree in modules("lm_eval", "0.4.13", r"/tests/test_minerva_math\.py$"):
        for test, row in parametrized(tree):
            if set(row) == {"answer"} and test.endswith("matches_itself"):
                yield pair(row["answer"], row["answer"], True)
            elif set(row) in ({"x1", "x2"}, {"pred", "gold"}):
                answer, reference = row.values()
                yield pair(reference, answer, "pred" in row)
        for (answer, reference), truth in asserted(tree, "is_equiv"):
            yield pair(reference, answer, truth)


def tinker_cookbook() -> Iterator[Pair]:
    """Yields the pairs of Tinker Cookbook's tests of its two graders."""
    for tree in modules("tinker_cookbook", "0.6.1", r"/(math_env|numeric_grading)_test\.py$"):
        for _, row in parametrized(tree):
            if "reward" in row:
                yield Pair(str(row["expected"]), row["response"], row["reward"] == 1.0, bare=False)
            elif {"response", "expected"} == set(row):
                yield Pair(row["expected"], row["response"], True, bare=False)
        for (answer, reference), truth in asserted(tree, "grade_answer"):
            yield pair(reference, answer, truth)


def sympy() -> Iterator[Pair]:
    """Yields what sympy's tests of its LaTeX parsers say a text means, as sympy prints it, and one more, which is wrong."""
    from sympy import Expr, Integral, latex, log, oo, sympify
    from sympy.parsing.tests import test_latex, test_latex_lark

    lists = [name for name in vars(test_latex_lark) if name.startswith("EVALUATED_") or name.startswith("TRIG")]
    for text, meaning in [*test_latex.GOOD_PAIRS, *(row for name in lists for row in vars(test_latex_lark)[name])]:
        value = sympify(meaning)
        if value.has(log):  # left as it was typed, its base would not be printed
            value = value.replace(log, lambda *arguments: log(*arguments))
        if _NO_MATHEMATICS.search(text) or _SPELLED.search(latex(value)):
            continue
        yield Pair(text, latex(value), True, bare=True, whole=False)
        if isinstance(value, Expr) and value.is_commutative is not False and not value.has(Integral) and value != oo:
            yield Pair(text, latex(value + 1), False, bare=True, whole=False)


@dataclass(frozen=True)
class Suite:
    read: Callable[[], Iterator[Pair]]
    fewest: int  # pairs that it has at least: a file laid out anew must not read as an empty one

    @property
    def name(self) -> str:
        return self.read.__name__

    def pairs(self) -> list[Pair]:
        """Returns the suite's pairs, each once."""
        return list(dict.fromkeys(self.read()))


SUITES = (Suite(math_verify, 260), Suite(lm_eval, 19), Suite(tinker_cookbook, 32), Suite(sympy, 300))


def rows(suite: Suite) -> Iterator[dict[str, typing.Any]]:
    """Yields each undisputed pair, in each of its forms, as a row of a file for `--config=bench_grading`."""
    disputes = map(json.loads, DISPUTES.read_text(encoding="utf-8").splitlines())
    disputed = {row["key"] for row in disputes if row["suite"] == suite.name}
    for found in suite.pairs():
        for extraction, response in found.responses() if found.key not in disputed else ():
            row = {"id": f"{suite.name}-{found.key}-{extraction}", "kind": suite.name, "task": "math"}
            row |= {"extraction": extraction, "reference": found.reference, "response": response}
            yield row | {"expected": found.expected}


def main(path: str) -> None:
    """Writes the rows to a JSON Lines file: python tests/foreign_suites.py PAIRS.jsonl"""
    jsonl.write(pathlib.Path(path), [row for suite in SUITES for row in rows(suite)])


if __name__ == "__main__":
    main(*sys.argv[1:])
