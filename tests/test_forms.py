"""Claims about the choice among the forms of attention, and about `constrain` where no mesh is in force."""

import json

import jax.numpy as jnp
import pytest
import small

from r1jax.core import sharding

# Mesh, new tokens of a row, with a cache, attention_implementation, attention_block: the forms of MLA and of GQA.
TABLE = {
    ("one", 8, False, "auto", 0): ("plain", "plain"),  # on a CPU
    ("one", 8, False, "xla", 4): ("plain", "in_blocks"),
    ("one", 8, False, "flash", 0): ("by_kernel", "by_kernel"),
    ("one", 8, False, "flash", 4): ("by_kernel", "by_kernel"),
    ("fsdp2", 8, False, "xla", 0): ("plain", "plain"),
    ("fsdp2", 8, False, "flash", 0): ("by_kernel", "by_kernel"),
    ("context2", 8, False, "xla", 0): ("around_ring", "around_ring"),
    ("context2", 8, False, "flash", 4): ("around_ring_by_kernel", "around_ring_by_kernel"),
    ("context2", 7, False, "xla", 0): ("plain", "plain"),  # 7 tokens do not divide
    ("context2", 7, False, "flash", 0): ("by_kernel", "by_kernel"),
    ("one", 1, True, "xla", 0): ("plain", "plain"),
    ("one", 1, True, "flash", 0): ("decoded", "decoded"),
    ("one", 2, True, "flash", 4): ("plain", "plain"),
    ("context2", 1, True, "flash", 0): ("decoded", "decoded"),
    ("context2", 8, True, "xla", 4): ("plain", "plain"),
}
CASES = [(model, *row) for row in TABLE for model in ("latent", "grouped")]


@pytest.fixture(scope="module")
def report():
    return small.driver_report("forms_driver.py", json.dumps(CASES))


def test_mesh_cache_and_kernels_choose_the_form_of_a_whole_forward_pass(report):
    found = dict(zip(CASES, report["forms"], strict=True))
    assert {row: (found["latent", *row], found["grouped", *row]) for row in TABLE} == TABLE


@pytest.mark.parametrize("call", ["no_mesh", "forward"])
def test_constrain_refuses_several_devices_without_a_mesh(report, call):
    assert report[call].startswith("constrain: no mesh is in force, and there are 8 devices;")
    assert "sharding.use_mesh" in report[call]


@pytest.mark.parametrize(("mesh", "devices"), [("one", 1), ("fsdp2", 2), ("context2", 2)])
def test_constrain_places_arrays_on_the_mesh_in_force(report, mesh, devices):
    assert report[mesh] == devices


def test_constrain_needs_no_mesh_on_a_single_device():
    x = jnp.ones((4, 4))
    assert sharding.constrain(x, "batch", None) is x
