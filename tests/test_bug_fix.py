"""Bug fixes: the failing tests pass and the passing ones stay so, whatever the changed code does to its process."""

import json
import sys

import pytest
from small import problems_of

from r1jax.rewards import compose
from r1jax.rewards.code import bug_fix
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig, SandboxConfig, replace

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux's namespaces")

ACCOUNT = """import math


class Overdrawn(ValueError):
    pass


class Account:
    def __init__(self, balance=0):
        self.balance = balance

    def withdraw(self, amount):
        if amount >= self.balance:
            raise Overdrawn(amount)
        self.balance -= amount
        return self.balance

    def history(self):
        yield from range(self.balance)


def interest(balance, rate):
    return math.floor(balance * rate)
"""
TESTS = """import unittest

from bank import Account, Overdrawn
from bank.account import interest
from .amounts import AMOUNT


class AccountTest(unittest.TestCase):
    def setUp(self):
        self.account = Account(AMOUNT)

    def test_all_of_it(self):
        self.assertEqual(self.account.withdraw(AMOUNT), 0)
        self.assertEqual(self.account.balance, 0)

    def test_too_much(self):
        with self.assertRaises(Overdrawn) as caught:
            self.account.withdraw(AMOUNT + 1)
        self.assertIn("6", str(caught.exception))


def test_part():
    account = Account(AMOUNT)
    assert account.withdraw(2) == 3 and list(account.history()) == [0, 1, 2]


class TestInterest:
    def test_is_whole(self):
        assert interest(10, rate=0.25) == 2
"""
FILES = {
    "src/bank/__init__.py": "from bank.account import Account, Overdrawn\n",
    "src/bank/account.py": ACCOUNT,
    "tests/__init__.py": "",
    "tests/amounts.py": "AMOUNT = 5\n",
    "tests/test_account.py": TESTS,
}
FAILING = ["tests/test_account.py::AccountTest::test_all_of_it"]
PASSING = [
    "tests/test_account.py::AccountTest::test_too_much",
    "tests/test_account.py::test_part",
    "tests/test_account.py::TestInterest::test_is_whole",
]
REFERENCE = {"files": FILES, "failing": FAILING, "passing": PASSING, "roots": ["src"]}
CONFIG = RewardConfig(deadline_s=30.0)
WRONG, RIGHT = "if amount >= self.balance:", "if amount > self.balance:"


def graded(response: str, config: RewardConfig = CONFIG, **changes):
    request = RewardRequest("sample", "bug_fix", "fix it", response, json.dumps({**REFERENCE, **changes}))
    return compose.grader("bug_fix", config)(request, config)


def file(path: str, content: str) -> str:
    return f"```python {path}\n{content.rstrip()}\n```\n"


def account(old: str = WRONG, new: str = RIGHT, extra: str = "") -> str:
    """Returns a response that replaces a part of the account module and adds code to it."""
    assert old in ACCOUNT
    return file("src/bank/account.py", ACCOUNT.replace(old, new) + extra)


def test_right_fix_scores_one_as_a_diff_and_as_a_file():
    hunk = f"@@ -11,3 +11,3 @@\n     def withdraw(self, amount):\n-        {WRONG}\n+        {RIGHT}\n"
    patch = f"<think>off by one</think>The bound was wrong.\n```diff\n--- a/src/bank/account.py\n+++ b/src/bank/account.py\n{hunk}```"
    for response in (patch, account()):
        score = graded(response)
        assert (score.value, score.scorable, score.detail) == (1.0, True, "all 4 tests passed")


def test_repository_as_it_was_fails_the_failing_test_and_passes_the_others():
    assert bug_fix.run_tests(bug_fix.read_reference(json.dumps(REFERENCE)), FILES, CONFIG).startswith(FAILING[0])
    only = bug_fix.read_reference(json.dumps({**REFERENCE, "failing": PASSING, "passing": []}))
    assert bug_fix.run_tests(only, FILES, CONFIG) == ""


def test_fix_that_breaks_a_passing_test_scores_zero_and_names_it():
    score = graded(account(WRONG, "if False:"))
    assert score.value == 0.0 and score.detail.startswith(PASSING[0])


