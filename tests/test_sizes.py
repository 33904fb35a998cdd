"""Every stage at every size: the recipe's numbers are the stages', shapes and meshes the sizes' (docs/sizes.md).

The tables are those of the papers (P2 section 2.3 and 3.2, B.3, B.4.2, B.4.3, Table 6, D.1), restated. The sizes for two
cores, tiny and smollm2_135m, differ on purpose: configs/_small.py and the golden dumps hold them.
"""

import itertools

import pytest

from r1jax import config as configs
from r1jax import launch, schema, stage_table
from r1jax.configs import _presets
from r1jax.core import sharding
from r1jax.recipe import graph
from r1jax.rl import schedules
from r1jax.schema import replace

STUDENTS = ("qwen2_5_1_5b", "qwen2_5_7b", "qwen2_5_14b", "qwen2_5_32b", "llama3_1_8b", "llama3_3_70b")
MIXTURES = ("v2_lite_16b", "moonlight_16b", "v3_671b")
REAL = (*STUDENTS, *MIXTURES)
SIZES = ("tiny", "smollm2_135m", *REAL)
CHAIN = (
    *("r1_zero", "ppo_baseline", "stage1_coldstart", "stage2_reasoning_rl", "stage3_rejection_sft"),
    *("reward_helpful", "reward_safety", "stage4_all_scenarios", "evaluate", "export_hf", "preference_pairs", "r1"),
    *("ablation_language", "ablation_budget"),
)
OF_STUDENTS = ("distill", "student_rl")
PAIRS = [
    *itertools.product(CHAIN, SIZES),
    *itertools.product(OF_STUDENTS, ("tiny", "smollm2_135m", *STUDENTS)),
]

R1_ZERO = {
    "optimizer.learning_rate": 3e-6,
    "optimizer.schedule": "constant",
    "grpo.group_size": 16,
    "grpo.prompts_per_update": 32,  # 512 outputs an update
    "grpo.updates_per_rollout": 16,  # 8,192 outputs a rollout
    "grpo.updates": 10400,
    "grpo.clip_ratio": 10.0,
    "grpo.kl_coef": 0.001,
    "grpo.reference_refresh_updates": 400,
    "sampler.temperature": 1.0,
    "sampler.max_new_tokens": 65536,
    "sampler.max_new_tokens_schedule": ((0, 32768), (8200, 65536)),
    "reward.accuracy": 1.0,
    "reward.format": 1.0,
    "reward.language": 0.0,
    "reward.reward_model": 0.0,
    "scenarios.from_update": -1,
    "start": "",
}
STAGE2 = R1_ZERO | {
    "grpo.updates": 2400,  # not in the paper
    "sampler.max_new_tokens": 32768,
    "sampler.max_new_tokens_schedule": (),
    "reward.language": 1.0,
    "start": "stage1_coldstart",
}
STAGE4 = STAGE2 | {
    "grpo.updates": 1700,
    "sampler.temperature": 0.7,
    "reward.reward_model": 1.0,
    "scenarios.from_update": 1700 - 400,
    "scenarios.helpful_model": "reward_helpful",
    "scenarios.safety_model": "reward_safety",
    "start": "stage3_rejection_sft",
}
SFT = {
    "optimizer.learning_rate": 5e-5,
    "optimizer.schedule": "cosine",
    "optimizer.final_fraction": 0.1,  # 5e-6
    "sft.epochs": 2,
    "sft.examples_per_update": 128,
    "pack.row_tokens": 32768,
    "start": "",
}
REWARD_MODEL = {
    "optimizer.learning_rate": 6e-6,
    "reward_model.epochs": 1,
    "reward_model.examples_per_update": 256,
    "pack.row_tokens": 8192,
}
RECIPE = {
    "r1_zero": R1_ZERO,
    "ppo_baseline": R1_ZERO | {"grpo.clip_ratio": 0.2, "grpo.advantage": "gae", "ppo.gae_lambda": 1.0},
    "stage1_coldstart": SFT | {"coldstart.samples_per_prompt": 4},
    "stage2_reasoning_rl": STAGE2,
    "stage3_rejection_sft": SFT | {"rejection.prompts": 88000, "rejection.general_fraction": 0.25},
    "stage4_all_scenarios": STAGE4,
    "reward_helpful": REWARD_MODEL,
    "reward_safety": REWARD_MODEL,
    "distill": SFT | {"optimizer.learning_rate": None, "sft.examples_per_update": 64},  # the rate: DISTILL_RATES
    "student_rl": R1_ZERO
    | {"optimizer.learning_rate": 2e-6, "sampler.max_new_tokens": 32768, "sampler.max_new_tokens_schedule": ()},
    "evaluate": {"evaluation.temperature": 0.6, "evaluation.top_p": 0.95, "evaluation.samples_per_problem": 16},
    "r1": {
        "evaluation.temperature": 0.6,
        "evaluation.top_p": 0.95,
        "evaluation.samples_per_problem": 16,
        "evaluation.greedy": False,
        "evaluation.consensus_samples": 64,
    },
}
DISTILL_RATES = dict(zip(STUDENTS, (1e-4, 8e-5, 7e-5, 6e-5, 5e-5, 2e-5), strict=True))
# Moonlight's positions end at 8,192: lengths that do not fit are its own.
SHORT = {"sampler.max_new_tokens": 7168, "sampler.max_new_tokens_schedule": (), "pack.row_tokens": 8192}


