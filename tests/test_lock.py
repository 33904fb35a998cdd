"""Claims about the lock of a folder: one run at a time, the first one named, nothing kept out by a dead process."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from r1jax import config as configs
from r1jax.core import lock
from r1jax.recipe import common

HOLDER = """
import pathlib, sys, time
from r1jax.core import lock
lock.hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def path(tmp_path):
    yield tmp_path / "runs" / ".r1_zero.lock"
    lock.release(tmp_path / "runs" / ".r1_zero.lock")


@pytest.fixture
def holder(path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def write_record(path, host, beats=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"pid": 7, "host": host, "since": "2025-01-20 10:00:00", "beats": beats}))


def test_a_second_run_is_refused_with_process_and_host_until_the_first_is_killed(path, holder, tmp_path):
    folder = common.StageFolder(configs.load("r1_zero:tiny"), path.parent)
    said = rf"runs is in use by process {holder.pid} on {socket.gethostname()} since .*; wait for its end, stop it, or"
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            folder.start({})
    assert not folder.path.exists()  # nothing was written
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert path.exists()
    folder.start({})
    folder.start({})  # the same process may go on
    assert json.loads(path.read_text())["pid"] == os.getpid()
    folder.finish({}, {}, "")
    assert not path.exists()


def test_a_folder_that_is_in_use_can_be_read(path, holder):
    folder = common.StageFolder(configs.load("r1_zero:tiny"), path.parent)
    folder.check()
    assert folder.finished({}) is None and folder.state({}) == "missing"


@pytest.mark.parametrize("reaches", [True, False])
def test_the_record_of_another_host_counts_as_long_as_it_changes(path, monkeypatch, reaches):
    monkeypatch.setattr(lock, "SILENT_S", 0.2)
    monkeypatch.setattr(lock, "_flock", lambda descriptor: reaches)
    write_record(path, "elsewhere")
    read, beats = lock._read, iter(range(1, 100))
    monkeypatch.setattr(lock, "_read", lambda path: read(path) | {"beats": next(beats)})
    with pytest.raises(ValueError, match="is in use by process 7 on elsewhere since 2025-01-20 10:00:00"):
        lock.hold(path)
    monkeypatch.setattr(lock, "_read", read)
    lock.hold(path)
    assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_a_living_process_counts_on_in_its_record(path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_S", 0.01)
    lock.hold(path)
    beats = {json.loads(path.read_text())["beats"] for _ in range(2000)}
    assert len(beats) > 1


def test_where_the_file_system_has_no_locks_the_record_of_this_host_is_watched_too(path, monkeypatch):
    def unsupported(descriptor, how):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    monkeypatch.setattr(lock, "SILENT_S", 0.2)
    write_record(path, socket.gethostname())
    watched = []
    monkeypatch.setattr(lock._Lock, "_watch", lambda self, record: watched.append(record["pid"]))
    lock.hold(path)
    assert watched == [7]
