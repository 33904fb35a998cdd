import json
import shutil
import sys
from dataclasses import replace

import pytest

from r1jax.rewards.code import tests as code_tests
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.sandbox import attack as sandbox_attack
from r1jax.rewards.sandbox.run import SandboxUnavailable
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig, SandboxConfig

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux's namespaces")

CONFIG = RewardConfig(
    deadline_s=60.0, batch_deadline_s=300.0, sandbox=SandboxConfig(backend="unshare", wall_s=20.0, cpu_s=10.0)
)
ADD = {"kind": "python-asserts", "setup": "", "asserts": ["assert add(2, 3) == 5", "assert add([1], [2]) == [1, 2]"]}
ECHO = {"kind": "stdin-stdout", "cases": [{"input": "3\n", "output": "1\n2\n3\n"}, {"input": "1", "output": "1"}]}
COUNT = "for n in range(int(input())): print(n + 1)"


def block(code, language="python"):
    return f"<think>easy</think>Here it is:\n```{language}\n{code}\n```\n"


def grade(code, tests=ADD, prompt="", config=CONFIG):
    text = code if "```" in code else block(code)
    reference = tests if isinstance(tests, str) else json.dumps(tests)
    return code_tests.accuracy(RewardRequest("x", "code", prompt, text, reference), config)


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("def add(a, b): return a + b", 1.0),
        ("def add(a, b): return a - b", 0.0),
        ("def add(a, b): return 5", 0.0),
        ("def other(a, b): return a + b", 0.0),
        ("def add(a, b): return a +", 0.0),
        ("print('noise' * 10)\ndef add(a, b):\n    print(a)\n    return a + b", 1.0),
    ],
)
def test_a_program_scores_one_only_when_every_assert_holds(code, value):
    score = grade(code)
    assert (score.value, score.scorable) == (value, True), score.detail


def test_the_tests_may_build_objects_of_the_programs_own_classes():
    tests = {
        "kind": "python-asserts",
        "setup": "root = Node(1)\nroot.left = Node(2)",
        "asserts": ["assert total(root) == 3"],
    }
    code = "class Node:\n    def __init__(self, value): self.value, self.left = value, None\n"
    assert grade(code + "def total(n): return 0 if n is None else n.value + total(n.left)", tests).value == 1.0


@pytest.mark.parametrize(
    "value",
    ["None", "True", "-7", "10 ** 5000", "1.5", "float('inf')", "2j", "'é\\ud800'", "b'ab'", "(1, [2, {3: {4}}])", "range(3)",
     "__import__('collections').OrderedDict(a=1)", "__import__('collections').Counter('aab')",
     "__import__('fractions').Fraction(1, 3)", "__import__('decimal').Decimal('1.10')", "__import__('datetime').date(2024, 2, 29)", "int"],
)  # fmt: skip
def test_plain_values_pass_between_test_and_program_unchanged(value):
    tests = {
        "kind": "python-asserts",
        "setup": "",
        "asserts": [f"x = same({value}); assert x == {value} and type(x) is type({value})"],
    }
    assert grade("def same(x): return x", tests).value == 1.0


@pytest.mark.parametrize(
    "value",
    [
        "map(str, [1])",
        "iter([1])",
        "iter(range(2))",
        "iter({1: 2}.items())",
        "__import__('itertools').islice('abc', 2)",
    ],
)
def test_iterators_of_the_language_pass_as_what_they_yield(value):
    tests = {"kind": "python-asserts", "setup": "", "asserts": [f"assert list(made()) == list({value})"]}
    assert grade(f"def made(): return {value}", tests).value == 1.0


def test_tests_by_lists_of_inputs_and_outputs_keep_their_tolerance():
    tests = {"inputs": ["3"], "outputs": ["0.3333"], "float_tolerance": 1e-3}
    assert grade("print(1 / int(input()))", tests).value == 1.0
    assert grade("print(2 / int(input()))", tests).value == 0.0


def test_a_check_sees_the_prompts_helpers_and_not_the_programs():
    prompt = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    '''Undo double.'''\n"
    tests = {
        "kind": "python-check",
        "entry_point": "half",
        "code": "def check(candidate):\n    assert double(candidate(8)) == 8\n",
    }
    assert grade("def half(x): return x // 2", tests, prompt).value == 1.0
    assert grade("    return x // 2", tests, prompt).value == 1.0
    assert grade("def double(x): return 8\ndef half(x): return 0", tests, prompt).value == 0.0


