"""Configs: loading by name, typed overrides, messages, sweeps, and the golden dump of every config.

A golden file has the sizes of WHOLE; where a size is not dumped, test_sizes.py holds the numbers of the pair. After a
change of defaults, rewrite the golden files and read their diff: PYTHONPATH=. python tests/test_config.py
"""

import pathlib
from typing import Literal

import hypothesis
import hypothesis.strategies as st
import pytest

from r1jax import config, schema, stage_table

ROOT = pathlib.Path(__file__).resolve().parents[1]

GOLDEN = pathlib.Path(__file__).parent / "golden"
ENTRIES = config.entries()
KNOWN = [entry.name for entry in ENTRIES]
WHOLE = ("tiny", "tiny_dense", "smollm2_135m", "v3_671b")  # the sizes that every golden file dumps
EVERY_SIZE = ("distill", "evaluate", "preference_pairs")  # the configs that are dumped at all of theirs


def dumped(entry: config.ConfigSummary) -> list[str]:
    """Returns the presets that the golden file of a config holds."""
    return [preset for preset in entry.presets if preset in WHOLE or entry.name in EVERY_SIZE]


def golden_text(entry: config.ConfigSummary) -> str:
    """Returns the dump of the first preset and, for each other one, the lines that differ."""
    presets = dumped(entry)
    first = config.dump(config.load(f"{entry.name}:{presets[0]}"))
    sections = [f"[{presets[0]}]\n{first}"]
    for preset in presets[1:]:
        lines = config.dump(config.load(f"{entry.name}:{preset}")).splitlines(keepends=True)
        different = [line for line in lines if line not in set(first.splitlines(keepends=True))]
        sections.append(f"[{preset}]\n{''.join(different)}")
    return "\n".join(sections)


