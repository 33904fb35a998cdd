"""Claims about training and sampling on separate devices: the same in step, ahead by a bounded number of rollouts else."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from r1jax import config as configs

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, str(ROOT / "tests" / "disaggregated_driver.py"), str(tmp_path_factory.mktemp("runs"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_trainer_and_sampler_have_devices_of_their_own(report):
    assert report["ahead_1"]["trainer_devices"] == [0, 1, 2, 3]
    assert report["ahead_1"]["sampler_devices"] == [4, 5, 6, 7]
    assert report["colocated"]["sampler_devices"] == [0, 1, 2, 3]


@pytest.mark.parametrize(("algorithm", "updates"), [("", 8), ("ppo_", 2)])
def test_in_step_a_run_equals_the_colocated_one(report, algorithm, updates):
    one, other = report[f"{algorithm}colocated"]["rows"], report[f"{algorithm}in_step"]["rows"]
    assert len(one) == len(other) == updates
    for a, b in zip(one, other, strict=True):
        assert b.pop("staleness") == 0
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_evaluations_between_updates_take_the_weights_of_their_update_also_while_rollouts_are_drawn_ahead(report):
    one, other, ahead = (report[name]["evaluations"] for name in ("colocated", "in_step", "ahead_2"))
    assert [row["update"] for row in one] == [row["update"] for row in other] == [4, 8]
    for a, b in zip(one, other, strict=True):
        assert [b[name] for name in ("mean_tokens", "language_consistency")] == pytest.approx(
            [a[name] for name in ("mean_tokens", "language_consistency")], rel=1e-6
        )
    assert [row["update"] for row in ahead] == [4, 8]
    assert one[0]["language_consistency"] != one[1]["language_consistency"]


def test_staleness_is_the_number_of_rollouts_ahead_after_the_first(report):
    staleness = {name: [row["staleness"] for row in report[name]["rows"]] for name in ("ahead_1", "ahead_2")}
    assert staleness["ahead_1"] == [0, 0, 2, 2, 2, 2, 2, 2]
    assert staleness["ahead_2"] == [0, 0, 2, 2, 4, 4, 4, 4]


def test_the_correction_for_older_weights_is_logged_and_is_one_only_without_them(report):
    rows = report["ahead_1"]["rows"]
    assert rows[0]["importance_ratio"] == pytest.approx(1, abs=1e-4)
    assert all(abs(row["importance_ratio"] - 1) > 1e-4 for row in rows[2:])
    assert all(row["zero_variance_groups"] < 1 for row in rows)
    assert "max_logprob_difference" in rows[0] and all("max_policy_shift" in row for row in rows[1:])
    fresh = report["in_step"]["rows"]
    assert all(abs(row["importance_ratio"] - 1) < 1e-4 for row in fresh[::2])


@pytest.mark.parametrize("algorithm", ["", "ppo_"])
def test_running_ahead_gives_the_same_bits_again(report, algorithm):
    one, again = report[f"{algorithm}ahead_1"], report[f"{algorithm}ahead_1_again"]
    assert (one["digest"], one["critic"]) == (again["digest"], again["critic"])
    assert one["rows"] == again["rows"]


def test_ppo_runs_ahead_and_its_critic_learns_from_rollouts_of_older_weights(report):
    rows = report["ppo_ahead_1"]["rows"]
    assert [row["staleness"] for row in rows] == [0, 0, 2, 2, 2, 2, 2, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["critic_grad_norm"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["importance_ratio"] == pytest.approx(1, abs=1e-4)
    assert all(abs(row["importance_ratio"] - 1) > 1e-4 for row in rows[2:])
    assert max(row["length"] for row in rows[:4]) <= 8 < max(row["length"] for row in rows[4:])  # the schedule's


def test_the_next_rollout_is_drawn_while_this_one_is_trained_on(report):
    events = report["ahead_1"]["events"]
    rollouts = {update: (begun, end) for name, update, begun, end in events if name == "draw"}
    updates = [(begun, end) for name, _, begun, end in events if name == "update"]
    overlap = sum(
        max(0.0, min(end, other_end) - max(begun, other_begun))
        for begun, end in rollouts.values()
        for other_begun, other_end in updates
    )
    print(f"{overlap:.2f} s of {sum(end - begun for begun, end in updates):.2f} s of updates beside a rollout")
    assert overlap > 0
    for start in (2, 4, 6):  # begun before the last update of the rollout before it had ended
        assert rollouts[start][0] < updates[start - 1][1]
    alone = report["in_step"]["events"]
    times = sorted((begun, end) for _, _, begun, end in alone)
    assert all(later[0] >= earlier[1] for earlier, later in zip(times, times[1:], strict=False))


def test_no_program_is_compiled_twice(report):
    for name, run in report.items():
        if name == "failed":
            continue
        counts = run["programs"]
        if name.startswith("ppo_ahead"):  # rows of two lengths; the last sampler alone is counted
            by_rows = {name: counts.pop(name) for name in ("update", "critic", "values", "reference")}
            assert set(by_rows.values()) == {2}, by_rows
        placed = counts.pop("place")  # the colocated engine's own move of the weights; else a copy between devices
        assert placed in (0, 1) and set(counts.values()) == {1}, counts


def test_an_error_in_an_update_ends_the_rollouts_under_way(report):
    assert report["failed"] == {"error": "the third update", "threads": []}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("grpo.rollouts_ahead", "-1", "rollouts_ahead=-1 must be 0 or more"),
        ("sampler_mesh.data", "0", "MeshConfig.data=0 must be at least 1"),
        ("compute.moe_buffer_factor", "0", "moe_buffer_factor=0.0 must be above 0"),
    ],
)
def test_a_setting_out_of_range_is_named(field, value, said):
    with pytest.raises(ValueError, match=said):
        configs.load("r1_zero:tiny", [("mode", "disaggregated"), (field, value)])


def test_running_ahead_needs_devices_of_its_own():
    with pytest.raises(ValueError, match="rollouts_ahead=1 needs mode=disaggregated"):
        configs.load("r1_zero:tiny", [("grpo.rollouts_ahead", "1")])
