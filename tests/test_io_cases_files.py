"""Cases of reading files of rows: each is read right, or refused in one line that names the file, the line and what to do."""

import json

import pytest
from io_cases import io_case

from r1jax.data import files, turns

GOOD = {"id": "a", "task": "math", "prompt": "1+1=", "answer": "2"}


def made(tmp_path, *lines: str | bytes | dict) -> str:
    """Writes lines, as they are or as JSON, after one good row and returns the path."""
    path = tmp_path / "rows.jsonl"
    raw = [line if isinstance(line, str | bytes) else json.dumps(line) for line in (GOOD, *lines)]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in raw))
    return str(path)


def refused(path: str, *columns: str) -> str:
    """Returns what is said behind the file's name."""
    with pytest.raises(ValueError) as error:
        files.read(path, columns)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)
    return str(error.value).removeprefix(path)


def last(path: str, *columns: str) -> dict:
    return files.read(path, columns).rows[-1].fields


def test_answers_that_are_no_numbers(tmp_path):
    (line,) = io_case("answers-that-are-no-numbers")["input"]["lines"]
    assert refused(made(tmp_path, line)) == ", line 2: field 'answer' is nan, a finite number is needed"
    for number, name in {"-Infinity": "-inf", "1e999": "inf", "1" * 400 + ".0": "inf"}.items():
        told = refused(made(tmp_path, f'{{"prompt": "p", "answer": "4", "tests": {{"cases": [1, {number}]}}}}'))
        assert told == f", line 2: field 'tests.cases[1]' is {name}, a finite number is needed"
    remarks = '{"prompt": "p", "meta": {"options": [NaN, "I only"], "level": Infinity}}'
    assert last(made(tmp_path, remarks))["meta"] == {"options": [None, "I only"], "level": None}


def test_byte_order_mark(tmp_path):
    assert io_case("byte-order-mark")["input"]["bytes"] == "EF BB BF then a good row and CRLF"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert [row.fields for row in files.read(str(path)).rows] == [GOOD, GOOD]
    path.write_bytes(b"\xef\xbb\xbf")
    assert "no rows" in refused(str(path))
    joined = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(joined * 2)
    assert [row.fields for row in files.read(str(path)).rows] == [GOOD, GOOD]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "rows.jsonl"
    path.write_bytes((json.dumps(GOOD) + "\n").encode(encoding))
    assert "not UTF-8 text: looks like UTF-16" in refused(str(path))


def test_bytes_that_are_no_text_have_a_line(tmp_path):
    assert refused(made(tmp_path, '{"prompt": "é"}'.encode("latin-1"))) == (
        ", line 2: not UTF-8 text: byte 13 of the line is 0xe9"
    )
    assert refused(made(tmp_path, b"\x00" * 9)) == ", line 2: a NUL byte; the file was not written whole"


def test_array_instead_of_lines(tmp_path):
    text = io_case("array-instead-of-lines")["input"]["text"]
    path = tmp_path / "rows.json"
    for content in (text, json.dumps(json.loads(text), indent=1), "[\n" + json.dumps(GOOD) + "\n]\n", "[]"):
        path.write_text(content)
        assert refused(str(path)).startswith(", line 1: a JSON array; one object a line is needed")
    path.write_text(json.dumps(GOOD, indent=1))
    assert refused(str(path)).startswith(", line 1: an object over several lines; one object a line is needed")


def test_integer_id(tmp_path):
    row = io_case("integer-id")["input"]["row"]
    assert last(made(tmp_path, row)) == row | {"id": "7", "answer": "4"}
    assert last(made(tmp_path, row | {"id": 0}))["id"] == "0"
    for value, kind in ((True, "bool"), (7.0, "float"), ([7], "list")):
        told = refused(made(tmp_path, row | {"id": value}))
        assert told == f", line 2: field 'id' is {kind}, a string or an integer is needed"
    assert refused(made(tmp_path, row | {"id": " "})) == ", line 2: field 'id' is empty; give it text or leave it out"


