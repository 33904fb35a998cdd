"""Claims about one update's gradients: they depend on the samples alone, not on rows, micro-batches or devices."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ONE, FOUR, TWO = (
    "1 micro-batch, padded, 1 device",
    "4 micro-batches, packed, 1 device",
    "2 micro-batches, packed, 2 devices",
)
PADDED_ON_FOUR, PACKED_ON_FOUR = "1 micro-batch, padded, 4 devices", "2 micro-batches, packed, 4 devices"
LAYOUTS = {
    "grpo": (ONE, FOUR, TWO, PADDED_ON_FOUR, PACKED_ON_FOUR),
    "sft": (ONE, FOUR, PADDED_ON_FOUR),
    "gspo": (ONE, PACKED_ON_FOUR),  # a ratio of whole samples
}
CASES = [(objective, layout) for objective, layouts in LAYOUTS.items() for layout in layouts]


@pytest.fixture(scope="module")
def report():
    """Returns, by model, objective and layout, relative differences to one packed micro-batch on one device."""
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "XLA_FLAGS": flags}
    command = [sys.executable, str(ROOT / "tests" / "invariance_driver.py")]
    pipes = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running = {model: subprocess.Popen([*command, model], **pipes) for model in ("moe", "dense")}
    found = {}
    for model, process in running.items():
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
        found[model] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize(("objective", "layout"), CASES)
@pytest.mark.parametrize("model", ["moe", "dense"])
def test_gradients_are_those_of_one_packed_micro_batch_on_one_device(report, model, objective, layout):
    """Relative to a parameter's largest gradient; the sums of some 60 float32 terms are taken in another order."""
    found = report[model][f"{objective}: {layout}"]
    print(f"{model} {objective}, {layout}: loss {found['loss']:.1e}, gradient {found['gradient']:.1e}")
    assert found["loss"] < 1e-6
    assert found["gradient"] < 3e-6
    still = {"moe": 1, "dense": 0}[model]  # the selection bias of the router has no gradient
    assert found["leaves"] == found["all_leaves"] - still
