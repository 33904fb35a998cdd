"""Claims about docs/algorithms.md: its code runs as it stands there, and does what it says."""

import pathlib
import re

import numpy as np
import pytest

from r1jax import config as configs
from r1jax.core import tree
from r1jax.core.metrics import read
from r1jax.recipe import lineage
from r1jax.rewards.compose import PART_NAMES
from r1jax.rl.journal import Rollout
from r1jax.sampler.sample import RolloutSample

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "algorithms.md"
FIELDS = {
    "grpo.updates": 3,
    "grpo.updates_per_rollout": 3,
    "grpo.prompts_per_update": 4,
    "grpo.group_size": 4,
    "grpo.kl_coef": 0,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_updates": 0,
    "sampler.slots": 16,
}


@pytest.fixture(scope="module")
def page():
    """Returns the names that the page's code defines, and the code."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names, code


def test_an_algorithm_is_two_methods_in_forty_lines(page):
    names, code = page
    methods = {name for name in vars(names["BestOfGroup"]) if not name.startswith("_")}
    assert methods == {"fields", "advantages", "loss"}
    assert len([line for line in code.splitlines() if line.strip()]) <= 40


def test_only_the_best_samples_of_groups_whose_rewards_differ_are_trained_on(page):
    config = configs.load("r1_zero:tiny", [("grpo.group_size", "3"), ("grpo.kl_coef", "0")])
    accuracies, scorable = [1, 0, 1, 0, 0, 0, 1, 0, 0], [True] * 6 + [False, True, True]
    samples = [
        RolloutSample(
            request_id=index // 3,
            sample_index=index % 3,
            prompt_ids=np.asarray([1], np.int32),
            token_ids=np.asarray([2, 3], np.int32),
            logps=np.zeros(2, np.float32),
            behaviour_logps=np.zeros(2, np.float32),
            finish_reason="stop",
            weight_version=0,
        )
        for index in range(9)
    ]
    parts = np.zeros((9, len(PART_NAMES)), np.float32)
    parts[:, PART_NAMES.index("accuracy")] = accuracies
    objective = page[0]["BestOfGroup"](config)
    advantages = objective.advantages(Rollout(samples, parts, np.asarray(scorable), 3), 0)
    assert advantages.trained.tolist() == [True, False, True] + [False] * 6
    assert advantages.in_mean.tolist() == advantages.trained.tolist()


def test_the_pages_run_moves_the_shipped_base_and_writes_its_rows(page, tmp_path):
    config = configs.load("r1_zero:tiny", [(name, str(value)) for name, value in FIELDS.items()])
    trained = page[0]["run"](config, tmp_path)
    rows = read(tmp_path / "best_of_group")
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert all("nats" in row and "kl" not in row and "max_logprob_difference" not in row for row in rows)
    assert 0 < sum(row["tokens"] for row in rows) < 3 * rows[0]["sampled_tokens"]  # the best samples alone
    assert any(row["grad_norm"] > 0 for row in rows)
    mesh = page[0]["common"].prepare(config)[2]
    assert tree.digest(trained) != tree.digest(lineage.start_weights(config, mesh, tmp_path))
