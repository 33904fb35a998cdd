"""PPO, the baseline that GRPO is measured against: a critic as large as the policy, GAE, per-token KL in the reward.

Source: arXiv 1707.06347; DeepSeek-R1, appendix A.3. The loop, the sampler, the rewards and the policy's update are the
same as for GRPO; only the advantages come from elsewhere.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from scipy.signal import lfilter

from r1jax.core import tree
from r1jax.models import decoder, flops
from r1jax.rl import logprobs, schedules
from r1jax.rl.journal import Rollout
from r1jax.rl.logprobs import Scorer
from r1jax.rl.objective import Batch, GroupObjective
from r1jax.rl.rollout import Advantages, token_kl
from r1jax.rl.settings import RunSettings
from r1jax.rl.state import RunInputs, RunState
from r1jax.schema import Network, replace
from r1jax.train import guard, step

CRITIC_FIELDS = ("value", "return")  # per-token values of the critic's batch besides `weight`


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, gae_lambda: float) -> np.ndarray:
    """Returns the advantages of one sample's tokens, float64 [length]: sum_l (gamma lambda)^l delta_(t + l).

    delta_t = r_t + gamma V_(t + 1) - V_t, where V after the last token is 0. Source: arXiv 1506.02438, eq. 16.
    """
    delta = rewards + gamma * np.append(values[1:], 0.0) - values
    return lfilter([1.0], [1.0, -gamma * gae_lambda], delta[::-1])[::-1]


def whitened(advantages: Sequence[np.ndarray], trained: np.ndarray) -> list[np.ndarray]:
    """Returns the advantages with mean 0 and variance 1 over the tokens of the trained samples, float32; others 0."""
    every = np.concatenate([row for row, kept in zip(advantages, trained, strict=True) if kept] or [np.zeros(1)])
    scale = np.sqrt(every.var(ddof=min(1, every.size - 1)) + 1e-8)
    return [
        (kept * (row - every.mean()) / scale).astype(np.float32) for row, kept in zip(advantages, trained, strict=True)
    ]


@struct.dataclass
class ValueArguments:
    """Numbers of the critic's loss that may change without compiling again; float32 scalars."""

    value_clip: jax.Array | np.float32


@jax.named_scope("loss")
def value_loss(values, old_values, returns, value_clip) -> jax.Array:
    """Returns half the larger squared error: the value's, or that of the value clipped to old_values +- value_clip.

    Source: the value clipping of arXiv 2005.12729 (appendix), as in TRL, verl and Tunix.
    """
    clipped = old_values + jnp.clip(values - old_values, -value_clip, value_clip)
    return jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns)) / 2


def make_value_loss(network: Network) -> step.Loss:
    """Returns the critic's loss of a micro-batch, weight * `value_loss` over the trained tokens, and its statistics."""

    def loss(params: decoder.Params, micro: dict[str, jax.Array], arguments: ValueArguments):
        hidden, _, _ = decoder.forward(params, micro["tokens"], micro["positions"], micro["segments"], network)
        values, mask = decoder.scalars(params, hidden), micro["loss_mask"]
        error = value_loss(values, micro["value"], micro["return"], arguments.value_clip)
        rest = micro["return"] - values
        named = dict(value_loss=error, value=values, returned=micro["return"], rest=rest)
        named |= dict(squared_return=jnp.square(micro["return"]), squared_rest=jnp.square(rest))
        stats = {name: jnp.sum(mask * array) for name, array in named.items()}
        return jnp.sum(mask * micro["weight"] * error), stats

    return loss


def critic_trainer(config: RunSettings, mesh: Mesh) -> step.Trainer:
    """Returns the trainer of the critic: the policy's network with a scalar head, and a learning rate of its own."""
    network = replace(config.network, scalar_head=True)
    rate = config.ppo.critic_learning_rate or config.optimizer.learning_rate
    optimizer = replace(config.optimizer, learning_rate=rate)
    return step.Trainer(network, optimizer, mesh, make_value_loss(network), config.grpo.updates)


