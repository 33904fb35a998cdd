"""The one writer of whole files, the reader of rows that a run appends, and errors in one line."""

import ast
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from r1jax.core import errors, files
from r1jax.recipe import common
from r1jax.schema import Config

ROOT = pathlib.Path(__file__).resolve().parents[1]
RENAMING = {"os.replace", "os.rename", "os.renames", "shutil.move"}
KILLED = """
import os, pathlib, signal, sys
from r1jax.core import files
with files.replacing(sys.argv[1]) as temporary:
    temporary.write_text("half of the new") if sys.argv[2] == "file" else temporary.mkdir()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_while_writing(path: pathlib.Path, kind: str) -> None:
    command = [sys.executable, "-c", KILLED, str(path), kind]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL


def test_a_file_is_written_whole_with_its_folders_and_nothing_else_stays(tmp_path):
    path = tmp_path / "new" / "deep" / "figures.json"
    for text in ("first", "seçond"):
        files.write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_written_whole(tmp_path):
    with files.replacing(tmp_path / "model") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "weights").write_bytes(b"abc")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "inner" / "weights").read_bytes() == b"abc"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, kind):
    path = tmp_path / "rows"
    path.write_text("old")
    with pytest.raises(KeyError, match="row 7"), files.replacing(path) as temporary:
        temporary.write_text("half of the new") if kind == "file" else temporary.mkdir()
        raise KeyError("row 7")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_while_writing_leaves_the_old_file_and_the_leftover_can_be_removed(tmp_path, kind):
    path = tmp_path / "rows[1].jsonl"
    path.write_text("old")
    kill_while_writing(path, kind)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_unfinished(tmp_path, "other")
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_unfinished(tmp_path, path.name)
    assert list(tmp_path.iterdir()) == [path]


def test_remove_unfinished_without_a_name_clears_all_leftovers_and_no_other_file(tmp_path):
    kept = [tmp_path / name for name in (".hidden", "rows.tmp", ".notes.tmp", "rows.7.tmp")]
    for path in kept:
        path.write_text("mine")
    for name in ("a", "b.json"):
        kill_while_writing(tmp_path / name, "file")
    files.remove_unfinished(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_stage_that_starts_again_clears_what_a_killed_run_left(tmp_path):
    folder = common.StageFolder(Config(stage="grade"), tmp_path)
    folder.path.mkdir()
    kill_while_writing(folder.path / "figures.json", "file")
    folder.start({})
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.json", common.INPUTS]


def test_rows_are_read_without_a_last_line_that_was_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert files.read_jsonl(path) == []
    path.write_bytes(b'{"update": 1}\n{"update": 2}\n{"upda')
    assert files.read_jsonl(path) == [{"update": 1}, {"update": 2}]


@pytest.mark.parametrize("line", ["{1}", "", "[1]", "7"])
def test_a_damaged_row_before_the_last_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"update": 1}}\n{line}\n{{"update": 3}}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not JSON, needs one object per line"):
        files.read_jsonl(path)


def renames(source: str) -> bool:
    """Returns whether a source calls a function that replaces a file: os.replace, path.rename and their like."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and {f"{node.module}.{alias.name}" for alias in node.names} & {*RENAMING}:
            return True
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        one_argument = len(node.args) == 1 and not node.keywords  # as pathlib has it; str.replace has two
        if ast.unparse(node.func) in RENAMING or (node.func.attr in ("replace", "rename") and one_argument):
            return True
    return False


def test_one_module_of_the_package_replaces_files():
    assert (
        renames("os.replace(a, b)")
        and renames("from os import replace")
        and renames("path.rename(other)")
        and not renames("text.replace('a', 'b')")
    )
    folders = [ROOT / "r1jax", ROOT / "configs", ROOT / "kernels"]
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    found = [path.relative_to(ROOT).as_posix() for path in paths if renames(path.read_text(encoding="utf-8"))]
    assert found == ["r1jax/core/files.py"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (ValueError(), "ValueError"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: no such file or directory"),
        (OSError("the disk is full"), "the disk is full"),
    ],
)
def test_an_error_is_one_line(error, line):
    assert errors.one_line(error) == line
    assert errors.one_line(error, 3) == line[:3]


def test_the_kind_of_an_error_is_named_once():
    assert errors.named(ValueError("two\n  lines")) == "ValueError: two lines"
    assert errors.named(ValueError("two\n  lines"), 3) == "ValueError: two"
    assert errors.named(MemoryError()) == "MemoryError"