def message(call, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("entry", ENTRIES, ids=KNOWN)
def test_config_equals_its_golden_dump(entry):
    assert golden_text(entry) == (GOLDEN / f"{entry.name}.txt").read_text(encoding="utf-8")


def test_golden_files_are_those_of_the_configs():
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == KNOWN


@pytest.mark.parametrize("entry", ENTRIES, ids=KNOWN)
def test_config_has_a_summary_and_names_its_preset(entry):
    assert entry.summary.endswith((".", ":")) and 20 < len(entry.summary) <= 120
    for preset in entry.presets:
        loaded = config.load(f"{entry.name}:{preset}")
        assert loaded.stage in stage_table.STAGES
        assert preset == (loaded.input_preset or loaded.preset)  # a student's own preset differs from its teacher's


def test_preset_defaults_to_tiny():
    assert config.load("r1_zero") == config.load("r1_zero:tiny")


def test_smollm2_preset_has_the_shape_of_its_config_json():
    model = config.load("r1_zero:smollm2_135m").model
    assert (model.family, model.vocab_size, model.hidden_size, model.intermediate_size) == ("llama", 49152, 576, 1536)
    assert (model.num_hidden_layers, model.num_attention_heads, model.num_key_value_heads) == (30, 9, 3)
    assert (model.head_dim, model.rope_theta, model.rms_norm_eps) == (64, 100000.0, 1e-5)
    assert model.tie_word_embeddings


def test_overrides_do_not_depend_on_their_order_even_when_fields_are_checked_together():
    pair = [("model.num_attention_heads", "9"), ("model.num_key_value_heads", "9")]
    there, back = config.load("r1_zero", pair), config.load("r1_zero", pair[::-1])
    assert there == back and there.model.num_attention_heads == there.model.num_key_value_heads == 9


def test_later_override_of_a_field_wins_and_nothing_else_changes():
    changed = config.flatten(config.load("r1_zero", [("seed", "1"), ("seed", "2")]))
    base = config.flatten(config.load("r1_zero"))
    assert {key: value for key, value in changed.items() if base[key] != value} == {"seed": 2}


def test_override_that_breaks_a_cross_field_check_says_both_fields():
    text = message(config.load, "r1_zero", [("model.num_key_value_heads", "5")])
    assert text == "ModelConfig.num_key_value_heads=5 does not divide num_attention_heads=2"


@pytest.mark.parametrize(
    ("spec", "overrides", "expected"),
    [
        ("r1_zer", [], f"no config named 'r1_zer'; did you mean 'r1_zero'?; known: {', '.join(KNOWN)}"),
        ("", [], f"--config=NAME[:PRESET] is needed; known: {', '.join(KNOWN)}"),
        ("grade:tinny", [], "config 'grade' has no preset 'tinny'; did you mean 'tiny'?; known: tiny"),
        ("grade:", [], "config 'grade' has no preset ''; known: tiny"),
        (
            "grade",
            [("optimizer.learning_rat", "1")],
            "OptimizerConfig has no field 'learning_rat' (in config.optimizer.learning_rat); "
            "did you mean 'learning_rate'?",
        ),
        (
            "grade",
            [("optimiser.learning_rate", "1")],
            "Config has no field 'optimiser' (in config.optimiser.learning_rate); did you mean 'optimizer'?",
        ),
        (
            "grade",
            [("learning_rate", "1")],
            "Config has no field 'learning_rate' (in config.learning_rate); did you mean 'optimizer.learning_rate'?",
        ),
        (
            "grade",
            [("mesh.zzz", "1")],
            "MeshConfig has no field 'zzz' (in config.mesh.zzz); it has: slice, data, fsdp, expert, tensor, context",
        ),
        *(
            (
                "r1_zero",
                [(f"model.{name}", "1")],
                f"ModelConfig has no field '{name}' (in config.model.{name}); did you mean '{part}.{name}'?",
            )
            for part, name in (("compute", "remat"), ("compute", "scan_layers"), ("auxiliary", "mtp_loss_weight"))
        ),
        (
            "r1_zero",
            [("model.compute_dtype", "float32")],
            "ModelConfig has no field 'compute_dtype' (in config.model.compute_dtype); did you mean "
            "'compute.compute_dtype' or 'judge.compute_dtype'?",
        ),
        ("grade", [("seed.x", "1")], "config.seed.x: 'seed' is 0, which has no fields of its own"),
        (
            "grade",
            [("mesh", "1")],
            "config.mesh=1: expected one of its fields (slice, data, fsdp, expert, tensor, context) to be set, "
            "not MeshConfig as a whole",
        ),
        ("grade", [("optimizer.kind", "sgd")], "config.optimizer.kind=sgd: expected Literal['adamw', 'muon']"),
        ("grade", [("seed", "1.5")], "config.seed=1.5: expected int"),
        ("grade", [("rebuild_base", "maybe")], "config.rebuild_base=maybe: expected bool (true or false)"),
        ("grade", [("sampler.windows", "1,x")], "config.sampler.windows=1,x: expected tuple[int, ...]"),
        ("grade", [("preset", "tiny")], "config.preset is chosen by --config=NAME:PRESET, not by an override"),
        ("grade", [("stage", "grade")], "config.stage is chosen by --config=NAME, not by an override"),
    ],
)
def test_load_refuses_with_one_exact_line(spec, overrides, expected):
    assert message(config.load, spec, overrides) == expected


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("1e3", int, 1000),
        ("1_000", int, 1000),
        ("-3", int, -3),
        ("1e-6", float, 1e-6),
        ("3", float, 3.0),
        ("true", bool, True),
        ("False", bool, False),
        ("", str, ""),
        (" a=b ", str, " a=b "),
        ("b", Literal["a", "b"], "b"),
        ("0", Literal[0, 1], 0),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("1,2", tuple[int, ...], (1, 2)),
        ("(1,1e2)", tuple[int, ...], (1, 100)),
        ("[8]", tuple[int, ...], (8,)),
        ("8", tuple[int, ...], (8,)),
        ("()", tuple[int, ...], ()),
        ("", tuple[int, ...], ()),
        ("a, b", tuple[str, ...], ("a", "b")),
        ("('a',)", tuple[str, ...], ("a",)),
        ("2,0.5", tuple[int, float], (2, 0.5)),
        ("((0,1.0),(10,0.5))", schema.Schedule, ((0, 1.0), (10, 0.5))),
        ("((0,1),)", schema.Schedule, ((0, 1.0),)),
        ("()", schema.Schedule, ()),
    ],
)
def test_parse_returns_the_typed_value(text, annotation, value):
    parsed = config.parse(text, annotation, "config.x")
    assert parsed == value and repr(parsed) == repr(value)


