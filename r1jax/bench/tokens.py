"""Measure the token cache: rows a second by workers, a build that is killed and started again, and a second start."""

import hashlib
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from r1jax.bench import measure
from r1jax.checkpoints import tokenizer as tokenizers
from r1jax.core.say import say
from r1jax.data import files, jsonl
from r1jax.recipe import fine_tuning, sft_rows, token_cache
from r1jax.report import table
from r1jax.schema import Config, DataConfig, PackConfig, SFTConfig

MODULE = "r1jax.bench.tokens"
PART = 4  # the rates by workers are those of one row in so many
KILLED_AT = 1 / 3  # of the blocks
CHECKED = 500  # one example in so many is compared with its row's tokens, made directly
SENTENCES, SENTENCES_OF_ROW = 4096, 75
PACK = PackConfig(row_tokens=8192, rows_per_micro_batch=8)
_NUMBER = re.compile(r"Problem (\d+):")
_WORDS = (
    "the of and so we have that this is not a value then let us check first second sum product for every number it "
    "follows from which means wait because if both sides are equal divide by two to get an answer again but consider "
    "case when n greater than zero maybe I made mistake here write equation as function polynomial degree root modulo "
    "prime factor triangle angle area circle radius probability event expected total remaining case therefore hence "
    "simplify expression substitute back original condition satisfied therefore final result integer positive"
).split()


