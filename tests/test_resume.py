"""The claim that a run killed anywhere, again and again, ends in the bits of a run that was never stopped."""

import collections
import json
import os
import pathlib
import random
import runpy
import signal
import subprocess
import sys
import time

import pytest

from r1jax.core.metrics import read

ROOT = pathlib.Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tests" / "resume_driver.py"
UPDATES = runpy.run_path(str(DRIVER))["UPDATES"]
PHASES = ("rollout", "grading", "update", "checkpoint")
LONGEST_DELAY_S = {"rollout": 0.08, "grading": 0.08, "update": 0.03, "checkpoint": 0.25}
DEADLINE_S = 240.0


def start(folder, slow):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"SLOW": "1"} if slow else {})}
    command = [sys.executable, str(DRIVER), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, error[-2000:]
    return json.loads(out.splitlines()[-1])


def phase_of(folder):
    try:
        name, update = (folder / "phase").read_text().split()
        return name, int(update)
    except (OSError, ValueError):
        return "", 0


def kill_in(process, folder, wanted, least_update, rng):
    """SIGKILLs the process in a phase, at a random moment; returns the phase it was in, or None when it had ended."""
    limit = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < limit:
        name, update = phase_of(folder)
        if name == wanted and update >= least_update:
            time.sleep(rng.uniform(0, LONGEST_DELAY_S[wanted]))
            process.send_signal(signal.SIGKILL)
            process.wait()
            return phase_of(folder)[0]
        time.sleep(0.001)
    process.kill()
    return None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return finish(start(folder, slow=False)), folder


def test_run_killed_in_every_phase_ends_bit_equal(undisturbed, tmp_path, results):
    expected, reference_folder = undisturbed
    rng, landed = random.Random(20250120), collections.Counter()
    kills = 12
    for number in range(kills):
        least = number * UPDATES // (kills + 4)
        landed[kill_in(start(tmp_path, slow=True), tmp_path, PHASES[number % 4], least, rng)] += 1
    found = finish(start(tmp_path, slow=False))
    print(f"kills by phase: {dict(landed)}")
    results("resume", {"kills_by_phase": {str(phase): count for phase, count in landed.items()}, **found})
    assert sum(landed[phase] for phase in PHASES) >= 10
    assert all(landed[phase] >= 2 for phase in PHASES)
    assert {name: found[name] for name in found if name != "programs"} == {
        name: expected[name] for name in expected if name != "programs"
    }
    assert (tmp_path / "metrics.jsonl").read_bytes() == (reference_folder / "metrics.jsonl").read_bytes()


def test_undisturbed_run_moves_refreshes_its_reference_and_counts_its_draws(undisturbed):
    found, folder = undisturbed
    rows = read(folder)
    assert [row["update"] for row in rows] == list(range(1, UPDATES + 1))
    assert sum(row["grad_norm"] > 0 for row in rows) >= 8
    assert found["params"] != found["reference"]
    assert found["cursor"]["draw"] == UPDATES * 4
    assert found["cursor"]["reference_update"] == 21  # the first rollout that starts at or after update 20
    assert set(found["programs"].values()) <= {1}