def expected(stage: str, size: str) -> dict:
    """Returns the fields of the recipe's table for a stage at a real size."""
    table = dict(RECIPE[stage])
    if size == "moonlight_16b":
        table |= {name: value for name, value in SHORT.items() if name in table}
    if stage == "distill":
        table["optimizer.learning_rate"] = DISTILL_RATES[size]
    return table


@pytest.mark.parametrize("stage", RECIPE)
def test_dry_run_of_a_stage_prints_the_recipes_numbers_at_every_real_size(stage, capsys):
    for size in STUDENTS if stage in OF_STUDENTS else REAL:
        assert launch.main([f"--config={stage}:{size}", "--dry_run"]) == 0
        printed = dict(line.split(" = ", 1) for line in capsys.readouterr().out.splitlines())
        for field, value in expected(stage, size).items():
            assert configs.parse(printed[field].strip("'"), type_of(field), field) == value, (size, field)


def type_of(field: str):
    return configs.field_type(schema.Config(), field)


def test_every_config_of_the_chain_takes_every_size_and_those_of_students_the_students():
    known = {entry.name: set(entry.presets) - {"tiny_dense"} for entry in configs.entries()}
    assert {name: known[name] for name in CHAIN} == dict.fromkeys(CHAIN, set(SIZES))
    assert {known[name] == {"tiny", "smollm2_135m", *STUDENTS} for name in OF_STUDENTS} == {True}


@pytest.mark.parametrize("spec", ["distill:v3_671b", "student_rl:moonlight_16b", "stage0_base:v3_671b"])
def test_a_stage_that_makes_no_sense_at_a_size_is_refused_in_one_line(spec, capsys):
    assert launch.main([f"--config={spec}", "--dry_run"]) == 2
    name, _, size = spec.partition(":")
    error = capsys.readouterr().err
    assert error.startswith(f"error: config '{name}' has no preset '{size}'; known: tiny") and error.count("\n") == 1


WITHOUT_ROWS = ("evaluate", "export_hf", "preference_pairs", "r1", "ablation_language", "ablation_budget")


@pytest.mark.parametrize("stage", CHAIN)
def test_the_stages_without_rows_pack_none(stage):
    packs = stage_table.reads(configs.load(f"{stage}:tiny").stage, "pack.row_tokens")
    assert packs == (stage not in WITHOUT_ROWS)


@pytest.mark.parametrize(("stage", "size"), PAIRS)
def test_shape_computation_and_mesh_are_the_sizes_at_every_stage(stage, size):
    own = configs.load(f"{stage}:{size}")
    entry = _presets.SIZES[own.preset]
    assert (own.model, own.compute, own.mesh) == (entry.model, entry.compute, entry.mesh)
    assert size == (own.input_preset or own.preset)


