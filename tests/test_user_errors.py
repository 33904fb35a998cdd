"""Claims about what a user sees after a mistake: one line, exit code 2, nothing half-written."""

import json
import shutil

import pytest

from r1jax import launch


def run(arguments, capsys):
    """Returns (exit code, non-empty lines of stdout and stderr)."""
    code = launch.main(arguments)
    captured = capsys.readouterr()
    return code, [line for line in (captured.out + captured.err).splitlines() if line.strip()]


@pytest.fixture
def model_folder(tmp_path):
    """A Hugging Face folder that is complete but for its weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    fields = dict(model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    fields |= dict(num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-5, hidden_act="silu")
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


CASES = {
    "unknown config": (["--config=r1_zer"], "did you mean 'r1_zero'"),
    "unknown preset": (["--config=r1_zero:tinny"], "did you mean 'tiny'"),
    "unknown field": (["--config=r1_zero", "--config.grpo.update=3"], "did you mean 'updates'"),
    "wrong type": (["--config=r1_zero", "--config.grpo.updates=x"], "config.grpo.updates=x: expected int"),
    "no checkpoint folder": (["--config=evaluate", "--config.checkpoint={tmp}/nowhere"], "no such checkpoint folder"),
    "no checkpoint given": (["--config=evaluate"], "--config.checkpoint=DIR"),
    "row too short": (["--config=r1_zero", "--config.sampler.max_new_tokens=100"], "config.pack.row_tokens=96"),
    "too few devices": (["--config=r1_zero", "--config.mesh.data=64"], "make config.mesh smaller"),
    "rows that do not divide": (
        ["--config=r1_zero", "--config.mesh.fsdp=3", "--config.mesh.context=2"],
        "config.pack.rows_per_micro_batch=32 does not divide over the 3 devices of config.mesh (fsdp=3), some would "
        "compute copies; give a multiple of 3, or make config.mesh smaller",
    ),
    "slots that do not divide": (
        ["--config=evaluate", "--config.mesh.expert=2", "--config.mesh.context=3"],
        "config.sampler.slots=128 does not divide over the 6 devices of config.mesh (expert=2, context=3)",
    ),
    "slots of a mesh of their own": (
        ["--config=r1_zero", "--config.mode=disaggregated", "--config.sampler_mesh.data=3"],
        "config.sampler.slots=128 does not divide over the 3 devices of config.sampler_mesh (data=3)",
    ),
    "no base of its own": (
        ["--config=r1_zero:smollm2_135m", "--config.data.path={tmp}/rows.jsonl"],
        "--config.model.checkpoint=DIR",
    ),
    "missing teacher": (
        ["--config=stage1_coldstart", "--config.data.path={tmp}/rows.jsonl"],
        "python -m r1jax.launch --config=r1_zero:tiny",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_mistake_is_one_clear_line_and_leaves_nothing(name, tmp_path, capsys):
    arguments, expected = CASES[name]
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "task": "math", "prompt": "1 + 1", "answer": "2"}\n')
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    code, lines = run([*arguments, f"--workdir={tmp_path}/runs"], capsys)
    assert code == 2
    assert len(lines) <= 3
    assert expected in lines[-1]
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        ("", "no rows"),
        ('{"id": "a"\n', "line 1"),
        ('{"id": "a", "prompt": "p", "answer": "1"}\n[]\n', "line 2"),
        ('{"id": "a", "task": "math", "prompt": "p"}\n', "answer"),
    ],
)
def test_bad_data_is_named_by_file_and_line(content, expected, tmp_path, capsys, smollm2_folder):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    arguments = ["--config=r1_zero:smollm2_135m", f"--config.model.checkpoint={smollm2_folder}"]
    code, lines = run([*arguments, f"--config.data.path={path}", f"--workdir={tmp_path}/runs"], capsys)
    assert code == 2
    assert len(lines) <= 3
    assert str(path) in lines[-1] and expected in lines[-1]
    assert not (tmp_path / "runs" / "r1_zero").exists()


def test_checkpoint_of_another_shape_is_named_by_array(tmp_path, capsys):
    run(
        ["--config=stage0_base", "--config.pretrain.updates=1", "--config.pretrain.corpus_documents=100"]
        + ["--config.model.num_hidden_layers=2", f"--workdir={tmp_path}/runs"],
        capsys,
    )
    shutil.copytree(tmp_path / "runs" / "stage0_base" / "checkpoints", tmp_path / "bare" / "checkpoints")
    code, lines = run(
        ["--config=evaluate", f"--config.checkpoint={tmp_path}/bare", f"--workdir={tmp_path}/runs"], capsys
    )
    assert code == 2
    assert len(lines) <= 3
    assert "does not fit the model" in lines[-1] and "sparse.attention" in lines[-1]
    assert not (tmp_path / "runs" / "evaluate").exists()


def test_folder_without_a_tokenizer_is_refused(tmp_path, capsys, model_folder):
    arguments = ["--config=evaluate:smollm2_135m", f"--config.checkpoint={model_folder}"]
    code, lines = run([*arguments, f"--workdir={tmp_path}/runs"], capsys)
    assert code == 2
    assert "no tokenizer.json" in lines[-1]
