"""Claims about the table of stages: an override that a stage does not read is refused, and the table says what is so."""

import ast
import dataclasses
import pathlib
import re
import sys

import config_reads
import pytest
from small import RL_FIELDS, finished_stage

from r1jax import config as configs
from r1jax import launch, schema, stage_table
from r1jax.core import rng, sharding
from r1jax.data import jsonl, tasks
from r1jax.models import decoder
from r1jax.recipe import graph
from r1jax.tools import ablation

ROOT = pathlib.Path(__file__).resolve().parents[1]
ENTRIES = configs.entries()
FIELDS = list(configs.flatten(schema.Config()))


# What is refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--config=r1_zero", "--config.sft.epochs=9"],
            "r1_zero does not read config.sft; leave it out (it is read by stage1_coldstart, stage3_rejection_sft, distill)",
        ),
        (
            ["--config=r1_zero", "--config.evaluation.greedy=false", "--sweep=sft.epochs=1,2"],
            "r1_zero does not read config.sft; leave it out (it is read by stage1_coldstart, stage3_rejection_sft, distill)",
        ),
        (
            ["--config=evaluate", "--config.sampler.temperature=0.6"],
            "evaluate does not read config.sampler.temperature; what counts here is config.evaluation.temperature",
        ),
        (
            ["--config=stage3_rejection_sft", "--config.sampler.temperature=0.6"],
            "stage3_rejection_sft does not read config.sampler.temperature; what counts here is "
            "config.rejection.temperature",
        ),
        (
            ["--config=evaluate", "--config.model.checkpoint=DIR"],
            "evaluate does not read config.model.checkpoint; what counts here is config.checkpoint",
        ),
        (
            ["--config=grade", "--config.reward.format=0.5"],
            "grade does not read config.reward.format; leave it out (it is read by r1_zero, ppo_baseline, "
            "stage2_reasoning_rl, stage4_all_scenarios, student_rl, stage1_coldstart, ...)",
        ),
        (
            ["--config=grade", "--config.data.template=chat"],
            "grade does not read config.data.template; leave it out (it is read by r1_zero, ppo_baseline, "
            "stage2_reasoning_rl, stage4_all_scenarios, student_rl, stage1_coldstart, ...)",
        ),
        (
            ["--config=r1_zero", "--config.gate.pass_at_1=0.5"],
            "r1_zero does not read config.gate; the graph does: --config=r1 --config.set=r1_zero.gate.pass_at_1=VALUE",
        ),
        (
            ["--config=r1_zero", "--config.ppo.gae_lambda=0.9"],
            "config.ppo.gae_lambda is read with config.grpo.advantage=gae alone; set that, or leave it out",
        ),
        (
            ["--config=r1_zero", "--config.sampler_mesh.data=2"],
            "config.sampler_mesh.data is read with config.mode=disaggregated alone; set that, or leave it out",
        ),
        (
            ["--config=ablation_language", "--config.grpo.updates=3"],
            "ablation does not read config.grpo; give it to a variant: "
            "--config.variants=('NAME STAGE grpo.updates=VALUE',)",
        ),
        (
            ["--config=quickstart", "--config.from=r1_zero", "--config.pack.row_tokens=4"],
            "config.pack.row_tokens is no setting of the whole graph; give it to a stage: "
            "--config.set=STAGE.pack.row_tokens=VALUE",
        ),
    ],
)
def test_a_field_that_the_stage_does_not_read_is_one_exact_line_before_anything_runs(
    capsys, tmp_path, arguments, expected
):
    assert launch.main([*arguments, f"--workdir={tmp_path}/runs"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {expected}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "--config=r1_zero",
            "--config.sampler.temperature=0.6",
            "--config.grpo.advantage=gae",
            "--config.ppo.gamma=0.9",
        ],
        ["--config=ppo_baseline", "--sweep=ppo.gae_lambda=0.95,1.0", "--sweep=seed=0,1"],
        ["--config=quickstart", "--config.from=r1_zero", "--config.evaluation.greedy=false", "--config.seed=3"],
        ["--config=grade", "--config.reward.extraction=boxed", "--config.reward.workers=3"],
        ["--config=evaluate", "--config.checkpoint=DIR", "--config.sampler.max_new_tokens=9"],
    ],
)
def test_what_a_stage_reads_is_taken(capsys, arguments):
    assert launch.main([*arguments, "--dry_run"]) == 0


