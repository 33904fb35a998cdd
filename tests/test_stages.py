"""Claims about whole stages, run short on the tiny world from the shipped base."""

import re

import numpy as np
import pytest

from r1jax import config as configs
from r1jax.core import sharding, tree
from r1jax.core.metrics import read
from r1jax.data import jsonl, tasks
from r1jax.models import decoder
from r1jax.recipe import common, evaluate, fine_tuning, lineage, policy, stage0_base, stage1_coldstart

SHORT = [
    ("grpo.updates", "16"),
    ("evaluation.samples_per_problem", "2"),
    ("evaluation.max_problems", "150"),
    ("evaluation.greedy", "false"),
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def zero(workdir):
    return policy.run(configs.load("r1_zero:tiny", SHORT), workdir)


@pytest.fixture(scope="module")
def dev1(workdir, zero):
    fewer = [("coldstart.prompts", "150"), ("coldstart.samples_per_prompt", "4"), ("sft.examples_per_update", "16")]
    return stage1_coldstart.run(configs.load("stage1_coldstart:tiny", SHORT[1:] + fewer), workdir)


def test_sixteen_updates_of_r1_zero_beat_the_base_by_three_standard_errors(zero):
    gain = zero["r1_zero"]["pass@1"] - zero["base"]["pass@1"]
    error = np.hypot(zero["r1_zero"]["pass@1_se"], zero["base"]["pass@1_se"])
    assert gain > 3 * error
    assert zero["r1_zero"]["mean_tokens"] > zero["base"]["mean_tokens"]


def test_r1_zero_leaves_metrics_curves_samples_and_a_picture(zero, workdir):
    folder = workdir / "r1_zero"
    rows = read(folder)
    assert [row["update"] for row in rows] == list(range(1, 17))
    assert (folder / "curves.csv").read_text().splitlines()[0] == "update,reward,accuracy,length,reflective_words"
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len(jsonl.read(folder / "samples.jsonl")) == 300
    assert list((folder / "tensorboard").iterdir())


def test_first_update_of_each_rollout_agrees_with_the_sampler(zero, workdir):
    differences = [
        row["max_logprob_difference"] for row in read(workdir / "r1_zero") if "max_logprob_difference" in row
    ]
    assert len(differences) == 8
    assert max(differences) < 1e-3  # float32, thousands of tokens, unlikely ones included


def test_a_finished_stage_is_not_run_again(zero, workdir):
    stamp = (workdir / "r1_zero" / "metrics.jsonl").stat().st_mtime_ns
    assert policy.run(configs.load("r1_zero:tiny", SHORT), workdir) == zero
    assert (workdir / "r1_zero" / "metrics.jsonl").stat().st_mtime_ns == stamp


def test_another_config_in_the_same_folder_is_refused_by_name(zero, workdir):
    with pytest.raises(ValueError, match=r"another config \(seed: 0 there, 1 now\)"):
        policy.run(configs.load("r1_zero:tiny", [*SHORT, ("seed", "1")]), workdir)


def test_cold_start_examples_are_right_clean_and_from_training_problems(dev1, workdir):
    rows = jsonl.read(workdir / "stage1_coldstart" / fine_tuning.EXAMPLES)
    assert len(rows) == dev1["examples"] > 20
    for row in rows:
        problem = tasks.parse_linear(row["prompt"])
        assert not tasks.is_held_out(problem.a, problem.b)
        assert f"<answer> {problem.x} </answer>" in row["response"]
        words = set(re.findall(r"[a-z]+", row["response"])) - {"think", "answer"}
        language = {tasks.LEXICON[word] for word in words}
        assert language <= {tasks.LEXICON[row["prompt"].split()[0]]}
        assert row["provenance"]["trace"] and row["provenance"]["teacher"] == "r1_zero"


def test_a_few_cold_start_examples_already_teach_one_language(dev1):
    assert dev1["dev1"]["language_consistency"] > dev1["base"]["language_consistency"] + 0.2


def test_evaluate_gives_the_figures_of_the_stage_it_reads(zero, workdir):
    config = configs.load("evaluate:tiny", [*SHORT[1:], ("checkpoint", str(workdir / "r1_zero"))])
    figures = evaluate.run(config, workdir)
    assert abs(figures["pass@1"] - zero["r1_zero"]["pass@1"]) < 4 * figures["pass@1_se"]
    assert figures["samples"] == 300


@pytest.mark.parametrize("preset", ["tiny", "tiny_dense"])
def test_shipped_base_belongs_to_the_config_that_is_committed(preset):
    base = configs.load(f"stage0_base:{preset}")
    metadata = common.asset_metadata(stage0_base.asset_path(preset))
    assert metadata["key"] == stage0_base.base_key(base.model, base.pretrain, base.optimizer, base.pack, base.auxiliary)
    assert stage0_base.asset_path(preset).stat().st_size <= 3_000_000


def test_tiny_policy_keeps_its_size():
    model = configs.load("r1_zero:tiny").model
    total = tree.count(sharding.abstract(decoder.specs(model), "float32"))
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    idle = (model.n_routed_experts - model.num_experts_per_tok) * expert * model.num_moe_layers
    assert total <= 700_000
    assert total - idle <= 350_000


@pytest.mark.slow
def test_rebuilt_bases_of_teacher_and_student_do_not_meet(tmp_path, monkeypatch):
    load = configs.load
    few = [("pretrain.updates", "2"), ("pretrain.corpus_documents", "60"), ("pretrain.rows_per_update", "4")]

    def shorter(spec, overrides=()):
        return load(spec, [*overrides, *few] if spec.startswith("stage0_base") else overrides)

    monkeypatch.setattr(lineage.configs, "load", shorter)
    found = []
    for name in ("r1_zero:tiny", "student_rl:tiny"):
        config, _, mesh = common.prepare(load(name, [("rebuild_base", "true")]))
        found.append(lineage.base_weights(config, mesh, tmp_path).embedding.shape)
    assert found == [(196, 96), (196, 64)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base_tiny", "base_tiny_dense"]
