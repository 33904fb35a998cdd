"""Every script in launch/ runs its own config from any folder, and tells what there is to run."""

import pathlib
import subprocess
import sys

import pytest

from r1jax import config, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
STAGES = (
    *("stage0_base", "r1_zero", "stage1_coldstart", "stage2_reasoning_rl", "stage3_rejection_sft"),
    *("stage4_all_scenarios", "distill", "student_rl", "ppo_baseline", "r1"),
)
NAMES = sorted(
    {path.stem for path in (ROOT / "launch").glob("*.py")} & ({entry.name for entry in config.entries()} | set(STAGES))
)
FIELDS = {
    "grade": ("data.max_rows", "data.max_rows = 5"),
    "export_hf": ("checkpoint", "checkpoint = '5'"),
}  # draw nothing


def run(name: str, *arguments: str, cwd: pathlib.Path) -> tuple[int, str, str]:
    """Returns (exit code, stdout, stderr) of a script started in another folder."""
    command = [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_every_stage_has_a_script():
    assert set(STAGES) <= set(NAMES)


@pytest.mark.parametrize("name", [*NAMES, "sweep"])
def test_help_of_a_script_lists_every_config_with_one_line(name, tmp_path):
    assert run(name, "--help", cwd=tmp_path) == (0, flags.help_text() + "\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_of_a_script_prints_its_own_stage_with_the_fields_given(name, tmp_path):
    field, shown = FIELDS.get(name, ("seed", "seed = 5"))
    code, out, error = run(name, f"--config.{field}=5", "--dry_run", cwd=tmp_path)
    assert (code, out, error) == (0, config.dump(config.load(name, [(field, "5")])), "")
    assert f"stage = '{name}'\n" in out and f"\n{shown}\n" in out
    assert list(tmp_path.iterdir()) == []


def test_mistake_in_a_scripts_flags_is_one_line(tmp_path):
    code, out, error = run("distill", "--config.sft.epoch=1", cwd=tmp_path)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: SFTConfig has no field 'epoch'") and "'epochs'" in error


def test_listing_of_the_graphs_script_tells_every_stage_as_missing(tmp_path):
    code, out, error = run("r1", "--config.list", cwd=tmp_path)
    assert (code, error, out.count("missing")) == (0, "", 9)
    assert list(tmp_path.iterdir()) == []
