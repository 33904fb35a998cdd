"""Changes that a response writes: diffs and whole files, applied safely or refused with the reason."""

import pytest

from r1jax.rewards.code import edits

FILES = {"src/a.py": "one\ntwo\nthree\nfour\n", "b.txt": "x\ny\nx\ny\n"}


def fenced(body: str, label: str = "diff") -> str:
    return f"Here:\n```{label}\n{body}```\nDone."


def diff(path: str, hunk: str, old: str = "a/", new: str = "b/") -> str:
    return fenced(f"--- {old}{path}\n+++ {new}{path}\n{hunk}")


def test_diff_changes_adds_and_removes_lines():
    changed = edits.apply(diff("src/a.py", "@@ -1,3 +1,3 @@\n one\n-two\n+2\n+2.5\n three\n"), FILES)
    assert changed == {**FILES, "src/a.py": "one\n2\n2.5\nthree\nfour\n"}
    assert edits.apply(diff("src/a.py", "@@ -9 +9 @@\n-four\n", "", ""), FILES)["src/a.py"] == "one\ntwo\nthree\n"


def test_line_numbers_choose_among_places_that_fit():
    assert edits.apply(diff("b.txt", "@@ -3,2 +3,2 @@\n-x\n+z\n y\n"), FILES)["b.txt"] == "x\ny\nz\ny\n"
    assert edits.apply(diff("b.txt", "@@ -1,2 +1,2 @@\n-x\n+z\n y\n"), FILES)["b.txt"] == "z\ny\nx\ny\n"


def test_two_hunks_and_two_files_in_one_diff():
    body = "--- a/b.txt\n+++ b/b.txt\n@@ -1 +1,2 @@\n-x\n+p\n+q\n@@ -3 +4 @@\n-x\n+r\n--- a/src/a.py\n+++ b/src/a.py\n@@ -4 +4 @@\n-four\n+4\n"
    changed = edits.apply(fenced(body), FILES)
    assert changed == {"b.txt": "p\nq\ny\nr\ny\n", "src/a.py": "one\ntwo\nthree\n4\n"}


def test_files_are_made_and_deleted():
    made = edits.apply(fenced("--- /dev/null\n+++ b/new/c.py\n@@ -0,0 +1,2 @@\n+a\n+b\n"), FILES)
    assert made["new/c.py"] == "a\nb\n"
    gone = edits.apply(fenced("--- a/b.txt\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n"), FILES)
    assert set(gone) == {"src/a.py"}


@pytest.mark.parametrize("label", ["python src/a.py", "python:src/a.py", "src/a.py", "path=src/a.py"])
def test_fenced_file_with_a_path_replaces_the_file(label):
    assert edits.apply(fenced("new\n", label), FILES)["src/a.py"] == "new\n"


def test_fence_may_hold_shorter_fences():
    text = "````markdown doc.md\n```python\nx\n```\n````\n"
    assert edits.apply(text, FILES)["doc.md"] == "```python\nx\n```\n"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("just words", "no change"),
        ("```python\nx = 1\n```", "no change"),
        (diff("src/a.py", "@@ -1 +1 @@\n-missing\n+x\n"), "the old lines of the hunk at 1 are not there"),
        (diff("src/none.py", "@@ -1 +1 @@\n-one\n+x\n"), "which is not there"),
        (diff("src/a.py", ""), "has no hunk"),
        (diff("../a.py", "@@ -1 +1 @@\n-one\n+x\n"), "not plain and relative"),
        (diff("/etc/passwd", "@@ -1 +1 @@\n-one\n+x\n", "", ""), "not plain and relative"),
        (fenced("x\n", "python ../../a.py"), "not plain and relative"),
        (fenced("--- a/b.txt\n+++ b/c.txt\n@@ -1 +1 @@\n-x\n+z\n"), "renames b.txt to c.txt"),
        (fenced("--- /dev/null\n+++ b/b.txt\n@@ -0,0 +1 @@\n+a\n"), "there already"),
        (fenced("--- /dev/null\n+++ /dev/null\n@@ -1 +1 @@\n-a\n+b\n"), "names no file"),
        (
            fenced("diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+/etc\n"),
            "makes a link",
        ),
        (fenced("x" * (edits.MAX_CHARACTERS + 1) + "\n", "python src/a.py"), "characters, more than"),
        ("".join(fenced("x\n", f"python f{n}.py") + "\n" for n in range(edits.MAX_FILES + 1)), "101 changed files"),
        (fenced("x\n", "python src/a.py/b.py"), "src/a.py would be a file and a folder"),
    ],
)
def test_unsafe_or_unfitting_change_is_refused_with_the_reason(text, reason):
    with pytest.raises(ValueError, match=reason):
        edits.apply(text, FILES)


def test_size_of_unchanged_files_does_not_count():
    large = {**FILES, "data.txt": "x" * (edits.MAX_CHARACTERS + 1)}
    assert edits.apply(fenced("new\n", "python src/a.py"), large) == {**large, "src/a.py": "new\n"}
