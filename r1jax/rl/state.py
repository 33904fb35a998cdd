"""The state of one RL run: weights, optimiser, reference and cursor, with the programs that move and score them."""

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from r1jax.core import preempt, runtime, sharding, tree
from r1jax.core.checkpoint import CheckpointStore
from r1jax.models import decoder
from r1jax.rewards.models.reward_model import RewardModel
from r1jax.rewards.pool import RewardPool
from r1jax.rl import schedules
from r1jax.rl.logprobs import Scorer
from r1jax.rl.rollout import PromptPhases
from r1jax.rl.settings import RunSettings, at_update
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.train import step
from r1jax.train.evaluations import Evaluations

# (sampler, weights in its form, graders) -> figures of these weights on held-out problems, by name.
MeasureBy = Callable[[RolloutSampler, decoder.Params, RewardPool], dict[str, float]]


@dataclass(frozen=True, eq=False)
class RunInputs:
    """What a run starts from, apart from its config."""

    tokenizer: Any  # has stop_ids and decode_batch
    mesh: Mesh  # of the trainer
    prompts: PromptPhases
    params: decoder.Params | None  # start weights; None where the folder has a checkpoint to go on from
    folder: Path
    sampler_mesh: Mesh | None = None  # devices of the sampler alone; None samples on `mesh`
    reward_models: Mapping[str, RewardModel] = field(default_factory=dict)  # by the task whose samples they score
    describe: Callable[[list[str]], dict[str, float]] = lambda texts: {}  # metrics of a rollout's texts
    on_update: Callable[[int, dict, dict], None] = lambda update, row, timing: None  # called after each metrics row
    measure: MeasureBy | None = None  # for train_eval.every


@dataclass
class Cursor:
    """How far a run has come. Together with the arrays this is all that a checkpoint holds."""

    update: int = 0  # policy updates made
    rollout_start: int = 0  # update at which the current rollout started
    draw: int = 0  # prompts drawn before the current rollout
    reference_update: int = 0  # rollout start at which the reference was last replaced
    skipped: int = 0  # updates skipped in a row until now


class OwnArrays(Protocol):
    """The arrays that an objective adds to a checkpoint."""

    def checkpoint_items(self) -> dict[str, Any]: ...

    def restore_targets(self) -> dict[str, Any]: ...

    def restore(self, items: dict[str, Any], update: int) -> None: ...


