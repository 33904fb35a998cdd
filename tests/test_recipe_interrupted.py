"""The claim that the graph of the recipe, killed in five places, ends in the very files of a run never stopped."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGES = (
    *("r1_zero", "stage1_coldstart", "stage2_reasoning_rl", "stage3_rejection_sft", "stage4_all_scenarios"),
    *("distill", "student_rl"),
)
SHORT_STAGES = (
    *("r1_zero.grpo.updates=4", "r1_zero.checkpointing.every_updates=1", "stage1_coldstart.coldstart.prompts=100"),
    *("stage2_reasoning_rl.grpo.updates=2", "stage2_reasoning_rl.checkpointing.every_updates=1"),
    *("stage3_rejection_sft.rejection.prompts=400", "stage4_all_scenarios.grpo.updates=4"),
    *("stage4_all_scenarios.checkpointing.every_updates=2", "stage4_all_scenarios.scenarios.from_update=2"),
    "student_rl.grpo.updates=2",
)
DEADLINE_S = 600.0


def start(workdir: pathlib.Path, *more: str) -> subprocess.Popen:
    evaluation = dict(samples_per_problem=1, max_problems=40, greedy="false", consensus_problems=4)
    command = [
        *(sys.executable, "-m", "r1jax.launch", "--config=quickstart", f"--workdir={workdir}"),
        *(f"--config.evaluation.{name}={value}" for name, value in evaluation.items()),
        *(f"--config.set={','.join(SHORT_STAGES)}", *more),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=workdir.parent
    )


def finish(process: subprocess.Popen) -> None:
    _, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, error[-2000:]


def in_phase(stage: str, name: str, least_update: int):
    """Returns a test of a working folder: whether that RL stage is in that phase, at that update or later."""

    def found(workdir: pathlib.Path) -> bool:
        try:
            phase, update = (workdir / stage / "phase").read_text().split()
        except (OSError, ValueError):
            return False
        return phase == name and int(update) >= least_update and not (workdir / stage / "DONE").exists()

    return found


def collecting(workdir: pathlib.Path) -> bool:
    folder = workdir / "stage3_rejection_sft"
    return (folder / "config.json").exists() and not (folder / "examples.jsonl").exists()


def between_stages(workdir: pathlib.Path) -> bool:
    done, following = workdir / "stage3_rejection_sft" / "DONE", workdir / "stage4_all_scenarios" / "config.json"
    return done.exists() and not following.exists()


# Place -> (test of the working folder, longest wait in seconds before the kill), in the order of the graph.
PLACES = {
    "rollout": (in_phase("r1_zero", "rollout", 2), 0.2),
    "update": (in_phase("stage2_reasoning_rl", "update", 1), 0.05),
    "rejection sampling": (collecting, 1.5),
    "between stages": (between_stages, 0.05),
    "checkpoint": (in_phase("stage4_all_scenarios", "checkpoint", 2), 0.03),
}


def kill_at(process: subprocess.Popen, workdir: pathlib.Path, place: str, rng: random.Random) -> bool:
    """SIGKILLs the process at a random moment of a place; returns whether it was there when it died."""
    reached, longest = PLACES[place]
    limit = time.monotonic() + DEADLINE_S
    while process.poll() is None and time.monotonic() < limit:
        if reached(workdir):
            time.sleep(rng.uniform(0, longest))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return process.returncode == -signal.SIGKILL and reached(workdir)
        time.sleep(0.001)
    process.kill()
    raise AssertionError(f"{place} was never reached: {process.communicate()[1][-2000:]}")


def artefacts(workdir: pathlib.Path) -> dict[str, object]:
    """Returns the digest of every stage's weights and the bytes of its metrics, examples and samples, and the summary."""
    found: dict[str, object] = {}
    for stage in STAGES:
        found[f"{stage} weights"] = json.loads((workdir / stage / "DONE").read_text())["output"]
        for name in ("metrics.jsonl", "examples.jsonl", "samples.jsonl", "config.json"):
            path = workdir / stage / name
            found[f"{stage} {name}"] = path.read_bytes() if path.exists() else b""
    found["summary"] = json.loads((workdir / "summary.json").read_text())["checkpoints"]
    return found


def differing(first: dict, second: dict) -> list[str]:
    return [name for name in first | second if first.get(name) != second.get(name)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "runs"
    finish(start(workdir))
    return workdir


@pytest.mark.slow
def test_graph_killed_in_five_places_ends_bit_equal(undisturbed, tmp_path, results):
    workdir, rng = tmp_path / "runs", random.Random(20250203)
    landed = {place: kill_at(start(workdir), workdir, place, rng) for place in PLACES}
    finish(start(workdir))
    print(f"killed in: {landed}")
    assert landed == dict.fromkeys(PLACES, True)
    expected = artefacts(undisturbed)
    different = differing(expected, artefacts(workdir))
    results("recipe_interrupted", {"killed_in": landed, "artefacts": len(expected), "different": different})
    assert different == []
    assert len(expected["stage3_rejection_sft examples.jsonl"]) > 1000
    assert len(set(expected[f"{stage} weights"] for stage in STAGES)) == len(STAGES)


@pytest.mark.slow
def test_stage_3_run_again_with_its_dependents_leaves_the_rest_and_ends_in_the_same_bits(undisturbed):
    expected = artefacts(undisturbed)
    written = {stage: (undisturbed / stage / "DONE").stat().st_mtime_ns for stage in STAGES}
    finish(start(undisturbed, "--config.from=stage3_rejection_sft"))
    again = {s for s, time_ns in written.items() if (undisturbed / s / "DONE").stat().st_mtime_ns != time_ns}
    assert again == {"stage3_rejection_sft", "stage4_all_scenarios", "distill"}
    assert differing(expected, artefacts(undisturbed)) == []