def test_overrides_of_the_graphs_stages_are_held_to_what_each_of_them_reads():
    quick = configs.load("quickstart", [("set", "distill.sft.epochs=1,r1_zero.gate.pass_at_1=0.1")])
    stages = graph.stage_configs(quick)
    assert (stages["distill"].sft.epochs, stages["r1_zero"].gate.pass_at_1) == (1, 0.1)
    with pytest.raises(ValueError, match="^r1_zero does not read config.sft; "):
        graph.stage_configs(configs.load("quickstart", [("set", "r1_zero.sft.epochs=1")]))


def test_overrides_of_an_ablations_variants_are_held_to_what_their_stage_reads(tmp_path):
    variants = "('good r1_zero grpo.updates=1', 'bad r1_zero rejection.prompts=1')"
    with pytest.raises(ValueError, match="^r1_zero does not read config.rejection; "):
        ablation.run(configs.load("ablation_language", [("variants", variants)]), tmp_path)
    assert list(tmp_path.iterdir()) == []


# That the table is right


def test_the_table_has_every_stage_of_a_config_and_no_other():
    assert {configs.load(f"{entry.name}:{preset}").stage for entry in ENTRIES for preset in entry.presets} == set(
        stage_table.STAGES
    )
    for name in stage_table.STAGES:
        assert callable(stage_table.function(name))


@pytest.mark.parametrize("name", stage_table.STAGES)
def test_every_part_in_the_table_is_one_of_the_config_and_each_exception_lies_in_a_part_that_is_read(name):
    stage = stage_table.STAGES[name]
    for part in (*stage.reads, *stage.unread, *filter(None, stage.unread.values())):
        assert configs.field_type(schema.Config(), part), part
    for part, instead in stage.unread.items():
        assert any(part.startswith(f"{read}.") or part == read for read in stage.reads), part
        assert not stage_table.reads(name, part) and (not instead or stage_table.reads(name, instead))


def test_all_stages_but_these_run_in_several_processes_together():
    assert [name for name in stage_table.STAGES if not stage_table.several_processes(name)] == [
        *("grade", "ablation", "bench_code", "bench_grading", "bench_import", "bench_kernels", "bench_loss"),
        *("bench_rewards", "bench_saving", "bench_tokens", "bench_update"),
    ]


def test_stages_that_make_updates_are_those_that_train_and_those_that_run_them():
    makes_none = [name for name, stage in stage_table.STAGES.items() if not stage.updates]
    assert [name for name in makes_none if not name.startswith("bench_")] == [
        *("evaluate", "export_hf", "grade", "build_tests", "preference_pairs"),
    ]


