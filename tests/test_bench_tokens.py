"""The benchmark of the token cache: its figures at a small size, and that it notices a row that is lost."""

import numpy as np
import pytest
from test_token_cache import words

from r1jax import config as configs
from r1jax.bench import tokens as bench_tokens
from r1jax.checkpoints import tokenizer as tokenizers
from r1jax.data import jsonl
from r1jax.recipe import token_cache
from r1jax.schema import DataConfig, replace

ROWS = 24


def test_a_second_start_reads_every_row_once_and_a_lost_row_is_seen(tmp_path):
    path = bench_tokens._file(tmp_path, ROWS)
    reading = token_cache.RowReading(path, "distill", DataConfig(), words())
    built, started = bench_tokens.build(reading, 1), bench_tokens.start(reading)
    assert built["examples"] == ROWS and built["peak_bytes"] > 0 and built["processor_s"] > 0
    assert started["updates"] == 2  # two epochs of one update
    assert started["numbers_sha256"] == bench_tokens._numbers_digest(range(ROWS))
    jsonl.write(path, [row for number, row in enumerate(bench_tokens.synthetic_rows(ROWS)) if number != ROWS - 1])
    assert bench_tokens.start(reading)["numbers_sha256"] == bench_tokens._numbers_digest(range(ROWS - 1))


def test_rows_are_of_the_size_that_makes_200000_of_them_a_gigabyte(tmp_path):
    size = bench_tokens._file(tmp_path, 100).stat().st_size / 100
    assert 1.1e9 < 200_000 * size < 1.2e9


def test_without_a_tokenizer_the_folder_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"give a folder with a tokenizer, --config.model.checkpoint=DIR"):
        bench_tokens.run(configs.load("bench_tokens"), tmp_path)


@pytest.mark.slow
def test_a_killed_build_loses_and_doubles_nothing_and_no_process_holds_the_rows(tmp_path):
    (tmp_path / "words").mkdir()
    words().save(tmp_path / "words")
    assert np.array_equal(tokenizers.from_folder(tmp_path / "words").encode("é 7"), words().encode("é 7"))
    config = configs.load("bench_tokens")
    model, bench = replace(config.model, checkpoint=str(tmp_path / "words")), replace(config.bench, repeats=1)
    figures = bench_tokens.run(replace(config, model=model, bench=replace(bench, samples=9000)), tmp_path)
    blocks = len(jsonl.parts(tmp_path / "bench_tokens" / "9000" / "examples.jsonl", token_cache.BLOCK_BYTES)[1])
    assert 0 < figures["killed_with_blocks"] < blocks
    assert figures["build"]["examples"] == 9000
    assert max(figures["build"]["worker_peak_bytes"], figures["start"]["peak_bytes"]) < 1.5e9
