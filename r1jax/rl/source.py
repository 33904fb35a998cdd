"""Where rollouts come from: drawn now, or ahead of the updates on older weights; a journal wraps either.

A rollout drawn ahead starts at update s and is drawn while the ones before it are trained on, with the weights of the
moment it was begun. How old they are is fixed by the schedule, not by who is faster: at most `grpo.rollouts_ahead`
rollouts. The loss needs no other form: its ratio is taken to the log-probabilities the tokens were drawn with.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from r1jax.models import decoder
from r1jax.rl import schedules
from r1jax.rl.journal import Journal, Rollout
from r1jax.rl.sampling import Sampling
from r1jax.rl.state import RunState


class RolloutSource:
    """Gives the scored rollouts of a run in order, drawn when they are asked for with the weights of that moment."""

    def __init__(self, run: RunState, sampling: Sampling, weights: Callable[[], decoder.Params]):
        """`weights` returns the policy of now as the sampler takes it."""
        self.run, self.sampling, self.weights = run, sampling, weights

    def warm_up(self) -> None:
        """Compiles the sampler and the reward models."""
        self.sampling.warm_up(self.weights(), self.run.programs)

    def __enter__(self) -> Self:
        self.sampling.open()
        return self

    def __exit__(self, *error) -> None:
        self.sampling.close()

    def rollout(self, start: int) -> Rollout:
        """Returns the rollout that starts at an update."""
        return self.sampling.draw(start, self.run.cursor.draw, self.weights(), start)

    def begin_following(self, start: int, rollout: Rollout) -> None:
        """Begins rollouts that may be drawn while `rollout`, which starts at an update, is trained on; here none."""

    def staleness(self, start: int, rollout: Rollout) -> dict[str, float]:
        """Returns the metric of how old the weights were that drew a rollout; {} where they never are."""
        return {}


class SourceAhead(RolloutSource):
    """Draws up to grpo.rollouts_ahead rollouts beside the updates; the sampler has devices of its own."""

    def __init__(self, run: RunState, sampling: Sampling, weights: Callable, holds: Callable[[int], bool]):
        """`holds` says whether the rollout that starts at an update is already stored, and need not be drawn."""
        super().__init__(run, sampling, weights)
        self._holds = holds
        self._ahead: dict[int, Future] = {}  # by the update at which the rollout starts
        self._frontier: tuple[int, int] | None = None  # (update, draw) of the first rollout that was not begun

    def __enter__(self) -> Self:
        super().__enter__()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        return self

    def __exit__(self, *error) -> None:
        """Ends the rollouts that are under way or queued, so that the process can end too."""
        try:
            self.sampling.sampler.cancelled.set()
            self._worker.shutdown(cancel_futures=True)
        finally:
            super().__exit__(*error)

    def rollout(self, start: int) -> Rollout:
        """Returns the rollout that starts at an update: the one begun earlier, else (first, or resumed) a new one."""
        begun = self._ahead.pop(start, None)
        if begun is None:
            return super().rollout(start)
        since = time.perf_counter()
        rollout = begun.result()  # its dispatches and its grading have deadlines of their own
        self.sampling.recorder.timer.add(rollout_wait_s=time.perf_counter() - since)
        return rollout

    def begin_following(self, start: int, rollout: Rollout) -> None:
        grpo, cursor = self.run.config.grpo, self.run.cursor
        following = start + schedules.updates_in_rollout(start, grpo.updates, grpo.updates_per_rollout)
        if self._frontier is None or self._frontier[0] < following:
            self._frontier = following, cursor.draw + rollout.draws
        limit = start + grpo.rollouts_ahead * grpo.updates_per_rollout
        while (first := self._frontier[0]) <= limit and first < grpo.updates:
            updates = schedules.updates_in_rollout(first, grpo.updates, grpo.updates_per_rollout)
            if not self._holds(first):
                arguments = (first, self._frontier[1], self.weights(), cursor.update)
                self._ahead[first] = self._worker.submit(self.sampling.draw, *arguments)
            self._frontier = first + updates, self._frontier[1] + updates * grpo.prompts_per_update

    def staleness(self, start: int, rollout: Rollout) -> dict[str, float]:
        """Returns the updates between the weights that drew the rollout and its first update.

        Raises RuntimeError when they are more than grpo.rollouts_ahead allows.
        """
        updates = start - min(sample.weight_version for sample in rollout.samples)
        bound = self.run.config.grpo.rollouts_ahead * self.run.config.grpo.updates_per_rollout
        if not 0 <= updates <= bound:
            raise RuntimeError(f"rollout {start}: its weights are {updates} updates old, at most {bound} are allowed")
        return {"staleness": float(updates)}


class JournalledSource:
    """A source whose rollouts are on disk before they are used, and are read from there by a resumed run."""

    def __init__(self, source: RolloutSource, journal: Journal):
        self.source, self.journal = source, journal
        self.sampling, self.warm_up, self.staleness = source.sampling, source.warm_up, source.staleness
        self._stored: Rollout | None = None

    def __enter__(self) -> Self:
        self.source.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.source.__exit__(*error)

    def rollout(self, start: int) -> Rollout:
        """Returns the rollout that starts at an update, and begins those that may be drawn beside its updates."""
        rollout = self.journal.read(start) or self.journal.write(start, self.source.rollout(start))
        self.source.begin_following(start, rollout)
        self._stored = rollout
        return rollout

    def store(self, start: int, rollout: Rollout) -> Rollout:
        """Returns the rollout, stored again if values were added to it."""
        return rollout if rollout is self._stored else self.journal.write(start, rollout)

    def prune(self, before: int) -> None:
        """Removes stored rollouts that start before an update."""
        self.journal.prune(before)