@pytest.mark.parametrize(
    ("text", "annotation", "expected"),
    [
        ("1.5", int, "int"),
        ("nan", int, "int"),
        ("", int, "int"),
        ("0x1", int, "int"),
        ("1e999999999", int, "int"),
        ("nan", float, "float"),
        ("inf", float, "float"),
        ("one", float, "float"),
        ("2", bool, "bool (true or false)"),
        ("c", Literal["a", "b"], "Literal['a', 'b']"),
        ("x", int | None, "int | None"),
        ("1,2,3", tuple[int, float], "tuple[int, float]"),
        ("(1,True)", tuple[int, ...], "tuple[int, ...]"),
        ("(1,'2.5')", tuple[int, ...], "tuple[int, ...]"),
        ("((0,1.0)", schema.Schedule, "tuple[tuple[int, float], ...]"),
        ("(0,1.0)", schema.Schedule, "tuple[tuple[int, float], ...]"),
        ("__import__('os')", tuple[int, ...], "tuple[int, ...]"),
    ],
)
def test_parse_refuses_another_type_and_names_the_expected_one(text, annotation, expected):
    assert message(config.parse, text, annotation, "config.x") == f"config.x={text}: expected {expected}"


@pytest.mark.parametrize("text", ["((1,1.0),)", "((0,1.0),(0,2.0))", "((0,1.0),(9,2.0),(5,3.0))"])
def test_schedule_must_begin_at_zero_and_rise(text):
    assert "must begin at 0 and rise" in message(config.load, "r1_zero", [("grpo.kl_coef_schedule", text)])


@hypothesis.given(st.integers(-(10**17), 10**17))
@hypothesis.settings(max_examples=50, deadline=None)
def test_parse_of_an_integer_is_exact(number):
    assert config.parse(str(number), int, "x") == number


@hypothesis.given(st.floats(allow_nan=False, allow_infinity=False))
@hypothesis.settings(max_examples=50, deadline=None)
def test_parse_of_a_float_is_exact(number):
    assert config.parse(repr(number), float, "x") == number


@pytest.mark.parametrize("name", KNOWN)
def test_dump_can_be_given_back_as_overrides(name):
    loaded = config.load(name)
    given = {key: value for key, value in config.flatten(loaded).items() if key not in ("stage", "preset")}
    again = config.override(
        schema.Config(stage=loaded.stage, preset=loaded.preset), [(key, str(value)) for key, value in given.items()]
    )
    assert config.flatten(again) == config.flatten(loaded)


def test_hash_is_equal_for_equal_configs_and_differs_for_any_field():
    base = config.load("grade")
    assert config.config_hash(base) == config.config_hash(config.load("grade", [("seed", "0")]))
    others = [("seed", "1"), ("rebuild_base", "true"), ("sampler.windows", "64"), ("data.path", "x")]
    hashes = {config.config_hash(config.override(base, [other])) for other in others}
    assert len(hashes | {config.config_hash(base)}) == 5


def test_sweep_is_the_product_with_the_last_axis_fastest():
    base = config.load("r1_zero")
    points = config.sweep(base, ["optimizer.learning_rate=1e-4,3e-4", "seed=0,1"])
    assert [point.slug for point in points] == [
        "learning_rate=1e-4,seed=0",
        "learning_rate=1e-4,seed=1",
        "learning_rate=3e-4,seed=0",
        "learning_rate=3e-4,seed=1",
    ]
    assert [(point.config.optimizer.learning_rate, point.config.seed) for point in points] == [
        (1e-4, 0),
        (1e-4, 1),
        (3e-4, 0),
        (3e-4, 1),
    ]


