"""Files at URLs (gs://, s3://, every protocol of fsspec): read, written, listed and removed with retries. No JAX."""

import errno
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from r1jax.core import errors

DEADLINE_S = 180.0  # an operation that fails is tried again for so long
FIRST_WAIT_S, SHOWN_WAIT_S, LONGEST_WAIT_S = 0.5, 4.0, 20.0  # between two tries; the second prints a warning
THREADS = 8  # files moved at once
PROGRESS_S = 20.0  # a transfer that takes longer prints a line at this interval
_URL = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*://.")
# NotImplementedError is fsspec's word for what a file system cannot do at all, as writing to a read-only one.
_PERMANENT = (
    *(PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, ImportError, NotImplementedError),
    *(ValueError, TypeError, AttributeError, LookupError),
)
_TRY_AGAIN = (408, 429)  # codes of HTTP below 500 that say so

Result = TypeVar("Result")


class RemoteError(ValueError):
    """What went wrong at a URL, in one line with the remedy."""


class ChangedError(RemoteError):
    """A file is not there, or not as it was listed before."""


class MissingError(RemoteError):
    """There is nothing at a URL."""


class RefusedError(RemoteError):
    """An operation that no second try can mend."""


class InUseError(RemoteError):
    """Another run writes to a folder at a URL."""


def print_line(line: str) -> None:
    """Prints a line on stderr: of a process that is the only one of its run, as all are that work at a URL."""
    print(line, file=sys.stderr, flush=True)


def is_url(text: object) -> bool:
    """Returns whether a text is a URL; `file://` names a path of this machine."""
    return bool(_URL.match(str(text)))


def plain(text: str) -> str:
    """Returns a path without `file://`; a URL as it is."""
    return text.removeprefix("file://")


def join(url: str, name: str) -> str:
    """Returns the URL of a name in the folder at a URL."""
    return f"{url.rstrip('/')}/{name}" if name else url


