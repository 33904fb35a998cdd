"""Rows of data from files: JSON Lines, Parquet and Hugging Face data sets, under the field names that r1jax uses.

Which columns of public sets are read as which field is in `dialects`; docs/data.md lists them.
"""

import contextlib
import datetime
import decimal
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from r1jax.core import errors
from r1jax.data import dialects, jsonl

INSTALL = "pip install 'r1jax[data]'"
BATCH_ROWS = 1024  # rows of a Parquet file that are turned into Python at a time
_PARQUET = b"PAR1"
_LINES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+)(?=:))?(?::(.+))?")  # name, config, split
_SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|dev|eval)(?=$|[-_./])")
_SUFFIXES = (*_LINES, ".parquet", ".gz", ".csv", ".txt", ".arrow")


@dataclass(frozen=True)
class FileRow:
    """One row of data: its fields under the names of docs/data.md, and its place as errors name it."""

    fields: dict
    place: str  # "FILE, line 3" of JSON Lines, "FILE, row 3" of other files


@dataclass(frozen=True)
class Table:
    """The rows of a file, and one-line remarks on how they were read."""

    rows: list[FileRow]
    notes: list[str]


def read(path: str, columns: Sequence[str] = (), limit: int = 0) -> Table:
    """Returns the rows of data at a path, of which `limit` are read if it is not 0.

    A path is a file of JSON Lines (also .gz) or Parquet, a folder of such files or of a saved data set, each with
    `:split` behind it where there are several, or ORG/NAME[:config][:split] of the Hub. `columns` are THEIRS=OURS; they
    come before the names that are recognised. Every row has an `id` (text, `row-N` where none is given) and a `prompt`
    (text or a list of messages). Raises ValueError, in one line with file and line or row, for data that cannot be
    read.
    """
    table = FileRows(path, columns, limit)
    rows = list(table.survey())
    for number, row in enumerate(rows, 1):
        table.name(row, number)
    return Table(rows, table.notes)


class FileRows:
    """The rows that `read` returns, read from the path at each iteration and one at a time, so that none is held.

    `survey` comes first: it counts the rows, and what they are called and how they were read depends on all of them.
    """

    def __init__(self, path: str, columns: Sequence[str] = (), limit: int = 0):
        self._path, self._limit = path, limit
        self._mapping = dialects.mapping(columns)
        self._id_field = ""  # whose values are the ids, "" for none
        self.count = 0
        self.notes: list[str] = []

    def survey(self) -> Iterator[FileRow]:
        """Yields the rows, an id only where it is in the file; `count` and `notes` are set at the end.

        Raises ValueError, as `read` does, for data that cannot be read.
        """
        mapped, without = dialects.MappedColumns(self._mapping), 0
        counts: Counter = Counter()
        values: dict[str, set[str]] = {name: set() for name in dialects.ID_FIELDS}  # that may be ids, all different
        raw, notes = _raw(self._path, self._limit)
        for number, (place, raw_row) in enumerate(raw, 1):
            mapped.see(raw_row)
            row, remarks = self._row(place, raw_row)
            counts.update(remarks)
            without += "id" not in row.fields
            for name in list(values):
                if without < number or not _is_new_id(row.fields.get(name), values[name]):
                    del values[name]
            self.count = number
            yield row
        if not self.count:
            raise ValueError(f"{self._path}: no rows, at least one is needed")
        mapped.check(self._path)
        notes += [f"{remark} ({count} of {self.count} rows)" for remark, count in counts.items()]
        self._id_field = next(iter(values), "")
        if self._id_field:
            notes.append(f"{self._id_field} read as id")
        elif without:
            notes.append(
                f"{without} of {self.count} rows have no id; they are called row-1, row-2, ... by their number"
            )
        self.notes = notes

    def __iter__(self) -> Iterator[FileRow]:
        raw, _ = _raw(self._path, self._limit)
        for number, (place, raw_row) in enumerate(raw, 1):
            row, _ = self._row(place, raw_row)
            self.name(row, number)
            yield row

    def name(self, row: FileRow, number: int) -> None:
        """Gives a row without an id one, in place."""
        if "id" not in row.fields:
            row.fields["id"] = str(row.fields[self._id_field]) if self._id_field else f"row-{number}"

    def _row(self, place: str, raw_row: dict) -> tuple[FileRow, list[str]]:
        """Returns (the row of a file under our names, remarks)."""
        fields, remarks = dialects.canonical(raw_row, self._mapping, place)
        if "meta" in fields:
            fields["meta"] = _without_nan(fields["meta"])
        return FileRow(fields, place), remarks