def test_sweep_does_not_split_inside_brackets_and_its_folder_names_hold_no_separator():
    points = config.sweep(config.load("grade"), ["sampler.windows=(1,8),(2,4)", "data.path=a/b,../c d"])
    assert points[0].config.sampler.windows == (1, 8) and points[3].config.data.path == "../c d"
    assert [point.slug for point in points] == [
        "windows=(1%2C8),path=a%2Fb",
        "windows=(1%2C8),path=..%2Fc%20d",
        "windows=(2%2C4),path=a%2Fb",
        "windows=(2%2C4),path=..%2Fc%20d",
    ]


def test_sweep_names_stay_different_when_they_are_long_or_share_a_last_part():
    long = "x" * 300
    points = config.sweep(config.load("grade"), [f"data.path={long}1,{long}2"])
    assert len({point.slug for point in points}) == 2 and max(len(point.slug) for point in points) < 120
    (point,) = config.sweep(config.load("grade"), ["sampler.temperature=1", "evaluation.temperature=0.5"])
    assert point.slug == "sampler.temperature=1,evaluation.temperature=0.5"


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (["seed"], "--sweep=seed: expected FIELD=VALUE,VALUE, as in optimizer.learning_rate=1e-4,3e-4"),
        (["sed=1"], "Config has no field 'sed' (in config.sed); did you mean 'seed'?"),
        (["seed=1,x"], "config.seed=x: expected int"),
        (["seed=1,,2"], "config.seed=: expected int"),
        (["seed=1,1e0"], "--sweep=seed=1,1e0: a value is given twice"),
        (["seed=1", "seed=2"], "--sweep=seed=2: config.seed is given twice"),
        (["grpo.updates=1"], "--sweep=grpo.updates=1: config.grpo.updates is given twice"),
        (
            ["model.num_attention_heads=2,3", "model.num_key_value_heads=2"],
            "ModelConfig.num_key_value_heads=2 does not divide num_attention_heads=3",
        ),
    ],
)
def test_sweep_refuses_with_one_exact_line(axes, expected):
    fixed = [("grpo.updates", "3")]
    assert message(config.sweep, config.load("r1_zero", fixed), axes, fixed) == expected


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        *(
            (f"pack.{name}", "0", f"PackConfig.{name}=0 must be at least 1")
            for name in ("row_tokens", "rows_per_micro_batch")
        ),
        *(
            (f"checkpointing.{name}", "0", f"CheckpointConfig.{name}=0 must be at least 1")
            for name in ("every_updates", "keep")
        ),
        ("evaluation.samples_per_problem", "0", "EvalConfig.samples_per_problem=0 must be at least 1"),
        ("evaluation.max_problems", "-1", "EvalConfig.max_problems=-1 must be 0 or more"),
        ("evaluation.temperature", "-0.5", "EvalConfig.temperature=-0.5 must be 0 (greedy) or more"),
        ("evaluation.top_p", "0", "EvalConfig.top_p=0.0 must be in (0, 1]"),
        ("pretrain.updates", "0", "PretrainConfig.updates=0 must be at least 1"),
        ("coldstart.prompts", "0", "ColdStartConfig.prompts=0 must be at least 1"),
        ("rejection.samples_per_prompt", "0", "RejectionConfig.samples_per_prompt=0 must be at least 1"),
        (
            "rejection.general_fraction",
            "1",
            "RejectionConfig.general_fraction=1.0 must be in [0, 1): a set of general rows alone has no traces",
        ),
    ],
)
def test_a_value_with_which_a_run_would_end_later_is_refused_at_once(field, value, expected):
    assert message(config.load, "r1_zero", [(field, value)]) == expected


def test_write_json_replaces_the_file_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "figures.json"
    config.write_json(path, {"a": float("nan"), "b": (1, 2)})
    assert path.read_text() == '{\n  "a": null,\n  "b": [\n    1,\n    2\n  ]\n}\n'
    assert [item.name for item in path.parent.iterdir()] == ["figures.json"]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.glob("*.txt"):
        stale.unlink()
    for item in ENTRIES:
        (GOLDEN / f"{item.name}.txt").write_text(golden_text(item), encoding="utf-8")
