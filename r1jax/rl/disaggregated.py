"""Training and sampling on separate devices: rollouts run ahead of the updates, on older weights, by a bounded number.

The rollout that starts at update s is drawn while the ones before it are trained on, with the weights of the moment it
was begun. How old they are is fixed by the schedule, not by who is faster: `grpo.rollouts_ahead` rollouts. The loss
needs no other form: its ratio is taken to the log-probabilities the tokens were drawn with, whatever the weights were.
"""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import jax
from jax.sharding import Mesh

from r1jax.core import tree
from r1jax.rewards.pool import RewardPool
from r1jax.rl import schedules
from r1jax.rl.journal import Rollout
from r1jax.rl.loop import PolicyTraining
from r1jax.rl.rollout import Judgement


class DisaggregatedTraining(PolicyTraining):
    """The loop of `PolicyTraining` with the sampler on `sampler_mesh`, whose devices the trainer's mesh does not use."""

    def __init__(self, *arguments, sampler_mesh: Mesh, **more):
        super().__init__(*arguments, sampler_mesh=sampler_mesh, **more)
        shared = set(self.mesh.devices.flat) & set(sampler_mesh.devices.flat)
        if shared:
            raise ValueError(f"disaggregated: {len(shared)} devices are in config.mesh and in config.sampler_mesh")
        self._snapshot = tree.copier(self.config.model.compute_dtype, self.trainer.param_shardings)
        self._ahead: dict[int, Future] = {}  # by the update at which the rollout starts
        self._frontier: tuple[int, int] | None = None  # (update, draw) of the first rollout that was not begun

    def sampler_weights(self):
        """Returns the policy in the compute dtype on the sampler's devices; the copy runs beside what follows."""
        return jax.device_put(self._snapshot(self.state.params), self.sampler.engine.param_shardings)

    def next_rollout(self, start: int, pool: RewardPool) -> Rollout:
        """Returns the rollout that starts at an update: the one begun earlier, else (first, or resumed) a new one."""
        begun = self._ahead.pop(start, None)
        if begun is None:
            return super().next_rollout(start, pool)
        since = time.perf_counter()
        scored = begun.result()  # its dispatches and its grading have deadlines of their own
        self.timer.add(rollout_wait_s=time.perf_counter() - since)
        return scored

    def look_ahead(self, scored: Rollout, start: int, pool: RewardPool) -> None:
        """Begins the rollouts that may run while this one is trained on."""
        grpo = self.config.grpo
        following = start + schedules.updates_in_rollout(start, grpo.updates, grpo.updates_per_rollout)
        draw = self.cursor.draw + scored.draws
        if self._frontier is None or self._frontier[0] < following:
            self._frontier = following, draw
        limit = start + grpo.rollouts_ahead * grpo.updates_per_rollout
        while (first := self._frontier[0]) <= limit and first < grpo.updates:
            updates = schedules.updates_in_rollout(first, grpo.updates, grpo.updates_per_rollout)
            if not self.journal.holds(first):
                arguments = (first, pool, self._frontier[1], self.sampler_weights(), self.cursor.update)
                self._ahead[first] = self._worker.submit(self.roll_out, *arguments)
            self._frontier = first + updates, self._frontier[1] + updates * grpo.prompts_per_update

    def judge(self, scored: Rollout, start: int) -> tuple[Judgement, dict[str, float]]:
        """Adds `staleness`, the updates between the weights that drew the rollout and its first update."""
        judged, summary = super().judge(scored, start)
        staleness = start - min(sample.weight_version for sample in scored.samples)
        bound = self.config.grpo.rollouts_ahead * self.config.grpo.updates_per_rollout
        if not 0 <= staleness <= bound:
            raise RuntimeError(f"rollout {start}: its weights are {staleness} updates old, at most {bound} are allowed")
        return judged, summary | {"staleness": float(staleness)}

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """Ends the rollouts that are under way or queued when the loop is left, so that the process can end too."""
        with ThreadPoolExecutor(1, thread_name_prefix="rollout") as self._worker:
            try:
                yield
            finally:
                self.sampler.cancelled.set()
                self._worker.shutdown(cancel_futures=True)
