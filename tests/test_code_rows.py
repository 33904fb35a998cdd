"""Which tests of programs are refused, and which programs a response holds."""

import json
import sys

import pytest
from conftest import shared_folder, unavailable

from r1jax.data import jsonl
from r1jax.rewards import compose
from r1jax.rewards.code import claims as code_claims
from r1jax.rewards.code import programs as code_programs
from r1jax.rewards.code import rows as code_rows
from r1jax.rewards.code import tests as code_tests
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux's namespaces")
CONFIG = RewardConfig(deadline_s=60.0, format=0.0)
SQUARE = {"kind": "stdin-stdout", "cases": [{"input": "3\n", "output": "9"}]}
PYTHON = "n = int(input())\nprint(n * n)\n"
CPP = "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << n * n; }\n"
SAME = "```python\ndef f(x):\n    return x\n```"  # passes what expects x of f(x)


def outcome(tests, response=SAME, prompt=""):
    """1.0 or 0.0, or the detail of a sample that is unscorable."""
    score = code_tests.accuracy(RewardRequest("x", "code", prompt, response, json.dumps(tests)), CONFIG)
    return score.value if score.scorable else score.detail


def check(body, before=""):
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    return {"kind": "python-check", "entry_point": "f", "code": f"{before}def check(candidate):\n{lines}"}


def asserts(*texts, setup=""):
    return {"kind": "python-asserts", "setup": setup, "asserts": list(texts)}


def test_code_cases_are_graded_as_they_say():
    path = shared_folder() / "cases" / "grading_cases.jsonl"
    if not path.is_file():
        unavailable(f"no cases in {path}; set R1JAX_SHARED to the folder that holds cases/")
    wrong = {}
    for row in jsonl.read(path, ("id", "task", "reference", "response", "expected")):
        if row["task"] == "code":
            request = RewardRequest(row["id"], "code", "", row["response"], row["reference"])
            score = compose.score(request, CONFIG)
            found = bool(score.parts["accuracy"]) if score.scorable else "unscorable"
            wrong |= {row["id"]: (found, score.detail)} if found != row["expected"] else {}
    assert wrong == {}


IN_VAIN = [  # bodies of check() that every function passes
    "pass", "...", "'''Tests f.'''", "return", "return\nassert candidate(1) == 2", "candidate(1)", "candidate(1) == 2", "assert True",
    "assert candidate", "assert candidate is not None", "assert callable(candidate)", "assert (candidate(1) == 2, 'wrong')",
    "assert candidate(1) == candidate(1)", "x = candidate(1)\nassert x == x", "assert True or candidate(1) == 2", "assert candidate(1) == 2 or True",
    "try:\n    assert candidate(1) == 2\nexcept Exception:\n    pass", "if False:\n    assert candidate(1) == 2", "for x in []:\n    assert candidate(x)",
    "print(candidate(1) == 2)", "return candidate(1) == 2", "assert lambda: candidate(1) == 2", "assert [candidate(1) == 2]",
    "def inner():\n    assert candidate(1) == 2", "candidate(1)\nassert 1 + 1 == 2", "import contextlib\nwith contextlib.suppress(Exception):\n    assert candidate(1) == 2",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(candidate(1), 2)",
    "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(candidate(1), 2)\nunittest.defaultTestLoader.loadTestsFromTestCase(T).run(unittest.TestResult())",
]  # fmt: skip


@pytest.mark.parametrize("body", IN_VAIN)
def test_a_check_that_every_program_passes_is_unscorable(body):
    assert str(outcome(check(body))).startswith("malformed tests: they ")


@pytest.mark.parametrize(
    "texts",
    [
        *(["pass"], ["assert 1 == 1"], ["f(1)"], ["assert f"], ["assert callable(f)"], ["x = f(1)"], ["# assert f(1) == 2"]),
        *(["assert f(1) == f(1)"], ["assert (f(1) == 2, 'no')"], ["assert isinstance(1, int)"], ["assert isinstance(f(1), object)"]),
        *(["print(f(1))", "assert not None"], ["try:\n    assert f(1) == 3\nexcept AssertionError:\n    pass"]),
    ],
)  # fmt: skip
def test_asserts_that_every_program_passes_are_unscorable(texts):
    assert str(outcome(asserts(*texts))).startswith("malformed tests: they ")


