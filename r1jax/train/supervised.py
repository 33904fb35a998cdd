"""The loop of supervised stages (pretraining, SFT): batches by update number, metrics, checkpoints, resume."""

import contextlib
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np

from r1jax.core import hosts, observe, preempt
from r1jax.core.checkpoint import CheckpointStore
from r1jax.core.metrics import MetricsLog, Timer
from r1jax.models import decoder, flops, utilisation
from r1jax.schema import TrainEvalConfig
from r1jax.train import guard, step
from r1jax.train.evaluations import Evaluations, Measure
from r1jax.train.step import Trainer, TrainState

Batch = tuple[dict[str, np.ndarray], int, Any]  # arrays [M, R, T], filled micro-batches, arguments of the loss


class _Timing(Timer):
    """The seconds and operations of the updates, and the seconds of checkpoints, since the last row."""

    def __init__(self, trainer: Trainer):
        super().__init__()
        self._trainer, self._peak = trainer, utilisation.peak(trainer.mesh)
        self._compilations = trainer.compilations

    @contextlib.contextmanager
    def update(self) -> Generator[None]:
        """Surrounds an update, the making of its batch included."""
        started = time.perf_counter()
        yield
        self.add(update_s=time.perf_counter() - started)

    def row(self) -> dict[str, float]:
        """Returns a row of timing; without MFU where the update was compiled meanwhile."""
        before, self._compilations = self._compilations, self._trainer.compilations
        return utilisation.with_mfu(self.take(), {"update": self._peak} if before == self._compilations else {})


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
    read: str = "loss_mask",
    evaluations: Evaluations | None = None,
    measure: Measure | None = None,
) -> tuple[decoder.Params, float]:
    """Returns (weights after the last update, its loss), continuing from the newest checkpoint in `store`.

    `start` returns the weights to begin with. It is called only without a checkpoint, and they are not kept.
    The loss is the newest finite one. Statistics are fetched, and skipped updates reported, every `log_every` updates
    and before a checkpoint. `read` is the array of a batch that is above 0 where a head is read. Where one of the
    `evaluations` is due, `measure` measures the weights. Raises ValueError when too many updates in a row were skipped,
    and Preempted, after a checkpoint, when the process was asked to end.
    """
    state, first, loss = resume(trainer, start, store)
    evaluations = evaluations or Evaluations(log.folder, TrainEvalConfig(), updates, name)
    evaluations.resume(first, lambda: state.params)

    def evaluate(update: int) -> None:
        if measure is not None:
            evaluations.make(update, lambda: measure(state.params), state.params, store, log)

    def save(update: int, items: dict[str, Any], record: dict[str, Any]) -> None:
        evaluations.wait()  # the best weights of before are on disk first
        store.save(update, items, record)

    in_a_row = store.record(first).get("skipped", 0) if first else 0
    skipped = guard.SkippedUpdates(name, trainer.config.max_skipped_updates, in_a_row)
    log.truncate(first)
    timing, trace = _Timing(trainer), observe.UpdateTrace(name, log.folder)
    waiting: list[dict] = []  # statistics of the updates since the last fetch, on the device
    with trace.running(first), hosts.in_step(), contextlib.ExitStack() as unsaved:
        evaluate(first)
        for update in range(first, updates):
            done, last = update + 1, update + 1 == updates
            trace.begin(done)
            logged = done % log_every == 0 or last
            saved = done % checkpoint_every == 0 or last or evaluations.is_due(done)
            with timing.update():
                batch = batch_at(update)
                state, stats = trainer.update(state, *batch)
                if update == first:  # until then, while the update is compiled, nothing would be lost
                    unsaved.enter_context(preempt.deferred())
                saved |= (ending := hosts.preempted("the end of an update", done))
                if logged or saved:
                    jax.block_until_ready(stats)
            timing.add(update_flops=flops.update(trainer.network, step.work(batch[0], read)).total)
            waiting.append({name: stats[name] for name in ("loss", "grad_norm", guard.SKIPPED)})
            if logged:
                row = {name: float(value) for name, value in jax.device_get(stats).items()}
                log.write(done, guard.recorded(row), timing.row())
                on_update(done, row["loss"])
            if logged or saved:
                fetched, waiting = jax.device_get(waiting), []
                for number, figures in enumerate(fetched, done - len(fetched) + 1):
                    skipped.note(number, figures)
                    loss = loss if figures[guard.SKIPPED] else float(figures["loss"])
            if saved:
                items = {"params": state.params, "optimizer": state.optimizer}
                record = {"update": done, "loss": loss, "skipped": skipped.in_a_row}
                timing.run("checkpoint", save, done, items, record)
            if ending and not last:
                raise preempt.Preempted
            trace.end(done, stats)
            evaluate(done)
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
