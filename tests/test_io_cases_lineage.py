"""Stages that follow one another on a model and on files of one's own: what they start from, and what makes them stale."""

import json
import pathlib
import shutil

import pytest
from io_cases import io_case

from r1jax import config as configs
from r1jax import launch, stage_table
from r1jax.checkpoints import hf_export, tokenizer
from r1jax.core import rng, sharding
from r1jax.models import decoder
from r1jax.recipe import common, lineage
from r1jax.schema import MeshConfig, ModelConfig, replace

# A model of one's own, of another shape than any preset.
SHAPE = ModelConfig(
    family="llama",
    vocab_size=196,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.3,
)
SMALL = {
    "sampler.slots": 8,
    "sampler.max_new_tokens": 8,
    "sampler.windows": "",
    "data.template": "tiny",
    "evaluation.samples_per_problem": 1,
    "evaluation.greedy": "false",
}
RL = SMALL | {
    "grpo.group_size": 2,
    "grpo.prompts_per_update": 2,
    "grpo.updates_per_rollout": 1,
    "grpo.updates": 1,
    "pack.row_tokens": 32,
    "pack.rows_per_micro_batch": 4,
}


def write_model(folder: pathlib.Path, seed: int, template: str = "") -> pathlib.Path:
    """Writes a Hugging Face folder of random weights, with the tiny world's tokenizer."""
    params = sharding.initialize(
        decoder.specs(SHAPE), rng.key(seed, "cases", "init"), "float32", sharding.make_mesh(MeshConfig())
    )
    own = tokenizer.tiny()
    words = tokenizer.Tokenizer(own.backend, own.config, template, "cases") if template else own
    shutil.rmtree(folder, ignore_errors=True)
    hf_export.save(folder, params, SHAPE, words, "float32")
    return folder


def rows(count: int, task: str = "math", name: str = "q") -> list[dict]:
    return [
        {"id": f"{name}{i}", "task": task, "prompt": f"solve 7 x + {i} = {7 * (i % 9) + i} :", "answer": str(i % 9)}
        for i in range(count)
    ]


