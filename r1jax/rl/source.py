"""Where rollouts come from: drawn when needed, or ahead of the updates on older weights; a journal wraps either.

A rollout drawn ahead is sampled while earlier ones are trained on, with the weights of the moment at which its sampling
began. The schedule fixes how old these are, whichever side is faster: at most `grpo.rollouts_ahead` rollouts. The loss
stays the same, because its ratio is taken to the log-probabilities with which the tokens were drawn.
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
    """Gives the scored rollouts of a run in order, each drawn when it is asked for, with the weights of that moment."""

    def __init__(self, run: RunState, sampling: Sampling, weights: Callable[[], decoder.Params]):
        """`weights` returns the current policy in the form that the sampler takes."""
        self.run, self.sampling, self.weights = run, sampling, weights

    def warm_up(self) -> None:
        """Compiles the sampler of the current rollout and the reward models."""
        self.sampling.warm_up(self.run.cursor.rollout_start, self.weights)
        self._make_room()

    def _make_room(self) -> None:
        """Frees the sampler's slots, whose memory the updates on the same devices then have."""
        self.sampling.sampler.drop_slots()

    def __enter__(self) -> Self:
        self.sampling.open()
        return self

    def __exit__(self, *error) -> None:
        self.sampling.close()

    def rollout(self, first_update: int) -> Rollout:
        """Returns the rollout that starts at an update."""
        rollout = self.sampling.draw(first_update, self.run.cursor.draw, self.weights, first_update)
        self._make_room()
        return rollout

    def evaluate(self) -> dict[str, float]:
        """Returns the figures of the current weights on held-out problems."""
        figures = self.sampling.evaluate(self.weights())
        self._make_room()
        return figures

    def begin_following(self, first_update: int, rollout: Rollout) -> None:
        """Begins the rollouts that may be drawn while this one is trained on; here there are none."""

    def staleness(self, first_update: int, rollout: Rollout) -> dict[str, float]:
        """Returns the metric `staleness`, the age of the weights that drew a rollout; {} if it is always 0."""
        return {}


class SourceAhead(RolloutSource):
    """Draws up to grpo.rollouts_ahead rollouts while updates run; the sampler has devices of its own."""

    def __init__(self, run: RunState, sampling: Sampling, weights: Callable, holds: Callable[[int], bool]):
        """`holds(update)` returns whether the rollout that starts at an update is stored and need not be drawn."""
        super().__init__(run, sampling, weights)
        self._holds = holds
        self._ahead: dict[int, Future] = {}  # by the update at which the rollout starts
        self._frontier: tuple[int, int] | None = None  # (update, draw) of the first rollout that was not begun

    def _make_room(self) -> None:
        """Keeps the slots: the sampler has devices of its own."""

    def __enter__(self) -> Self:
        super().__enter__()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        return self

    def __exit__(self, *error) -> None:
        """Cancels rollouts that are running or queued, so that the process can end."""
        try:
            self.sampling.sampler.cancelled.set()
            self._worker.shutdown(cancel_futures=True)
        finally:
            super().__exit__(*error)

    def rollout(self, first_update: int) -> Rollout:
        """Returns the rollout that was begun earlier, or, at the start of a run or after a resume, a new one."""
        future = self._ahead.pop(first_update, None)
        if future is None:
            return super().rollout(first_update)
        begun = time.perf_counter()
        rollout = future.result()  # its dispatches and its grading have deadlines of their own
        self.sampling.recorder.timer.add(rollout_wait_s=time.perf_counter() - begun)
        return rollout

    def evaluate(self) -> dict[str, float]:
        """Returns the same, measured after the rollouts that were begun: the sampler does one thing at a time."""
        return self._worker.submit(self.sampling.evaluate, self.weights()).result()

    def begin_following(self, first_update: int, rollout: Rollout) -> None:
        grpo, cursor = self.run.config.grpo, self.run.cursor
        following = first_update + schedules.updates_in_rollout(first_update, grpo.updates, grpo.updates_per_rollout)
        if self._frontier is None or self._frontier[0] < following:
            self._frontier = following, cursor.draw + rollout.draws
        limit = first_update + grpo.rollouts_ahead * grpo.updates_per_rollout
        while (first := self._frontier[0]) <= limit and first < grpo.updates:
            updates = schedules.updates_in_rollout(first, grpo.updates, grpo.updates_per_rollout)
            if not self._holds(first):
                of_now = self.weights()
                arguments = (first, self._frontier[1], lambda of_now=of_now: of_now, cursor.update)
                self._ahead[first] = self._worker.submit(self.sampling.draw, *arguments)
            self._frontier = first + updates, self._frontier[1] + updates * grpo.prompts_per_update

    def staleness(self, first_update: int, rollout: Rollout) -> dict[str, float]:
        """Returns the updates between the weights that drew the rollout and its first update.

        Raises RuntimeError when they are more than grpo.rollouts_ahead allows.
        """
        updates = first_update - min(sample.weight_version for sample in rollout.samples)
        bound = self.run.config.grpo.rollouts_ahead * self.run.config.grpo.updates_per_rollout
        if not 0 <= updates <= bound:
            raise RuntimeError(
                f"rollout {first_update}: its weights are {updates} updates old, at most {bound} are allowed"
            )
        return {"staleness": float(updates)}


class JournalledSource:
    """A source that writes each rollout to disk before it is used; a resumed run reads it from there."""

    def __init__(self, source: RolloutSource, journal: Journal):
        self.source, self.journal = source, journal
        self.sampling, self.warm_up, self.staleness = source.sampling, source.warm_up, source.staleness
        self.evaluate = source.evaluate
        self._stored: Rollout | None = None

    def __enter__(self) -> Self:
        self.source.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.source.__exit__(*error)

    def rollout(self, first_update: int) -> Rollout:
        """Returns the rollout that starts at an update, and begins those that may be drawn during its updates."""
        rollout = self.journal.read(first_update) or self.journal.write(first_update, self.source.rollout(first_update))
        self.source.begin_following(first_update, rollout)
        self._stored = rollout
        return rollout

    def store(self, first_update: int, rollout: Rollout) -> Rollout:
        """Returns the rollout, and stores it again if values were added to it."""
        return rollout if rollout is self._stored else self.journal.write(first_update, rollout)

    def prune(self, before: int) -> None:
        """Removes stored rollouts that start before an update."""
        self.journal.prune(before)
