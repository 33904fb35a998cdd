"""The claim that a run killed anywhere, again and again, ends in the bits of a run that was never stopped."""

import collections
import hashlib
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

from r1jax.core import preempt
from r1jax.core.metrics import read

ROOT = pathlib.Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tests" / "resume_driver.py"
NAMES = ("UPDATES", "PER_ROLLOUT", "CHECKPOINT_EVERY")
UPDATES, PER_ROLLOUT, CHECKPOINT_EVERY = (runpy.run_path(str(DRIVER))[name] for name in NAMES)
OTHER = {  # none of it changes a bit on this machine
    "reward.workers": 1,
    "reward.deadline_s": 20.0,
    "sampler.slots": 8,
    "sampler.steps_per_dispatch": 5,
    "checkpointing.every_updates": 7,
    "checkpointing.keep": 1,
    "optimizer.offload": True,
    "grpo.offload_reference": True,
    "optimizer.max_skipped_updates": 3,
}
KINDS = ("rollout", "grading", "update", "rename")
LONGEST_DELAY_S = {"rollout": 0.08, "grading": 0.08, "update": 0.03, "rename": 0.3}
DEADLINE_S = 240.0


def start(folder, slow, fields=None, devices=1):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"SLOW": "1"} if slow else {})}
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, str(DRIVER), str(folder), json.dumps(fields or {})]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, error[-2000:]
    return json.loads(out.splitlines()[-1])


def places_of(folder):
    """Returns (where a run is, updates made); beside its phase the first has "rename" while a checkpoint is renamed."""
    try:
        name, update = (folder / "phase").read_text().split()
        return [name, *(["rename"] if (folder / "renaming").exists() else [])], int(update)
    except (OSError, ValueError):
        return [], 0


def newest_checkpoint(folder):
    return max((int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()), default=0)


def unfinished_checkpoints(folder):
    return [path.name for path in folder.glob("checkpoints/*") if not path.name.isdigit()]


def end_in(folder, wanted, least_update, rng, number=signal.SIGKILL, code=-signal.SIGKILL):
    """Sends a run a signal in one place, at a random moment, and returns where it was and what it left behind.

    That is {"wanted", "places", "update", "checkpoint" (the newest whole one), "torn" (half-written ones)}.
    """
    (folder / "phase").unlink(missing_ok=True)
    (folder / "renaming").unlink(missing_ok=True)
    process, chosen = start(folder, slow=True), 0.0
    limit = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < limit:
        places, update = places_of(folder)
        if wanted in places and update >= least_update:
            if not chosen:  # counted from the first moment there; the place may be left and entered again meanwhile
                chosen = time.monotonic() + rng.uniform(0, LONGEST_DELAY_S[wanted])
            if wanted != "rename":
                time.sleep(max(0.0, chosen - time.monotonic()))
            if time.monotonic() >= chosen:
                break
        time.sleep(0.001)
    process.send_signal(number)
    _, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, f"the run ended before it was in {wanted} at {least_update}: {error[-2000:]}"
    places, update = places_of(folder)
    torn = len(unfinished_checkpoints(folder))
    return {"wanted": wanted, "places": places, "update": update, "checkpoint": newest_checkpoint(folder), "torn": torn}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return finish(start(folder, slow=False)), folder


