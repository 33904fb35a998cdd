"""The import benchmark: its figures, its refusals, and that an import stays below twice the largest file."""

import json

import pytest

from r1jax import config as configs
from r1jax.bench import checkpoint_import as bench_import
from r1jax.schema import replace

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 16384}


def test_an_import_takes_less_than_twice_the_largest_file_beside_the_parameters(tmp_path):
    config = configs.load("bench_import")
    model = replace(config.model, **SIZES, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    figures = bench_import.run(replace(config, model=model), tmp_path)
    assert figures["files"] >= 4
    assert figures["parameter_bytes"] == pytest.approx(
        2 * figures["checkpoint_bytes"], rel=0.001
    )  # float32 of bfloat16
    extra = figures["peak_rss_bytes"] - figures["rss_before_bytes"] - figures["parameter_bytes"]
    assert figures["extra_bytes"] == extra
    assert figures["ratio"] == extra / figures["largest_shard_bytes"] < 2
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_that_does_not_import_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    config = configs.load("bench_import", [("model.checkpoint", str(tmp_path))])
    with pytest.raises(ValueError, match="holds neither model.safetensors") as error:
        bench_import.run(config, tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="'mistral' is not known") as error:
        bench_import.run(config, tmp_path)
    assert "\n" not in str(error.value)
