"""One run at a time in a folder: a second one is refused with the process and host of the first. Imports no JAX.

The lock is the operating system's (flock), which ends with the process that has it, however that ends. It may not reach
over a network file system; there the file's record counts, in which a living process counts on every few seconds. What
reads a folder needs no lock.
"""

import atexit
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

BEAT_S = 5.0  # interval at which a process shows in the record that it lives
SILENT_S = 25.0  # a process of another host that has not shown it for so long is dead
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def hold(path: Path) -> None:
    """Takes the lock whose file is `path`, for this process until `release` or its end; again changes nothing.

    Raises ValueError, naming the process and its host, if another one has it. A record that a dead process of another
    host left is watched for SILENT_S first.
    """
    path = Path(path).absolute()
    if path not in _held:
        _held[path] = _Lock(path)


def release(path: Path) -> None:
    """Gives the lock up and removes its file; does nothing if this process does not have it."""
    lock = _held.pop(Path(path).absolute(), None)
    if lock is not None:
        lock.close()


class _Lock:
    """A lock file that this process has, with the thread that counts in its record."""

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = self._open()
        self._record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._beats, self._ending = 0, threading.Event()
        try:
            self._beat()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        self._thread.join()  # or it could write to whatever file has the descriptor's number next
        if _is_file(self._descriptor, self._path):
            self._path.unlink()
        os.close(self._descriptor)

    def _open(self) -> int:
        """Returns the descriptor of the locked file. Raises ValueError if another process has the lock."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                reaches = _flock(descriptor)
                record = _read(self._path)
                alive = record and not (reaches and record.get("host") == socket.gethostname()) and self._watch(record)
            except BlockingIOError:
                record, alive = _read(self._path), True
            if alive:
                os.close(descriptor)
                raise ValueError(_refusal(self._path, record))
            if _is_file(descriptor, self._path):
                return descriptor
            os.close(descriptor)  # removed by the process that had it, between the opening and the locking

    def _watch(self, record: dict) -> bool:
        """Returns whether the record changes within SILENT_S."""
        ends = time.monotonic() + SILENT_S
        while time.monotonic() < ends:
            time.sleep(min(1.0, SILENT_S / 5))
            if _read(self._path) != record:
                return True
        return False

    def _run(self) -> None:
        while not self._ending.wait(BEAT_S):
            try:
                self._beat()
            except OSError:  # a full disk, which the run itself will report
                continue

    def _beat(self) -> None:
        self._beats += 1
        text = json.dumps(self._record | {"beats": self._beats})
        os.pwrite(self._descriptor, text.encode().ljust(256), 0)
        os.fsync(self._descriptor)


_held: dict[Path, _Lock] = {}


@atexit.register
def release_all() -> None:
    """Gives up every lock of this process and removes their files."""
    for path in list(_held):
        release(path)


def _flock(descriptor: int) -> bool:
    """Locks the file and returns whether that means something here. Raises BlockingIOError if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, Any]:
    """Returns the record in a lock file, {} for one without."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _refusal(path: Path, record: dict[str, Any]) -> str:
    who = "another process"
    if record:
        who = f"process {record['pid']} on {record['host']} since {record['since']}"
    return f"{path.parent} is in use by {who} ({path.name}); wait for its end, stop it, or choose another --workdir"
