"""Evaluations between the updates of a run: when they are due, the rows of their figures, and the best weights.

An evaluated update is also a checkpoint, and its row is written once that checkpoint is on disk. So whatever is in
evaluation.jsonl, and in the folder of the best weights, is of updates that a run which is started again has made. An
evaluation is made again only where a run was stopped before its row was written.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r1jax.core import hosts, preempt
from r1jax.core.checkpoint import CheckpointStore
from r1jax.core.metrics import EVALUATION_FILE, EvaluationLog, MetricsLog, Timer, read_evaluation
from r1jax.core.say import say
from r1jax.models import decoder
from r1jax.schema import TrainEvalConfig

BEST, CHECKPOINTS = "best", "checkpoints"  # FOLDER/best/checkpoints/ has the weights of the best evaluation
SAME = ("problems", "samples")  # figures that two evaluations have in common where they compare


Measure = Callable[[decoder.Params], Mapping[str, float]]  # float32 weights -> their figures on held-out problems


class Evaluations:
    """The evaluations that a run has made, and the weights of the best. With train_eval.every=0 it does nothing."""

    def __init__(self, folder: Path, settings: TrainEvalConfig, updates: int, name: str):
        """`updates` are those of the whole run, `name` is its name in messages."""
        self.folder, self._settings, self._updates, self._name = Path(folder), settings, updates, name
        self._rows: dict[int, Mapping[str, float]] = {}  # by update
        self._best: int | None = None  # the update whose weights are kept
        self._log = EvaluationLog(folder) if settings.every else None
        self._store = CheckpointStore(self.folder / BEST / CHECKPOINTS, keep=1) if settings.every else None

    def resume(self, update: int, weights: Callable[[], decoder.Params]) -> None:
        """Continues from the evaluations of a run that has made so many updates; `weights` returns its weights now.

        Rows and weights of later updates are dropped. The best weights are written where a stop came before that.
        """
        if self._log is None or self._store is None:
            return
        self._log.truncate(update)
        rows = hosts.decide(read_evaluation, self.folder, name=f"{self.folder / EVALUATION_FILE}")
        self._rows = {row["update"]: row for row in rows}
        self._store.drop_after(update)
        self._best = self._store.latest()
        if update in self._rows:
            self._keep_if_best(update, weights())

    def is_due(self, update: int) -> bool:
        """Returns whether the weights after an update are to be measured, and were not yet."""
        every = self._settings.every
        return every > 0 < update and (update % every == 0 or update == self._updates) and update not in self._rows

    def make(
        self,
        update: int,
        measure: Callable[[], Mapping[str, float]],
        params: decoder.Params,
        store: CheckpointStore,
        log: MetricsLog,
    ) -> None:
        """Measures the weights where that is due, and records their figures once their checkpoint is in `store`.

        `log` gets what the measurement took. Raises Preempted when the process was asked to end meanwhile.
        """
        if not self.is_due(update):
            return
        timer = Timer()
        figures = timer.run("evaluation", measure)
        hosts.raise_if_preempted("the figures of an evaluation")  # the notice may have ended workers that graded
        with preempt.deferred():
            store.wait()
            self.record(update, figures, params)
            log.write_timing(update, timer.take())
        log.send_evaluation(update, figures)

    def record(self, update: int, figures: Mapping[str, float], params: decoder.Params) -> None:
        """Writes the figures of the weights after an update, and begins to write the weights if they are the best.

        The checkpoint of that update has to be on disk. Of equal values the earlier counts.
        """
        assert self._log is not None
        self._log.write(update, figures)
        self._rows[update] = figures
        self._keep_if_best(update, params)
        metric = self._settings.metric
        value = (
            f"{metric} {figures[metric]:.4g}" if metric in figures else f"no {metric}, whose grader gives fractions,"
        )
        best = ", the best so far" if self._best == update else ""
        say(f"{self._name} update {update}: {value} on {figures['problems']:g} held-out problems{best}")

    def wait(self) -> None:
        """Returns when the best weights are on disk: before a later checkpoint is written."""
        if self._store is not None:
            self._store.wait()

    def close(self) -> None:
        """Waits as well, and closes the files."""
        if self._log is not None and self._store is not None:
            self._store.close()
            self._log.close()

    def _keep_if_best(self, update: int, params: decoder.Params) -> None:
        assert self._store is not None
        if self._best != update and self._value(update) > self._to_beat(update):
            record = {"update": update, "metric": self._settings.metric, "value": self._value(update)}
            self._store.save(update, {"params": params}, record)
            self._best = update

    def _value(self, update: int) -> float:
        """Returns the metric of an evaluation; minus infinity where it has none, which nothing is below."""
        value = self._rows.get(update, {}).get(self._settings.metric, math.nan)
        return -math.inf if math.isnan(value) else value

    def _to_beat(self, update: int) -> float:
        """Returns the value of the weights that are kept, minus infinity where the two do not compare."""
        if self._best is None:
            return -math.inf
        kept, row = self._rows.get(self._best, {}), self._rows[update]
        return self._value(self._best) if all(kept.get(name) == row.get(name) for name in SAME) else -math.inf


def best_of(folder: Path) -> dict[str, Any] | None:
    """Returns {update, metric, value} of the best weights in the folder of a run, None where there are none."""
    with contextlib.closing(CheckpointStore(Path(folder) / BEST / CHECKPOINTS, read_only=True)) as store:
        number = store.latest()
        return None if number is None else store.record(number)
