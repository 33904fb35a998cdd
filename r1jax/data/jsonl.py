"""Reading and writing JSON Lines, with errors that name the file, the line and what is wrong there."""

import codecs
import decimal
import gzip
import hashlib
import json
import math
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from r1jax.core import files

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
FREE = ("meta",)  # may hold NaN, as remarks of public sets do
_JSON_NAMES: dict[type, str] = {str: "a string", int: "an integer", float: "a number"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_GZIP = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20
_OTHER_FORMATS = {  # first bytes of a file -> the format, for the error
    b"PAR1": "a Parquet file; name it .parquet",
    b"ARROW1": "an Arrow file; give the folder of the saved data set",
    b"PK\x03\x04": "a Zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\xfd7zXZ": "compressed with xz; unpack it first",
    codecs.BOM_UTF16_LE: "not UTF-8 text: looks like UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "not UTF-8 text: looks like UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
}


def read(path: str | os.PathLike, required: Sequence[str] = ()) -> list[dict]:
    """Returns the rows of a JSON Lines file (`.gz` is decompressed); blank lines are skipped.

    Each row must be an object that has every field of `required`, not null; required fields named in FIELD_TYPES must
    have that type. Raises ValueError, in one line, for a missing or unreadable file, a bad row, and a file without
    rows.
    """
    return [row for _, row in read_numbered(path, required)]


def read_numbered(path: str | os.PathLike, required: Sequence[str] = (), limit: int = 0) -> list[tuple[int, dict]]:
    """Returns what `numbered` yields."""
    return list(numbered(path, required, limit))


def numbered(path: str | os.PathLike, required: Sequence[str] = (), limit: int = 0) -> Generator[tuple[int, dict]]:
    """Yields (line number from 1, row) of each row, as `read`; of the first `limit` rows alone if it is not 0.

    A byte order mark (also further down, where files were joined), CRLF and a compressed file under any name are read;
    a number that no float holds exactly keeps its digits as text (`str`). Refused, with the line: a field given twice,
    NaN and infinite numbers outside `meta`, integers too long for Python, text with half of a surrogate pair, bytes
    that are not UTF-8.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"no such file: {path}")
    count = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                row = _row(line.removeprefix(codecs.BOM_UTF8), required, f"{path}, line {number}")
                if row is not None:
                    count += 1
                    yield number, row
                if limit and count == limit:
                    break
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not count:
        raise ValueError(f"{path}: no rows; at least one JSON object per line is needed")


@dataclass(frozen=True)
class LineRange:
    """Some neighbouring whole lines of a file that is not compressed."""

    start: int  # byte of the file
    end: int  # the byte after the last one
    line: int  # number of the first line, from 1
    lines: int


def parts(path: str | os.PathLike, least_bytes: int) -> tuple[str, list[LineRange]]:
    """Returns (sha256 of a file, its lines as parts of at least `least_bytes`, but for the last), reading it once."""
    sha, result = hashlib.sha256(), []
    start, first, line, position = 0, 1, 1, 0  # of the part, of the next byte
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sha.update(chunk)
            counted = 0  # bytes of the chunk whose line ends are in `line`
            while (place := chunk.find(b"\n", max(start + least_bytes - 1 - position, 0))) >= 0:
                line += chunk.count(b"\n", counted, place + 1)
                counted = place + 1
                result.append(LineRange(start, position + counted, first, line - first))
                start, first = position + counted, line
            line += chunk.count(b"\n", counted)
            position += len(chunk)
            last = chunk[-1:]
    if position > start:
        result.append(LineRange(start, position, first, line - first + (last != b"\n")))
    return sha.hexdigest(), result


def read_part(path: str | os.PathLike, part: LineRange) -> list[dict]:
    """Returns the rows of some lines of a file; blank ones are skipped. Raises ValueError as `read` does."""
    with open(path, "rb") as file:
        file.seek(part.start)
        lines = file.read(part.end - part.start).split(b"\n")
    rows = (_row(line, (), f"{path}, line {number}") for number, line in enumerate(lines, part.line))
    return [row for row in rows if row is not None]


def write(path: str | os.PathLike, rows: Iterable[Mapping]) -> int:
    """Writes one JSON object per line (compressed if the name ends in `.gz`) and returns the number of rows.

    Makes the folders. The file appears under its name only when it is complete; a failure leaves what was there before.
    Half of a surrogate pair, which no UTF-8 can hold, becomes U+FFFD.
    """
    opener = gzip.open if pathlib.Path(path).suffix == ".gz" else open
    count = 0
    with files.replacing(path) as temporary, opener(temporary, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(_SURROGATE.sub("\ufffd", json.dumps(row, ensure_ascii=False)) + "\n")
            count += 1
    return count


def fault(value: object, free: Sequence[str] = ()) -> tuple[str, str] | None:
    """Returns (path of the field, fault) of the first text or number in a value that cannot be used; None without one.

    Those are text with half of a surrogate pair, and numbers that are not finite, which only the fields named in `free`
    may hold. The path reads `tests.cases[2].input`.
    """
    return _fault(value, True, free)


def _fault(value: object, finite: bool, free: Sequence[str]) -> tuple[str, str] | None:
    if isinstance(value, str):
        return ("", "has half of a surrogate pair, which is no text") if _SURROGATE.search(value) else None
    if isinstance(value, float):
        return None if math.isfinite(value) or not finite else ("", f"is {value}, a finite number is needed")
    if isinstance(value, Mapping):
        if any(_SURROGATE.search(str(name)) for name in value):
            return "", "has a name with half of a surrogate pair, which is no text"
        members: Iterable = ((str(name), member) for name, member in value.items())
    elif isinstance(value, list | tuple):
        members = ((f"[{index}]", member) for index, member in enumerate(value))
    else:
        return None
    for step, member in members:
        if inner := _fault(member, finite and step not in free, ()):
            rest = inner[0] if not inner[0] or inner[0].startswith("[") else f".{inner[0]}"
            return step + rest, inner[1]
    return None


@contextmanager
def _opened(path: pathlib.Path) -> Generator[Iterable[bytes]]:
    """Gives the lines of a file, decompressed if it begins as gzip does.

    ValueError for a file of another known format.
    """
    with path.open("rb") as raw:
        start = raw.peek(8)[:8]
        for first, what in _OTHER_FORMATS.items():
            if start.startswith(first):
                raise ValueError(f"{path}: {what}")
        if not start.startswith(_GZIP):
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield unpacked


def _row(line: bytes, required: Sequence[str], where: str) -> dict | None:
    """Returns the row of a line, None for a blank line."""
    text = _text(line, where)
    if not text.strip():
        return None
    row = _parsed(text, where)
    if isinstance(row, list):
        raise ValueError(f"{where}: a JSON array; one object a line is needed (jq -c '.[]' FILE writes that)")
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


def _text(line: bytes, where: str) -> str:
    if b"\x00" in line:
        utf16 = line.count(b"\x00") * 3 > len(line) and line.strip(b"\x00")
        what = "not UTF-8 text: looks like UTF-16" if utf16 else "a NUL byte; the file was not written whole"
        raise ValueError(f"{where}: {what}")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text: byte {error.start + 1} of the line is {line[error.start]:#04x}"
        ) from None


def _parsed(text: str, where: str) -> object:
    try:
        row = json.loads(text, object_pairs_hook=_without_repeats, parse_float=_number)
        bad = fault(row, FREE)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {_malformed(text, error)}") from None
    except RecursionError:
        raise ValueError(f"{where}: malformed JSON: lists or objects nested too deeply") from None
    except _Repeated as error:
        raise ValueError(f"{where}: field {error.args[0]!r} is given twice") from None
    except ValueError:
        digits = sys.get_int_max_str_digits()
        raise ValueError(f"{where}: an integer of more than {digits} digits; write it as text") from None
    if bad:
        name, what = bad
        raise ValueError(f"{where}: field {name!r} {what}" if name else f"{where}: the row {what}")
    return row


class _Written(float):
    """A number with more digits than a float holds; str() returns it as it was written."""

    _text: str

    def __new__(cls, text: str) -> "_Written":
        number = super().__new__(cls, text)
        number._text = text
        return number

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple:
        return _Written, (self._text,)


def _number(text: str) -> float:
    """Returns the number of a text of JSON, as `_Written` where a float would change it.

    An infinite one is refused later.
    """
    value = float(text)
    try:
        exact = not math.isfinite(value) or decimal.Decimal(text) == decimal.Decimal(repr(value))
    except decimal.InvalidOperation:  # an exponent beyond all bounds
        exact = False
    return value if exact else _Written(text)


class _Repeated(Exception):
    """A field that an object has twice."""


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Repeated(next(name for name in names if names.count(name) > 1))
    return row


def _malformed(text: str, error: json.JSONDecodeError) -> str:
    """Returns what is wrong with a line, judged by how it begins where that is clearer than the parser's message."""
    bare = text.strip()
    if bare.startswith("["):
        return f"a JSON array; one object a line is needed (jq -c '.[]' FILE writes that); malformed JSON: {error}"
    if bare == "{":
        return "an object over several lines; one object a line is needed (jq -c . FILE writes that)"
    if "\r" in bare:
        return "lines end in CR alone; convert the file with tr '\\r' '\\n'"
    return f"malformed JSON: {error}"