@pytest.mark.parametrize(("stage", "size"), [pair for pair in PAIRS if pair[1] in REAL and pair[0] not in WITHOUT_ROWS])
def test_rows_hold_a_prompt_with_its_response_and_rows_and_slots_divide_over_the_mesh(stage, size):
    own = configs.load(f"{stage}:{size}")
    devices = own.mesh.slice * own.mesh.data * own.mesh.fsdp * own.mesh.expert
    if stage_table.reads(own.stage, "grpo"):
        assert own.pack.row_tokens == own.sampler.max_prompt_tokens + own.sampler.max_new_tokens
        assert own.sampler.slots % devices == 0
        assert max(own.sampler.windows) < own.pack.row_tokens
    if stage_table.reads(own.stage, "sft"):
        assert own.pack.row_tokens <= own.model.max_position_embeddings
    if stage_table.reads(own.stage, "pack"):
        assert sharding.row_shards(own.pack.rows_per_micro_batch, own.mesh) == devices


@pytest.mark.parametrize(("stage", "size"), PAIRS)
def test_rows_and_slots_that_a_stage_reads_divide_over_its_mesh(stage, size):
    stage_table.check(configs.load(f"{stage}:{size}"), [])  # it refuses those that do not


def test_changes_between_rollouts_take_effect_at_the_first_rollout_at_or_after_them():
    zero, last = configs.load("r1_zero:v3_671b"), configs.load("stage4_all_scenarios:v3_671b")
    updates = zero.grpo.updates_per_rollout
    assert schedules.first_start_at_or_after(8200, updates) == 8208
    assert [schedules.max_new_tokens(zero.sampler, start) for start in (0, 8192, 8208)] == [32768, 32768, 65536]
    first = schedules.first_start_at_or_after(last.scenarios.from_update, updates)
    assert (first, last.grpo.updates - first) == (1312, 388)
    refreshed = [start for start in schedules.rollout_starts(10400, updates) if start and start % 400 == 0]
    assert refreshed[:2] == [400, 800] and len(refreshed) == 25


def test_the_first_phase_of_r1_zero_decodes_in_a_window_of_its_own_length():
    assert 2048 + 32768 in configs.load("r1_zero:v3_671b").sampler.windows


# The graph


@pytest.mark.parametrize("size", SIZES)
def test_the_graph_of_a_size_has_its_policy_at_that_size_and_its_student_at_another(size, tmp_path, capsys):
    stages = graph.stage_configs(configs.load(f"r1:{size}"))
    assert {own.preset for name, own in stages.items() if name not in OF_STUDENTS} == {size}
    student = "tiny_dense" if size == "tiny" else configs.student_of(size)
    assert {stages[name].preset for name in OF_STUDENTS} == {student}
    assert launch.main([f"--config=r1:{size}", "--config.list=true", f"--workdir={tmp_path}/runs"]) == 0
    assert capsys.readouterr().out.count("missing") == len(graph.GRAPH)
    assert launch.main([f"--config=r1:{size}", "--dry_run"]) == 0


def test_the_671b_recipe_sets_distillation_and_rl_side_by_side_at_32b_and_another_student_can_be_named():
    stages = graph.stage_configs(configs.load("r1:v3_671b"))
    assert stages["distill"].preset == stages["student_rl"].preset == "qwen2_5_32b"
    named = configs.load("r1:v3_671b", [("set", "distill.preset=llama3_1_8b")])
    stages = graph.stage_configs(named)
    assert (stages["distill"].preset, stages["distill"].optimizer.learning_rate) == ("llama3_1_8b", 5e-5)
    assert stages["student_rl"].preset == "qwen2_5_32b"


