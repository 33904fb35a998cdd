"""The type checker finds nothing wrong, and does find a wrong field and a wrong call (settings: pyproject.toml)."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
BROKEN = (  # module, what it says, what a copy of it says instead, the rule that finds it
    ("r1jax/recipe/compute.py", "auxiliary.mtp_loss_weight", "auxiliary.mtp_loss_wieght", "missing-attribute"),
    ("r1jax/recipe/compute.py", "decoder.specs(model)", "decoder.specs(model, 1, 2)", "too-many-positional-arguments"),
    ("r1jax/models/layers.py", "gate=wide,", "gates=wide,", "unknown-argument"),
    ("r1jax/models/flash.py", "interpret=interpret", "interpreted=interpret", "unknown-argument"),  # of a kernel
    ("r1jax/rl/sampling.py", "assert self.pool is not None", "pass", "missing-union-attribute"),
    ("configs/bench_loss.py", "row_tokens=512", "row_token=512", "unknown-argument"),
)


def checked(*paths: pathlib.Path) -> str:
    """Returns what ty prints of files, or of all that pyproject.toml names, read with this interpreter's packages."""
    command = [sys.executable, "-m", "ty", "check", "--project", str(ROOT), "--python", sys.prefix]
    shown = ["--output-format", "concise", "--color", "never", "--no-progress"]
    done = subprocess.run([*command, *shown, *paths], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def test_package_kernels_and_configs_have_no_type_error():
    assert checked() == "All checks passed!\n"


def test_checker_passes_copies_of_modules_and_reports_what_is_wrong_in_each(tmp_path):
    copies = {tmp_path / f"copy_{number}.py": broken for number, broken in enumerate(BROKEN)}
    for copy, (module, right, _, _) in copies.items():
        text = (ROOT / module).read_text(encoding="utf-8")
        assert right in text, module
        copy.write_text(text, encoding="utf-8")
    assert checked(*copies) == "All checks passed!\n"
    for copy, (_, right, wrong, _) in copies.items():
        copy.write_text(copy.read_text(encoding="utf-8").replace(right, wrong), encoding="utf-8")
    lines = checked(*copies).splitlines()
    for copy, (module, _, _, rule) in copies.items():
        assert any(f"{copy.name}:" in line and f" error[{rule}] " in line for line in lines), (module, rule, lines)