def run(config: Config, workdir: Path) -> dict:
    """Returns the figures of config.bench.samples synthetic rows, tokenised as config.model.checkpoint does it.

    `rates` are rows a second of a quarter of the rows with one worker and with config.bench.threads, in turn, in
    config.bench.repeats rounds, with the processor seconds of both; `ratio` is the median of the rounds. `build` is the
    build of all rows that goes on after one was killed at a third of its blocks; `start` is a second start, up to the
    first batch. Both have the peak memory of a process. Raises ValueError without a folder with a tokenizer, and when a
    row is lost or doubled.
    """
    measure.require_memory_figures("bench_tokens")
    rows, threads, checkpoint = config.bench.samples, config.bench.threads, config.model.checkpoint
    if not checkpoint:
        raise ValueError("bench_tokens: give a folder with a tokenizer, --config.model.checkpoint=DIR")
    whole, part = (_file(Path(workdir), count) for count in (rows, max(1, rows // PART)))
    figures: dict = {"rows": rows, "bytes": whole.stat().st_size, "threads": threads, "cores": os.cpu_count()}
    say(f"bench_tokens: {rows} rows, {figures['bytes'] / 1e9:.2f} GB")
    rounds, ratios = [], []
    for _ in range(config.bench.repeats):
        built = []
        for workers in (1, threads):
            token_cache.remove(part)
            built.append(_in_own_process("build", part, checkpoint, workers))
        one, several = (max(1, rows // PART) / figures_of["seconds"] for figures_of in built)
        used = [figures_of["processor_s"] for figures_of in built]
        rounds.append({"one": one, "several": several, "processor_s": used})
        ratios.append(several / one)
        say(f"bench_tokens: rows a second {one:.1f} with one worker, {several:.1f} with {threads}")
    figures["rates"] = rounds
    figures["ratio"] = statistics.median(ratios)
    token_cache.remove(whole)
    figures["killed_with_blocks"] = _killed(whole, checkpoint, threads)
    figures["build"] = _in_own_process("build", whole, checkpoint, threads)
    started = time.monotonic()
    figures["start"] = _in_own_process("start", whole, checkpoint, threads)
    figures["start"]["process_s"] = time.monotonic() - started - figures["start"].pop("check_s")
    if figures["start"]["numbers_sha256"] != _numbers_digest(range(rows)):
        raise ValueError(f"bench_tokens: rows were lost or doubled: {figures}")
    _show(figures)
    return figures


def _file(workdir: Path, count: int) -> Path:
    """Returns a file of synthetic rows, written first if it is not there."""
    path = workdir / "bench_tokens" / str(count) / "examples.jsonl"
    if not path.exists():
        jsonl.write(path, synthetic_rows(count))
    return path


def synthetic_rows(count: int) -> Iterator[dict]:
    """Yields rows of about 5.5 kB, always the same: a numbered problem, and a thought of random sentences."""
    draw = random.Random(0)
    sentences = [
        " ".join(draw.choice(_WORDS) for _ in range(draw.randint(6, 14)))
        + f" {draw.randint(0, 9999)} = x_{draw.randint(0, 9)}.\n"
        for _ in range(SENTENCES)
    ]
    for number in range(count):
        thought = "".join(draw.choices(sentences, k=SENTENCES_OF_ROW))
        prompt = f"Problem {number}: {draw.choice(sentences)}"
        yield {"id": f"r{number}", "prompt": prompt, "response": f"<think>\n{thought}</think>\n\\boxed{{{number}}}"}


def _in_own_process(action: str, path: Path, checkpoint: str, workers: int) -> dict:
    return measure.in_own_process(
        MODULE, *_arguments(action, path, checkpoint, workers), what=f"bench_tokens' {action}"
    )


def _arguments(action: str, path: Path, checkpoint: str, workers: int) -> list[str]:
    return [action, str(path), checkpoint, str(workers)]


def _killed(path: Path, checkpoint: str, workers: int) -> int:
    """Starts a build, kills it when a third of its blocks are there, and returns how many those are."""
    blocks = len(jsonl.parts(path, token_cache.BLOCK_BYTES)[1])
    process = subprocess.Popen([sys.executable, "-m", MODULE, *_arguments("build", path, checkpoint, workers)])
    while token_cache.finished_blocks(path) < blocks * KILLED_AT and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return token_cache.finished_blocks(path)


def build(reading: token_cache.RowReading, workers: int) -> dict:
    """Returns seconds, examples, tokens, and the peak memory of this process and of its largest worker."""
    started, used = time.monotonic(), _processor_s()
    cache = token_cache.load(reading, workers)
    return {
        "seconds": time.monotonic() - started,
        "processor_s": _processor_s() - used,
        "examples": len(cache),
        "tokens": int(cache.lengths.sum(dtype=np.int64)),
        "peak_bytes": measure.peak(),
        "worker_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def start(reading: token_cache.RowReading) -> dict:
    """Returns the seconds of a second start up to its first batch, its peak memory, and a digest of the rows' numbers.

    The seconds include the digest of the rows, which a stage takes of its input. Raises ValueError for an example whose
    tokens are not those of its row.
    """
    started = time.monotonic()
    files.digest(str(reading.path))
    cache = token_cache.load(reading)
    fitting = cache.only(fine_tuning.fitting(cache.lengths, PACK.row_tokens))
    chosen, micro_batches = fine_tuning.plan_updates(fitting.lengths, SFTConfig(), PACK, reading.stage, 0)
    every_row = np.ones(PACK.rows_per_micro_batch, bool)
    fine_tuning.read_batch(fitting.only(chosen[0]), PACK, micro_batches, 1, every_row)
    result = {"seconds": time.monotonic() - started, "updates": len(chosen), "peak_bytes": measure.peak()}
    started, numbers = time.monotonic(), []
    for place in range(len(cache)):
        text = reading.tokenizer.decode(cache[place].tokens[:96])
        numbers += map(int, _NUMBER.findall(text)[:1])
    for place, row in enumerate(synthetic_rows(len(cache))):
        if place % CHECKED == 0:
            (item,) = sft_rows.items_of(row, reading.stage, reading.data, reading.tokenizer)
            cached = cache[place]
            if not (np.array_equal(item.tokens, cached.tokens) and np.array_equal(item.loss_mask, cached.loss_mask)):
                raise ValueError(f"example {place} has other tokens than its row")
    return result | {"numbers_sha256": _numbers_digest(numbers), "check_s": time.monotonic() - started}


def _processor_s() -> float:
    """Returns the processor seconds of this process and of the workers that have ended."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _numbers_digest(numbers: Iterable[int]) -> str:
    return hashlib.sha256(repr(list(numbers)).encode()).hexdigest()


def _show(figures: dict) -> None:
    built, second = figures["build"], figures["start"]
    row = {"rows": figures["rows"], "GB": figures["bytes"] / 1e9, "ratio": figures["ratio"]}
    row |= {"start_s": second["seconds"], "start_process_s": second["process_s"]}
    row |= {"peak_GB": max(built["peak_bytes"], built["worker_peak_bytes"], second["peak_bytes"]) / 1e9}
    table.render([row], tuple(row), "the token cache")


if __name__ == "__main__":
    action, path, checkpoint, workers = sys.argv[1:]
    reading = token_cache.RowReading(
        Path(path), "distill", DataConfig(template="auto"), tokenizers.from_folder(checkpoint)
    )
    print(json.dumps(build(reading, int(workers)) if action == "build" else start(reading)))
