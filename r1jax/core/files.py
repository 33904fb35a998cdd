"""Files that appear whole or not at all, and JSON Lines whose last line may be cut off. Imports no JAX."""

import contextlib
import errno
import glob
import json
import os
import shutil
from collections.abc import Generator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Generator[Path]:
    """Yields a temporary path beside `path`; the file or folder that the block makes there becomes `path` at its end.

    A reader sees what was there before or all of the new content, also after a loss of power. When the block raises,
    the temporary file is removed and `path` stays as it was. Missing parent folders are made. A process that is killed
    leaves the temporary file behind; `remove_unfinished` clears it away.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for member in (*temporary.rglob("*"), temporary):
            _sync(member)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        _remove(temporary)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a whole file, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a whole file of UTF-8 text, as `replacing` does."""
    write_bytes(path, text.encode("utf-8"))


def move(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Gives a file another name, in place of what had it; takes no room on the disk."""
    os.replace(source, target)


def remove_unfinished(folder: str | os.PathLike, name: str = "") -> None:
    """Removes what killed processes left in `folder` while writing the file or folder `name`, or any where it is empty.

    No other process may be writing there.
    """
    for leftover in Path(folder).glob(f".{glob.escape(name) or '*'}.[0-9]*.tmp"):
        _remove(leftover)


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """Returns the objects of a JSON Lines file that a run appends to; [] when there is no such file.

    A last line without its line end was cut off by a crash and is left out. Raises ValueError, naming file and line,
    for any other line that is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not JSON, needs one object per line")
        rows.append(row)
    return rows


def _sync(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