def names_read(path: pathlib.Path) -> set[str]:
    """Returns the attributes that a source reads, and its texts, by which some are read."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    return attributes | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_no_field_of_the_config_is_read_by_nobody():
    skipped = {*SCHEMA.glob("*.py"), *(ROOT / "r1jax" / f"{name}.py" for name in ("config", "stage_table"))}
    sources = [*(ROOT / "r1jax").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    known = set().union(*(names_read(path) for path in sources if path not in skipped))
    in_schema = {  # read by properties and checks of the schema alone
        *("num_attention_heads", "preset"),
    }
    assert [name for name in FIELDS if name.rpartition(".")[2] not in known | in_schema] == []


SCHEMA = pathlib.Path(schema.__file__).parent
# Parts that a stage hands whole to the stages that it runs.
HANDED_ON = dict.fromkeys(("quickstart", "r1", "ablation"), ("evaluation", "data", "watch")) | dict.fromkeys(
    ("reward_helpful", "reward_safety"), ("evaluation",)
)
BY_THE_LOADER = ("grpo.preset",)  # sets other fields


@pytest.mark.parametrize("name", stage_table.STAGES)
def test_every_field_is_refused_in_one_line_or_read_by_the_code_behind_the_stage(name):
    config, read, without_effect = (
        schema.Config(stage=name),
        config_reads.of_stage(stage_table.STAGES[name].function),
        [],
    )
    for key in FIELDS:
        try:
            stage_table.check(config, [key])
        except ValueError as error:
            names = key.split(".")
            starts = {".".join(names[:count]) for count in range(1, len(names) + 1)}  # of the field or a part it is in
            assert "\n" not in str(error) and starts & set(re.findall(r"config\.([a-z_0-9.]*[a-z_0-9])", str(error)))
            if not stage_table.reads(name, key):  # else it is read under a condition
                continue
        part, own = key.partition(".")[0], config_reads.owner_of(key)
        handed_on = part in HANDED_ON.get(name, ()) and ("Config", part) in read
        if own not in read and not handed_on and key not in BY_THE_LOADER:
            without_effect.append(key)
    assert without_effect == []


def test_the_fields_that_code_reads_are_found_through_calls_parts_and_properties():
    assert config_reads.of_stage("bench.kernels:run") == {("Config", "bench"), ("BenchConfig", "topology")}
    policy = config_reads.of_stage("recipe.policy:run")
    assert {("GRPOConfig", "kl_coef_schedule"), ("ComputeConfig", "remat"), ("SandboxConfig", "cpu_s")} <= policy
    assert not {("SFTConfig", "epochs"), ("DistillConfig", "grade"), ("BenchConfig", "repeats")} & policy


QUIET = {
    "<string>",
    dataclasses.__file__,
    configs.__file__,
    *map(str, SCHEMA.glob("*.py")),
}  # copies, hashes, dumps, checks


def watched(value, seen: set[str], prefix: str = ""):
    """Returns a config that notes in `seen` the fields that are read of it, by dotted name."""
    kind, names = type(value), {field.name for field in dataclasses.fields(value)}

    def read(self, name):
        found = object.__getattribute__(self, name)
        if name in names and not dataclasses.is_dataclass(found):
            if sys._getframe(1).f_code.co_filename not in QUIET:
                seen.add(prefix + name)
        return found

    def equal(self, other):
        if not isinstance(other, kind):
            return False
        for name in names:
            if getattr(self, name) != getattr(other, name):
                return False
        return True

    equal.__code__ = equal.__code__.replace(co_filename="<string>")
    plain = kind, tuple(getattr(value, field.name) for field in dataclasses.fields(kind))  # for processes of their own
    methods = {"__getattribute__": read, "__eq__": equal, "__hash__": kind.__hash__, "__reduce__": lambda self: plain}
    parts = {name: getattr(value, name) for name in names}
    parts = {
        name: watched(part, seen, f"{prefix}{name}.") if dataclasses.is_dataclass(part) else part
        for name, part in parts.items()
    }
    return type(kind.__name__, (kind,), methods)(**parts)


def test_a_watched_config_is_equal_to_its_own_and_notes_what_is_read_and_what_is_copied_not():
    seen: set[str] = set()
    plain = configs.load("r1_zero")
    config = watched(plain, seen)
    assert config == plain and plain == config and hash(config) == hash(plain)
    assert configs.config_hash(config) == configs.config_hash(plain)
    changed = schema.replace(config, model=schema.replace(config.model, hidden_size=4))
    assert seen == set() and changed != plain
    assert (changed.model.hidden_size, config.seed) == (4, 0) and seen == {"model.hidden_size", "seed"}


SMALL = [
    *((name, str(value)) for name, value in RL_FIELDS.items()),
    *(("grpo.updates", "1"), ("grpo.updates_per_rollout", "1"), ("grpo.prompts_per_update", "2")),
    *(("grpo.group_size", "2"), ("sampler.slots", "4"), ("sampler.max_new_tokens", "8"), ("pack.row_tokens", "96")),
    *(
        ("evaluation.max_problems", "1"),
        ("evaluation.samples_per_problem", "1"),
        ("evaluation.consensus_problems", "1"),
    ),
    *(("pretrain.updates", "1"), ("pretrain.corpus_documents", "100"), ("sft.epochs", "1")),
    *(("coldstart.prompts", "2"), ("coldstart.samples_per_prompt", "1")),
    *(("rejection.prompts", "2"), ("rejection.samples_per_prompt", "1"), ("reward_model.epochs", "1")),
    ("reward_model.balance_lengths", "false"),
]

# Read only once the stage has put other values there: the folder that is named, the run's own config.
OVERWRITTEN = {
    "grade": ("reward.accuracy", "reward.format", "reward.language"),
    "evaluate": "model.checkpoint",
    "reward_helpful": "auxiliary.mtp_loss_weight",
    "export_hf": ("model.", "compute.", "data.", "sampler.stop_ids"),
}
SMALL_RUN = configs.load("stage2_reasoning_rl", SMALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Returns a working folder with a small model as stage 2's result and files of rows."""
    folder = tmp_path_factory.mktemp("table")
    config = configs.load("stage2_reasoning_rl", SMALL)
    key, mesh = rng.key(0, "table", "init"), sharding.make_mesh(config.mesh)
    params = sharding.initialize(decoder.specs(config.model), key, "float32", mesh)
    finished_stage(config, folder, params, {})
    words = [problem.text("en") for problem in tasks.linear_problems()[0][:12]]
    jsonl.write(folder / "taught.jsonl", [{"prompt": text, "response": "the cat is small"} for text in words])
    pairs = [{"prompt": text, "chosen": "the cat is small thanks", "rejected": "cat"} for text in words]
    jsonl.write(folder / "pairs.jsonl", [{"id": f"p{n}", **row} for n, row in enumerate(pairs)])
    rows = [{"id": "1", "task": "math", "reference": "4", "response": "4"}]
    jsonl.write(folder / "rows.jsonl", rows)
    return folder


