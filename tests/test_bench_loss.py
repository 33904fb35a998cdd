"""The loss benchmark: its figures at a small size, with and without the TPU's compiler."""

import sys

import pytest

from r1jax import config as configs
from r1jax.bench import loss as bench_loss
from r1jax.schema import replace


def test_the_tiled_loss_is_the_same_in_a_fraction_of_the_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)  # Python's own sign for a module that cannot be imported
    config = configs.load("bench_loss")
    model = replace(config.model, hidden_size=16, vocab_size=10000)
    found = bench_loss.run(replace(config, model=model), tmp_path)
    assert set(found) == {"cpu"}
    told = capsys.readouterr()
    assert "4096 tokens of 16, 10000 words, float32" in told.out
    assert told.err.splitlines() == ["bench_loss: no libtpu, so no figures for TPU; pip install 'r1jax[plan]'"]
    whole, tiled, ratio = (found["cpu"][name] for name in ("whole", "tiled", "tiled_over_whole"))
    logits = 4 * 4096 * 10000
    assert whole["temporary_bytes"] > logits
    assert tiled["temporary_bytes"] < whole["temporary_bytes"] / 10
    assert ratio["temporary_bytes"] == tiled["temporary_bytes"] / whole["temporary_bytes"]
    assert tiled["extra_rss_bytes"] < whole["extra_rss_bytes"] / 2
    assert tiled["output_bytes"] == whole["output_bytes"] >= 4 * 16 * (4096 + 10000)
    assert tiled["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert min(whole["call_s"], tiled["call_s"], tiled["processor_s"]) > 0