def test_the_graph_hands_base_and_problems_to_the_stages_that_take_them():
    given = [
        *(("model.checkpoint", "BASE"), ("data.path", "rows.jsonl"), ("data.max_rows", "7")),
        ("set", "distill.model.checkpoint=OTHER,reward_helpful.data.path=pairs.jsonl,stage1_coldstart.data.max_rows=3"),
    ]
    stages = graph.stage_configs(configs.load("r1:v3_671b", given))
    bases = {name: own.model.checkpoint for name, own in stages.items()}
    assert bases == dict.fromkeys(graph.GRAPH, "BASE") | {"distill": "OTHER", "student_rl": ""}
    rows = {name: (own.data.path, own.data.max_rows) for name, own in stages.items()}
    assert rows == dict.fromkeys(graph.GRAPH, ("rows.jsonl", 7)) | {
        "stage1_coldstart": ("rows.jsonl", 3),
        "reward_helpful": ("pairs.jsonl", 0),
        "reward_safety": ("", 0),
    }


BASE, ROWS = "--config.model.checkpoint=DIR", "--config.data.path=FILE.jsonl"
PAIRS_OF_MODELS = "--config.set=reward_helpful.data.path=P.jsonl,reward_safety.data.path=L.jsonl"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], f"r1_zero has no weights to start from; give its base with {BASE} (a Hugging Face folder)"),
        ([BASE], f"r1_zero has no problems; give some with {ROWS} (rows with id, task, prompt and answer)"),
        (
            [BASE, ROWS],
            "reward_helpful has no rows to learn from; give some with --config.set=reward_helpful.data.path=FILE.jsonl "
            "(rows with prompt and chosen, rejected or a label)",
        ),
        (
            [BASE, ROWS, PAIRS_OF_MODELS],
            "distill:qwen2_5_32b has no weights to start from; give its base with "
            "--config.set=distill.model.checkpoint=DIR (a Hugging Face folder)",
        ),
    ],
)
def test_what_the_graph_of_a_real_size_lacks_is_one_line_with_the_field_before_anything_runs(
    arguments, expected, tmp_path, capsys
):
    assert launch.main(["--config=r1:v3_671b", *arguments, f"--workdir={tmp_path}/runs"]) == 2
    assert capsys.readouterr().err == f"error: r1:v3_671b: {expected}\n"
    assert list(tmp_path.iterdir()) == []


def test_an_ablation_of_a_real_size_says_which_variant_lacks_its_base(tmp_path, capsys):
    arguments = ["--config=ablation_budget:v3_671b", BASE, ROWS, f"--workdir={tmp_path}/runs"]
    assert launch.main(arguments) == 2
    assert capsys.readouterr().err == (
        "error: ablation:v3_671b: distill:qwen2_5_32b has no weights to start from; give its base with "
        "--config.variants=('distill_1 distill model.checkpoint=DIR ...', ...) (a Hugging Face folder)\n"
    )


def test_a_stage_of_a_real_size_names_the_command_that_makes_its_start(tmp_path, capsys):
    assert launch.main(["--config=stage2_reasoning_rl:v3_671b", f"--workdir={tmp_path}"]) == 2
    assert "make it with: python -m r1jax.launch --config=stage1_coldstart:v3_671b" in capsys.readouterr().err


# One entry


def test_a_new_entry_is_a_size_of_every_stage(monkeypatch):
    new = replace(_presets.SIZES["qwen2_5_7b"], mesh=schema.MeshConfig(fsdp=8), distill_rate=9e-5)
    monkeypatch.setitem(_presets.SIZES, "new_7b", new)
    for stage in (*CHAIN, *OF_STUDENTS):
        module = __import__(f"r1jax.configs.{stage}", fromlist=["config"])
        own = module.config("new_7b")
        assert (own.preset, own.model, own.mesh.fsdp) == ("new_7b", new.model, 8)
    assert own.optimizer.learning_rate == 2e-6
    distill = __import__("r1jax.configs.distill", fromlist=["config"]).config("new_7b")
    assert (distill.optimizer.learning_rate, distill.pack.rows_per_micro_batch) == (9e-5, 8)


@pytest.mark.parametrize("size", ["tiny", "smollm2_135m"])
def test_what_a_small_size_does_otherwise_stands_in_one_place_and_names_stages_and_fields_that_exist(size):
    differs = _presets.SIZES[size].differs
    assert set(differs) <= {*CHAIN, *OF_STUDENTS}
    for stage, fields in differs.items():
        own = configs.flatten(configs.load(f"{stage}:{size}"))
        assert {field: own[field] for field in fields} == dict(fields)
