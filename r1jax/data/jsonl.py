"""Reading and writing JSON Lines, with errors that name the file, the line and what is wrong there."""

import gzip
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

_TEXT, _IDENTIFIER, _ANSWER = (str,), (str, int), (str, int, float)
FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    "id": _IDENTIFIER,
    "task": _TEXT,
    "prompt": _TEXT,
    "response": _TEXT,
    "reference": _ANSWER,
    "answer": _ANSWER,
    "solution": _TEXT,
    "chosen": _TEXT,
    "rejected": _TEXT,
    "text": _TEXT,
}
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_JSON_NAMES = {str: "a string", int: "an integer", float: "a number"}


def read(path: str | os.PathLike, required: Sequence[str] = ()) -> list[dict]:
    """Returns the rows of a JSON Lines file (`.gz` is decompressed); blank lines are skipped.

    Each row must be an object that has every field of `required`, not null; required fields named in FIELD_TYPES must have that type.
    Raises ValueError, in one line, for a missing or unreadable file, a bad row, and a file without rows.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"no such file: {path}")
    rows = []
    number = 0
    try:
        with _open(path, "rt") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_row(line, required, f"{path}, line {number}"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text after line {number}") from None
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows; at least one JSON object per line is needed")
    return rows


def write(path: str | os.PathLike, rows: Iterable[Mapping]) -> int:
    """Writes one JSON object per line (compressed if the name ends in `.gz`) and returns the number of rows.

    A lone surrogate of a text, which no encoding holds, becomes U+FFFD.
    Makes the folders. The file appears under its name only when it is complete; a failure leaves what was there before.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    count = 0
    try:
        with _open(temporary, "wt") as file:
            for row in rows:
                file.write(_SURROGATE.sub("\ufffd", json.dumps(row, ensure_ascii=False)) + "\n")
                count += 1
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _open(path: pathlib.Path, mode: str):
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, mode, encoding="utf-8")


def _row(line: str, required: Sequence[str], where: str) -> dict:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: malformed JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {type(row).__name__} given, a JSON object is needed")
    for name in required:
        if row.get(name) is None:
            raise ValueError(
                f"{where}: field {name!r} is missing; the row has {', '.join(map(repr, row)) or 'no fields'}"
            )
        types = FIELD_TYPES.get(name)
        if types and (not isinstance(row[name], types) or isinstance(row[name], bool)):
            wanted = " or ".join(_JSON_NAMES[kind] for kind in types)
            raise ValueError(f"{where}: field {name!r} is {type(row[name]).__name__}, {wanted} is needed")
    return row
