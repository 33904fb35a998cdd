"""One run at a time in a folder at a URL: an object there names the run, which counts in it as long as it lives. No JAX.

Object stores have no locks. Two runs that start within the same second can both go on, until the next push of one of
them sees the other's manifest and ends (`mirror`); a folder is never made of the files of two runs.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from r1jax.core import errors, mirror, urls

NAME = f"{mirror.INSIDE}/lock.json"
BEAT_S = 15.0  # interval at which a run counts in its record
SILENT_S = 75.0  # a run that has not counted for so long is dead
READINGS, PAUSE_S = 20, 0.05  # of a record that is cut off, as one is that is being written
_CUT_OFF = {"run": "", "pid": "?", "host": "?", "since": "?"}  # a record that stays so: its process was killed
_held: set[str] = set()  # runs of this process that have a lock


class UrlLock:
    """The lock of a folder at a URL, from its making until `release`.

    Raises InUseError, naming process and host, if another run has it. The record of a dead process of this host is
    replaced at once, that of another host or container is watched for SILENT_S first.
    """

    def __init__(self, url: str):
        self._url, self._folder = url, urls.RemoteFolder(url)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "processes": _processes()}
        self._record = {**who, "since": since, "run": secrets.token_hex(8)}
        self._beats, self._ending, self._beating = 0, threading.Event(), threading.Lock()
        self._beaten = 0.0  # time.monotonic() before the newest count: until SILENT_S after it nobody takes the lock
        record = self._read()
        if record and _may_live(record) and self._changes(record):
            raise urls.InUseError(self._refusal(record))
        self._beat()
        self.check()
        _held.add(self._record["run"])
        self._thread = threading.Thread(target=self._run, name="url-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises InUseError if another run has the lock by now, or had it meanwhile."""
        record = self._read()
        for _ in range(READINGS if not record else 0):
            time.sleep(PAUSE_S)  # a file system may remove what it replaces
            if record := self._read():
                break
        if not record:
            raise urls.InUseError(
                f"{self._url}: {NAME} is gone, so another run may have written there; give the same command again"
            )
        if record.get("run") != self._record["run"]:
            raise urls.InUseError(self._refusal(record))

    def hold(self) -> None:
        """Raises InUseError if another run may have the lock by now; looks only where this one has not counted of late.

        To be called before everything that changes the folder: a run that was halted may have been taken for dead.
        """
        if time.monotonic() - self._beaten > SILENT_S / 3:
            self._count()

    def release(self) -> None:
        """Gives the lock up and removes its object, unless another run has it by now; prints a warning if that fails."""
        self._ending.set()
        self._thread.join(BEAT_S)
        _held.discard(self._record["run"])
        try:
            if self._read().get("run") == self._record["run"]:
                self._folder.remove(NAME)
        except urls.RemoteError as error:
            urls.print_line(f"warning: {errors.one_line(error)}; the next run waits {SILENT_S:.0f} s for it")

    def _changes(self, record: dict[str, Any]) -> bool:
        """Returns whether a record changes within SILENT_S."""
        who = f"process {record['pid']} on {record['host']}"
        urls.print_line(f"{self._url}: {who} was at work there; waiting {SILENT_S:.0f} s for a sign of it")
        ends = time.monotonic() + SILENT_S
        while time.monotonic() < ends:
            time.sleep(min(1.0, SILENT_S / 5))
            if (now := self._read()) != record:
                return bool(now)  # it was released otherwise
        return False

    def _run(self) -> None:
        while not self._ending.wait(BEAT_S):
            with contextlib.suppress(Exception):  # the next push of the run meets the same
                self._count()

    def _count(self) -> None:
        with self._beating:
            self.check()
            self._beat()

    def _beat(self) -> None:
        self._beats, now = self._beats + 1, time.monotonic()
        self._folder.write(NAME, json.dumps(self._record | {"beats": self._beats}).encode())
        self._beaten = now

    def _read(self) -> dict[str, Any]:
        """Returns the record of the lock, {} for none, and _CUT_OFF for one that stays cut off."""
        for _ in range(READINGS):
            try:
                content = self._folder.read(NAME)
            except FileNotFoundError:
                return {}
            with contextlib.suppress(ValueError):
                return json.loads(content)
            time.sleep(PAUSE_S)
        return _CUT_OFF

    def _refusal(self, record: dict[str, Any]) -> str:
        return (
            f"{self._url} is in use by process {record['pid']} on {record['host']} since {record['since']}; wait for its "
            "end, stop it, or choose another --workdir"
        )


def _processes() -> str:
    """Returns where the numbers of processes count: the machine since its start, and the container; "" if unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _may_live(record: dict[str, Any]) -> bool:
    """Returns whether the run of a record may be alive: where numbers of processes are those of this one, its process is
    looked for; of others who knows."""
    if (record["host"], record.get("processes")) != (socket.gethostname(), _processes()):
        return True
    if record["pid"] == os.getpid():  # also of an earlier process, where numbers repeat
        return record["run"] in _held
    return is_alive(record["pid"])


def is_alive(pid: int) -> bool:
    """Returns whether this machine, or container, has a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
