"""Claims about ablations: variants side by side, over one seed or several."""

import json
import math

import pytest

from r1jax import config as configs
from r1jax.recipe import inherited, policy
from r1jax.tools import ablation

SHORT = "grpo.updates=1 grpo.updates_per_rollout=1 grpo.prompts_per_update=2 grpo.group_size=4 sampler.slots=8"
FIELDS = [
    ("variants", f"('with r1_zero {SHORT} reward.language=1',)"),
    ("evaluation.samples_per_problem", "1"),
    ("evaluation.max_problems", "16"),
    ("evaluation.greedy", "false"),
]


def test_variants_run_once_a_seed_and_the_table_tells_means_and_spread(tmp_path):
    found = ablation.run(configs.load("ablation_language:tiny", [*FIELDS, ("seeds", "(3,4)")]), tmp_path)
    written = (tmp_path / "ablation" / "language" / "table.json").read_text()
    assert json.dumps(json.loads(written)) == json.dumps(found, sort_keys=True)  # as text: a share of nothing is NaN
    each = [
        json.loads((tmp_path / f"seed_{seed}" / "ablation" / "language" / "table.json").read_text()) for seed in (3, 4)
    ]
    assert list(found) == list(each[0]) == list(each[1]) == ["with"]
    for name, figures in found.items():
        one, two = (run[name]["mean_tokens"] for run in each)
        assert one != two  # the seeds differ
        assert figures["seeds"] == 2 and figures["mean_tokens"] == pytest.approx((one + two) / 2)
        assert figures["mean_tokens_sd"] == pytest.approx(abs(one - two) / 2**0.5)


def test_figures_that_a_run_lacks_and_texts_have_no_mean():
    runs = [{"a": 1.0, "b": 2, "c": "x"}, {"a": 2.0, "c": "x"}, {"a": 6.0, "b": 3, "c": "y"}]
    assert ablation.over_seeds(runs) == {"seeds": 3, "a": 3.0, "a_sd": pytest.approx(7**0.5)}
    assert ablation.over_seeds(runs[:1])["a_sd"] == 0.0
    nothing = ablation.over_seeds([{"a": 1.0}, {"a": float("nan")}])
    assert math.isnan(nothing["a"]) and math.isnan(nothing["a_sd"])


def test_a_seed_given_twice_and_a_malformed_variant_are_errors_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"config.seeds=\(1, 1\): a seed is given twice"):
        ablation.run(configs.load("ablation_language:tiny", [("seeds", "(1,1)")]), tmp_path)
    with pytest.raises(ValueError, match="is not NAME STAGE FIELD=VALUE"):
        ablation.run(configs.load("ablation_language:tiny", [("variants", "('zero',)"), ("seeds", "(1,2)")]), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["reward_helpful", "stage0_base", "evaluate"])
def test_a_stage_without_held_out_problems_is_no_variant(stage):
    with pytest.raises(ValueError, match="is not NAME STAGE FIELD=VALUE ...; stages: r1_zero"):
        ablation.parse(f"one {stage} seed=1")


def test_a_variant_that_held_nothing_out_is_an_error_and_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "run", lambda config, workdir: {"seconds": 1.0, "compute": 2.0})
    with pytest.raises(ValueError, match="with has no held-out problems to be compared on"):
        ablation.run(configs.load("ablation_language:tiny", FIELDS), tmp_path)


def test_a_variants_fields_win_over_what_the_ablation_hands_down():
    config = configs.load("ablation_language:tiny", [("evaluation.max_problems", "16"), ("seed", "3")])
    own = [("evaluation.max_problems", "5"), ("reward.language", "1")]
    variant = inherited.stage_config(config, "r1_zero:tiny", own)
    assert (variant.evaluation.max_problems, variant.reward.language, variant.seed) == (5, 1.0, 3)
    assert inherited.stage_config(config, "r1_zero:tiny").evaluation.max_problems == 16