class RemoteFolder:
    """The files below a URL, by their names relative to it; the URL itself may be a file, whose name is "".

    An operation that fails is tried again, with growing waits, for DEADLINE_S. Then it raises RemoteError, as it does
    at once for what no second try can mend. FileNotFoundError is raised for a file that is not there.
    """

    def __init__(self, url: str, may_write: Callable[[], None] = lambda: None):
        """`may_write` is called before every try to change something, and raises RemoteError to forbid it."""
        import fsspec.core

        self.url, self._may_write = url.rstrip("/"), may_write
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise RemoteError(f"{url}: needs a package that is not installed: {errors.one_line(error)}") from None
        except Exception as error:
            reason = errors.one_line(error, 300)
            raise RemoteError(f"{url} cannot be opened: {reason}; give a path, or a URL of fsspec") from None
        self._folders: set[str] = set()

    def kind(self) -> str:
        """Returns what is at the URL: file, folder, or "" for nothing."""
        try:
            return "file" if self.info("")["type"] == "file" else "folder"
        except FileNotFoundError:
            return ""

    def info(self, name: str) -> dict[str, Any]:
        """Returns what the file system knows of a file or folder."""
        return self._try("look at", name, lambda: self._fresh().info(self._path(name)))

    def listing(self, below: str = "") -> dict[str, dict[str, Any]]:
        """Returns {name: what the file system knows of it (size and more)} of the files in a folder and all below it."""
        root = self._path(below)
        try:
            listed = self._try("list", below, lambda: _files_below(self._fresh(), root))
        except FileNotFoundError:
            return {}
        start = self._root.rstrip("/") + "/"
        inside = {path: info for path, info in listed.items() if path.startswith(start) and info["type"] == "file"}
        return {path.removeprefix(start): info for path, info in inside.items()}

    def read(self, name: str) -> bytes:
        return self._try("read", name, lambda: self._fs.cat_file(self._path(name)))

    def write(self, name: str, content: bytes) -> None:
        self._make_parent(name)
        self._change("write", name, lambda: self._fs.pipe_file(self._path(name), content))

    def upload(self, source: Path, name: str, size: int) -> None:
        """Writes the first `size` bytes of a local file. Raises RemoteError if it is shorter."""
        self._make_parent(name)
        self._change("write", name, lambda: self._put(source, self._path(name), size))

    def _put(self, source: Path, target: str, size: int) -> None:
        if source.stat().st_size == size:
            self._fs.put_file(str(source), target)
            if source.stat().st_size == size:
                return  # else it grew, and who knows up to where it was copied
        if source.stat().st_size < size:
            raise RemoteError(f"{source} became shorter while it was copied to {self.url}; give the same command again")
        with source.open("rb") as file, self._fs.open(target, "wb") as remote:
            while size and (block := file.read(min(size, 1 << 22))):
                remote.write(block)
                size -= len(block)

    def download(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._try("read", name, lambda: self._fs.get_file(self._path(name), str(target)))

    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is none to remove."""
        try:
            self._change("remove", name, lambda: self._fs.rm_file(self._path(name)))
        except FileNotFoundError:
            return

    def _path(self, name: str) -> str:
        return join(self._root, name)

    def _fresh(self):
        """Returns the file system, which has forgotten what it listed before."""
        self._fs.invalidate_cache()
        return self._fs

    def _make_parent(self, name: str) -> None:
        parent = self._path(name).rpartition("/")[0]
        if parent and parent not in self._folders:
            self._change("make the folder of", name, lambda: self._fs.makedirs(parent, exist_ok=True))
            self._folders.add(parent)

    def _change(self, what: str, name: str, operation: Callable[[], object]) -> None:
        def change() -> None:
            self._may_write()
            operation()

        self._try(what, name, change)

    def _try(self, what: str, name: str, operation: Callable[[], Result]) -> Result:
        ends, wait = time.monotonic() + DEADLINE_S, FIRST_WAIT_S
        while True:
            try:
                return operation()
            except (FileNotFoundError, RemoteError):
                raise
            except Exception as error:
                failure = f"{join(self.url, name)}: cannot {what} it ({errors.named(error, 300)})"
                permanent = _is_permanent(error)
                if permanent or time.monotonic() + wait > ends:
                    remedy = "check that the URL is right and that this machine may read and write there"
                    raise (RefusedError if permanent else RemoteError)(f"{failure}; {remedy}") from error
                if wait == SHOWN_WAIT_S:
                    print_line(f"warning: {failure}; trying for {DEADLINE_S:.0f} s")
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)


def _files_below(file_system: Any, root: str) -> dict[str, dict[str, Any]]:
    """Returns {path: what the file system knows of it} of the files at and below a path.

    The `find` of fsspec itself, which many file systems have, leaves out what it cannot list; here that raises.
    """
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    kind = type(file_system)
    default = getattr(kind, "_find", AsyncFileSystem._find) is AsyncFileSystem._find
    if not (default and kind.find is AbstractFileSystem.find):
        return file_system.find(root, detail=True)
    files: dict[str, dict[str, Any]] = {}
    waiting, seen = [root], set()
    while waiting:
        folder = waiting.pop()
        seen.add(folder)
        try:
            listed = file_system.ls(folder, detail=True)
        except OSError as error:
            if error.errno == errno.ENOENT or isinstance(error, FileNotFoundError | NotADirectoryError):
                continue  # also a folder that was removed meanwhile
            raise
        for info in listed:
            path = info["name"].rstrip("/")
            if info["type"] != "directory":
                files[path] = info
            elif path not in seen:
                waiting.append(path)
    return files


def _is_permanent(error: Exception) -> bool:
    """Returns whether a second try cannot succeed: a wrong name, no permission, an answer of HTTP that says no."""
    code = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(code, int) and 400 <= code < 500:
        return code not in _TRY_AGAIN
    return isinstance(error, _PERMANENT)


def move(what: str, files: Mapping[str, int], one: Callable[[str], object]) -> None:
    """Calls `one` with each name of {name: bytes}, several at once, and prints how far it is where that takes long.

    `what` begins the line. Raises what a call raises, after the others in hand.
    """
    progress = _Progress(what, sum(files.values()))

    def moved(name: str) -> None:
        one(name)
        progress.add(files[name])

    in_threads(moved, files)


def in_threads(function: Callable[[str], object], names: Iterable[str]) -> None:
    """Calls a function with each name, several at once. Raises what a call raises, and begins none after that."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(function, name) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Progress:
    """Bytes moved of a whole, as a line on stderr every PROGRESS_S."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._shown, self._lock = time.monotonic(), threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            if time.monotonic() - self._shown < PROGRESS_S:
                return
            self._shown = time.monotonic()
        line = f"{self._what}: {self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB"
        print_line(line)
