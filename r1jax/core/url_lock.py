"""One run at a time in a folder at a URL: an object there names the run, which counts in it as long as it lives. No JAX.

Object stores have no locks. Two runs that start within the same second can both go on, until the next push of one of
them sees the other's manifest and ends (`mirror`); a folder is never made of the files of two runs.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any

from r1jax.core import mirror, urls

NAME = f"{mirror.INSIDE}/lock.json"
BEAT_S = 15.0  # interval at which a run counts in its record
SILENT_S = 75.0  # a run that has not counted for so long is dead
_held: set[str] = set()  # runs of this process that have a lock


class UrlLock:
    """The lock of a folder at a URL, from its making until `release`.

    Raises RemoteError, naming process and host, if another run has it. The record of a dead process of this host is
    replaced at once, that of another host is watched for SILENT_S first.
    """

    def __init__(self, url: str):
        self._url, self._folder = url, urls.RemoteFolder(url)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._record = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "run": secrets.token_hex(8)}
        self._beats, self._ending = 0, threading.Event()
        record = self._read()
        if record and _may_live(record) and self._changes(record):
            raise urls.RemoteError(self._refusal(record))
        self._beat()
        self.check()
        _held.add(self._record["run"])
        self._thread = threading.Thread(target=self._run, name="url-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises RemoteError if another run has the lock by now."""
        record = self._read()
        if record and record.get("run") != self._record["run"]:
            raise urls.RemoteError(self._refusal(record))

    def release(self) -> None:
        """Gives the lock up and removes its object, unless another run has it by now."""
        self._ending.set()
        self._thread.join(BEAT_S)
        _held.discard(self._record["run"])
        if self._read().get("run") == self._record["run"]:
            self._folder.remove(NAME)

    def _changes(self, record: dict[str, Any]) -> bool:
        """Returns whether a record changes within SILENT_S."""
        who = f"process {record['pid']} on {record['host']}"
        print(f"{self._url}: {who} was at work there; waiting {SILENT_S:.0f} s for a sign of it", file=sys.stderr)
        ends = time.monotonic() + SILENT_S
        while time.monotonic() < ends:
            time.sleep(min(1.0, SILENT_S / 5))
            if (now := self._read()) != record:
                return bool(now)  # it was released otherwise
        return False

    def _run(self) -> None:
        while not self._ending.wait(BEAT_S):
            try:
                self.check()
                self._beat()
            except urls.RemoteError:  # the next push of the run meets the same
                continue

    def _beat(self) -> None:
        self._beats += 1
        self._folder.write(NAME, json.dumps(self._record | {"beats": self._beats}).encode())

    def _read(self) -> dict[str, Any]:
        """Returns the record of the lock, {} for none and for one that is cut off."""
        try:
            return json.loads(self._folder.read(NAME))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def _refusal(self, record: dict[str, Any]) -> str:
        return (
            f"{self._url} is in use by process {record['pid']} on {record['host']} since {record['since']}; wait for its "
            "end, stop it, or choose another --workdir"
        )


def _may_live(record: dict[str, Any]) -> bool:
    """Returns whether the run of a record may be alive: of this host its process is looked for, of others who knows."""
    if record["host"] != socket.gethostname():
        return True
    if record["pid"] == os.getpid():  # also in a container that was started again, where numbers repeat
        return record["run"] in _held
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
