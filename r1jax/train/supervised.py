"""The loop of supervised stages (pretraining, SFT): a pure function update -> batch, metrics, checkpoints, resume."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from r1jax.core.checkpoint import CheckpointStore
from r1jax.core.metrics import MetricsLog
from r1jax.models import decoder
from r1jax.train.step import Trainer, TrainState

Batch = tuple[dict[str, np.ndarray], int, Any]  # arrays [M, R, T], filled micro-batches, arguments of the loss


def fit(
    trainer: Trainer,
    params: decoder.Params,
    batch_at: Callable[[int], Batch],
    updates: int,
    store: CheckpointStore,
    log: MetricsLog,
    checkpoint_every: int,
    on_update: Callable[[int, float], None] = lambda update, loss: None,
    log_every: int = 10,
) -> tuple[decoder.Params, float]:
    """Returns (weights after the last update, its loss), going on from the newest checkpoint in `store`."""
    state, first, loss = resume(trainer, params, store)
    log.truncate(first)
    for update in range(first, updates):
        state, stats = trainer.update(state, *batch_at(update))
        done, last = update + 1, update + 1 == updates
        if done % log_every == 0 or last:
            stats = {name: float(value) for name, value in jax.device_get(stats).items()}
            loss = stats["loss"]
            log.write(done, stats, {})
            on_update(done, loss)
        if done % checkpoint_every == 0 or last:
            items = {"params": state.params, "optimizer": state.optimizer}
            store.save(done, items, {"update": done, "loss": loss})
    return state.params, loss


def resume(trainer: Trainer, params: decoder.Params, store: CheckpointStore) -> tuple[TrainState, int, float]:
    """Returns (state, updates made, last loss) of the newest checkpoint, or a fresh state from `params`."""
    number = store.latest()
    if number is None:
        return trainer.init(params), 0, float("nan")
    target = trainer.restore_target()
    items = store.restore(number, {"params": target.params, "optimizer": target.optimizer})
    return trainer.state(items["params"], items["optimizer"], number), number, store.record(number)["loss"]