@pytest.mark.parametrize(
    ("code", "value"),
    [
        (COUNT, 1.0),
        (COUNT.replace("print(n + 1)", "print(n + 1, end='  \\n')"), 1.0),
        ("print(1)", 0.0),
        (COUNT + "\nprint('more')", 0.0),
        ("n = int(input())\nfor i in range(1, n + 1): print(i, flush=True)\nraise SystemExit(1)", 0.0),
    ],
)
def test_output_is_compared_whole_and_the_program_must_end_well(code, value):
    assert grade(code, ECHO).value == value


def test_the_three_ways_to_write_inputs_and_outputs_read_alike():
    cases = ECHO["cases"]
    apps = {"inputs": [case["input"] for case in cases], "outputs": [case["output"] for case in cases]}
    read = [code_tests.read_tests(json.dumps(tests)) for tests in (ECHO, cases, apps)]
    assert read[0] == read[1] == read[2]


def test_numbers_may_differ_by_the_tolerance_that_a_row_asks_for():
    assert code_tests.outputs_equal("0.333333 a\n", "0.333334 a", 1e-5)
    assert not code_tests.outputs_equal("0.333333 a\n", "0.333334 a")
    assert not code_tests.outputs_equal("0.333333 a\n", "0.333334 b", 1e-5)
    assert not code_tests.outputs_equal("1 2", "1 2 3", 1e-5)
    assert not code_tests.outputs_equal("nan", "1", 1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_cpp_program_is_compiled_and_run_in_the_sandbox():
    code = "#include <iostream>\nint main() { int n; std::cin >> n; for (int i = 1; i <= n; i++) std::cout << i << '\\n'; }"
    assert grade(block(code, "cpp"), ECHO).value == 1.0
    wrong = grade(block(code.replace("i <= n", "i < n"), "cpp"), ECHO)
    assert (wrong.value, "printed" in wrong.detail) == (0.0, True)
    broken = grade(block("int main() { return x; }", "cpp"), ECHO)
    assert (broken.value, "it does not compile" in broken.detail) == (0.0, True)


def test_a_cpp_program_is_unscorable_without_a_compiler(monkeypatch):
    monkeypatch.setattr(code_tests.shutil, "which", lambda *_, **__: None)
    score = grade(block("int main() {}", "cpp"), ECHO)
    assert (score.scorable, score.detail) == (False, "no C++ compiler here (apt-get install g++)")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```python\na\n```\n```py\nb\n```\n", "b\n"),
        ("```python\na\n```\n```text\nout\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("<think>\n```python\nwrong\n```\n</think>\n    return 1", "    return 1"),
        ("<think>```python\na\n```", None),
        ("```text\nout\n```", None),
        ("```python\nnever closed", None),
    ],
)
def test_the_program_is_the_last_block_after_the_thought(text, found):
    source = code_tests.extract_program(text)
    assert (source and source.text) == found


@pytest.mark.parametrize(
    "tests",
    ["", "7", "{}", '{"kind": "unknown"}', "[]", '[{"input": 1, "output": "1"}]', '{"inputs": ["1"], "outputs": []}',
     '{"kind": "python-asserts", "asserts": []}', '{"kind": "python-asserts", "asserts": ["assert ("]}',
     '{"kind": "python-check", "entry_point": "f", "code": "x = 1"}', '{"kind": "python-check", "entry_point": "f"}'],
)  # fmt: skip
def test_malformed_tests_make_a_sample_unscorable(tests):
    score = grade("def add(a, b): return a + b", tests)
    assert not score.scorable
    assert score.detail.startswith("malformed tests: ")


def test_the_pool_grades_programs_in_its_workers_and_cut_ones_as_zero():
    requests = [
        RewardRequest("good", "code", "", block("def add(a, b): return a + b"), json.dumps(ADD)),
        RewardRequest("cut", "code", "", block("def add(a, b): return a + b"), json.dumps(ADD), truncated=True),
        RewardRequest("slow", "code", "", block("while True: pass"), json.dumps(ADD)),
    ]
    with RewardPool(replace(CONFIG, sandbox=replace(CONFIG.sandbox, cpu_s=2.0))) as pool:
        scores = pool.score(requests)
    assert [score.parts["accuracy"] for score in scores] == [1.0, 0.0, 0.0]
    assert "stopped by the cpu limit" in scores[2].detail


def test_a_pool_refuses_programs_before_it_grades_where_they_cannot_be_isolated(monkeypatch):
    monkeypatch.setattr(sandbox_attack, "attack", lambda sandbox: ["write: /etc/passwd"])
    monkeypatch.setattr(sandbox_attack, "withstood", set())
    with RewardPool(CONFIG) as pool, pytest.raises(SandboxUnavailable, match="write: /etc/passwd"):
        pool.score([RewardRequest("x", "code", "", block("pass"), json.dumps(ADD))])
