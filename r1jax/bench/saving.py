"""Measure how long updates wait for checkpoints: written beside the work, and waited for whole."""

import math
import shutil
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from r1jax.core import rng, runtime, sharding
from r1jax.core.checkpoint import CheckpointStore
from r1jax.core.say import say
from r1jax.models import decoder
from r1jax.report import table
from r1jax.schema import Config, PackConfig
from r1jax.train import sft, step

WAYS = ("waited_for", "beside")
UPDATES = 3  # after a save, before the next one


def run(config: Config, workdir: Path) -> dict:
    """Returns by way of saving the seconds of pauses and of the updates after them, beside which one is written.

    A pause is the time between two updates that a save takes. `waited_for` waits until the checkpoint is on disk,
    `beside` goes on while it is written. The ways take turns, config.bench.repeats times, with config.model of random
    weights, its moments and SFT updates on random tokens. `ratio` is the longest pause of the second way over the
    longest of the first. The checkpoints are written below `workdir` and removed.
    """
    runtime.setup()
    folder = Path(workdir) / config.stage / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    mesh, network, pack = sharding.make_mesh(config.mesh), config.network, config.pack
    trainer = step.Trainer(network, config.optimizer, mesh, sft.make_loss(network), 1000)
    key = rng.key(config.seed, config.stage, "init")
    state = trainer.init(sharding.initialize(decoder.specs(config.model), key, "float32", mesh))
    batch = _batch(config.seed, config.model.vocab_size, pack)
    inverse = np.float32(1 / batch["tokens"].size)
    store, number = CheckpointStore(folder, keep=1), 0
    seconds: dict[str, dict[str, list[float]]] = {way: {"pause": [], "update": []} for way in WAYS}

    def update() -> float:
        nonlocal state
        begun = time.perf_counter()
        state, stats = trainer.update(state, batch, 1, inverse)
        jax.block_until_ready((state, stats))
        return time.perf_counter() - begun

    try:
        update()  # compiles
        alone = [update() for _ in range(UPDATES)]
        for turn in range(1 + config.bench.repeats):
            for way in WAYS:
                number += 1
                begun = time.perf_counter()
                store.save(number, {"params": state.params, "optimizer": state.optimizer}, {"update": number})
                if way == "waited_for":
                    store.wait()
                pause = time.perf_counter() - begun
                updates = [update() for _ in range(UPDATES)]
                store.wait()
                if turn:  # the first turn opens files and threads
                    seconds[way]["pause"].append(pause)
                    seconds[way]["update"] += updates
                    say(f"turn {turn}, {way}: waited {pause:.2f} s, updates {statistics.median(updates):.2f} s")
        store.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return _report(size, alone, seconds)


def _batch(seed: int, vocab_size: int, pack: PackConfig) -> dict[str, np.ndarray]:
    """Returns one micro-batch of random tokens, every one of which is trained."""
    shape = (1, pack.rows_per_micro_batch, pack.row_tokens)
    ids = np.random.default_rng(seed).integers(0, vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(pack.row_tokens, dtype=np.int32), shape)
    arrays = {"tokens": ids, "targets": np.roll(ids, -1, -1), "positions": positions}
    return arrays | {"segments": np.ones(shape, np.int32), "loss_mask": np.ones(shape, np.float32)}


def _report(size: int, alone: list[float], seconds: dict[str, dict[str, list[float]]]) -> dict:
    figures: dict = {"state_bytes": size, "update_alone_s": statistics.median(alone)}
    for way, measured in seconds.items():
        figures[way] = {
            "longest_pause_s": max(measured["pause"]),
            "median_pause_s": statistics.median(measured["pause"]),
            "median_update_after_s": statistics.median(measured["update"]),
            "longest_update_after_s": max(measured["update"]),
        }
    figures["ratio"] = figures["beside"]["longest_pause_s"] / figures["waited_for"]["longest_pause_s"]
    rows = [{"checkpoint": way.replace("_", " "), **figures[way]} for way in WAYS]
    title = f"{size / 1e9:.2f} GB a checkpoint; an update alone takes {figures['update_alone_s']:.2f} s"
    table.render(rows, ("checkpoint", *figures["beside"]), title)
    print(f"the longest pause is {figures['ratio']:.3f} of that with waiting")
    return figures