@pytest.mark.parametrize(
    ("tests", "told"),
    [
        (asserts("assert np.isclose(f(1), 1)", setup="import numpy as np"), "they import 'numpy'"),
        (check("import pandas\nassert candidate(1) == 1"), "they import 'pandas'"),
        (check("assert candidate(1) == oracle(1)"), "they use 'oracle', which nothing defines"),
        (asserts("assert False", "assert f(1) == 1"), "they fail whatever the program does"),
        (check("raise NotImplementedError\nassert candidate(1)"), "they fail whatever the program does"),
        (asserts("return f(1) == 1"), "is no Python code"),
        (
            {"kind": "python-check", "entry_point": "f", "code": "def check():\n    assert f(1)"},
            "must take one argument",
        ),
    ],
)
def test_tests_that_no_program_can_pass_are_refused(tests, told):
    with pytest.raises(code_rows.MalformedTests, match=told):
        code_rows.read_tests(json.dumps(tests))


UNITTEST = "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(1), {})"


@pytest.mark.parametrize(
    ("tests", "value"),
    [
        (check("for x, y in CASES:\n    assert candidate(x) == y", "CASES = [(1, 1)]\n"), 1.0),
        (check("for x, y in CASES:\n    assert candidate(x) == y", "CASES = [(1, 2)]\n"), 0.0),
        (check("if candidate(1) != 1:\n    raise AssertionError"), 1.0),
        (check("try:\n    candidate(None)\nexcept TypeError:\n    return\nassert candidate(None) is None"), 1.0),
        ({"kind": "python-check", "entry_point": "f", "code": UNITTEST.format(1)}, 1.0),
        ({"kind": "python-check", "entry_point": "f", "code": UNITTEST.format(2)}, 0.0),
        (
            {
                "kind": "python-check",
                "entry_point": "f",
                "code": "from solution import f\ndef test_f():\n    assert f(1) == 1",
            },
            1.0,
        ),
        (["assert f(1) == 1", "assert f(2) == 2"], 1.0),
        (["assert f(1) == 1", "assert f(2) == 3"], 0.0),
        ({"inputs": [[1], [2]], "outputs": [1, 2], "fn_name": "f"}, 1.0),
        ({"inputs": [[1], [2]], "outputs": [1, 3], "fn_name": "f"}, 0.0),
        ([{"input": '"a"', "output": '"a"', "testtype": "functional", "metadata": {"func_name": "f"}}], 1.0),
        ([{"input": '"a"', "output": '"b"', "testtype": "functional", "metadata": {"func_name": "f"}}], 0.0),
        ({"test_cases": [{"fn_name": "f", "input": [1], "output": 1, "type": "function_call"}]}, 1.0),
    ],
)
def test_tests_that_carry_what_they_need_are_run(tests, value):
    assert outcome(tests) == value


def test_functional_tests_call_a_method_where_the_program_defines_the_class():
    tests = {"inputs": [[[2, 7], 9]], "outputs": [[0, 1]], "fn_name": "two"}
    for program in ("def two(a, b): return {}", "class Solution:\n    def two(self, a, b): return {}"):
        values = [
            outcome(tests, f"```python\n{program.format(result)}\n```") for result in ("[0, 1]", "(0, 1)", "[1, 0]")
        ]
        assert values == [1.0, 1.0, 0.0]


ONE = {"input": "1", "output": "1"}


@pytest.mark.parametrize(
    ("tests", "told"),
    [
        ([ONE | {"testtype": "functional"}], "name the function: none; give its name as 'fn_name'"),
        ([ONE | {"testtype": "interactive"}], "a test is of type 'interactive'"),
        ({"cases": [ONE | {"testtype": "stdin"}, ONE | {"testtype": "functional"}], "fn_name": "f"}, "give the row one kind"),
        ({"inputs": ["1"], "outputs": ["1"], "checker": "any"}, "field 'checker' is given"),
        ({"inputs": ["1"], "outputs": ["1"], "float_tol": 0.1}, "field 'float_tol' is '0.1', .*mean 'float_tolerance'"),
        ({"inputs": ["1"], "outputs": ["1"], "case_sensitive": False}, "field 'case_sensitive' is 'False'"),
        ({"kind": "stdin-stdout", "cases": [ONE | {"compare": "set"}]}, "field 'compare' is 'set'"),
        ({"kind": "stdin-stdout", "cases": [ONE], "language": "java"}, "field 'language' is 'java'"),
        (asserts("assert f(1) == 1") | {"float_tolerance": 0.1}, "field 'float_tolerance' is '0.1'"),
    ],
)  # fmt: skip
def test_fields_that_are_not_read_are_refused_by_name(tests, told):
    with pytest.raises(code_rows.MalformedTests, match=told):
        code_rows.read_tests(json.dumps(tests))


def test_fields_that_change_nothing_are_taken():
    tests = {"inputs": ["1"], "outputs": ["1"], "fn_name": None, "time_limit": 2, "source": "x", "interactive": False}
    assert code_rows.read_tests(json.dumps(tests))["cases"] == [("1", "1")]