class RunState:
    """The policy with its optimiser, the frozen reference and the cursor."""

    def __init__(self, config: RunSettings, inputs: RunInputs, loss: step.Loss):
        self.config, self.mesh = config, inputs.mesh
        offloaded = config.grpo.offload_reference
        self.trainer = step.Trainer(config.network, config.optimizer, inputs.mesh, loss, config.grpo.updates)
        self.scorer = Scorer(config.network, inputs.mesh, offloaded=offloaded)
        placed = self.trainer.param_shardings
        self.reference_shardings = sharding.on_host(placed) if offloaded else placed
        self._copy = tree.copier(config.network.compute.compute_dtype, self.reference_shardings)
        # Until `restore` the state of a run that goes on is shapes alone.
        begins = inputs.params is not None
        self.state = self.trainer.init(inputs.params) if begins else self.trainer.restore_target()
        self.reference, self.cursor = None, Cursor()
        kept = config.checkpointing
        self.store = CheckpointStore(inputs.folder / "checkpoints", kept.keep, kept.keep_every)
        self._saved = Cursor()  # of the newest checkpoint
        self.evaluations = Evaluations(inputs.folder, config.train_eval, config.grpo.updates, config.stage)
        self.programs = runtime.ProgramSet()
        self.compiled: RunSettings | None = None  # for which the programs of the updates are compiled

    @property
    def settings(self) -> RunSettings:
        """The settings of the current rollout, whose responses and rows may be shorter than those of a later one."""
        return at_update(self.config, self.cursor.rollout_start)

    @property
    def params(self) -> decoder.Params:
        """The policy's float32 weights."""
        return self.state.params

    @property
    def finished(self) -> bool:
        return self.cursor.update >= self.config.grpo.updates

    def frozen_policy(self) -> decoder.Params:
        """Returns a copy of the policy in the compute dtype, placed as the reference is."""
        return self._copy(self.params)

    def warm_up(self, arrays: dict[str, np.ndarray], arguments: Any, scores: bool) -> None:
        """Compiles the update, and with `scores` the scorer, for batches such as `arrays`."""
        if scores or self.config.grpo.uses_reference or self.config.grpo.replay_check_every:
            self.scorer(self.frozen_policy() if self.reference is None else self.reference, arrays, 1, 1.0)
        self.trainer.compile(arrays, arguments)
        self.programs.add("update", lambda: self.trainer.compilations)
        self.programs.add("reference", lambda: self.scorer.compilations)

    def begin_rollout(self) -> int:
        """Returns the update at which the current rollout starts, after replacing the reference if that is due.

        It becomes the policy at the first rollout at or after each multiple of grpo.reference_refresh_updates.
        """
        first_update, grpo = self.cursor.rollout_start, self.config.grpo
        every = grpo.reference_refresh_updates if grpo.uses_reference else 0
        if first_update == self.cursor.update and schedules.reference_refresh_due(
            first_update, self.cursor.reference_update, every
        ):
            self.reference, self.cursor.reference_update = self.frozen_policy(), first_update
        return first_update

    def update(self, arrays: dict[str, np.ndarray], num_filled: int, arguments: Any) -> dict[str, float]:
        """Makes one policy update on the first `num_filled` micro-batches and returns its statistics."""
        self.state, stats = self.trainer.update(self.state, arrays, num_filled, arguments)
        return {name: float(value) for name, value in jax.device_get(stats).items()}

    def count_update(self) -> None:
        """Moves the cursor past an update. Raises RuntimeError if a program was compiled since the warm-up."""
        self.cursor.update += 1
        self.programs.check()

    def finish_rollout(self, draws: int) -> None:
        """Moves the cursor to the next rollout; `draws` prompts were drawn for the one just trained on."""
        self.cursor.rollout_start = self.cursor.update
        self.cursor.draw += draws

    def restore(self, objective: OwnArrays) -> None:
        """Loads the newest checkpoint; without one the policy becomes the reference, if there is a KL term.

        Evaluations go on from there as well. Raises ValueError where there are neither a checkpoint nor start weights.
        """
        number = self.store.latest()
        if number is None:
            if isinstance(self.state.update, jax.ShapeDtypeStruct):
                raise ValueError(f"{self.store.folder}: no checkpoint to go on from, and no start weights were given")
            self.reference = self.frozen_policy() if self.config.grpo.uses_reference else None
            self.evaluations.resume(0, lambda: self.params)
            return
        self.cursor = Cursor(**self.store.record(number))
        self._saved = replace(self.cursor)
        items = self.store.restore(number, self._targets() | objective.restore_targets())
        self.reference = items.get("reference")
        self.state = self.trainer.state(items["params"], items["optimizer"], self.cursor.update)
        objective.restore(items, self.cursor.update)
        self.evaluations.resume(self.cursor.update, lambda: self.params)

    def checkpoint_due(self) -> bool:
        every = self.config.checkpointing.every_updates
        return self.finished or not self.cursor.update % every or self.evaluations.is_due(self.cursor.update)

    def save(self, objective: OwnArrays) -> int:
        """Begins to write a checkpoint of weights, optimiser, reference, cursor and the objective's own arrays.

        Returns the update at which the rollout of the newest checkpoint on disk started: until this one is there too,
        a run that is stopped goes on with that one's rollout.
        """
        reference = {"reference": self.reference} if self.config.grpo.uses_reference else {}
        items = {"params": self.params, "optimizer": self.state.optimizer} | reference
        self.evaluations.wait()
        before, self._saved = self._saved, replace(self.cursor)
        self.store.save(self.cursor.update, items | objective.checkpoint_items(), vars(self._saved))
        return before.rollout_start

    @contextlib.contextmanager
    def stores_closed(self) -> Generator[None]:
        """Surrounds the updates: after them all that is being written is on disk, and the files are closed."""
        with contextlib.closing(self.store), contextlib.closing(self.evaluations):
            yield

    @contextlib.contextmanager
    def saved_when_preempted(self, objective: OwnArrays) -> Generator[None]:
        """Surrounds the updates: where one raises Preempted, those that no checkpoint has are saved first."""
        try:
            yield
        except preempt.Preempted:
            if self.cursor.update != self._saved.update:
                self.save(objective)
            raise

    def _targets(self) -> dict[str, Any]:
        """Returns the shapes and shardings of the arrays that `save` writes, without the objective's."""
        target = self.trainer.restore_target()
        targets = {"params": target.params, "optimizer": target.optimizer}
        if self.config.grpo.uses_reference:
            shapes = jax.eval_shape(self._copy, target.params)
            place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)  # noqa: E731
            targets["reference"] = jax.tree.map(place, shapes, self.reference_shardings)
        return targets