@pytest.mark.parametrize("count", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_run_killed_in_every_place_ends_bit_equal(undisturbed, tmp_path, results, count):
    expected, reference_folder = undisturbed
    rng = random.Random(20250120)
    kills = []
    for number in range(count):
        for _ in range(
            3
        ):  # a busy machine may leave the place before the signal arrives: that kill counts, as where it landed
            kills.append(end_in(tmp_path, KINDS[number % 4], number * UPDATES // (count + 4), rng))
            if KINDS[number % 4] in kills[-1]["places"]:
                break
    found = finish(start(tmp_path, slow=False))
    landed = collections.Counter(place for kill in kills for place in kill["places"])
    print(f"kills by place: {dict(landed)}; {kills}")
    phases = collections.Counter(kill["places"][0] for kill in kills if kill["places"] and kill["wanted"] != "rename")
    assert all(phases[kind] >= count // 4 for kind in KINDS[:3])
    assert sum(kill["wanted"] == "rename" and "rename" in kill["places"] for kill in kills) >= count // 4
    assert any(kill["checkpoint"] % PER_ROLLOUT for kill in kills)  # the resumed run stood inside a rollout
    assert any(kill["torn"] for kill in kills)
    assert unfinished_checkpoints(tmp_path) == []
    del found["programs"]
    assert found == {name: value for name, value in expected.items() if name != "programs"}
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    assert rows == (reference_folder / "metrics.jsonl").read_bytes()
    samples = (tmp_path / "rollout_samples.jsonl").read_bytes()
    assert samples == (reference_folder / "rollout_samples.jsonl").read_bytes()
    if count >= 10:
        digest = hashlib.sha256(rows).hexdigest()
        results("resume", {"kills_by_place": dict(landed), "kills": kills, "bit_equal": {**found, "metrics": digest}})


@pytest.mark.parametrize("count", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_run_asked_to_end_saves_the_update_in_hand_and_ends_bit_equal(undisturbed, tmp_path, count):
    expected, reference_folder = undisturbed
    rng, notices = random.Random(20250121), []
    for number in range(count):
        place, least = KINDS[number % 3], 1 + number * UPDATES // (count + 2)
        notices.append(end_in(tmp_path, place, least, rng, signal.SIGTERM, preempt.PREEMPTED_EXIT))
    print(notices)
    # What was made is saved: no checkpoint falls short of the update that the run was at.
    assert all(notice["checkpoint"] >= notice["update"] for notice in notices)
    assert any(notice["checkpoint"] % CHECKPOINT_EVERY for notice in notices)  # more than the usual checkpoints
    found = finish(start(tmp_path, slow=False))
    del found["programs"]
    assert found == {name: value for name, value in expected.items() if name != "programs"}
    assert (tmp_path / "metrics.jsonl").read_bytes() == (reference_folder / "metrics.jsonl").read_bytes()


def test_run_goes_on_with_other_workers_dispatches_offload_and_checkpoints_and_longer_in_the_same_bits(
    undisturbed, tmp_path
):
    expected, reference_folder = undisturbed
    short = {"grpo.updates": UPDATES // 2}
    finish(start(tmp_path, slow=False, fields=short))
    assert newest_checkpoint(tmp_path) == UPDATES // 2
    found = finish(start(tmp_path, slow=False, fields=OTHER))
    del found["programs"]
    assert found == {name: value for name, value in expected.items() if name != "programs"}
    assert (tmp_path / "metrics.jsonl").read_bytes() == (reference_folder / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_run_goes_on_with_other_devices_and_micro_batches_up_to_rounding(undisturbed, tmp_path):
    expected, reference_folder = undisturbed
    half = UPDATES // 2
    finish(start(tmp_path, slow=False, fields={"grpo.updates": half}))
    fields = {"mesh.fsdp": 2, "pack.rows_per_micro_batch": 4}
    found = finish(start(tmp_path, slow=False, fields=fields, devices=2))
    rows, before = read(tmp_path), read(reference_folder)
    assert rows[:half] == before[:half] and found["cursor"] == expected["cursor"]
    first, same = rows[half], before[half]  # the first update on two devices: the same samples, other sums
    assert [first[name] for name in ("reward", "length", "tokens")] == [
        same[name] for name in ("reward", "length", "tokens")
    ]
    assert first["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-3)
    assert found["params"] != expected["params"]


def test_undisturbed_run_moves_refreshes_its_reference_and_counts_its_draws(undisturbed):
    found, folder = undisturbed
    rows = read(folder)
    assert [row["update"] for row in rows] == list(range(1, UPDATES + 1))
    assert sum(row["grad_norm"] > 0 for row in rows) >= 8
    assert found["params"] != found["reference"]
    assert found["cursor"]["draw"] == UPDATES * 4
    assert found["cursor"]["reference_update"] == 21  # the first rollout that starts at or after update 20
    assert set(found["programs"].values()) <= {1}
    best = max(found["evaluations"], key=lambda row: (row["language_consistency"], -row["update"]))
    assert [row["update"] for row in found["evaluations"]] == list(range(4, UPDATES + 1, 4))
    assert found["best"][0] == {
        "update": best["update"],
        "metric": "language_consistency",
        "value": best["language_consistency"],
    }