def digest(path: str) -> str:
    """Returns the sha256 of the data at a path.

    It covers a file's content, the names and contents of a folder's files, or the rows of a Hub set. Raises
    ValueError when there is nothing there.
    """
    local, split = _local(path)
    if local is None:
        sha = hashlib.sha256()
        for _, row in _saved_rows(_from_hub(path), path, 0):
            sha.update(json.dumps(row, sort_keys=True).encode() + b"\n")
        return sha.hexdigest()
    if local.is_file():
        return _file_digest(local)
    files, _ = _files_of(local, split)
    listed = sorted((file.relative_to(local).as_posix(), _file_digest(file)) for file in files)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _is_new_id(value: object, seen: set[str]) -> bool:
    """Returns whether a value can be an id and is not among those seen, to which it is added."""
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "" or str(value) in seen:
        return False
    seen.add(str(value))
    return True


def _raw(path: str, limit: int) -> tuple[Iterator[tuple[str, dict]], list[str]]:
    """Returns (iterator of (place, row as the file has it), remarks)."""
    local, split = _local(path)
    if local is None:
        return _saved_rows(_from_hub(path), path, limit), []
    if local.is_file():
        return _file_rows(local, limit), []
    if _is_saved(local):
        dataset, notes = _saved(local, split)
        return _saved_rows(dataset, path, limit), notes
    files, notes = _files_of(local, split)
    rows = (row for file in files for row in _file_rows(file, limit))
    return islice(rows, limit or None), notes


def _local(path: str) -> tuple[Path | None, str]:
    """Returns (file or folder, split), or (None, "") for a name of the Hub. ValueError when it can be neither."""
    whole = Path(path)
    if path and whole.exists():
        return whole, ""
    before, colon, split = path.rpartition(":")
    if colon and Path(before).is_dir():
        return Path(before), split
    name = path.split(":")[0]
    if not _HUB_NAME.fullmatch(path) or name.endswith(_SUFFIXES) or Path(name).parent.is_dir():
        raise ValueError(f"no such file: {path}")
    return None, ""


def _file_rows(path: Path, limit: int) -> Iterator[tuple[str, dict]]:
    if path.suffix in (".csv", ".tsv"):
        raise ValueError(f"{path}: a table of text is not read; convert it to JSON Lines or Parquet")
    if _starts_as_parquet(path):
        return _parquet_rows(path, limit)
    if path.suffix == ".parquet":
        raise ValueError(f"{path}: not a Parquet file; it does not begin with PAR1")
    return ((f"{path}, line {line}", row) for line, row in jsonl.numbered(path, limit=limit))


