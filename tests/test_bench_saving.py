"""The benchmark of checkpoints at a small size: both ways of saving are measured and nothing stays on disk."""

import small

from r1jax import config as configs
from r1jax.bench import saving
from r1jax.schema import PackConfig, replace


def test_both_ways_are_measured_and_the_checkpoints_are_removed(tmp_path, capsys):
    config = configs.load("bench_saving", [("bench.repeats", "2")])
    pack = PackConfig(row_tokens=32, rows_per_micro_batch=1)
    config = replace(config, model=small.MIXTURE.model, compute=small.MIXTURE.compute, pack=pack)
    figures = saving.run(config, tmp_path)
    assert figures["state_bytes"] > 3 * 4 * 32 * 16  # weights and two moments of the embedding alone
    for way in saving.WAYS:
        assert 0 < figures[way]["median_pause_s"] <= figures[way]["longest_pause_s"]
        assert figures[way]["median_update_after_s"] > 0
    assert figures["ratio"] == figures["beside"]["longest_pause_s"] / figures["waited_for"]["longest_pause_s"]
    assert list((tmp_path / "bench_saving").iterdir()) == []
    assert "the longest pause is" in capsys.readouterr().out
