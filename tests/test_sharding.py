"""Claims about meshes: an update, a rollout and a long row on eight devices are those of one device."""

import pathlib

import jax
import numpy as np
import pytest
import small
from jax.sharding import PartitionSpec

from r1jax.configs import _presets as presets
from r1jax.core import sharding, tree
from r1jax.models import decoder
from r1jax.schema import MeshConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIGURES = ("loss", "grad_norm", "kl", "entropy", "clip_fraction", "tokens", "max_ratio")


MESHES = (
    "slice2_data4",
    "fsdp8",
    "data2_expert4",
    "fsdp2_expert2_tensor2",
    "expert2_context4",
    "fsdp2_tensor2_context2",
    "slice2_expert2_context2",
)
RUNS = [f"{model}/{mesh}" for model in ("moe", "dense") for mesh in MESHES]
RUNS += [f"moe/{mesh}_routed" for mesh in ("fsdp8", "data2_expert4", "fsdp2_expert2_tensor2", "expert2_context4")]
RUNS += [f"{model}/fsdp2_expert2_tensor2_flash" for model in ("moe", "dense")]


@pytest.fixture(scope="module")
def report():
    return small.driver_report("sharding_driver.py", timeout=1200)


@pytest.mark.parametrize("run", RUNS)
def test_update_on_eight_devices_equals_one_within_rounding(report, run):
    one, found = report[f"{run.split('/')[0]}/one"], report[run]
    for name in FIGURES:
        assert found["figures"][name] == pytest.approx(one["figures"][name], rel=2e-5, abs=1e-6), name
    if run.startswith("moe"):
        assert found["figures"]["max_expert_share"] == pytest.approx(one["figures"]["max_expert_share"], rel=1e-6)
    print(f"{run}: largest difference {found['difference']:.1e} of a largest move of {one['largest_move']:.1e}")
    assert one["largest_move"] > 1e-5
    assert found["difference"] <= 2 * np.finfo(np.float32).eps  # the weights themselves reach 1, where one ulp is eps


@pytest.mark.parametrize("run", RUNS)
def test_rollout_on_eight_devices_gives_the_tokens_of_one(report, run):
    assert report[run]["samples"] == 24
    assert report[run]["same_tokens"] == 24


@pytest.mark.parametrize("mesh", ["fsdp8", "fsdp2_expert2_tensor2", "expert2_context4"])
@pytest.mark.parametrize("model", ["moe", "dense"])
def test_a_rollout_with_divided_dense_weights_gives_the_tokens_of_one_device(report, model, mesh):
    found = report[f"{model}/{mesh}/divided"]
    assert found["same_tokens"] == 24
    assert found["held"] < 0.9  # heads that are too few, projections to latents and norms are whole


@pytest.mark.parametrize("model", ["moe", "dense"])
def test_a_row_of_4096_tokens_around_a_ring_of_four_equals_one_device(report, model):
    found = report[f"{model}/context"]
    print(f"{model}: hidden {found['hidden']:.1e}, gradient {found['gradient']:.1e} of the largest value")
    assert found["loss"][1] == pytest.approx(found["loss"][0], rel=1e-6)
    assert found["hidden"] < 1e-5
    assert found["gradient"] < 1e-4  # sums over 4,000 tokens in another order
    assert found["smallest_gradient"] > 1e-6


def test_a_divided_vocabulary_is_never_put_together(report):
    shapes = report["vocabulary_shapes"]
    assert any("1111" in shape for shape in shapes)
    assert not any("4444" in shape for shape in shapes)


def test_a_digest_of_divided_weights_is_that_of_one_device(report):
    assert len(report["digests"]) == len(MESHES) + 1
    assert len(set(report["digests"].values())) == 1


def test_a_digest_summed_in_place_sees_one_bit_and_the_order_of_elements(monkeypatch):
    monkeypatch.setattr(tree, "WHOLE_BYTES", 0)
    drawn = np.random.default_rng(0).normal(size=(3, 8, 5)).astype(np.float32)
    bit, swapped = drawn.copy(), drawn.copy()
    bit.view(np.uint32)[2, 7, 4] ^= 1
    swapped[[0, 1]] = swapped[[1, 0]]
    found = [tree.digest({"w": jax.numpy.asarray(w)}) for w in (drawn, bit, swapped, drawn.reshape(3, 5, 8), drawn)]
    assert len(set(found)) == 4 and found[0] == found[4]
    sums = np.stack([tree.checksums(w) for w in (drawn, bit)])
    assert np.all(sums[0] != sums[1])


