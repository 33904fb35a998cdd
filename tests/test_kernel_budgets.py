"""Claims about the kernels as the TPU compiler makes them: they compile for every generation, within committed budgets.

All figures are static, nothing is run. tests/kernel_budgets.json holds them; `R1JAX_BUDGETS=lower` writes what has
become better there, never what has become worse. The cases of v6e are slow: `bash launch/test.sh --slow
tests/test_kernel_budgets.py`. Needs libtpu (`pip install '.[test]'` on x86 Linux): skipped without it, an error when
CI=true.
"""

import importlib.util
import json
import os
import pathlib

import pytest

from r1jax.plan import kernels
from r1jax.plan.compile import compile_program

if importlib.util.find_spec("libtpu") is None:
    if os.environ.get("CI", "").lower() == "true":
        raise ImportError("no libtpu; pip install '.[test]'")
    pytest.skip("no libtpu; pip install '.[plan]'", allow_module_level=True)

ROOT = pathlib.Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tests" / "plan_driver.py"
BUDGETS = ROOT / "tests" / "kernel_budgets.json"
DIVIDED_OVER = ["v5p:2x2x1", "v5e:2x2", "v6e:2x2"]
DIVIDED = dict(model__num_hidden_layers=2, mesh__fsdp=2, mesh__tensor=2)
BEST = {"bundles": min, "spill_stores": min, "vmem_bytes": min, "mxu_share": max}
TOPOLOGIES = ("v5p:1x1x1", "v5e:1x1", "v6e:1x1")


def summed(figures: dict) -> dict:
    """Returns what is budgeted: of the slower of a step's two regions, spills of both."""
    regions = figures["regions"]
    return {
        "bundles": max(region["bundles"] for region in regions),
        "spill_stores": sum(region["spill_stores"] for region in regions),
        "vmem_bytes": figures["vmem_bytes"],
        "mxu_share": round(min(region["mxu_share"] for region in regions), 3),
    }


def of_generation(topology: str, *values: str):
    """Returns the parameters of one case; those of v6e, for which no config of the recipe is, are slow."""
    return pytest.param(topology, *values, marks=[pytest.mark.slow] if topology.startswith("v6e") else [])


CASES = [
    of_generation(topology, shape, kernel)
    for topology in TOPOLOGIES
    for kernel, shapes in kernels.OURS.items()
    for shape in shapes
    if kernel not in kernels.LOGPROB or shape == "v3" or topology == TOPOLOGIES[0]
]


@pytest.mark.parametrize(("topology", "shape", "kernel"), CASES)
def test_a_kernel_compiles_within_its_budget(topology, shape, kernel):
    figures = kernels.figures(kernel, shape, topology)
    found = summed(figures)
    budgets = json.loads(BUDGETS.read_text())
    place = budgets.setdefault(topology, {}).setdefault(kernel, {})
    if os.environ.get("R1JAX_BUDGETS") == "lower":
        place[shape] = {name: best(found[name], place.get(shape, found)[name]) for name, best in BEST.items()}
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    for name, best in BEST.items():
        assert best(found[name], place[shape][name]) == found[name], (name, found, place[shape])
    assert found["vmem_bytes"] > 0
    assert kernel not in kernels.LOGPROB or figures["temporary_bytes"] < 64 * 10**6


@pytest.mark.parametrize(("kernel", "other"), zip(kernels.ATTENTION, kernels.SPLASH, strict=True))
def test_a_step_has_fewer_bundles_and_less_than_half_the_spill_share_of_splash_attention(kernel, other):
    ours = kernels.figures(kernel, "mla_192_128", "v5p:1x1x1")["regions"]
    (splash,) = kernels.figures(other, "mla_192_128", "v5p:1x1x1")["regions"]
    for region in ours:
        assert region["bundles"] < splash["bundles"]
        assert region["spill_share"] < splash["spill_share"] / 2


@pytest.mark.parametrize("topology", [of_generation(topology) for topology in DIVIDED_OVER])
def test_the_kernels_compile_in_the_update_of_a_divided_model(topology, tmp_path):
    shape = dict(model__qk_nope_head_dim=128, model__qk_rope_head_dim=64, model__v_head_dim=128)
    rows = dict(pack__rows_per_micro_batch=4, pack__row_tokens=512, compute__logprob_implementation="pallas")
    given = dict(spec="r1_zero:tiny", name="update", **DIVIDED, **shape, **rows)
    found = compile_program(topology, f"{DRIVER}:stage", given, "full", keep=tmp_path)
    logprob = dict.fromkeys(kernels.LOGPROB, 1)
    assert found.kernels == {"flash_attention_forward": 2, "flash_attention_backward": 2} | logprob
    assert found.rematerialized == ()


LATENT = dict(model__kv_lora_rank=512, model__qk_rope_head_dim=64)
GROUPED = dict(model__num_attention_heads=8, model__num_key_value_heads=2, model__head_dim=128)


@pytest.mark.parametrize("topology", [of_generation(topology) for topology in DIVIDED_OVER])
@pytest.mark.parametrize(
    ("spec", "shape", "kernel"),
    [("r1_zero:tiny", LATENT, "latent_decode"), ("student_rl:tiny", GROUPED, "grouped_decode")],
)
def test_a_decode_kernel_compiles_in_the_step_of_a_divided_model(spec, shape, kernel, topology):
    more = dict(compute__compute_dtype="bfloat16", sampler__slots=4)
    given = dict(spec=spec, name="rollout: decode 104", **DIVIDED, **shape, **more)
    found = compile_program(topology, f"{DRIVER}:stage", given, "full")
    assert found.kernels == {kernel: 2}
    assert found.rematerialized == ()
