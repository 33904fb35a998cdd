"""The type checker finds nothing wrong, and does find a wrong field and a wrong call (settings: pyproject.toml)."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def checked(*paths: str) -> str:
    """Returns what ty prints of files, or of all that pyproject.toml names, read with this interpreter's packages."""
    command = [sys.executable, "-m", "ty", "check", "--project", str(ROOT), "--python", sys.prefix]
    shown = ["--output-format", "concise", "--color", "never", "--no-progress"]
    done = subprocess.run([*command, *shown, *paths], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def test_package_kernels_and_configs_have_no_type_error():
    assert checked() == "All checks passed!\n"


@pytest.mark.parametrize(
    ("module", "right", "wrong", "rule"),
    [
        ("r1jax/recipe/compute.py", "auxiliary.mtp_loss_weight", "auxiliary.mtp_loss_wieght", "missing-attribute"),
        (
            "r1jax/recipe/compute.py",
            "decoder.specs(model)",
            "decoder.specs(model, 1, 2)",
            "too-many-positional-arguments",
        ),
        ("r1jax/models/layers.py", "gate=wide,", "gates=wide,", "unknown-argument"),
        ("r1jax/models/flash.py", "interpret=interpret", "interpreted=interpret", "unknown-argument"),  # of a kernel
        ("r1jax/rl/sampling.py", "assert self.pool is not None", "pass", "missing-union-attribute"),
        ("configs/bench_loss.py", "row_tokens=512", "row_token=512", "unknown-argument"),
    ],
)
def test_checker_reports_what_is_wrong_in_a_copy_of_a_module(tmp_path, module, right, wrong, rule):
    text, copy = (ROOT / module).read_text(encoding="utf-8"), tmp_path / "copy.py"
    assert right in text
    copy.write_text(text, encoding="utf-8")
    assert checked(str(copy)) == "All checks passed!\n"
    copy.write_text(text.replace(right, wrong), encoding="utf-8")
    assert f"error[{rule}]" in checked(str(copy))
