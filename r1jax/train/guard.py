"""Reports updates that were skipped because their loss or gradient norm is not finite, and ends a run of too many."""

import math
from collections.abc import Mapping

from r1jax.core.say import say

SKIPPED = "skipped_updates"  # a statistic of every update: 1 where weights and moments were left as they were
_FIGURES = {  # figures that must be finite: name, and where to look when it is the first that is not
    "loss": ("loss", "the batch's rewards and log-probabilities and the weights the run started from"),
    "grad_norm": ("gradient norm", "optimizer.learning_rate, compute.compute_dtype and the scale of the rewards"),
    "value_loss": ("critic's loss", "the returns and ppo.critic_learning_rate"),
    "critic_grad_norm": ("critic's gradient norm", "ppo.critic_learning_rate and the scale of the rewards"),
}


class SkippedUpdates:
    """Counts the updates skipped in a row, reports each one on stderr, and ends a run with too many."""

    def __init__(self, run: str, limit: int, in_a_row: int = 0):
        """`run` is the start of each line; `limit` skipped updates in a row end the run, 0 is no limit."""
        self.run, self.limit, self.in_a_row = run, limit, in_a_row

    def note(self, update: int, stats: Mapping[str, float]) -> None:
        """Takes the statistics of an update (numbered from 1): SKIPPED, `loss`, `grad_norm`, and those of a critic.

        Raises ValueError when it is the `limit`-th skipped in a row.
        """
        if not stats[SKIPPED]:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        values = {name: float(stats[name]) for name in _FIGURES if name in stats}
        what, look = _FIGURES[next(name for name, value in values.items() if not math.isfinite(value))]
        figures = ", ".join(f"{_FIGURES[name][0]} {value:.4g}" for name, value in values.items())
        say(
            f"{self.run} update {update}: skipped, its {what} is not finite ({figures}); "
            f"weights and moments stay as they were; look at {look}"
        )
        if self.limit and self.in_a_row >= self.limit:
            raise ValueError(
                f"{self.run}: the last {self.in_a_row} updates, up to {update}, were skipped, the {what} is not "
                f"finite; look at {look}; the newest checkpoint holds finite weights "
                f"(optimizer.max_skipped_updates={self.limit})"
            )


def recorded(row: Mapping[str, float]) -> dict[str, float]:
    """Returns a metrics row as it is written: for a skipped update, without the figures that are not finite."""
    return {name: value for name, value in row.items() if not row.get(SKIPPED) or math.isfinite(value)}