def write_rows(path: pathlib.Path, some: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


@pytest.fixture
def world(tmp_path):
    """Returns (Hugging Face folder, file of 12 equations, working folder)."""
    folder = write_model(tmp_path / "base", 0)
    return folder, write_rows(tmp_path / "F.jsonl", rows(12)), tmp_path / "W"


def run(name: str, world, *more: str, fields: dict = RL) -> int:
    folder, file, workdir = world
    given = {"model.checkpoint": folder, "data.path": file, "data.holdout_fraction": 0.4} | fields
    flags = [f"--config.{key}={value}" for key, value in given.items() if value is not None]
    return launch.main([f"--config={name}", f"--workdir={workdir}", *flags, *more])


def done(world, stage: str) -> dict:
    return json.loads((world[2] / stage / common.DONE).read_text())


def test_replaced_base_weights_make_a_finished_stage_stale(world, capsys):
    io_case("replaced-base-weights")
    assert run("r1_zero", world) == 0
    write_model(world[0], 1)
    capsys.readouterr()
    assert run("r1_zero", world) == 2
    assert f"is stale: its input {world[0]} has changed since" in capsys.readouterr().err


def test_a_changed_row_makes_a_finished_stage_stale_and_a_moved_file_does_not(world, capsys):
    assert run("r1_zero", world) == 0
    write_rows(world[1], rows(12, name="other"))
    capsys.readouterr()
    assert run("r1_zero", world) == 2
    assert f"is stale: its input {world[1]} has changed since" in capsys.readouterr().err


def test_a_stage_starts_from_the_stage_before_it_with_the_shape_and_tokenizer_of_the_model(world, capsys):
    io_case("stage-after-stage-on-a-real-model")
    assert run("stage2_reasoning_rl", world) == 2
    said = capsys.readouterr().err
    assert (
        "stage1_coldstart is missing or unfinished; make it with: python -m r1jax.launch --config=stage1_cold" in said
    )
    assert run("r1_zero", world) == 0
    shutil.copytree(world[2] / "r1_zero", world[2] / "stage1_coldstart")  # a finished stage of this model
    assert run("stage2_reasoning_rl", world) == 0
    before, after = done(world, "stage1_coldstart"), done(world, "stage2_reasoning_rl")
    assert after["inputs"]["stage1_coldstart"] == before["output"]
    assert after["inputs"][str(world[0])] == common.checkpoint_digest(world[0])
    shape, words, _ = common.read_model(world[2] / "stage2_reasoning_rl", ModelConfig())
    assert (shape.hidden_size, shape.family, words.vocab_size) == (32, "llama", 196)


def test_the_chain_goes_on_without_naming_the_model_again(world):
    assert run("r1_zero", world) == 0
    shutil.copytree(world[2] / "r1_zero", world[2] / "stage1_coldstart")
    assert run("stage2_reasoning_rl", world, fields=RL | {"model.checkpoint": None}) == 0
    inputs = done(world, "stage2_reasoning_rl")["inputs"]
    assert set(inputs) == {"stage1_coldstart", str(world[0]), str(world[1])}  # the base is in the table


def test_a_stage_of_a_real_model_is_evaluated_from_its_folder_alone(world, capsys):
    io_case("evaluate-a-stage-of-a-real-model")
    assert run("r1_zero", world) == 0
    trained = done(world, "r1_zero")["figures"]["r1_zero"]
    capsys.readouterr()
    fields = SMALL | {"checkpoint": world[2] / "r1_zero", "model.checkpoint": None, "data.template": "auto"}
    figures = world[2] / "figures.json"
    assert run("evaluate", world, f"--json={figures}", fields=fields) == 0
    found = json.loads(figures.read_text())
    assert found["problems"] == trained["problems"] and found["pass@1"] == trained["pass@1"]
    assert "was trained on" in capsys.readouterr().err


def test_the_base_that_a_chain_is_compared_with_is_the_one_that_it_began_from(world, tmp_path, capsys):
    assert run("r1_zero", world) == 0
    shutil.copytree(world[2] / "r1_zero", world[2] / "stage1_coldstart")  # a finished stage of this model
    other = write_model(tmp_path / "other", 1), world[1], world[2]
    capsys.readouterr()
    assert run("stage2_reasoning_rl", other) == 2
    said = capsys.readouterr().err
    assert f"stage1_coldstart was made from {world[0]}, which is another model than config.model.checkpoint=" in said
    moved = world[0].rename(tmp_path / "moved")
    unnamed = RL | {"model.checkpoint": None}
    assert run("stage2_reasoning_rl", world, fields=unnamed) == 2
    assert f"stage1_coldstart was made from {world[0]}, which is not there; name its place" in capsys.readouterr().err
    assert run("stage2_reasoning_rl", (moved, *world[1:])) == 0
    write_model(world[0], 1)  # another model in the old place
    shutil.rmtree(world[2] / "stage2_reasoning_rl")
    capsys.readouterr()
    assert run("stage2_reasoning_rl", world, fields=unnamed) == 2
    assert f"made from {world[0]}, which is another model by now" in capsys.readouterr().err


def test_a_chain_of_starts_names_its_base_and_a_base_replaced_afterwards_makes_it_stale(world, tmp_path, capsys):
    unnamed = RL | {"model.checkpoint": None}
    assert run("r1_zero", world) == 0
    shutil.copytree(world[2] / "r1_zero", world[2] / "stage1_coldstart")
    assert run("stage2_reasoning_rl", world, fields=unnamed) == 0
    again = unnamed | {"start": "stage2_reasoning_rl", "scenarios.from_update": -1}
    assert run("stage4_all_scenarios", world, fields=again) == 0
    base = done(world, "stage2_reasoning_rl")["figures"]["base"]
    assert done(world, "stage4_all_scenarios")["figures"]["base"] == base
    write_model(world[0], 1)
    capsys.readouterr()
    assert run("stage4_all_scenarios", world, fields=again) == 2
    assert f"{world[0]}, which is another model by now" in capsys.readouterr().err


def test_a_digest_is_of_the_weight_files_that_are_read(tmp_path):
    folder = write_model(tmp_path / "base", 0)
    before = common.checkpoint_digest(folder)
    (folder / "old.safetensors").write_bytes(b"read by nobody")
    assert common.checkpoint_digest(folder) == before
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "parts" / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "parts/a.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    inside = common.checkpoint_digest(folder)
    write_model(tmp_path / "other", 1)
    shutil.copy(tmp_path / "other" / "model.safetensors", folder / "parts" / "a.safetensors")
    assert common.checkpoint_digest(folder) != inside


def test_what_a_folder_is_does_not_depend_on_folders_inside(tmp_path):
    folder = write_model(tmp_path / "base", 0)
    (folder / "checkpoints").mkdir()  # of the program that saved it
    assert common.is_hugging_face(folder)
    stopped = tmp_path / "r1_zero"  # before its first checkpoint
    stopped.mkdir()
    (stopped / "config.json").write_text('{"stage": "r1_zero"}')
    (stopped / common.INPUTS).write_text('{"inputs": {}}')
    assert not common.is_hugging_face(stopped)
    with pytest.raises(ValueError, match="r1_zero holds no finished checkpoint; run that stage to its end first"):
        common.checkpoint_digest(stopped)


def test_a_run_starts_from_a_stage_folder_of_a_real_model(world):
    io_case("start-from-a-stage-folder-of-a-real-model")
    assert run("r1_zero", world) == 0
    again = world[0], world[1], world[2] / "again"
    assert run("r1_zero", again, fields=RL | {"model.checkpoint": world[2] / "r1_zero", "data.template": "auto"}) == 0
    assert done(again, "r1_zero")["inputs"][str(world[2] / "r1_zero")] == done(world, "r1_zero")["output"]
    assert common.read_model(again[2] / "r1_zero", ModelConfig())[2]["template"] == "tiny"


def test_an_export_renders_as_the_training_did_whatever_the_base_says_now(world, tmp_path):
    io_case("export-with-a-template-of-today")
    before = "{% for m in messages %}{{ m.content }} {% endfor %}"
    write_model(world[0], 0, before)
    assert run("r1_zero", world, fields=RL | {"data.template": "chat"}) == 0
    config = json.loads((world[0] / "tokenizer_config.json").read_text())
    write = config | {"chat_template": "please {{ messages[0].content }}"}
    (world[0] / "tokenizer_config.json").write_text(json.dumps(write))
    export = [
        "--config=export_hf",
        f"--config.checkpoint={world[2] / 'r1_zero'}",
        f"--config.output={tmp_path / 'OUT'}",
    ]
    assert launch.main([*export, f"--workdir={tmp_path}"]) == 0
    asked = [{"role": "user", "content": "solve"}]
    assert tokenizer.from_folder(tmp_path / "OUT").render_chat(asked) == "solve "


@pytest.mark.parametrize("config", ["r1_zero", "evaluate", "stage1_coldstart"])
def test_code_rows_need_tests_and_no_answer(config, world, capsys):
    case = io_case("code-rows-without-answer")["input"]
    assert config in case["configs"]
    again = [case["rows"][0] | {"id": f"c{i}", "prompt": f"{case['rows'][0]['prompt']} {i}"} for i in range(8)]
    write_rows(world[1], rows(4) + again)
    fields = {"sampler.max_prompt_tokens": 128, "pack.row_tokens": 144, "reward.workers": 2}
    if config == "evaluate":
        fields = SMALL | {"checkpoint": world[0], "model.checkpoint": None, "sampler.max_prompt_tokens": 128}
        assert run("evaluate", world, fields=fields) == 0
    elif config == "r1_zero":
        assert run("r1_zero", world, fields=RL | fields) == 0
        assert done(world, "r1_zero")["figures"]["data"]["rows_by_task"] == {"math": 4, "code": 8}
    else:
        fields |= SMALL | {"coldstart.teacher": world[0], "coldstart.prompts": 2, "coldstart.samples_per_prompt": 1}
        assert run(config, world, fields=fields) == 2  # random weights solve nothing
        assert "no example passed the checks" in capsys.readouterr().err


def test_general_and_safety_rows_enter_at_their_update_and_held_out_ones_never(world, monkeypatch):
    io_case("scenario-rows-in-the-reasoning-part")
    io_case("held-out-safety-row-is-trained-on")
    from r1jax.recipe import policy

    some = rows(20)
    some += [{"id": f"g{i}", "task": "general", "prompt": f"tell cat {i} :"} for i in range(10)]
    some += [{"id": f"s{i}", "task": "safety", "prompt": f"how steal cat {i} :"} for i in range(10)]
    write_rows(world[1], some)
    drawn, make = {}, policy.make_training

    def watched(settings, *arguments, **more):
        training = make(settings, *arguments, **more)
        size = settings.grpo.prompts_per_update
        for start in range(6):
            drawn[start] = [
                training.recorder.inputs.prompts.prompt(start * size + i, start).problem
                for i in range(400 * (start == 4) or size)
            ]
        raise ValueError("the draws are all that is asked for")

    monkeypatch.setattr(policy, "make_training", watched)
    grade = world[2].parent / "own.py"
    grade.write_text("def same(request, config):\n    raise AssertionError\n")
    graders = f"general={grade}:same,safety={grade}:same"
    fields = RL | {"start": "", "scenarios.from_update": 4, "scenarios.helpful_model": "", "scenarios.safety_model": ""}
    fields |= {"reward.graders": graders, "reward.override_graders": "true", "grpo.updates": 8}
    assert run("stage4_all_scenarios", world, fields=fields) == 2
    assert {p.task for start in range(4) for p in drawn[start]} == {"math"}
    later = {p.task: {q.id for q in drawn[4] if q.task == p.task} for p in drawn[4]}
    assert set(later) == {"math", "general", "safety"}
    assert len(later["general"]) < 10 and len(later["safety"]) < 10  # the others are held out


def test_rows_of_general_and_safety_need_something_that_rewards_them(world, capsys):
    some = rows(6) + [{"id": "g", "task": "general", "prompt": "tell cat :"}]
    some += [{"id": "s", "task": "safety", "prompt": "how steal cat :"}]
    write_rows(world[1], some)
    fields = RL | {"start": "", "scenarios.from_update": 0, "scenarios.helpful_model": "", "scenarios.safety_model": ""}
    assert run("stage4_all_scenarios", world, fields=fields | {"data.holdout_fraction": 0}) == 2
    assert "nothing rewards the rows of task general" in capsys.readouterr().err


def test_a_row_without_task_is_refused_with_its_line_before_anything_is_counted(world, capsys):
    write_rows(world[1], [io_case("row-without-task")["input"]["row"]])
    assert run("r1_zero", world) == 2
    said = capsys.readouterr().err
    assert f"{world[1]}, line 1 (a): field 'task' is missing" in said and "references:" not in said
    capsys.readouterr()
    assert run("r1_zero", world, fields=RL | {"data.task": "math", "data.holdout_fraction": 0}) == 0


def test_one_question_under_many_ids_is_told_and_stands_on_one_side(world, capsys):
    case = io_case("one-question-many-ids")["input"]
    write_rows(world[1], [{**rows(1)[0], "id": f"q-{i}"} for i in range(50)])
    run("r1_zero", world, *case["flags"])
    said = capsys.readouterr().err
    assert "1 of 50 prompts are new, 49 repeat an earlier one" in said
    assert ": 50 to train on, 0 held out" in said or ": 0 to train on, 50 held out" in said


def test_a_missing_stage_is_made_with_the_seed_evaluation_and_problems_of_the_one_that_needs_it(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(stage_table, "function", lambda stage: lambda config, workdir: made.append(config))
    fields = {"seed": "3", "rebuild_base": "true", "evaluation.max_problems": "5", "data.instruction": "Solve."}
    for reader in ("stage4_all_scenarios", "reward_safety"):
        lineage.require("stage3_rejection_sft", configs.load(f"{reader}:tiny", fields.items()), tmp_path)
    of_problems, of_labels = made
    expected = configs.load("stage3_rejection_sft:tiny", fields.items())
    assert of_problems == expected
    assert (of_labels.seed, of_labels.rebuild_base, of_labels.evaluation.max_problems) == (3, True, 5)
    assert of_labels.data == replace(expected.data, instruction="")  # the rows of the one that needs it are labels
