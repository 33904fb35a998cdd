"""Claims about SIGTERM: what must be whole ends first, then the process, within the grace period and with its own code."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from r1jax import launch
from r1jax.core import preempt

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROGRAM = """
import ctypes, sys, time
from r1jax.core import preempt
preempt.listen(float(sys.argv[1]))
try:
{body}
except preempt.Preempted:
    print("raised", flush=True)
    sys.exit(preempt.PREEMPTED_EXIT)
"""
AT_ONCE = """
    print("ready", flush=True)
    try:
        time.sleep(100)
    except Exception:
        print("caught")
"""
WHOLE = """
    with preempt.deferred():
        with preempt.deferred():
            print("ready", flush=True)
            for _ in range(20):
                time.sleep(0.05)
        print("whole", flush=True)
    print("never")
"""
SAVING = """
    import os, tempfile, threading
    import numpy as np
    from r1jax.core.checkpoint import CheckpointStore, numbers
    renaming = threading.Event()
    def slower(function):
        def slowly(*arguments, **keywords):
            renaming.set()
            time.sleep(0.5)
            return function(*arguments, **keywords)
        return slowly
    folder = tempfile.mkdtemp()
    store = CheckpointStore(folder)
    os.rename, os.replace = slower(os.rename), slower(os.replace)
    store.save(1, {"params": {"a": np.ones(4)}}, {})
    renaming.wait()
    print("ready", flush=True)
    try:
        store.close()
    finally:
        print(numbers(folder), flush=True)
"""
STUCK = """
    print("ready", flush=True)
    ctypes.CDLL(None).system(b"exec sleep 20 >/dev/null 2>&1")
"""


@pytest.mark.parametrize(
    ("body", "grace_s", "prints", "least_s", "most_s"),
    [
        (AT_ONCE, 60, "raised\n", 0, 20),
        (WHOLE, 60, "whole\nraised\n", 0.5, 20),
        (SAVING, 60, "[1]\nraised\n", 0.1, 20),
        (STUCK, 2, "", 1.7, 2.0),
    ],
)
def test_sigterm_ends_a_process_at_once_after_what_is_whole_or_when_the_grace_period_is_over(
    body, grace_s, prints, least_s, most_s
):
    command = [sys.executable, "-c", PROGRAM.format(body=body), str(grace_s)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdout=-1, stderr=-1)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # a second one changes nothing
    out, error = process.communicate(timeout=60)
    seconds = time.monotonic() - started
    assert (process.returncode, out) == (preempt.PREEMPTED_EXIT, prints)
    assert error.startswith(f"asked to end (SIGTERM): this run ends within {grace_s} s\n")
    assert ("the grace period is over" in error) == (body == STUCK)
    assert least_s <= seconds <= most_s + 2  # a busy machine


def test_an_error_after_a_notice_is_its_consequence(monkeypatch, capsys):
    monkeypatch.setattr(preempt._notice, "asked", True)
    monkeypatch.setattr(launch, "execute", lambda arguments: 1 / 0)
    assert launch.main(["--config=r1_zero"]) == preempt.PREEMPTED_EXIT
    assert capsys.readouterr().err.splitlines()[0] == "error: division by zero"


SWEEP = """
import sys
from r1jax import launch, sweep
sweep._command = lambda point, *more: [sys.executable, "-c", sys.argv[1], "60"]
sys.exit(launch.main(["--config=r1_zero", "--sweep=seed=1,2", "--workdir=" + sys.argv[2]]))
"""


def test_a_sweep_passes_the_notice_on_and_begins_no_further_point(tmp_path):
    command = [sys.executable, "-c", SWEEP, PROGRAM.format(body=WHOLE), str(tmp_path)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, stdout=-1, stderr=-1)
    log = tmp_path / "sweep" / "seed=1" / "log.txt"
    limit = time.monotonic() + 60
    while not (log.exists() and "ready" in log.read_text()):
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == preempt.PREEMPTED_EXIT, error
    assert "whole\nraised\n" in log.read_text() and "seed=2" not in out
    assert not (tmp_path / "sweep" / "table.json").exists()
