"""Supervised training in the folder of a stage: resumed from its checkpoints, with metrics and live progress."""

import contextlib
from collections.abc import Callable

from r1jax.core.metrics import MetricsLog
from r1jax.models import decoder
from r1jax.recipe import stage_report
from r1jax.recipe.common import StageFolder
from r1jax.recipe.progress import Progress
from r1jax.schema import TrainEvalConfig
from r1jax.train import supervised
from r1jax.train.evaluations import Evaluations, Measure
from r1jax.train.step import Trainer


def fit(
    folder: StageFolder,
    trainer: Trainer,
    start: Callable[[], decoder.Params],
    batch_at: Callable[[int], supervised.Batch],
    updates: int,
    name: str,
    log_every: int = 1,
    read: str = "loss_mask",
    measure: Measure | None = None,
    work: stage_report.StageWork | None = None,
) -> tuple[decoder.Params, float]:
    """Returns (weights after the last update, its loss), as train.supervised.fit from the weights of `start`.

    `name` is the result's name, `read` as there. With `measure` the weights are measured every train_eval.every
    updates. `work` is what the stage's page shows.
    """
    watch = folder.config.watch
    store, log = folder.checkpoints(), MetricsLog(folder.path, wandb_project=watch.wandb_project)
    if work is not None:
        work.updates = updates
    settings = folder.config.train_eval if measure else TrainEvalConfig()
    evaluations = Evaluations(folder.path, settings, updates, folder.config.stage)
    with (
        log,  # is closed last: W&B may let it wait when all else is on disk
        contextlib.closing(store),
        contextlib.closing(evaluations),
        Progress(name, updates) as progress,
    ):
        return supervised.fit(
            trainer,
            start,
            batch_at,
            updates,
            store,
            log,
            folder.config.checkpointing.every_updates,
            lambda update, loss: progress.update(update, loss=loss),
            log_every=log_every,
            name=name,
            read=read,
            evaluations=evaluations,
            measure=measure,
        )