class CriticObjective(GroupObjective):
    """Advantages from a critic that is trained along with the policy; the policy's loss stays as it is."""

    def __init__(self, config: RunSettings, inputs: RunInputs):
        super().__init__(config)
        self.fields += CRITIC_FIELDS
        self.critic, network = critic_trainer(config, inputs.mesh), config.network
        # The critic begins with the policy's weights and values every token at 0.
        self.critic_state = self.critic.restore_target()  # shapes alone, where a checkpoint is to be restored
        if inputs.params is not None:
            head = np.zeros(network.model.hidden_size, np.float32)
            self.critic_state = self.critic.init(dataclasses.replace(inputs.params, scalar_head=head))
        self.value_scorer = Scorer(self.critic.network, inputs.mesh, read=logprobs.values)
        self._copy = tree.copier(network.compute.compute_dtype, self.critic.param_shardings)
        self._value_arguments = ValueArguments(np.float32(config.ppo.value_clip or np.inf))

    def advantages(self, rollout: Rollout, first_update: int) -> Advantages:
        """Returns GAE advantages, whitened over the rollout, and the returns the critic learns; rewards as in GRPO."""
        grouped = super().advantages(rollout, first_update)
        ppo, beta = self.config.ppo, schedules.kl_coef(self.config.grpo, first_update)
        penalties = token_kl(rollout) if beta and self.config.grpo.kl_placement == "reward" else None
        advantages, returns = [], []
        for index, values in enumerate(rollout.values["value"]):
            rewards = np.zeros(len(values)) if penalties is None else -beta * penalties[index].astype(np.float64)
            rewards[-1] += grouped.rewards[index]
            advantages.append(gae(rewards, values, ppo.gamma, ppo.gae_lambda))
            returns.append((advantages[-1] + values).astype(np.float32))
        white = whitened(advantages, grouped.trained)
        return dataclasses.replace(grouped, advantages=white, values={"return": returns})

    def update(self, run: RunState, batch: Batch, first_update: int) -> dict[str, float]:
        """Makes one update of the policy and one of the critic and returns the statistics of both."""
        policy, critic = split(batch.arrays)
        stats = run.update(policy, batch.num_filled, self.arguments(first_update))
        self.critic_state, sums = self.critic.update(self.critic_state, critic, batch.num_filled, self._value_arguments)
        sums = {name: float(value) for name, value in jax.device_get(sums).items()}
        skipped = max(stats[guard.SKIPPED], sums[guard.SKIPPED])
        return stats | _critic_figures(sums, max(stats["tokens"], 1.0)) | {guard.SKIPPED: skipped}

    def flops(self, run: RunState, batch: Batch) -> float:
        """Returns the operations of policy and critic."""
        return super().flops(run, batch) + flops.update(self.critic.network, step.work(batch.arrays)).total

    def scorers(self, run: RunState) -> dict[str, tuple[Scorer, decoder.Params]]:
        return super().scorers(run) | {"value": (self.value_scorer, self._copy(self.critic_state.params))}

    def warm_up(self, run: RunState, arrays: dict[str, np.ndarray]) -> None:
        policy, critic = split(arrays)
        run.warm_up(policy, self.arguments(0), scores=True)
        self.value_scorer(self._copy(self.critic_state.params), arrays, 1, 1.0)
        self.critic.compile(critic, self._value_arguments)
        run.programs.add("critic", lambda: self.critic.compilations)
        run.programs.add("values", lambda: self.value_scorer.compilations)

    def checkpoint_items(self) -> dict[str, Any]:
        return {"critic": self.critic_state.params, "critic_optimizer": self.critic_state.optimizer}

    def restore_targets(self) -> dict[str, Any]:
        target = self.critic.restore_target()
        return {"critic": target.params, "critic_optimizer": target.optimizer}

    def restore(self, items: dict[str, Any], update: int) -> None:
        self.critic_state = self.critic.state(items["critic"], items["critic_optimizer"], update)


def split(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the policy's and the critic's arrays of a batch."""
    policy = {name: array for name, array in arrays.items() if name not in CRITIC_FIELDS}
    shared = ("tokens", "targets", "positions", "segments", "loss_mask", "weight")
    return policy, {name: arrays[name] for name in (*shared, *CRITIC_FIELDS)}


def _critic_figures(sums: dict[str, float], tokens: float) -> dict[str, float]:
    """Returns the critic's metrics; explained_variance is 1 - Var(return - value) / Var(return), 0 without variance."""
    mean = {name: sums[name] / tokens for name in ("value_loss", "value", "returned", "rest")}
    spread, rest = (sums[f"squared_{name}"] / tokens for name in ("return", "rest"))
    spread, rest = spread - mean["returned"] ** 2, rest - mean["rest"] ** 2
    explained = 0.0 if spread <= 1e-8 else 1 - rest / spread  # not finite where the sums are not
    figures = {"value_loss": mean["value_loss"], "value": mean["value"], "explained_variance": explained}
    return figures | {"critic_grad_norm": sums["grad_norm"]}