def _starts_as_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.peek(4)[:4] == _PARQUET
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _parquet_rows(path: Path, limit: int) -> Iterator[tuple[str, dict]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: a Parquet file; reading it needs pyarrow: {INSTALL}") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=min(limit, BATCH_ROWS) or BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", _finite(plain(row), f"{path}, row {number}")
                    if number == limit:
                        return
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read after row {number}: {errors.one_line(error, 300)}") from None


def _files_of(folder: Path, split: str) -> tuple[list[Path], list[str]]:
    """Returns (files with the rows of a folder, those of one split where file names mark several; remarks)."""
    if _is_saved(folder):
        return _saved_files(folder, split), []
    members = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    parquet = [path for path in members if path.suffix == ".parquet"]
    lines = [path for path in members if path.name.endswith(_LINES[:2])]
    if parquet and lines:
        raise ValueError(f"{folder}: holds both Parquet and JSON Lines files; give one of them")
    files = parquet or lines
    if not files:
        raise ValueError(f"{folder}: a folder without .parquet and .jsonl files, and no saved data set; give a file")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        match = _SPLIT.search(path.relative_to(folder).as_posix().split(".")[0])
        by_split.setdefault(match[1] if match else "", []).append(path)
    if not split and len(by_split) == 1:
        return files, []
    chosen, notes = _choose_split(split, list(by_split), folder)
    return by_split[chosen], notes


def _choose_split(split: str, known: list[str], folder: Path) -> tuple[str, list[str]]:
    """Returns (the split asked for, else train or the only one; remarks)."""
    chosen = split or ("train" if "train" in known else known[0] if len(known) == 1 else "")
    if chosen not in known:
        asked = f"no split {split!r}" if split else "several splits and none is named train"
        raise ValueError(f"{folder}: {asked}; it has {', '.join(map(repr, known))}; give one as {folder}:SPLIT")
    others = ", ".join(name or "files of no split" for name in known if name != chosen)
    return chosen, [] if split or not others else [
        f"split {chosen} is read, not {others}; {folder}:SPLIT names another"
    ]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _saved_split(folder: Path, split: str) -> tuple[Path, list[str]]:
    """Returns (folder of the data set of one split, remarks)."""
    if not (folder / "dataset_dict.json").is_file():
        if split:
            raise ValueError(f"{folder}: one data set without splits; leave out :{split}")
        return folder, []
    with _one_line_errors(folder):
        known = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    chosen, notes = _choose_split(split, known, folder)
    return folder / chosen, notes


def _saved_files(folder: Path, split: str) -> list[Path]:
    one, _ = _saved_split(folder, split)
    with _one_line_errors(folder):
        listed = json.loads((one / "state.json").read_text(encoding="utf-8"))["_data_files"]
        return [one / entry["filename"] for entry in listed]


def _saved(folder: Path, split: str):
    """Returns (data set of the `datasets` package, remarks)."""
    datasets = _datasets(f"{folder}: a saved data set")
    one, notes = _saved_split(folder, split)
    with _one_line_errors(one):
        return datasets.load_from_disk(str(one)), notes


def _from_hub(path: str):
    datasets = _datasets(f"no such file: {path}; as a name of the Hugging Face Hub it")
    match = _HUB_NAME.fullmatch(path)
    assert match is not None  # only such names come here
    name, config, split = match.groups()
    try:
        return datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # of the network, the Hub or the set: many types, all the user's to read
        raise ValueError(f"no such file: {path}; and as a data set of the Hub: {errors.one_line(error, 300)}") from None


def _datasets(what: str):
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{what} needs the package datasets: {INSTALL}") from None
    return datasets


def _saved_rows(dataset, path: str, limit: int) -> Iterator[tuple[str, dict]]:
    number, rows = 0, iter(islice(dataset, limit or None))
    while True:
        with _one_line_errors(f"{path}, after row {number}"):
            row = next(rows, None)
        if row is None:
            return
        number += 1
        yield f"{path}, row {number}", _finite(plain(row), f"{path}, row {number}")


def _finite(row: dict, place: str) -> dict:
    """Returns a row of a table without the columns whose numbers are not finite; ValueError for one that we read."""
    faults = {name: fault for name, value in row.items() if (fault := jsonl.fault({name: value}, jsonl.FREE))}
    for name, (field, what) in faults.items():
        if name in dialects.KNOWN:
            raise ValueError(f"{place}: field {field!r} {what}")
    return {name: value for name, value in row.items() if name not in faults}


@contextlib.contextmanager
def _one_line_errors(path: object) -> Generator[None]:
    try:
        yield
    except Exception as error:  # whatever the package meets in a damaged folder
        raise ValueError(f"{path}: cannot be read: {errors.one_line(error, 300)}") from None


def _without_nan(value: object) -> object:
    """Returns a value with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {name: _without_nan(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: object) -> Any:
    """Returns a value of a table as JSON would hold it.

    Nulls in objects are left out, dates and decimals become text, bytes UTF-8 text. Bytes that are no text become None.
    """
    if isinstance(value, Mapping):
        members = {str(name): plain(member) for name, member in value.items()}
        return {name: member for name, member in members.items() if member is not None}
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
        return None
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
