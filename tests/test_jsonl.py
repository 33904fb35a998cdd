import gzip

import pytest

from r1jax.data import jsonl


def test_write_then_read_returns_the_rows_and_makes_the_folders(tmp_path):
    rows = [{"id": 1, "prompt": "né\n中"}, {"id": "b", "prompt": ""}]
    for name in ("a/b/rows.jsonl", "a/b/rows.jsonl.gz"):
        assert jsonl.write(tmp_path / name, iter(rows)) == 2
        assert jsonl.read(tmp_path / name, required=("id", "prompt")) == rows
    assert gzip.open(tmp_path / "a/b/rows.jsonl.gz").read(1) == b"{"


def test_write_leaves_the_old_file_and_no_other_when_a_row_fails(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl.write(path, [{"id": 1}])
    with pytest.raises(TypeError):
        jsonl.write(path, [{"id": 2}, {"id": object()}])
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    assert jsonl.read(path) == [{"id": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": 1, "prompt": "a"}\n\n{"id": 2,}\n', "line 3: malformed JSON: "),
        (b'["id"]\n', "line 1: a JSON array; one object a line is needed"),
        (b'{"prompt": "a"}\n', "line 1: field 'id' is missing; the row has 'prompt'"),
        (b'{"id": 1, "prompt": null}\n', "line 1: field 'prompt' is missing; the row has 'id', 'prompt'"),
        (b'{"id": 1, "prompt": 5}\n', "line 1: field 'prompt' is int, a string is needed"),
        (b'{"id": true, "prompt": ""}\n', "line 1: field 'id' is bool, a string or an integer is needed"),
        (b"\n \n", "no rows; at least one JSON object per line is needed"),
        (b'{"id": 1, "prompt": "a"}\n\xff\xfe\n', "not UTF-8 text"),
    ],
)
def test_read_names_the_file_the_line_and_the_fault(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        jsonl.read(path, required=("id", "prompt"))
    assert str(path) in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_read_names_a_missing_file_a_folder_and_a_broken_gzip(tmp_path):
    with pytest.raises(ValueError, match="^no such file: .*none.jsonl$"):
        jsonl.read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        jsonl.read(tmp_path)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match="cut.jsonl.gz: cannot be read"):
        jsonl.read(tmp_path / "cut.jsonl.gz")


def test_read_numbered_gives_true_lines_and_stops_at_its_limit(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"id": 1}\n\n{"id": 2}\n{"id": 3, broken\n')
    assert jsonl.read_numbered(path, ("id",), limit=2) == [(2, {"id": 1}), (4, {"id": 2})]
    with pytest.raises(ValueError, match="rows.jsonl, line 5: malformed JSON"):
        jsonl.read_numbered(path, ("id",), limit=3)


def test_write_replaces_half_of_a_surrogate_pair_and_keeps_the_rest(tmp_path):
    rows = [{"text": "a\ud83db", "more": ["\udc00", "\U0001f600"]}, {"text": "c"}]
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        assert jsonl.write(tmp_path / name, rows) == 2
        expected = [{"text": "a\ufffdb", "more": ["\ufffd", "\U0001f600"]}, {"text": "c"}]
        assert jsonl.read(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (b"PK\x03\x04", "a Zip archive; unpack it first"),
        (b"\x28\xb5\x2f\xfd", "compressed with Zstandard; unpack it first"),
        (b"ARROW1\x00\x00", "an Arrow file; give the folder of the saved data set"),
    ],
)
def test_files_of_other_formats_are_named(tmp_path, start, told):
    (tmp_path / "rows.jsonl").write_bytes(start + b"rest")
    with pytest.raises(ValueError, match=f"rows.jsonl: {told}$"):
        jsonl.read(tmp_path / "rows.jsonl")