ALWAYS = "\nclass Always(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n    __gt__ = __lt__ = __ge__ = __contains__ = __eq__\n"
OBJECT = ALWAYS.replace("Always(int)", "Always")
PATCH = "\nimport unittest\nunittest.TestCase.assertEqual = lambda *_: None\nunittest.TestCase.run = lambda self, result: result\n"
HOSTILE = {
    "exit at import": (account(WRONG, WRONG, "\nimport sys\nsys.exit(0)\n"), "SystemExit"),
    "hard exit at import": (account(WRONG, WRONG, "\nimport os\nos._exit(0)\n"), "EOFError"),
    "exit in the call": (account(WRONG, "raise SystemExit(0)\n        if False:"), "SystemExit"),
    "patched unittest": (account(WRONG, WRONG, PATCH), "Overdrawn"),
    "patched builtins": (account(WRONG, WRONG, "\nimport builtins\nbuiltins.AssertionError = type('E', (), {})\n"), "Overdrawn"),
    "skip": (account(WRONG, "import unittest; raise unittest.SkipTest('later')\n        if False:"), "SkipTest: later"),
    "always equal": (account(WRONG, "return Always()\n        if False:", OBJECT), "cannot be compared"),
    "number that is always equal": (account(WRONG, "return Always(7)\n        if False:", ALWAYS), "7 != 0"),
    "verdict printed": (account(WRONG, WRONG, f"\nprint({json.dumps(json.dumps(dict.fromkeys(FAILING + PASSING, '')))})\n"), "Overdrawn"),
    "verdict sent": (
        account(WRONG, WRONG, '\nimport os\nfor fd in range(3, 20):\n    try: os.write(fd, b\'["ok", 0]\\n\' * 99)\n    except OSError: pass\n'),
        "cannot be sent",
    ),
    "endless loop": (account(WRONG, "while True: pass\n        if False:"), "stopped by the wall limit"),
    "end of iteration": (account(WRONG, "raise StopIteration\n        if False:"), "Ended"),
    "tests read": (account(WRONG, "print(open('tests/test_account.py').read())\n        if False:"), "FileNotFoundError"),
    "test changed": (account() + file("tests/test_account.py", "def test_part(): pass"), "is of the tests"),
    "test helper changed": (account() + file("tests/amounts.py", "AMOUNT = 1"), "is of the tests"),
    "test deleted": ("```diff\n--- a/tests/amounts.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-AMOUNT = 5\n```", "is of the tests"),
    "conftest": (account() + file("src/conftest.py", "import os; os._exit(0)"), "is of the tests"),
    "sitecustomize": (account() + file("sitecustomize.py", "import os; os._exit(0)"), "is of the tests"),
    "path out of the repository": (account() + file("../driver.py", "x = 1"), "not plain and relative"),
    "driver overwritten": (account(WRONG, WRONG) + file("bug_fix_driver.py", "print('{}')"), "Overdrawn"),
    "unittest shadowed": (account(WRONG, WRONG) + file("src/unittest.py", "class TestCase: pass"), "Overdrawn"),
    "long name": (account() + file("字" * 100 + ".py", "x = 1"), "not plain and relative"),
    "hidden folder": (account(WRONG, WRONG) + file(".keep/x.py", "x = 1"), "Overdrawn"),
    "file and folder": (account() + file("src/bank/account.py/x.py", "x = 1"), "a file and a folder"),
    "no change": ("All is well.", "no change"),
    "same file": (account(WRONG, WRONG), "changes nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_change_scores_zero_and_the_defence_is_named(name):
    response, defence = HOSTILE[name]
    score = graded(response, replace(CONFIG, deadline_s=5.0) if "loop" in name else CONFIG)
    assert (score.value, score.scorable) == (0.0, True) and defence in score.detail, score.detail


def test_twin_of_the_hostile_changes_that_is_benign_scores_one():
    harmless = "\nimport builtins, os, unittest\nprint('[\"ok\", 0]')\n\n\nclass Always(int):\n    pass\n"
    assert graded(account(WRONG, RIGHT, harmless) + file("src/helpers.py", "x = 1")).value == 1.0


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"files": []}, "needs 'files'"),
        ({"failing": []}, "names no test"),
        ({"failing": ["tests/none.py::test_x"]}, "with a PATH of 'files'"),
        ({"failing": ["tests/test_account.py"]}, "with a PATH of 'files'"),
        ({"passing": "all"}, "must be lists"),
        ({"files": {"../x": ""}}, "not plain and relative"),
    ],
)
def test_unreadable_reference_is_unscorable(changes, reason):
    score = graded(account(), **changes)
    assert not score.scorable and reason in score.detail


