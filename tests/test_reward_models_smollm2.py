"""Reward models from SmolLM2-135M on real pairs and labels: frozen trunk, head and last blocks, two cores, minutes each."""

import json
import time

import numpy as np
import pytest

from r1jax import launch
from r1jax.data import jsonl

FIELDS = {  # of the three runs beside the preset's
    "safety": {"data.max_rows": 1200, "reward_model.response_tokens": 64, "reward_model.epochs": 4},
    "known_rule": {"data.max_rows": 240, "reward_model.response_tokens": 40, "reward_model.prompt_tokens": 16},
    "helpful": {"data.max_rows": 400, "reward_model.response_tokens": 48, "reward_model.prompt_tokens": 32},
}
FOUND: dict[str, dict] = {}  # by run


def measured(name: str, kind: str, path, smollm2_folder, tmp_path, results) -> dict:
    """Returns the held-out figures of one run, which are also kept with its command."""
    fields = {"model.checkpoint": smollm2_folder, "data.path": path} | FIELDS[name]
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    out, started = tmp_path / "figures.json", time.monotonic()
    command = [f"--config=reward_{kind}:smollm2_135m", *flags]
    assert launch.main([*command, f"--workdir={tmp_path}/runs", f"--json={out}"]) == 0
    figures = json.loads(out.read_text())
    told = [
        f"--config=reward_{kind}:smollm2_135m",
        "--config.model.checkpoint=SMOLLM2",
        f"--config.data.path={path.name}",
    ]
    told += [f"--config.{field}={value}" for field, value in FIELDS[name].items()]
    FOUND[name] = {
        "command": f"python -m r1jax.launch {' '.join(told)}",
        "wall_s": round(time.monotonic() - started, 1),
    }
    FOUND[name] |= {key: figures[key] for key in ("examples", "left_out", "loss", "held_out")}
    results("reward_models", dict(FOUND))
    return figures["held_out"]


@pytest.mark.slow
def test_safety_model_tells_unsafe_texts_by_three_standard_errors(shared_data, smollm2_folder, tmp_path, results):
    path = shared_data / "pref" / "moderation_1680.jsonl"
    found = measured("safety", "safety", path, smollm2_folder, tmp_path, results)
    assert found["auc"] - 3 * found["auc_se"] > 0.5


@pytest.mark.slow
def test_helpful_model_learns_that_words_have_an_order(shared_data, smollm2_folder, tmp_path, results):
    """The known rule: of two texts with the same words, the one whose words stand in their own order is preferred."""
    rows = jsonl.read(shared_data / "pref" / "flan_cot_strategyqa.jsonl", required=("prompt", "cot"))
    draw, pairs = np.random.default_rng(0), []
    for row in rows:
        words = row["cot"].split()
        shuffled = " ".join(draw.permutation(words))
        if 12 <= len(words) <= 28 and shuffled != row["cot"]:
            pairs.append({"id": row["id"], "prompt": row["prompt"], "chosen": row["cot"], "rejected": shuffled})
    path = tmp_path / "word_order.jsonl"
    jsonl.write(path, pairs)
    found = measured("known_rule", "helpful", path, smollm2_folder, tmp_path, results)
    assert found["accuracy"] >= 0.95


@pytest.mark.slow
def test_helpful_model_on_real_pairs_tells_its_accuracy_with_an_interval(
    shared_data, smollm2_folder, tmp_path, results
):
    folder, path = shared_data / "pref", tmp_path / "hh_and_oasst.jsonl"
    rows = [row for name in ("hh_harmless_test", "oasst_en_100_pairs") for row in jsonl.read(folder / f"{name}.jsonl")]
    jsonl.write(path, rows)
    found = measured("helpful", "helpful", path, smollm2_folder, tmp_path, results)
    assert len(found["sources"]) == 2
    assert sum(one["pairs"] for one in found["sources"].values()) == found["pairs"] >= 60
    assert found["accuracy_low"] > 0.5
    for one in (found, *found["sources"].values()):
        assert 0 <= one["accuracy_low"] <= one["accuracy"] <= one["accuracy_high"] <= 1