def test_the_text_of_real_tests_shows_nearly_always_that_they_compare(shared_data):
    for name, unsure in {"humaneval": 3, "mbpp": 1}.items():
        rows = jsonl.read(shared_data / f"{name}.jsonl")
        read = [code_rows.read_tests(json.dumps(row["tests"]), row["prompt"]) for row in rows]
        assert sum(not tests["sure"] for tests in read) == unsure
        for tests, row in zip(read, rows, strict=True):
            if not tests["sure"]:
                assert code_tests.checks_nothing(json.dumps(row["tests"]), row["prompt"], CONFIG) == ""


def test_a_text_is_sure_only_where_a_reached_assertion_compares_a_result():
    sure = [
        "assert f(1) == 2", "assert f(1)", "assert not f(1)", "assert abs(f(1) - 2) < 0.1", "x = f(1)\nassert x == 2",
        "for x in [1, 2]:\n    assert f(x) == x", "assert f(1) == 2 and f(2) == 3",
    ]  # fmt: skip
    unsure = [
        "assert f(1) == f(2)", "assert g(1) == 2", "return\nassert f(1) == 2", "assert f(1) == 2 or f(2)", "x = f(1)\nassert x == x",
        "for x in y:\n    assert f(x) == x", "f = len\nassert f('') == 0", "assert [f(x) for x in []] == []", "assert f(1) == ANY",
    ]  # fmt: skip
    assert all(code_claims.surely_compare(text, {"f"}) for text in sure)
    assert not any(code_claims.surely_compare(text, {"f"}) for text in unsure)


PYTHONS = [
    "py3",
    "python3",
    "Python 3.11",
    "pypy3",
    "PyPy 3-64",
    "PYTHON",
    "{python}",
    "{.python .numberLines}",
    "main.py",
]
PYTHONS += ['python title="a.py"', "language-python", "CPython 3.9", "ipython", "python:main.py", "python,linenos"]
CPPS = ["C++17", "c++", "cpp20", "CPP", "GNU C++17", "g++", "G++20 (gcc 13-64)", "cxx", "c++ 20", "gnu++17", "a.cpp"]
OTHERS = {
    "java": "java",
    "Java 17": "java",
    "C": "c",
    "C#": "c#",
    "go": "go",
    "rust": "rust",
    "JavaScript": "javascript",
}
TEXTS = ["text", "output", "bash", "console", "python-repl", "pycon", "json", "cppreference", "pyramid", "input"]


def test_a_label_names_its_language_whatever_its_version():
    assert {label: code_programs.language_of(label) for label in PYTHONS} == dict.fromkeys(PYTHONS, "python")
    assert {label: code_programs.language_of(label) for label in CPPS} == dict.fromkeys(CPPS, "cpp")
    assert {label: code_programs.language_of(label) for label in OTHERS} == OTHERS
    assert {label: code_programs.language_of(label) for label in TEXTS} == dict.fromkeys(TEXTS, "text")


def indented(text, before):
    return "".join(before + line + "\n" for line in text.splitlines())


BLOCK = f"```python\n{PYTHON}```"


@pytest.mark.parametrize(
    "response",
    [
        "1. Code:\n" + indented(BLOCK, "   "),
        "1. Code:\n\n" + indented(BLOCK, "    ") + "2. Done.",
        "* Code:\n" + indented(BLOCK, "\t"),
        indented(BLOCK, "        "),
        indented(BLOCK, "> "),
        indented(BLOCK.replace("`", "~"), "  "),
        "- ```python\n" + indented(PYTHON, "  ") + "  ```",
        "   ```python\n" + PYTHON + "   ```",
        "  ```python\n" + indented(PYTHON, "  ") + "```",
        "```python\n" + indented(PYTHON, "    ") + "```",
        "```python\ndef g():\n    '''\n    ```\n    x\n    ```\n    '''\n" + PYTHON + "```",
        BLOCK.replace("\n", "\r\n"),
        "```\n" + CPP + "```",
        CPP,
    ],
)
def test_a_program_is_found_whatever_the_indent_of_its_block(response):
    assert outcome(SQUARE, response) == 1.0


def test_a_bare_body_keeps_its_indent():
    tests = {"kind": "python-check", "entry_point": "f", "code": "def check(c):\n    assert c(2) == 4"}
    for response in ("```python\n    y = x * x\n    return y\n```", "- So:\n  ```python\n      return x * x\n  ```"):
        assert outcome(tests, response, "def f(x):\n    '''Square.'''\n") == 1.0


def test_a_program_in_a_language_that_cannot_be_run_is_a_zero_that_says_so():
    score = code_tests.accuracy(RewardRequest("x", "code", "", "```java\nclass A {}\n```", json.dumps(SQUARE)), CONFIG)
    assert (score.value, score.scorable) == (0.0, True)
    assert score.detail == "the program is in java, and only Python and C++ can be run"