def test_row_with_tests_becomes_a_prompt_whose_answer_the_grader_reads():
    [prompt] = problems_of([{"id": "a", "task": "bug_fix", "prompt": "fix", "tests": {"kind": "bug-fix", **REFERENCE}}])
    assert bug_fix.read_reference(prompt.reference).failing == tuple(FAILING)


def test_module_names_follow_the_import_roots():
    files = dict.fromkeys(("src/bank/__init__.py", "src/bank/deep/a.py", "b.py", "data.txt"), "")
    assert bug_fix.modules(files, ("src",)) == {"bank": "src/bank", "bank.deep": "src/bank/deep", "bank.deep.a": ""}
    assert bug_fix.modules(files, (".",))["b"] == ""


@pytest.mark.parametrize(
    "test",
    [
        "async def test_it():\n    assert one() == 2\n",
        "def test_it():\n    yield\n    assert one() == 2\n",
        "import unittest\n\n\nclass T(unittest.TestCase):\n    async def test_it(self):\n        assert one() == 2\n",
    ],
)
def test_test_that_only_returns_a_coroutine_or_generator_does_not_pass(test):
    files = {"code_.py": "def one(): return 0\n", "test_it.py": "from code_ import one\n\n\n" + test}
    name = "test_it.py::T::test_it" if "class T" in test else "test_it.py::test_it"
    given = {"files": files, "failing": [name], "passing": [], "roots": ["."]}
    request = RewardRequest("a", "bug_fix", "fix", file("code_.py", "def one(): return 1"), json.dumps(given))
    assert compose.grader("bug_fix", CONFIG)(request, CONFIG).value == 0.0


def test_new_package_does_not_take_the_place_of_a_tests_helper():
    test = "from code_ import answer\nfrom test_helper import EXPECTED\n\n\ndef test_it():\n    assert answer() == EXPECTED\n"
    files = {"code_.py": "def answer(): return 1\n", "test_helper.py": "EXPECTED = 42\n", "test_it.py": test}
    given = {"files": files, "failing": ["test_it.py::test_it"], "passing": [], "roots": ["."]}
    forged = file("code_.py", "def answer(): return 1 + 0") + file("test_helper/__init__.py", "EXPECTED = 1")
    score = graded(forged, **given)
    assert score.value == 0.0 and "AssertionError" in score.detail
    assert graded(file("code_.py", "def answer(): return 42"), **given).value == 1.0


MEASURE = """def length(x, y):
    return x + y


class Opened:
    def __enter__(self):
        return 1

    def __exit__(self, kind, error, trace):
        return None
"""
MEASURE_TESTS = """from measure import Opened, length


def test_length():
    assert abs(length(3, 4) - 5.0) < 1e-9


def test_opened():
    with Opened() as found:
        assert found == 2
"""
SWALLOWED = MEASURE.replace("return None", "return True")
ZERO = "class Zero:\n    def __sub__(self, other): return 0\n    __rsub__ = __add__ = __abs__ = __sub__\n\n\n"


@pytest.mark.parametrize(
    "test, forged, right",
    [
        ("test_opened", SWALLOWED, MEASURE.replace("return 1", "return 2")),
        ("test_length", ZERO + MEASURE.replace("x + y", "Zero()"), MEASURE.replace("x + y", "(x * x + y * y) ** 0.5")),
    ],
)
def test_neither_swallowed_assertions_nor_forged_arithmetic_pass(test, forged, right):
    files = {"measure.py": MEASURE, "test_measure.py": MEASURE_TESTS}
    given = {"files": files, "failing": [f"test_measure.py::{test}"], "passing": [], "roots": ["."]}
    assert graded(file("measure.py", forged), **given).value == 0.0
    assert graded(file("measure.py", right), **given).value == 1.0


def test_pool_grades_bug_fixes_in_a_worker_beside_one_that_hangs():
    responses = [account(), account(WRONG, "while True: pass\n        if False:"), account(WRONG, "if False:")]
    asked = [
        RewardRequest(str(n), "bug_fix", "fix it", text, json.dumps(REFERENCE)) for n, text in enumerate(responses)
    ]
    config = RewardConfig(deadline_s=20.0, sandbox=SandboxConfig(cpu_s=3.0, wall_s=18.0))
    with RewardPool(config) as pool:
        scores = pool.score(asked)
    assert [(score.parts["accuracy"], score.scorable) for score in scores] == [(1.0, True), (0.0, True), (0.0, True)]
    assert "stopped by the cpu limit" in scores[1].detail
