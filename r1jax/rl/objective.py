"""What a run learns from its rollouts. A new algorithm is an `Objective` with two methods (docs/algorithms.md)."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from r1jax.models import decoder, flops
from r1jax.rl import losses, schedules
from r1jax.rl.journal import Rollout
from r1jax.rl.logprobs import Scorer
from r1jax.rl.rollout import Advantages, compute_advantages
from r1jax.rl.settings import RunSettings
from r1jax.rl.state import RunState
from r1jax.train import step


@dataclass(frozen=True, eq=False)
class Batch:
    """The batch of one update."""

    arrays: dict[str, np.ndarray]  # [M, R, T] by name
    num_filled: int  # leading micro-batches that hold tokens
    last: bool  # whether it is the last of its rollout
    figures: dict[str, float]  # metrics measured while it was made


class Objective:
    """The advantages of a rollout and the loss of a batch; the other methods have defaults that fit most algorithms."""

    fields: tuple[str, ...] = ("advantage", "behaviour_logp", "weight")  # per-token values in a batch

    def advantages(self, rollout: Rollout, first_update: int) -> Advantages:
        """Returns the advantages of the rollout that starts at `first_update`, and which samples are trained on."""
        raise NotImplementedError

    def loss(self, params: decoder.Params, micro: dict[str, jax.Array], arguments: Any):
        """Returns (loss sum over tokens, statistics) of a micro-batch [R, T]; traced under jit.

        `micro` has tokens, targets, positions, segments, loss_mask and `fields`. Statistics are sums, of which `tokens`
        is the number of trained tokens, or maxima if their name begins with max_.
        """
        raise NotImplementedError

    def arguments(self, first_update: int) -> Any:
        """Returns the loss arguments of a rollout: numbers that may change without compiling again."""
        return None

    def update(self, run: RunState, batch: Batch, first_update: int) -> dict[str, float]:
        """Makes one update and returns its statistics."""
        return run.update(batch.arrays, batch.num_filled, self.arguments(first_update))

    def flops(self, run: RunState, batch: Batch) -> float:
        """Returns the model's floating-point operations of an update (models/flops.py)."""
        return flops.update(run.config.network, step.work(batch.arrays)).total

    def scorers(self, run: RunState) -> dict[str, tuple[Scorer, decoder.Params]]:
        """Returns the scorer and weights of each per-token value that a rollout needs before its first update."""
        return {}

    def warm_up(self, run: RunState, arrays: dict[str, np.ndarray]) -> None:
        """Compiles every program that runs on a batch."""
        run.warm_up(arrays, self.arguments(0), scores=bool(self.scorers(run)))

    def checkpoint_items(self) -> dict[str, Any]:
        """Returns the objective's own arrays for a checkpoint."""
        return {}

    def restore_targets(self) -> dict[str, Any]:
        """Returns the shapes and shardings of `checkpoint_items`."""
        return {}

    def restore(self, items: dict[str, Any], update: int) -> None:
        """Takes over restored `checkpoint_items`, as they were after `update` updates."""


class GroupObjective(Objective):
    """GRPO and its relatives: advantages within groups of samples of one prompt, the loss that config.grpo names."""

    def __init__(self, config: RunSettings):
        self.config, self.fields = config, losses.fields(config.grpo)
        self._loss = losses.make_loss(config.network, config.grpo, trained_chunk=config.pack.trained_chunk)

    def loss(self, params: decoder.Params, micro: dict[str, jax.Array], arguments: Any):
        return self._loss(params, micro, arguments)

    def advantages(self, rollout: Rollout, first_update: int) -> Advantages:
        """Returns advantages over whole groups, computed before samples are split into mini-batches."""
        longest = schedules.max_new_tokens(self.config.sampler, first_update)
        return compute_advantages(rollout, self.config, longest, schedules.kl_coef(self.config.grpo, first_update))

    def arguments(self, first_update: int) -> losses.PolicyLossArguments:
        grpo = self.config.grpo
        return losses.arguments(grpo, schedules.kl_coef(grpo, first_update), self.config.sampler.temperature)

    def scorers(self, run: RunState) -> dict[str, tuple[Scorer, decoder.Params]]:
        """Returns the scorers of the policy before its updates, and of the reference if the reward has a KL term."""
        grpo, scorers = self.config.grpo, {}
        if grpo.old_logp == "recomputed":
            scorers["old_logp"] = run.scorer, run.frozen_policy()
        if grpo.uses_reference and grpo.kl_placement == "reward":
            scorers["reference_logp"] = run.scorer, run.reference
        return scorers