def test_number_of_5001_digits(tmp_path):
    assert io_case("number-of-5001-digits")["input"]["row"].endswith('"answer": 1 and 5000 zeros}')
    told = refused(made(tmp_path, '{"id":"a","prompt":"p","answer": 1' + "0" * 5000 + "}"))
    assert told == ", line 2: an integer of more than 4300 digits; write it as text"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("123456789012345678901234567890.5", "123456789012345678901234567890.5"),
        ("3.14159265358979323846", "3.14159265358979323846"),
        ("1e-400", "1e-400"),
        ("1e-99999999999999999999999", "1e-99999999999999999999999"),
        ("0.10", "0.1"),
        ("2.5", "2.5"),
        ("1" * 4000, "1" * 4000),
    ],
)
def test_a_number_keeps_its_digits(tmp_path, written, read):
    assert last(made(tmp_path, f'{{"prompt": "p", "answer": {written}}}'))["answer"] == read


def test_half_a_surrogate_pair(tmp_path):
    line = io_case("half-a-surrogate-pair")["input"]["line"]
    assert refused(made(tmp_path, line)) == ", line 2: field 'prompt' has half of a surrogate pair, which is no text"
    nested = '{"prompt": "p", "meta": {"notes": ["x", {"by": "\\uDC00"}]}}'
    assert refused(made(tmp_path, nested)).startswith(", line 2: field 'meta.notes[1].by' has half")
    assert refused(made(tmp_path, '{"prompt": "p", "\\ud800": 1}')).startswith(", line 2: the row has a name with half")
    assert last(made(tmp_path, '{"prompt": "\\ud83d\\ude00"}'))["prompt"] == "\U0001f600"


