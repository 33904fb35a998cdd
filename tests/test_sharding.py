"""Claims about meshes: an update and a rollout on four devices are those of one device."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from r1jax.core import sharding
from r1jax.schema import MeshConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIGURES = ("loss", "grad_norm", "kl", "entropy", "clip_fraction", "tokens", "max_ratio")


@pytest.fixture(scope="module")
def report():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, str(ROOT / "tests" / "sharding_driver.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["moe", "dense"])
@pytest.mark.parametrize("mesh", ["data2_expert2", "fsdp2_tensor2"])
def test_update_on_four_devices_equals_one_within_rounding(report, model, mesh):
    one, four = report[f"{model}/one"], report[f"{model}/{mesh}"]
    for name in FIGURES:
        assert four["figures"][name] == pytest.approx(one["figures"][name], rel=2e-5, abs=1e-6), name
    if model == "moe":
        assert four["figures"]["max_expert_share"] == pytest.approx(one["figures"]["max_expert_share"], rel=1e-6)
    print(f"{model}/{mesh}: largest difference {four['difference']:.1e} of a largest move of {one['largest_move']:.1e}")
    assert one["largest_move"] > 1e-5
    assert four["difference"] <= 2 * np.finfo(np.float32).eps  # the weights themselves reach 1, where one ulp is eps


@pytest.mark.parametrize("model", ["moe", "dense"])
@pytest.mark.parametrize("mesh", ["data2_expert2", "fsdp2_tensor2"])
def test_rollout_on_four_devices_gives_the_tokens_of_one(report, model, mesh):
    found = report[f"{model}/{mesh}"]
    assert found["samples"] == 24
    assert found["same_tokens"] == 24


def test_an_axis_that_does_not_divide_its_dimension_is_replicated():
    mesh = jax.sharding.AbstractMesh((1, 2, 4, 3, 1), sharding.AXES)
    axes = ("experts", "embed", "ffw")
    assert sharding.partition(axes, (8, 6, 9), mesh) == PartitionSpec("expert", "fsdp", "tensor")
    assert sharding.partition(axes, (6, 7, 8), mesh) == PartitionSpec(None, None, None)
    assert sharding.partition(("batch", None), (8, 5), mesh) == PartitionSpec(("data", "fsdp", "expert"), None)


def test_a_mesh_larger_than_the_machine_is_refused_by_its_axes():
    with pytest.raises(ValueError, match="'data': 64.*needs 64 devices"):
        sharding.make_mesh(MeshConfig(data=64))


def test_specs_give_abstract_and_drawn_parameters_of_one_shape():
    specs = {"w": sharding.ParamSpec((4, 6), (None, "embed"), sharding.normal(0.1)), "b": None}
    drawn = sharding.initialize(specs, jax.random.key(0), "float32", sharding.make_mesh(MeshConfig()))
    assert drawn["w"].shape == sharding.abstract(specs, "float32")["w"].shape == (4, 6)
    assert 0.02 < float(np.std(drawn["w"])) < 0.2