@pytest.mark.parametrize(
    ("stage", "own"),
    [
        ("grade", {"data.path": "rows.jsonl", "output": "graded.jsonl"}),
        ("stage0_base", {}),
        ("evaluate", {"checkpoint": "stage2_reasoning_rl"}),
        ("export_hf", {"checkpoint": "stage2_reasoning_rl", "output": "exported"}),
        ("distill", {"distill.examples": "taught.jsonl", "model.checkpoint": "stage2_reasoning_rl"}),
        pytest.param("r1_zero", {"model.checkpoint": "stage2_reasoning_rl"}, marks=pytest.mark.slow),
        pytest.param("ppo_baseline", {"model.checkpoint": "stage2_reasoning_rl"}, marks=pytest.mark.slow),
        pytest.param("stage1_coldstart", {"coldstart.teacher": "stage2_reasoning_rl"}, marks=pytest.mark.slow),
        pytest.param("stage3_rejection_sft", {}, marks=pytest.mark.slow),
        pytest.param(
            "reward_helpful",
            {"data.path": "pairs.jsonl", "model.checkpoint": "stage2_reasoning_rl", "start": ""},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_a_running_stage_reads_is_in_the_table(place, tmp_path, stage, own):
    seen: set[str] = set()
    files = [(name, str(place / value) if value else "") for name, value in own.items()]
    config = configs.load(stage, [*SMALL, *files, ("data.template", "tiny")])
    model = schema.replace(SMALL_RUN.model, checkpoint=config.model.checkpoint)
    config = watched(schema.replace(config, model=model, compute=SMALL_RUN.compute), seen)
    workdir = place if stage == "stage3_rejection_sft" else tmp_path
    try:
        stage_table.function(stage)(config, workdir)
    except ValueError as error:  # a random model writes nothing that is right
        assert stage in ("stage1_coldstart", "stage3_rejection_sft") and "no example passed the checks" in str(error)
    assert len(seen) > 3
    unlisted = sorted(
        name for name in seen - {"stage", "preset", *stage_table.DERIVED} if not stage_table.reads(stage, name)
    )
    unlisted = [name for name in unlisted if not name.startswith(OVERWRITTEN.get(stage, "-"))]
    assert unlisted == []