def test_separators_of_unicode_do_not_split_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d\x1ce"
    assert last(made(tmp_path, json.dumps({"prompt": text}, ensure_ascii=False)))["prompt"] == text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "p", "answer": 1, "answer": 2}', ", line 2: field 'answer' is given twice"),
        ('{"prompt": "p", "meta": {"k": 1, "k": 1}}', ", line 2: field 'k' is given twice"),
        (
            '{"prompt": "p", "meta": ' + "[" * 9999 + "]" * 9999 + "}",
            ", line 2: malformed JSON: lists or objects nested too",
        ),
        ('{"prompt": "p"} {"prompt": "q"}', ", line 2: malformed JSON: Extra data"),
        ("prompt,answer", ", line 2: malformed JSON: "),
        ('"prompt"', ", line 2: str given, a JSON object is needed"),
        ('{"prompt": "p"}\r{"prompt": "q"}', ", line 2: lines end in CR alone; convert the file with tr"),
        ('{"prompt": "p", "task": 3}', ", line 2: field 'task' is int, a string is needed"),
        ('{"prompt": 3}', ", line 2: field 'prompt' is int, a string or a list of messages is needed"),
        ('{"prompt": "p", "answer": true}', ", line 2: field 'answer' is bool, a string or a number is needed"),
        ('{"prompt": "p", "answer": ["4"]}', ", line 2: field 'answer' is list, a string or a number is needed"),
        ('{"prompt": "p", "tests": "assert x"}', ", line 2: field 'tests' is text that is not JSON: 'assert x'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, told):
    assert refused(made(tmp_path, line)).startswith(told)


def test_conversational_prompt(tmp_path):
    row = io_case("conversational-prompt")["input"]["row"]
    assert last(made(tmp_path, row)) == row
    assert last(made(tmp_path, row | {"prompt": json.dumps(row["prompt"])})) == row
    for text in ('["role", "content"]', "[1, 2] summed?", '[{"role": "user"}]', "["):
        assert last(made(tmp_path, {"prompt": text}))["prompt"] == text
    row["prompt"][0]["role"] = "wizard"
    assert refused(made(tmp_path, row)).startswith(
        ", line 2: field 'prompt', message 1: role 'wizard' is none of user,"
    )


def test_messages_for_distillation(tmp_path):
    row = io_case("messages-for-distillation")["input"]["row"]
    found = last(made(tmp_path, row))
    assert (found["prompt"], found["response"]) == ("2+2?", "<think>x</think>4")
    assert found["messages"] == row["messages"]


def test_columns_of_public_sets(tmp_path):
    row = io_case("columns-of-public-sets")["input"]["row"]
    table = files.read(made(tmp_path, row))
    assert table.rows[1].fields == {
        "id": "row-2",
        "prompt": "2+2?",
        "answer": "4",
        "solution": row["solution"],
        "response": row["solution"],
    }
    assert table.notes == [
        "problem read as prompt (1 of 2 rows)",
        "solution, which has a thought, read as response too (1 of 2 rows)",
        "1 of 2 rows have no id; they are called row-1, row-2, ... by their number",
    ]
    renamed = {"aufgabe": "2+2?", "loesung": "\\boxed{4}"}
    named = last(made(tmp_path, renamed), "aufgabe=prompt", "loesung=solution")
    assert (named["prompt"], named["answer"]) == ("2+2?", "4")
    assert refused(made(tmp_path, {"problemo": "2+2?", "answer": "4"})) == (
        ", line 2: field 'prompt' is missing; the row has 'problemo', 'answer'; "
        "map one with --config.data.columns=problemo=prompt"
    )
    assert refused(made(tmp_path, renamed)).endswith("map one with --config.data.columns=NAME=prompt")


def test_parquet_file(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    assert io_case("parquet-file")["input"]["file"] == "the same rows as .parquet"
    rows = [io_case("columns-of-public-sets")["input"]["row"], io_case("columns-of-public-sets")["input"]["row"]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = files.read(str(tmp_path / "rows.parquet"))
    assert [(row.fields["prompt"], row.fields["answer"]) for row in found.rows] == [("2+2?", "4")] * 2
    assert found.rows[1].place == f"{tmp_path}/rows.parquet, row 2"


def test_thought_in_its_own_column(tmp_path):
    rows = io_case("thought-in-its-own-column")["input"]["rows"]
    table = files.read(made(tmp_path, *rows))
    responses = [row.fields["response"] for row in table.rows[1:]]
    assert responses == ["<think>\n2 and 2 are 4\n</think>\n\n4", "<think>2 and 2"]
    assert "reasoning_content merged into the response as <think>...</think> (1 of 3 rows)" in table.notes
    assert turns.thoughts(responses) == {"a thought that is never closed": 1}
    for name in ("thinking", "thought", "thoughts", "reasoning_trace", "chain_of_thought", "cot"):
        found = last(made(tmp_path, {"prompt": "2+2?", "response": "4", name: "2 and 2 are 4"}))
        assert found["response"] == responses[0]
    own = {"prompt": "2+2?", "response": "<think>a</think>4", "reasoning": "b"}
    table = files.read(made(tmp_path, own))
    assert table.rows[1].fields["response"] == own["response"]
    assert "reasoning is not read: the response has its own <think> (1 of 2 rows)" in table.notes
    said = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    found = last(made(tmp_path, {"messages": [{"role": "user", "content": "2+2?"}, said]}))
    assert found["response"] == found["messages"][1]["content"] == "<think>\n2 and 2\n</think>\n\n4"


def test_two_thoughts():
    response = io_case("two-thoughts")["input"]["row"]["response"]
    good = ["<think>a</think>4", "<think>\n\n</think>4", " <think> a </think> <answer> 4 </answer>"]
    assert turns.thoughts(good) == {}
    bad = [response, "<think>a<think>b</think>4", "</think><think>", "<think>a</think>4<think>", "a</think>4", "4", ""]
    assert turns.thoughts(good + bad) == {
        "several thoughts": 2,
        "a thought that is never closed": 2,
        "a thought that is never opened": 1,
        "no thought": 2,
    }
