r"""Claims about rows of public data sets: which field is read as which, what is said of it, and what is refused."""

import json

import pytest

from r1jax.data import dialects, files, jsonl
from r1jax.rewards.code import tests as code_tests
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig


def canonical(row: dict, *columns: str) -> dict:
    return dialects.canonical(row, dialects.mapping(columns), "F, line 3")[0]


def refused(row: dict, *columns: str) -> str:
    with pytest.raises(ValueError) as error:
        canonical(row, *columns)
    assert str(error.value).startswith("F, line 3: ") and "\n" not in str(error.value)
    return str(error.value).removeprefix("F, line 3: ")


USER, SYSTEM = {"role": "user", "content": "2+2?"}, {"role": "system", "content": "Be brief."}
FOUR = {"role": "assistant", "content": "4"}
CASES = {
    "own fields stay": ({"prompt": "p", "answer": "4", "extra": 1}, {"prompt": "p", "answer": "4", "extra": 1}),
    "numbers become text": (
        {"prompt": "p", "answer": 4.5, "source": 3},
        {"prompt": "p", "answer": "4.5", "source": "3"},
    ),
    "nulls are absent": ({"prompt": "p", "task": None}, {"prompt": "p"}),
    "problem/answer": ({"problem": "p", "answer": "4"}, {"prompt": "p", "answer": "4"}),
    "capitals": ({"Problem": "p", "Answer": 4, "ID": "x"}, {"prompt": "p", "answer": "4", "id": "x"}),
    "expected_answer": ({"question": "p", "expected_answer": "4"}, {"prompt": "p", "answer": "4"}),
    "list of one answer": ({"question": "p", "final_answer": ["4"]}, {"prompt": "p", "answer": "4"}),
    "same answers twice": (
        {"prompt": "p", "final_answer": "4", "ground_truth": "4"},
        {"prompt": "p", "answer": "4", "ground_truth": "4"},
    ),
    "MATH": (
        {"problem": "p", "solution": "So \\boxed{3} and \\boxed{\\frac{1}{2}}.", "level": "Level 5", "type": "Algebra"},
        {
            **{"prompt": "p", "answer": "\\frac{1}{2}", "solution": "So \\boxed{3} and \\boxed{\\frac{1}{2}}."},
            **{"level": "Level 5", "type": "Algebra"},
        },
    ),
    "GSM8K": (
        {"question": "p", "answer": "48/2 = <<48/2=24>>24\n#### 1,072 "},
        {"prompt": "p", "answer": "1,072", "solution": "48/2 = <<48/2=24>>24"},
    ),
    "GSM8K under another name": (
        {"prompt": "p", "answer": "#### A plan\n48/2 = 24\n#### 24"},
        {"prompt": "p", "answer": "24", "solution": "#### A plan\n48/2 = 24"},
    ),
    "a heading in an answer": ({"question": "p", "answer": "#### No\nend"}, {"prompt": "p", "answer": "#### No\nend"}),
    "question/answer": ({"question": "p", "answer": "the #1"}, {"prompt": "p", "answer": "the #1"}),
    "alpaca": ({"instruction": "Add.", "input": "2, 2", "output": "4"}, {"prompt": "Add.\n\n2, 2", "response": "4"}),
    "alpaca without input": ({"instruction": "p", "input": "", "output": "4"}, {"prompt": "p", "response": "4"}),
    "query/response": ({"query": "p", "response": "4"}, {"prompt": "p", "response": "4"}),
    "prompt/completion": ({"prompt": [USER], "completion": [FOUR]}, {"prompt": [USER], "response": "4"}),
    "verl": (
        {"data_source": "aime", "prompt": [USER], "reward_model": {"ground_truth": "4", "style": "rule"}},
        {
            **{"source": "aime", "prompt": [USER], "answer": "4"},
            "reward_model": {"ground_truth": "4", "style": "rule"},
        },
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"prompt": "2+2?", "response": "4", "messages": [USER, FOUR]},
    ),
    "messages of several turns": (
        {"messages": [SYSTEM, USER, FOUR, USER, FOUR]},
        {"prompt": [SYSTEM, USER, FOUR, USER], "response": "4", "messages": [SYSTEM, USER, FOUR, USER, FOUR]},
    ),
    "messages that wait for an answer": (
        {"messages": [USER, FOUR, USER], "answer": 4},
        {"prompt": [USER, FOUR, USER], "answer": "4", "messages": [USER, FOUR, USER]},
    ),
    "messages as JSON text": ({"messages": json.dumps([USER])}, {"prompt": "2+2?", "messages": [USER]}),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}]},
        {"prompt": "2+2?", "messages": [USER]},
    ),
    "a prompt beside one exchange": (
        {"problem": "p", "messages": [USER, FOUR], "prompt": "p"},
        {"problem": "p", "prompt": "p", "response": "4", "messages": [USER, FOUR]},
    ),
    "a prompt that is the first of several turns": (
        {"prompt": "2+2?", "messages": [USER, FOUR, USER, FOUR]},
        {"prompt": [USER, FOUR, USER], "response": "4", "messages": [USER, FOUR, USER, FOUR]},
    ),
    "system beside a prompt": (
        {"system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
        {"system": "Be brief.", "prompt": [SYSTEM, USER], "response": "4"},
    ),
    "system beside conversations": (
        {"system": "Be brief.", "conversations": [{"from": "user", "value": "2+2?"}]},
        {"system": "Be brief.", "prompt": [SYSTEM, USER], "messages": [SYSTEM, USER]},
    ),
    "MMLU": (
        {"question": "p", "choices": ["1", "2", "3", "4"], "answer": 3, "subject": "s"},
        {"prompt": "p\nA. 1\nB. 2\nC. 3\nD. 4", "answer": "D", "task": "mcq", "subject": "s"},
    ),
    "MMLU-Pro": (
        {"question": "p", "options": ["x", "y"], "answer": "B", "answer_index": 1},
        {"prompt": "p\nA. x\nB. y", "answer": "B", "task": "mcq", "answer_index": 1},
    ),
    "ARC": (
        {"question": "p", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        {"prompt": "p\nA. x\nB. y", "answer": "B", "task": "mcq"},
    ),
    "ARC with its label as a number": (
        {"question": "p", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": 1},
        {"prompt": "p\nA. x\nB. y\nC. z", "answer": "A", "task": "mcq"},
    ),
    "options by letter": (
        {"question": "p", "options": {"A": "x", "B": "y"}, "answer": "y"},
        {"prompt": "p\nA. x\nB. y", "answer": "B", "task": "mcq"},
    ),
    "options with their letters": (
        {"question": "p", "options": ["A)x", "(B) y"], "answer": "B"},
        {"prompt": "p\nA. x\nB. y", "answer": "B", "task": "mcq"},
    ),
    "choices that the prompt shows": (
        {"prompt": "p\nA. x\nB. y", "choices": ["x", "y"], "answer": "B"},
        {"prompt": "p\nA. x\nB. y", "choices": ["x", "y"], "answer": "B"},
    ),
    "preferences as text": (
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    "preferences as messages": (
        {"prompt": "2+2?", "chosen": [USER, FOUR], "rejected": [USER, FOUR | {"content": "5"}]},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    ),
    "preferences as last messages": (
        {"prompt": [USER], "chosen": [FOUR], "rejected": [FOUR | {"content": "5"}]},
        {"prompt": [USER], "chosen": "4", "rejected": "5"},
    ),
    "preferences of several turns": (
        {"chosen": [USER, FOUR, USER, FOUR], "rejected": [USER, FOUR, USER, FOUR | {"content": "5"}]},
        {"prompt": [USER, FOUR, USER], "chosen": "4", "rejected": "5"},
    ),
    "HH-RLHF": (
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    ),
    "HumanEval": (
        {"task_id": "HumanEval/0", "prompt": "def f(x):", "entry_point": "f", "test": "def check(c):\n    assert c(1)"},
        {
            **{"task_id": "HumanEval/0", "prompt": "def f(x):", "task": "code"},
            "tests": {"kind": "python-check", "code": "def check(c):\n    assert c(1)", "entry_point": "f"},
        },
    ),
    "MBPP": (
        {"text": "Write f.", "code": "...", "test_list": ["assert f(1)", "assert f(2)"], "test_setup_code": "x = 1"},
        {
            **{"prompt": "Write f.\nYour code should pass this test:\nassert f(1)", "code": "...", "task": "code"},
            "tests": {"kind": "python-asserts", "setup": "x = 1", "asserts": ["assert f(1)", "assert f(2)"]},
        },
    ),
    "sanitized MBPP": (
        {"prompt": "Write f.", "test_list": ["assert f(1)"], "test_imports": ["import math"]},
        {
            **{"prompt": "Write f.\nYour code should pass this test:\nassert f(1)", "task": "code"},
            "tests": {"kind": "python-asserts", "setup": "import math", "asserts": ["assert f(1)"]},
        },
    ),
    "tests as JSON text": (
        {"prompt": "p", "tests": '[{"input": "1", "output": "2"}]'},
        {"prompt": "p", "tests": [{"input": "1", "output": "2"}]},
    ),
    "code_contests": (
        {
            **{"name": "n", "description": "p", "input_file": "", "output_file": "", "source": 2},
            "public_tests": {"input": ["1\n"], "output": ["2\n"]},
            "private_tests": {"input": [], "output": []},
            "generated_tests": {"input": ["3\n"], "output": ["4\n"]},
        },
        {
            **{"name": "n", "prompt": "p", "input_file": "", "output_file": "", "source": "2", "task": "code"},
            "tests": {
                "kind": "stdin-stdout",
                "cases": [{"input": "1\n", "output": "2\n"}, {"input": "3\n", "output": "4\n"}],
            },
        },
    ),
    "APPS": (
        {"question": "p", "input_output": '{"inputs": ["1\\n", ["2", "3"]], "outputs": ["2\\n", ["5"]]}'},
        {
            **{"prompt": "p", "task": "code"},
            "tests": {
                "kind": "stdin-stdout",
                "cases": [{"input": "1\n", "output": "2\n"}, {"input": "2\n3", "output": "5"}],
            },
        },
    ),
    "LiveCodeBench": (
        {
            **{"question_content": "p", "starter_code": "", "metadata": "{}"},
            "public_test_cases": '[{"input": "1\\n", "output": "2\\n", "testtype": "stdin"}]',
            "private_test_cases": '[{"input": "3\\n", "output": "4\\n", "testtype": "stdin"}]',
        },
        {
            **{"prompt": "p", "task": "code", "starter_code": "", "metadata": "{}"},
            "tests": {
                "kind": "stdin-stdout",
                "cases": [{"input": "1\n", "output": "2\n"}, {"input": "3\n", "output": "4\n"}],
            },
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_read_as(name):
    row, expected = CASES[name]
    before = json.dumps(row)
    assert canonical(row) == expected
    assert json.dumps(row) == before


REFUSED = {
    "two prompts": (
        {"problem": "p", "question": "q"},
        "fields 'problem' and 'question' may each be the prompt; map one with --config.data.columns=problem=prompt",
    ),
    "two answers": ({"prompt": "p", "ground_truth": "1", "final_answer": "2"}, "may each be the answer"),
    "no fields": ({}, "field 'prompt' is missing; the row has no fields; map one with"),
    "a likely field": ({"text": "p", "label": "4"}, "map one with --config.data.columns=text=prompt"),
    "a misspelt field": ({"promt": "p"}, "map one with --config.data.columns=promt=prompt"),
    "a longer name": ({"user_question_en": "p"}, "map one with --config.data.columns=user_question_en=prompt"),
    "no messages": ({"messages": []}, "field 'messages' is empty, a list of messages with role and content is needed"),
    "messages as text": ({"messages": "hello"}, "field 'messages' is str, a list of messages"),
    "a message as text": ({"messages": ["hello"]}, "field 'messages', message 1 is str, an object with role"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "message 1: the content is list, a string is needed",
    ),
    "a tool call": ({"messages": [USER, FOUR | {"tool_calls": [{}]}]}, "message 2: 'tool_calls' is not read"),
    "an untrained turn": ({"messages": [USER, FOUR | {"weight": 0}]}, "message 2: 'weight' 0 is not read"),
    "pairs of two prompts": ({"chosen": [USER, FOUR], "rejected": [SYSTEM, FOUR]}, "need one prompt"),
    "a pair without a response": ({"chosen": [USER], "rejected": [USER]}, "'chosen' does not end in an assistant turn"),
    "a letter beyond": (
        {"question": "p", "choices": ["a", "b"], "answer": "C"},
        "'answer' is 'C', needs the number of one",
    ),
    "an index beyond": (
        {"question": "p", "choices": ["a", "b"], "answer": 2},
        "'answer' is 2, needs the number of one of 2",
    ),
    "many choices": ({"question": "p", "choices": list("abcdefghijk"), "answer": 0}, "has 11 choices, at most 10"),
    "a checker": (
        {"prompt": "p", "tests": [], "generated_checker": "..."},
        "'generated_checker' is given: rows with more",
    ),
    "a checker in tests": (
        {"prompt": "p", "tests": {"checker": "x"}},
        "field 'checker' is given: rows with more than one",
    ),
    "pickled tests": (
        {"question_content": "p", "public_test_cases": "[]", "private_test_cases": "eJxrYJmqzgABPdLF"},
        "field 'private_test_cases' is compressed and pickled, and a pickle can run code; write it as JSON: json.dumps(",
    ),
    "no test cases": ({"question_content": "p", "public_test_cases": "[]"}, "test cases of testtype none"),
    "a function without name": (
        {"question_content": "p", "public_test_cases": '[{"input": "1", "output": "1", "testtype": "functional"}]'},
        "test cases of testtype functional: stdin, or functional with metadata.func_name",
    ),
    "files": ({"description": "p", "public_tests": {}, "input_file": "in.txt"}, "programs that read or write files"),
    "unpaired tests": (
        {"description": "p", "public_tests": {"input": ["1"], "output": []}},
        "1 inputs and 0 outputs of tests",
    ),
    "no tests": ({"question": "p", "input_output": "{}"}, "field 'input_output' has no 'inputs' and 'outputs'"),
    "no asserts": ({"text": "p", "test_list": []}, "field 'test_list' is empty"),
    "a response in parts": ({"prompt": "p", "response": [USER]}, "one assistant turn is needed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_is_refused(name):
    row, told = REFUSED[name]
    assert told in refused(row)


def test_what_the_user_maps_wins_over_what_is_recognised():
    row = {"problem": "p", "question": "q", "answer": "worked \\boxed{4}", "extra": {"gold": 5}, "prompt": "old"}
    found = canonical(row, "question=prompt", "extra.gold=answer")
    assert (found["prompt"], found["answer"], found["problem"]) == ("q", "5", "p")
    swapped = canonical({"prompt": "a", "response": "b"}, "prompt=response", "response=prompt")
    assert swapped == {"prompt": "b", "response": "a"}


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (["problem"], "config.data.columns: 'problem' is not THEIRS=OURS, as in problem=prompt"),
        (["=prompt"], "is not THEIRS=OURS"),
        (["problem=promt"], "'problem=promt': no field 'promt'; did you mean 'prompt'?"),
        (["problem=zzz"], "no field 'zzz'; known: id, task, prompt"),
        (["a=prompt", "b=prompt"], "'b=prompt': 'prompt' is mapped twice"),
        (["a=prompt", "a=answer"], "'a=answer': 'a' is mapped twice"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused(columns, told):
    with pytest.raises(ValueError) as error:
        dialects.mapping(columns)
    assert told in str(error.value)


def test_a_mapped_field_that_no_row_has_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl.write(path, [{"problem": "p", "answer": "4"}, {"problem": "q", "answer": "4", "hint": "h"}])
    assert files.read(str(path), ["hint=solution"]).rows[1].fields["solution"] == "h"
    with pytest.raises(
        ValueError, match="rows.jsonl: no row has the field 'problme' of .*=problme=prompt; did you mean 'problem'"
    ):
        files.read(str(path), ["problme=prompt"])


def test_remarks_are_counted_over_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"problem": "p", "solution": "\\boxed{4}", "unique_id": f"t/{n}"} for n in range(3)]
    jsonl.write(path, [*rows, {"problem": "p", "solution": "see above", "unique_id": "t/3"}])
    table = files.read(str(path))
    assert table.notes == [
        "problem read as prompt (4 of 4 rows)",
        "answer taken from the last \\boxed{} of the solution (3 of 4 rows)",
        "unique_id read as id",
    ]
    assert [row.fields["id"] for row in table.rows] == ["t/0", "t/1", "t/2", "t/3"]
    assert "answer" not in table.rows[3].fields
    jsonl.write(path, [*rows, rows[0]])  # not unique, so no id
    assert files.read(str(path)).rows[3].fields["id"] == "row-4"


def test_a_missing_field_is_told_with_what_the_row_has():
    told = dialects.missing("answer", {"prompt": "p", "target": "4"}, "F, line 1")
    assert told == (
        "F, line 1: field 'answer' is missing; the row has 'prompt', 'target'; "
        "map one with --config.data.columns=target=answer"
    )


FUNCTION = {
    "LiveCodeBench": (
        {
            "question_content": "Find two.",
            "starter_code": "class Solution:\n    def two(self, nums: List[int], total: int) -> List[int]:\n        ",
            "public_test_cases": json.dumps([{"input": "[2, 7]\n9", "output": "[0, 1]", "testtype": "functional"}]),
            "private_test_cases": json.dumps([{"input": "[3, 3]\n6", "output": "[0, 1]", "testtype": "functional"}]),
            "metadata": json.dumps({"func_name": "two"}),
        },
        "from typing import List\nclass Solution:\n    def two(self, nums: List[int], total: int):\n        return {}",
        ("[0, 1]", "(0, 1)"),
        ("[0, 2]", "None", "nums", "[[0, 1]]"),
    ),
    "APPS": (
        {
            "question": "Add up.",
            "input_output": json.dumps({"fn_name": "sum", "inputs": [[[1, 2]], [[]]], "outputs": [[3], [0]]}),
        },
        "def sum(xs):\n    return {}",
        ("xs[0] + xs[1] if xs else 0", "[xs[0] + xs[1] if xs else 0]"),
        ("3", "-1"),
    ),
}


@pytest.mark.parametrize("name", FUNCTION)
def test_tests_of_functions_run_in_the_grader(name):
    row, program, right, wrong = FUNCTION[name]
    found = canonical(row)

    def value(result: str) -> float:
        response = f"```python\n{program.format(result)}\n```"
        request = RewardRequest("1", "code", found["prompt"], response, json.dumps(found["tests"]))
        score = code_tests.accuracy(request, RewardConfig())
        assert score.scorable, score.detail
        return score.value

    assert [value(result) for result in (*right, *wrong)] == [1.0] * len(right) + [0.0] * len(wrong)


def test_starter_code_stands_in_the_prompt_with_the_names_of_its_types():
    assert canonical(FUNCTION["LiveCodeBench"][0])["prompt"] == (
        "Find two.\n\nBegin your program with this code:\n```python\nfrom typing import List\n\n"
        "class Solution:\n    def two(self, nums: List[int], total: int) -> List[int]:\n```"
    )


def test_real_sets_are_read_whole_and_their_original_dialects_alike(shared_data):
    for name, count in {"gsm8k_test": 1319, "math500": 500, "mmlu_stem": 3018, "mbpp": 974, "humaneval": 164}.items():
        table = files.read(str(shared_data / f"{name}.jsonl"))
        assert (len(table.rows), table.notes) == (count, [])
    row = next(row for row in jsonl.read(shared_data / "mbpp.jsonl") if row["id"] == "mbpp-2")
    tests = row["tests"]
    original = {
        "text": row["prompt"].partition("\n")[0],
        "test_list": tests["asserts"],
        "test_setup_code": tests["setup"],
    }
    assert canonical(original) == {name: row[name] for name in ("task", "prompt", "tests")}
    for row in jsonl.read(shared_data / "humaneval.jsonl")[:20]:
        tests = row["tests"]
        original = {"prompt": row["prompt"], "test": tests["code"], "entry_point": tests["entry_point"]}
        found = canonical(original)
        assert (found["prompt"], found["tests"], found["task"]) == (row["prompt"], row["tests"], "code")
    for row in jsonl.read(shared_data / "mmlu_stem.jsonl")[:200]:
        options, letter = row["meta"]["options"], row["answer"]
        asked = row["prompt"].rpartition("\nA. ")[0]
        found = canonical({"question": asked, "choices": options, "answer": "ABCD".index(letter)})
        assert (found["prompt"], found["answer"], found["task"]) == (row["prompt"], letter, "mcq")
