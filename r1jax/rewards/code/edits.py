"""Applies the changes to files in a response: unified diffs, or whole files in fenced blocks that name a path."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from r1jax.rewards.answers.extraction import fences

MAX_PATH_BYTES = 200
MAX_CHARACTERS = 1 << 20  # total length of all changed files
MAX_FILES = 100  # files that a response may change
_PATH = re.compile(r"(?:\S+[ :]|path=)?([\w.-]+(?:/[\w.-]+)*\.\w+)")
_HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@")

Files = Mapping[str, str]


def apply(text: str, files: Files) -> dict[str, str]:
    """Returns the files after the changes of a response: every fenced block that is a diff or names a path, in order.

    A fence's first line is `diff`, or a language and a path (```python src/a.py). Raises ValueError, in one line, when
    there is no change, a path is not plain and relative, a hunk's old lines are not found, or the change is too large.
    """
    changed, has_change = dict(files), False
    for label, body in fences(text, flush=True)[0]:  # flush: lines of a diff begin with its own marks
        if label.split(" ")[0] in ("diff", "patch") or body.startswith(("--- ", "diff --git ")):
            has_change = True
            _apply_diff(body, changed)
        elif named := _PATH.fullmatch(label):
            has_change = True
            changed[safe_path(named[1])] = body
    if not has_change:
        raise ValueError("no change: a fenced diff, or a fenced file whose first line names its path, is needed")
    written = [path for path, content in changed.items() if files.get(path) != content]
    total = sum(len(changed[path]) for path in written)
    if total > MAX_CHARACTERS or len(written) > MAX_FILES:
        raise ValueError(
            f"{len(written)} changed files of {total} characters, more than {MAX_FILES} or {MAX_CHARACTERS} are not taken"
        )
    folders = {str(folder) for path in changed for folder in PurePosixPath(path).parents}
    if both := sorted(folders & {*changed}):
        raise ValueError(f"{both[0]} would be a file and a folder")
    return changed


def safe_path(path: str) -> str:
    """Returns the path. Raises ValueError unless it is relative, of plain names, and stays inside the directory."""
    parts = path.split("/")
    if (
        len(path.encode("utf-8", "replace")) > MAX_PATH_BYTES
        or not all(re.fullmatch(r"[\w.-]+", part) for part in parts)
        or {".", ".."} & {*parts}
    ):
        raise ValueError(f"the path {path[:MAX_PATH_BYTES]!r} is not plain and relative")
    return path


def _apply_diff(text: str, files: dict[str, str]) -> None:
    """Applies every file section of a unified diff. Line numbers are used only if a hunk fits at several places."""
    lines, place = text.splitlines(), 0
    while place < len(lines):
        line = lines[place]
        if line.startswith(("new file mode 12", "new mode 12", "rename ", "copy ", "GIT binary", "Binary files")):
            raise ValueError(f"the diff makes a link, a rename or a binary change: {line[:80]!r}")
        if not (line.startswith("--- ") and lines[place + 1 : place + 2] and lines[place + 1].startswith("+++ ")):
            place += 1
            continue
        old, new = _name(line), _name(lines[place + 1])
        place += 2
        hunks = []
        while place < len(lines) and (start := _HUNK.match(lines[place])):
            place += 1
            body = []
            while place < len(lines) and (lines[place][:1] in (" ", "+", "-", "\\") or not lines[place]):
                if (
                    lines[place].startswith("--- ")
                    and lines[place + 1 : place + 2]
                    and lines[place + 1].startswith("+++ ")
                ):
                    break
                body.append(lines[place] or " ")
                place += 1
            hunks.append((int(start[1]), body))
        _change(old, new, hunks, files)


def _name(line: str) -> str | None:
    """Returns the path of a `---` or `+++` line without its a/ or b/, or None for /dev/null."""
    path = line[4:].split("\t")[0].strip()
    if path == "/dev/null":
        return None
    return safe_path(path[2:] if path.startswith(("a/", "b/")) else path)


def _change(old: str | None, new: str | None, hunks: list[tuple[int, list[str]]], files: dict[str, str]) -> None:
    if old is None and new is None:
        raise ValueError("the diff names no file")
    if old is not None and old not in files:
        raise ValueError(f"the diff changes {old}, which is not there")
    if old is not None and new is not None and old != new:
        raise ValueError(f"the diff renames {old} to {new}")
    if old is None and new in files:
        raise ValueError(f"the diff makes {new}, which is there already")
    if not hunks:
        raise ValueError(f"the diff of {new or old} has no hunk")
    if new is None:
        assert old is not None
        del files[old]
        return
    lines, shift = files[old].splitlines() if old else [], 0
    for start, body in hunks:
        while body and body[-1] == " " and not _places_of(lines, [text[1:] for text in body if text[0] in " -"]):
            body = body[:-1]  # blank lines after a diff are not context
        before = [text[1:] for text in body if text[0] in " -"]
        after = [text[1:] for text in body if text[0] in " +"]
        places = _places_of(lines, before)
        if not places:
            raise ValueError(f"the diff does not fit {new}: the old lines of the hunk at {start} are not there")
        at = min(places, key=lambda place: abs(place - (start - 1 + shift))) if before else max(0, start - 1 + shift)
        lines[at : at + len(before)] = after
        shift += len(after) - len(before)
    files[new] = "".join(f"{line}\n" for line in lines)


def _places_of(lines: list[str], wanted: list[str]) -> list[int]:
    """Returns every index in `lines` at which the wanted lines begin in a row."""
    return [at for at in range(len(lines) - len(wanted) + 1) if lines[at : at + len(wanted)] == wanted]
