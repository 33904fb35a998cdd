"""Claims about rows of data: JSON Lines, Parquet, folders and saved data sets read alike, and what is refused, with its place."""

import datetime
import decimal
import gzip
import json
import sys

import pytest

from r1jax.data import files, jsonl

ROWS = [
    {"id": "a", "task": "math", "prompt": "2+2=", "answer": "4", "meta": {"level": 1}},
    {"id": "b", "task": "math", "prompt": "2+3=", "answer": "5", "meta": {"level": 2}},
    {"id": "c", "task": "math", "prompt": "2+4=", "answer": "6", "meta": {"level": 3}},
]


def written(path, rows=ROWS) -> str:
    """Writes rows as JSON Lines, or as Parquet if the name says so, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        jsonl.write(path, rows)
    return str(path)


def fields(path, *columns: str, limit: int = 0) -> list[dict]:
    return [row.fields for row in files.read(str(path), columns, limit).rows]


def refused(path, *columns: str) -> str:
    """Returns the one line with which a file is refused; it names the file."""
    with pytest.raises(ValueError) as error:
        files.read(str(path), columns)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value).removeprefix(str(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
def test_every_format_gives_the_same_rows_with_their_places(tmp_path, name):
    path = written(tmp_path / name)
    table = files.read(path)
    assert [row.fields for row in table.rows] == ROWS and table.notes == []
    unit = "row" if name.endswith("parquet") else "line"
    assert [row.place for row in table.rows] == [f"{path}, {unit} {number}" for number in (1, 2, 3)]
    assert fields(path, limit=2) == ROWS[:2] and fields(path, limit=7) == ROWS


def test_places_are_true_lines_when_blank_lines_stand_between(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "p"}\n\n  \n{"prompt": "q"}\n')
    table = files.read(str(path))
    assert [row.place for row in table.rows] == [f"{path}, line 2", f"{path}, line 5"]
    assert [row.fields["id"] for row in table.rows] == ["row-1", "row-2"]
    assert table.notes == ["2 of 2 rows have no id; they are called row-1, row-2, ... by their number"]


def test_a_file_is_known_by_its_first_bytes_whatever_its_name(tmp_path):
    written(tmp_path / "rows.parquet")
    (tmp_path / "parquet.jsonl").write_bytes((tmp_path / "rows.parquet").read_bytes())
    assert fields(tmp_path / "parquet.jsonl") == ROWS
    with pytest.raises(ValueError, match=r"parquet.jsonl: a Parquet file; name it .parquet$"):
        jsonl.read(tmp_path / "parquet.jsonl")
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(content))
    (tmp_path / "unpacked.jsonl.gz").write_bytes(content)
    assert fields(tmp_path / "packed.jsonl") == fields(tmp_path / "unpacked.jsonl.gz") == ROWS
    (tmp_path / "false.parquet").write_bytes(content)
    assert refused(tmp_path / "false.parquet") == ": not a Parquet file; it does not begin with PAR1"


def test_parquet_values_become_plain_python_without_nulls(tmp_path):
    rows = [
        {"id": 7, "prompt": "p", "answer": decimal.Decimal("4.50"), "task": None, "meta": {"a": None, "b": [1, None]}},
        {"id": 8, "prompt": "q", "answer": None, "task": "math", "meta": {"a": 1, "b": []}},
    ]
    for row in rows:
        row |= {"day": datetime.date(2024, 5, 1), "blob": b"\xff\x00", "name": b"text"}
    path = written(tmp_path / "rows.parquet", rows)
    more = {"day": "2024-05-01", "name": "text"}
    assert fields(path) == [
        {"id": "7", "prompt": "p", "answer": "4.50", "meta": {"b": [1, None]}, **more},
        {"id": "8", "prompt": "q", "task": "math", "meta": {"a": 1, "b": []}, **more},
    ]


def test_numbers_that_are_not_finite_are_refused_where_they_are_read(tmp_path):
    rows = [{"prompt": "p", "answer": 4.0, "score": 1.0}, {"prompt": "q", "answer": 5.0, "score": float("nan")}]
    assert [row.get("score") for row in fields(written(tmp_path / "score.parquet", rows))] == [1.0, None]
    rows[1]["answer"] = float("nan")
    assert (
        refused(written(tmp_path / "answer.parquet", rows))
        == ", row 2: field 'answer' is nan, a finite number is needed"
    )


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    path = tmp_path / "rows.parquet"
    written(path)
    path.write_bytes(path.read_bytes()[:-30])
    assert refused(path).startswith(": cannot be read after row 0: ")


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    path = written(tmp_path / "rows.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(path) == ": a Parquet file; reading it needs pyarrow: pip install 'r1jax[data]'"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"^no such file: no/set; .* needs the package datasets: pip install 'r1jax\[data\]'"
    ):
        files.read("no/set")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path, suffix):
    for number in (2, 1, 0):
        written(tmp_path / f"data/part-{number}{suffix}", ROWS[number : number + 1])
    (tmp_path / "README.md").write_text("about")
    written(tmp_path / f".cache/part-9{suffix}")
    assert fields(tmp_path) == ROWS and fields(tmp_path, limit=2) == ROWS[:2]


def test_of_several_splits_train_is_read_and_said(tmp_path):
    written(tmp_path / "data/train-00000-of-00001.parquet", ROWS[:2])
    written(tmp_path / "data/test-00000-of-00001.parquet", ROWS[2:])
    table = files.read(str(tmp_path))
    assert [row.fields for row in table.rows] == ROWS[:2]
    assert table.notes == [f"split train is read, not test; {tmp_path}:SPLIT names another"]
    assert fields(f"{tmp_path}:test") == ROWS[2:] and files.read(f"{tmp_path}:test").notes == []
    with pytest.raises(ValueError, match="no split 'dev'; it has 'test', 'train'; give one as .*:SPLIT"):
        files.read(f"{tmp_path}:dev")
    written(tmp_path / "rows.jsonl")
    assert refused(tmp_path) == ": holds both Parquet and JSON Lines files; give one of them"


def test_an_empty_folder_and_tables_of_text_are_refused(tmp_path):
    assert "a folder without .parquet and .jsonl files" in refused(tmp_path)
    (tmp_path / "rows.csv").write_text("prompt,answer\n1,2\n")
    assert refused(tmp_path / "rows.csv") == ": a table of text is not read; convert it to JSON Lines or Parquet"
    for name in ("none.jsonl", "none/rows.jsonl", "none", ""):
        with pytest.raises(ValueError, match=f"^no such file: {name}$"):
            files.read(name)


def test_saved_data_sets_and_their_splits_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    one, two = (datasets.Dataset.from_list(rows) for rows in (ROWS[:2], ROWS[2:]))
    one.save_to_disk(str(tmp_path / "one"))
    assert fields(tmp_path / "one") == ROWS[:2] and fields(tmp_path / "one", limit=1) == ROWS[:1]
    assert files.read(str(tmp_path / "one")).rows[1].place == f"{tmp_path}/one, row 2"
    assert "one data set without splits; leave out :train" in refused_split(f"{tmp_path}/one:train")
    datasets.DatasetDict(train=one, test=two).save_to_disk(str(tmp_path / "both"))
    assert fields(f"{tmp_path}/both:test") == ROWS[2:]
    table = files.read(str(tmp_path / "both"))
    assert [row.fields for row in table.rows] == ROWS[:2]
    assert table.notes == [f"split train is read, not test; {tmp_path}/both:SPLIT names another"]
    assert "no split 'dev'; it has 'train', 'test'" in refused_split(f"{tmp_path}/both:dev")
    datasets.DatasetDict(a=one, b=two).save_to_disk(str(tmp_path / "named"))
    assert "several splits and none is named train; it has 'a', 'b'" in refused(tmp_path / "named")


def refused_split(path: str) -> str:
    with pytest.raises(ValueError) as error:
        files.read(path)
    return str(error.value)


def test_a_name_of_the_hub_gives_name_config_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*given, split):
        asked.append((*given, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for path in ("org/set", "org/set:test", "org/set:main:train[:3]", "org/set:train[:3]"):
        assert fields(path) == ROWS
    assert asked == [
        ("org/set", None, "train"),
        ("org/set", None, "test"),
        ("org/set", "main", "train[:3]"),
        ("org/set", None, "train[:3]"),
    ]
    assert files.digest("org/set") == files.digest("other/set")


def test_a_name_of_the_hub_that_cannot_be_loaded_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*given, **more):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    expected = "^no such file: org/set; and as a data set of the Hub: no route to host$"
    with pytest.raises(ValueError, match=expected):
        files.read("org/set")


def test_a_digest_is_of_the_content_and_of_the_names_in_a_folder(tmp_path):
    first = files.digest(written(tmp_path / "a/rows.jsonl"))
    assert first == files.digest(written(tmp_path / "b/other.jsonl")) and len(first) == 64
    written(tmp_path / "a/more.jsonl", ROWS[:1])
    written(tmp_path / "c/more.jsonl", ROWS[:1])
    written(tmp_path / "c/rows.jsonl")
    both = files.digest(str(tmp_path / "a"))
    assert both == files.digest(str(tmp_path / "c"))
    (tmp_path / "a/notes.txt").write_text("not read")
    assert files.digest(str(tmp_path / "a")) == both
    (tmp_path / "c/rows.jsonl").rename(tmp_path / "c/renamed.jsonl")
    written(tmp_path / "a/more.jsonl", ROWS[1:])
    assert len({both, files.digest(str(tmp_path / "a")), files.digest(str(tmp_path / "c"))}) == 3
    with pytest.raises(ValueError, match="^no such file: none.jsonl$"):
        files.digest("none.jsonl")


def test_the_digest_of_a_saved_data_set_is_of_its_rows_and_not_of_when_it_was_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for name, rows in {"one": ROWS, "again": ROWS, "other": ROWS[:2]}.items():
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
    one, again, other = (files.digest(str(tmp_path / name)) for name in ("one", "again", "other"))
    (tmp_path / "one/cache-1.arrow").write_bytes(b"of a map")
    assert one == again == files.digest(str(tmp_path / "one")) != other
