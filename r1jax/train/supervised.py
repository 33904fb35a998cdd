"""The loop of supervised stages (pretraining, SFT): batches by update number, metrics, checkpoints, resume."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from r1jax.core.checkpoint import CheckpointStore
from r1jax.core.metrics import MetricsLog
from r1jax.models import decoder
from r1jax.train import guard
from r1jax.train.step import Trainer, TrainState

Batch = tuple[dict[str, np.ndarray], int, Any]  # arrays [M, R, T], filled micro-batches, arguments of the loss


def fit(
    trainer: Trainer,
    start: Callable[[], decoder.Params],
    batch_at: Callable[[int], Batch],
    updates: int,
    store: CheckpointStore,
    log: MetricsLog,
    checkpoint_every: int,
    on_update: Callable[[int, float], None] = lambda update, loss: None,
    log_every: int = 10,
    name: str = "training",
) -> tuple[decoder.Params, float]:
    """Returns (weights after the last update, its loss), continuing from the newest checkpoint in `store`.

    `start` returns the weights to begin with. It is called only without a checkpoint, and they are not kept.
    The loss is the newest finite one. Statistics are fetched, and skipped updates reported, every `log_every` updates
    and before a checkpoint. Raises ValueError when too many updates in a row were skipped.
    """
    state, first, loss = resume(trainer, start, store)
    in_a_row = store.record(first).get("skipped", 0) if first else 0
    skipped = guard.SkippedUpdates(name, trainer.config.max_skipped_updates, in_a_row)
    log.truncate(first)
    waiting: list[dict] = []  # statistics of the updates since the last fetch, on the device
    for update in range(first, updates):
        state, stats = trainer.update(state, *batch_at(update))
        waiting.append({name: stats[name] for name in ("loss", "grad_norm", guard.SKIPPED)})
        done, last = update + 1, update + 1 == updates
        logged, saved = done % log_every == 0 or last, done % checkpoint_every == 0 or last
        if logged:
            row = {name: float(value) for name, value in jax.device_get(stats).items()}
            log.write(done, guard.recorded(row), {})
            on_update(done, row["loss"])
        if logged or saved:
            fetched, waiting = jax.device_get(waiting), []
            for number, figures in enumerate(fetched, done - len(fetched) + 1):
                skipped.note(number, figures)
                loss = loss if figures[guard.SKIPPED] else float(figures["loss"])
        if saved:
            items = {"params": state.params, "optimizer": state.optimizer}
            store.save(done, items, {"update": done, "loss": loss, "skipped": skipped.in_a_row})
    return state.params, loss


def resume(
    trainer: Trainer, start: Callable[[], decoder.Params], store: CheckpointStore
) -> tuple[TrainState, int, float]:
    """Returns (state, updates made, last loss) of the newest checkpoint, or a fresh state from the weights of `start`."""
    number = store.latest()
    if number is None:
        return trainer.init(start()), 0, float("nan")
    target = trainer.restore_target()
    items = store.restore(number, {"params": target.params, "optimizer": target.optimizer})
    return trainer.state(items["params"], items["optimizer"], number), number, store.record(number)["loss"]