def test_the_sums_of_a_digest_hold_one_layer_at_a_time():
    stacked = jax.ShapeDtypeStruct((32, 256, 256), "float32")
    assert tree.checksums.lower(stacked).compile().memory_analysis().temp_size_in_bytes < 2**19 + 4096  # 2 layers


def test_mesh_axes_that_do_not_divide_a_dimension_are_left_out_from_the_front():
    mesh = jax.sharding.AbstractMesh((1, 3, 2, 4, 5, 1), sharding.AXES)
    axes = ("experts", "ffw")
    assert sharding.partition(axes, (16, 10), mesh) == PartitionSpec(("fsdp", "expert"), "tensor")
    assert sharding.partition(axes, (12, 8), mesh) == PartitionSpec("expert", None)  # 12 by 4, not by 8
    assert sharding.partition(("embed",), (7,), mesh) == PartitionSpec(None)
    assert sharding.partition(("batch", None), (24, 5), mesh) == PartitionSpec(("data", "fsdp", "expert"), None)
    assert sharding.partition(("batch", None), (8, 5), mesh) == PartitionSpec(("fsdp", "expert"), None)


def test_decoding_holds_dense_weights_whole_and_gives_the_context_axis_slots():
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 2, 1, 2), sharding.AXES)
    rules = sharding.DECODE
    assert sharding.partition(("embed", "heads"), (8, 8), mesh, rules) == PartitionSpec(None, None)
    assert sharding.partition(("slots",), (8,), mesh, rules) == PartitionSpec(("fsdp", "expert", "context"))
    for rules in (sharding.DECODE, sharding.TRAIN):
        assert sharding.partition(("experts",), (8,), mesh, rules) == PartitionSpec(("context", "fsdp", "expert"))
        assert sharding.partition(("experts",), (4,), mesh, rules) == PartitionSpec(
            ("fsdp", "expert")
        )  # too few for all


@pytest.mark.parametrize(
    ("size", "mesh", "axes"),
    [
        ("v3_671b", {"data": 2, "fsdp": 32, "expert": 8}, ("expert",)),
        ("llama3_3_70b", {"fsdp": 32}, ("fsdp",)),
        ("llama3_3_70b", {"fsdp": 4, "expert": 2}, ("fsdp", "expert")),
        ("qwen2_5_1_5b", {"fsdp": 8}, ()),
        ("moonlight_16b", {"fsdp": 8, "expert": 8}, ()),
        ("llama3_3_70b", {"data": 8}, ()),
    ],
)
def test_dense_weights_above_4_gib_are_divided_in_decoding_over_the_fewest_devices_that_bring_them_below(
    size, mesh, axes
):
    model, shape = presets.SIZES[size].model, MeshConfig(**mesh).shape
    specs, abstract = decoder.specs(model), jax.sharding.AbstractMesh(shape, sharding.AXES)
    rules = sharding.decode_rules(specs, abstract, "bfloat16")
    assert rules["heads"] == rules["ffw"] == rules["vocab"] == (*axes, "tensor")
    assert rules["dense"] == axes
    rows = sharding.partition(("weight_rows", "batch"), (512, 512), abstract, rules)
    assert set(axes).isdisjoint(sharding.mesh_axes(rows[0])) and set(axes) <= set(sharding.mesh_axes(rows[1]))
    assert axes or rules == sharding.DECODE
    assert rules["expert_ffw"] == ("tensor",)


def test_a_mesh_larger_than_the_machine_is_refused_by_its_axes():
    with pytest.raises(ValueError, match="'data': 64.*needs 64 devices"):
        sharding.make_mesh(MeshConfig(data=64))


def test_specs_give_abstract_and_drawn_parameters_of_one_shape():
    specs = {"w": sharding.ParamSpec((4, 6), (None, "embed"), sharding.normal(0.1)), "b": None}
    drawn = sharding.initialize(specs, jax.random.key(0), "float32", sharding.make_mesh(MeshConfig()))
    assert drawn["w"].shape == sharding.abstract(specs, "float32")["w"].shape == (4, 6)
    assert 0.02 < float(np.std(drawn["w"])) < 0.2
