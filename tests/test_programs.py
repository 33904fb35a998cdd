"""The programs and arrays of a stage that `recipe.programs` derives from a config are those that a run makes."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from r1jax import config as configs
from r1jax.configs import _presets
from r1jax.recipe import programs

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHORT = (
    *("grpo.updates=2", "grpo.updates_per_rollout=1", "grpo.prompts_per_update=2", "grpo.group_size=4"),
    *("sampler.slots=8", "pack.rows_per_micro_batch=4", "checkpointing.every_updates=100"),
)
SAMPLER = ("place", "prefill 16", "insert 16", "decode 40", "decode 64", "decode 104")


def sampling(name: str) -> list[str]:
    return [f"{name}: {program}" for program in SAMPLER]


UPDATES = ["start: state", "update"]
EXPECTED = {
    "r1_zero:tiny": [
        *("start: state", "reference: copy", *sampling("rollout"), "update: reference", "update"),
        *sampling("evaluation"),
    ],
    "ppo_baseline:tiny": [
        *("start: state", "critic: state", "reference: copy", *sampling("rollout")),
        *("scoring: log-probabilities", "values: score", "update: reference", "update", "update: critic"),
        *sampling("evaluation"),
    ],
    "stage1_coldstart:tiny": [*sampling("traces"), *UPDATES, *sampling("evaluation")],
    "distill:tiny": [*UPDATES, *sampling("evaluation")],
    "reward_helpful:tiny": [*UPDATES, "evaluation: score"],
    "stage0_base:tiny": UPDATES,
    "evaluate:tiny": sampling("sampling"),
}


@pytest.mark.parametrize("spec", EXPECTED)
def test_a_stage_has_these_programs_in_the_order_of_a_run(spec):
    assert list(programs.programs(configs.load(spec))) == EXPECTED[spec]


def test_stage_4_scores_with_reward_models_beside_the_sampler():
    (phase,) = (
        one for one in programs.phases(configs.load("stage4_all_scenarios:tiny")) if one.name == "reward models"
    )
    assert {"state", "reference", "sampler weights", "slots", "reward model"} < set(phase.arrays)
    assert sum(name.startswith("reward model") for name in phase.arrays) == 2


def test_a_stage_without_programs_says_which_have_some():
    with pytest.raises(ValueError, match="grade runs no programs of its own; plan one of r1_zero, "):
        programs.phases(configs.load("grade"))


def test_programs_are_lowered_without_arrays():
    fields = [("model.num_hidden_layers", "2"), ("sampler.windows", "()"), ("sampler.slots", "4")]
    every = programs.programs(configs.load("reward_helpful:tiny", fields))
    before = {id(array): array for array in jax.live_arrays()}  # kept, so that no id is used again
    text = every["update"].lower().as_text()
    assert "func.func public @main" in text
    assert [array.shape for array in jax.live_arrays() if id(array) not in before] == []


def live(folder, spec: str, *fields: str) -> dict:
    command = [sys.executable, str(ROOT / "tests" / "memory_driver.py"), str(folder), spec, *fields]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def check(phases: dict) -> None:
    assert set(phases) == {"rollout", "update"}
    for sizes in phases.values():
        assert sizes["planned"] == pytest.approx(sizes["live"], rel=0.1)
    largest = [max(sizes[kind] for sizes in phases.values()) for kind in ("planned", "live")]
    assert largest[0] == pytest.approx(largest[1], rel=0.02)


def test_the_arrays_of_a_plan_are_the_bytes_that_a_run_of_the_tiny_world_holds(tmp_path):
    check(live(tmp_path, "r1_zero:tiny", *SHORT, "grpo.updates=1", "sampler.windows=()", "model.num_hidden_layers=2"))


@pytest.mark.slow
def test_the_arrays_of_a_plan_are_the_bytes_that_a_run_of_135m_weights_holds(tmp_path, results):
    phases = live(tmp_path, "r1_zero:smollm2_135m", *SHORT, "sampler.windows=()", "sampler.max_new_tokens=32")
    results("plan_live_bytes_smollm2_135m", phases)
    check(phases)


STAGES = (*programs.RL, *programs.SFT, *programs.REWARD_MODELS, *programs.SAMPLING)


@pytest.mark.slow
@pytest.mark.parametrize("size", [size for size in _presets.SIZES if size != "tiny_dense"])
def test_every_program_of_every_stage_is_lowered_at_every_size(size, results):
    """For TPU devices of the size's own mesh, in a process of its own."""
    known = {entry.name: entry.presets for entry in configs.entries()}
    stages = [stage for stage in STAGES if size in known[stage]]
    command = [sys.executable, str(ROOT / "tests" / "lowering_driver.py"), size, *stages]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    results(f"programs_{size}", figures)
    assert set(figures["programs"]) == set(stages)
    assert all(count >= 2 for count in figures["programs"].values())
