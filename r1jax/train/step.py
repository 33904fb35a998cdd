"""One jitted update for every stage: gradients summed over micro-batches, one optimiser step, donated state.

A batch is `[M, R, T]`: M micro-batches of R packed rows. Only the first `filled` are run, so one program serves any
fill. A loss returns a sum, not a mean: each token's weight is set when the batch is packed, and so neither
packing nor micro-batching nor the mesh changes the result.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from r1jax.core import sharding, tree
from r1jax.core.sharding import use_mesh
from r1jax.data.packing import PackedBatch
from r1jax.models import decoder, moe
from r1jax.schema import ModelConfig, OptimizerConfig, PackConfig
from r1jax.train import optimizer as optimizers

# (params in compute dtype, micro-batch of [R, T] arrays, arguments) -> (loss sum, statistics)
Loss = Callable[[decoder.Params, dict[str, jax.Array], Any], tuple[jax.Array, dict[str, jax.Array]]]


@struct.dataclass
class TrainState:
    """Master weights, optimiser state and the number of updates made."""

    params: decoder.Params
    optimizer: Any
    update: jax.Array  # int32 []


def batch_arrays(batch: PackedBatch, pack: PackConfig, micro_batches: int, fields: tuple[str, ...]) -> dict:
    """Returns the batch as arrays [M, R, T] by name: tokens, targets, positions, segments, loss_mask and `fields`."""
    shape = (micro_batches, pack.rows_per_micro_batch, pack.row_tokens)
    named = {name: getattr(batch, name) for name in ("tokens", "targets", "positions", "segments", "loss_mask")}
    named |= {name: batch.values[name] for name in fields}
    return {name: np.ascontiguousarray(array.reshape(shape)) for name, array in named.items()}


def filled_micro_batches(batch: PackedBatch, pack: PackConfig) -> int:
    """Returns how many leading micro-batches hold at least one token (at least 1)."""
    rows = np.flatnonzero(batch.segments.any(axis=1))
    last = int(rows[-1]) + 1 if rows.size else 1
    return -(-last // pack.rows_per_micro_batch)


class Trainer:
    """Builds and runs the update of one model, optimiser and loss on one mesh."""

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        mesh: Mesh,
        loss: Loss,
        total_updates: int,
    ):
        self.model, self.config, self.mesh, self.loss = model, optimizer, mesh, loss
        self.specs = decoder.specs(model)
        self.transform = optimizers.make(optimizer, total_updates)
        self.param_shardings = sharding.spec_shardings(self.specs, mesh)
        self.rate = optimizers.learning_rate(optimizer, total_updates)
        self._update = jax.jit(self._step, donate_argnums=0, out_shardings=(self.state_shardings(), None))

    def abstract_state(self) -> TrainState:
        """Returns the shapes of the state, without shardings."""
        params = sharding.abstract(self.specs, jnp.dtype(self.config.param_dtype))
        return jax.eval_shape(lambda p: TrainState(p, self.transform.init(p), jnp.zeros((), jnp.int32)), params)

    def state_shardings(self) -> TrainState:
        """Returns the sharding of every leaf: moments lie as their parameters do, counters everywhere."""
        everywhere = sharding.replicated(self.mesh)
        placed = jax.tree.leaves(self.param_shardings)
        by_shape = {
            leaf.shape: place for leaf, place in zip(jax.tree.leaves(self.abstract_state().params), placed, strict=True)
        }
        structure = jax.tree.structure(self.abstract_state().params)

        def place(node):
            if jax.tree.structure(node) == structure:
                return self.param_shardings
            return jax.tree.map(lambda leaf: by_shape.get(leaf.shape, everywhere), node)

        is_params = lambda node: jax.tree.structure(node) == structure  # noqa: E731
        return jax.tree.map(place, self.abstract_state(), is_leaf=is_params)

    def init(self, params: decoder.Params) -> TrainState:
        """Returns the state of a fresh run; `params` are copied into the master dtype."""
        dtype = jnp.dtype(self.config.param_dtype)

        def build(params):
            params = jax.tree.map(lambda p, s: jnp.array(p, s.dtype or dtype, copy=True), params, self.specs)
            return TrainState(params, self.transform.init(params), jnp.zeros((), jnp.int32))

        return jax.jit(build, out_shardings=self.state_shardings())(params)

    def restore_target(self) -> TrainState:
        """Returns shape structs with shardings: what a checkpoint of the state is read into."""
        return jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            self.abstract_state(),
            self.state_shardings(),
        )

    def state(self, params: decoder.Params, optimizer: Any, update: int) -> TrainState:
        """Returns the state after `update` updates from restored parts."""
        return jax.device_put(TrainState(params, optimizer, np.int32(update)), self.state_shardings())

    def update(self, state: TrainState, batch: dict[str, np.ndarray], filled: int, arguments: Any):
        """Returns (new state, statistics as device scalars). The given state is donated."""
        batch = {name: jax.device_put(array, self._batch_sharding(array.shape)) for name, array in batch.items()}
        with use_mesh(self.mesh):
            return self._update(state, batch, np.int32(filled), arguments)

    @property
    def compilations(self) -> int:
        """Programs compiled for the update so far; constant after the first."""
        return self._update._cache_size()

    def _batch_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        return sharding.sharding(self.mesh, (None, "batch", None), shape)

    def _step(self, state: TrainState, batch, filled, arguments):
        compute = jnp.dtype(self.model.compute_dtype)

        def objective(params, micro):
            return self.loss(tree.cast(params, compute), micro, arguments)

        gradient = jax.value_and_grad(objective, has_aux=True)
        first = jax.tree.map(lambda x: x[0], batch)
        shapes = jax.eval_shape(gradient, state.params, first)
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        start = (start[0], jax.tree.map(lambda g: g.astype(jnp.float32), start[1]))

        def accumulate(index, total):
            (loss, stats), grads = gradient(state.params, jax.tree.map(lambda x: x[index], batch))
            (old_loss, old_stats), old_grads = total
            stats = {
                name: jnp.maximum(old_stats[name], value) if name.startswith("max_") else old_stats[name] + value
                for name, value in stats.items()
            }
            return (old_loss + loss, stats), jax.tree.map(lambda a, b: a + b.astype(a.dtype), old_grads, grads)

        (loss, stats), grads = jax.lax.fori_loop(0, filled, accumulate, start)
        norm = tree.global_norm(grads)
        updates, opt_state = self.transform.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        experts_load = stats.pop("expert_load", None)
        if experts_load is not None and self.model.router_bias_update_rate:
            bias = moe.updated_bias(params.sparse.ffw.bias, experts_load, self.model.router_bias_update_rate)
            params = params.replace(sparse=params.sparse.replace(ffw=params.sparse.ffw.replace(bias=bias)))
        stats |= {"loss": loss, "grad_norm": norm, "learning_rate": self.rate(state.update)}
        if experts_load is not None:
            stats["max_expert_share"] = (experts_load / jnp.maximum(experts_load.sum(-1, keepdims=True), 1)).max()
        return TrainState(params, opt_state, state.update + 1), stats


def expert_statistics(auxiliary: decoder.Auxiliary, micro: dict[str, jax.Array], model: ModelConfig) -> dict:
    """Returns {"expert_load": [L, E]} of a mixture of experts, else nothing."""
    if auxiliary.experts is None:
        return {}
    return {"expert_load": moe.load(auxiliary.experts, micro["segments"] > 0, model.n_routed_experts)}
