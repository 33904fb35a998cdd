"""`--plan`: what fits a slice, the sum of memory over the phases of a run, the nearest slice; mostly without compiling."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from r1jax import config as configs
from r1jax import flags
from r1jax.core import sharding, slices
from r1jax.plan import chips, meshes
from r1jax.schema import MeshConfig, replace
from r1jax.tools import plan

CI = os.environ.get("CI", "").lower() == "true"
if importlib.util.find_spec("libtpu") is None and CI:
    raise ImportError("no libtpu; pip install '.[test]'")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu; pip install '.[plan]'")


def launched(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "r1jax.launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)


@needs_libtpu
def test_a_plan_compiles_every_program_and_adds_up_each_phase(tmp_path):
    found = tmp_path / "plan.json"
    small = ("--config.model.num_hidden_layers=2", "--config.reward_model.examples_per_update=8")
    done = launched(
        *("--config=reward_helpful:tiny", "--plan", "--topology=v5p:2x2x1", "--price=2", f"--json={found}", *small)
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(found.read_text())
    assert list(figures["programs"]) == ["start: state", "update", "evaluation: score"]
    assert figures["fits"] and figures["devices"] == 4
    for phase in figures["phases"]:
        assert phase["total_bytes"] == sum(phase["arrays"].values()) + phase["program_bytes"]
        whole = figures["programs"][phase["program"]]["hbm_bytes"]["total"]
        assert phase["total_bytes"] >= whole - 4096  # arrays are counted without the padding that arguments have
    assert figures["peak_bytes"] == max(phase["total_bytes"] for phase in figures["phases"])
    expected, bound = figures["time"]["expected"], figures["time"]["bound"]
    assert expected["hours"] > bound["hours"] > 0
    assert expected["cost"] == pytest.approx(2 * expected["chip_hours"])
    assert "fits" in done.stdout and "nothing was measured" in done.stdout


@needs_libtpu
def test_a_slice_that_is_too_small_is_refused_with_the_nearest_that_would_do(tmp_path):
    found = tmp_path / "plan.json"
    done = launched("--config=distill:qwen2_5_7b", "--plan", "--topology=v5e:2x2", f"--json={found}")
    assert done.returncode == 2
    figures = json.loads(found.read_text())
    assert not figures["fits"] and figures["nearest_topology"].startswith("v5e:")
    line = next(line for line in done.stderr.splitlines() if "does not fit" in line)
    assert "GiB a device (an estimate)" in line and figures["nearest_topology"] in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan"], "--plan needs --topology=GENERATION:SHAPE, such as v5p:4x4x8"),
        (["--plan=all", "--topology=v5p:2x2x1"], "--plan=all is unknown; give --plan, or --plan=search"),
        (["--price=3"], "--price=3.0 goes with --plan alone"),
        (["--response_tokens=5:9"], "--response_tokens=5:9 goes with --plan alone"),
        (["--topology=v5p:2x2x1"], "--topology=v5p:2x2x1 goes with --plan and --config=bench_kernels alone"),
        (["--plan", "--topology=v5p:2x2x1", "--sweep=seed=1,2"], "--plan runs nothing and takes one config; give it "),
        (["--plan", "--topology=v5p:2x2x1", "--profile=1:3"], "give it without --profile"),
    ],
)
def test_flags_of_a_plan_that_do_not_go_together_are_one_line(arguments, message):
    with pytest.raises(ValueError) as error:
        flags.parse(["--config=r1_zero", *arguments])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_slice_is_read_from_its_name():
    one = slices.parse("v5p:8x8x16")
    devices = {name: generation.devices_per_chip for name, generation in chips.GENERATIONS.items()}
    assert (one.chips, one.chips * devices[one.generation]) == (1024, 1024)
    assert slices.parse("v4:4x4x4").chips * devices["v4"] == 128  # a chip is two devices
    assert [other.topology for other in slices.larger(slices.parse("v5e:8x8"))] == ["v5e:8x16", "v5e:16x16"]
    for text in ("v7:2x2", "v5p", "v5p:2xx", "v5p:0x2"):
        with pytest.raises(ValueError, match="is no slice; give a generation"):
            slices.parse(text)


@pytest.mark.parametrize(("preset", "devices"), [("qwen2_5_7b", 8), ("v3_671b", 512), ("moonlight_16b", 16)])
def test_meshes_fill_the_devices_and_divide_the_model(preset, devices):
    stage = "distill" if preset.startswith("qwen") else "r1_zero"
    model = configs.load(f"{stage}:{preset}").model
    found = list(meshes.divisions(model, devices, 32768))
    assert found and len(found) == len(set(found))
    for mesh in found:
        sizes = [getattr(mesh, name) for name in ("data", "fsdp", "expert", "tensor", "context")]
        assert math.prod(sizes) == devices
        assert model.num_attention_heads % mesh.tensor == 0
        assert not model.n_routed_experts or model.n_routed_experts % (mesh.fsdp * mesh.expert) == 0


def test_rows_and_slots_follow_the_mesh():
    config = configs.load("r1_zero:v3_671b")
    one = plan.placed(config, MeshConfig(fsdp=8, expert=8, tensor=2, context=4))
    assert one.pack.rows_per_micro_batch == 64  # one a device that holds rows, as before
    assert one.sampler.slots % 256 == 0


def test_lengths_default_to_a_third_of_the_longest_and_a_bad_law_is_one_line():
    assert plan.Assumed().law(900).mean == 300
    assert plan.Assumed("100:400").law(900).p99 == 400
    with pytest.raises(ValueError, match="--response_tokens=long: give MEAN:P99, such as 8000:30000"):
        plan.Assumed("long").law(900)


def test_a_disaggregated_run_is_planned_on_its_own_meshes_and_not_searched_for():
    config = replace(configs.load("r1_zero:tiny"), mode="disaggregated")
    assert plan._devices(config) == 2
    with pytest.raises(ValueError, match="--plan=search chooses one mesh"):
        plan.run(config, "r1_zero:tiny", [], "v5p", search=True)


def test_rows_and_slots_are_divided_over_the_axes_of_the_sharding_rules():
    mesh = MeshConfig(slice=2, data=3, fsdp=5, expert=7, tensor=11, context=13)
    sizes = dict(zip(sharding.AXES, mesh.shape, strict=True))
    assert mesh.row_devices == math.prod(sizes[name] for name in sharding.TRAIN["batch"]) == 210
    assert mesh.slot_devices == math.prod(sizes[name] for name in sharding.DECODE["slots"]) == 210 * 13


KERNELS = {"logprob_forward", "flash_attention_forward", "flash_attention_backward"}
PLANNED = {  # name of the result: the config, the topology, the law of lengths
    "stage2_reasoning_rl_v3_671b": ("stage2_reasoning_rl:v3_671b", "v5p:8x8x8", "8000:30000"),
    "r1_zero_v3_671b": ("r1_zero:v3_671b", "v5p:8x8x8", "10000:60000"),
    "r1_zero_moonlight_16b": ("r1_zero:moonlight_16b", "v5p:2x2x2", "2000:7000"),
    "r1_zero_smollm2_135m": ("r1_zero:smollm2_135m", "v5e:1x1", "40:120"),
    "distill_qwen2_5_1_5b": ("distill:qwen2_5_1_5b", "v5e:2x4", "5355:30000"),
    "distill_qwen2_5_7b": ("distill:qwen2_5_7b", "v5p:2x2x1", "5355:30000"),
    "distill_qwen2_5_14b": ("distill:qwen2_5_14b", "v5p:2x2x2", "5355:30000"),
    "distill_qwen2_5_32b": ("distill:qwen2_5_32b", "v5p:2x2x4", "5355:30000"),
    "distill_llama3_1_8b": ("distill:llama3_1_8b", "v5p:2x2x1", "5355:30000"),
    "distill_llama3_3_70b": ("distill:llama3_3_70b", "v5p:2x4x4", "5355:30000"),
    "student_rl_qwen2_5_1_5b": ("student_rl:qwen2_5_1_5b", "v5e:2x4", "8000:30000"),
    "student_rl_qwen2_5_7b": ("student_rl:qwen2_5_7b", "v5p:2x2x2", "8000:30000"),
    "student_rl_qwen2_5_14b": ("student_rl:qwen2_5_14b", "v5p:2x2x4", "8000:30000"),
    "student_rl_qwen2_5_32b": ("student_rl:qwen2_5_32b", "v5p:2x4x4", "8000:30000"),
    "student_rl_llama3_1_8b": ("student_rl:llama3_1_8b", "v5p:2x2x2", "8000:30000"),
    "student_rl_llama3_3_70b": ("student_rl:llama3_3_70b", "v5p:4x4x4", "8000:30000"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_a_stage_fits_its_slice_or_the_next_one_is_named(name, results, tmp_path):
    spec, topology, lengths = PLANNED[name]
    found = tmp_path / "plan.json"
    done = launched(
        f"--config={spec}", "--plan", f"--topology={topology}", f"--response_tokens={lengths}", f"--json={found}"
    )
    print(done.stderr, done.stdout)
    figures = json.loads(found.read_text())
    results(f"plan_of_{name}", figures)
    assert done.returncode == (0 if figures["fits"] else 2)
    assert figures["fits"] or "nearest_topology" in figures
    assert set(figures["programs"]["update"]["kernels"]) == KERNELS
    for program in figures["programs"].values():
        assert program["involuntary_rematerializations"] == program["weight_gathers"] == 0
    if "v3_671b" in name:
        assert figures["chips"] == 512 and figures["peak_bytes"] < 95 * 2**30


@pytest.mark.slow
def test_the_largest_model_is_refused_on_64_chips_with_the_slice_that_would_do(tmp_path):
    done = launched("--config=stage2_reasoning_rl:v3_671b", "--plan", "--topology=v5p:4x4x4")
    assert done.returncode == 2
    assert "does not fit: phase" in done.stderr and "by the estimate v5p:" in done.stderr
