"""One jitted update for every stage: gradients summed over micro-batches, one optimiser step, donated state.

A batch is `[M, R, T]`: M micro-batches of R packed rows. Only the first `num_filled` micro-batches are run, so one
program serves any number of them. A loss returns a sum, not a mean: each token's weight is set when the batch is
packed, so that neither packing nor micro-batching nor the mesh changes the result. An update whose loss or gradient
norm is not finite leaves weights, moments and router bias as they were.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from r1jax.core import private_jax, sharding, tree
from r1jax.core.sharding import use_mesh
from r1jax.data.packing import PackedBatch
from r1jax.models import decoder, flops, logprobs, moe, mtp
from r1jax.schema import Network, OptimizerConfig, PackConfig
from r1jax.train import guard
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
    """Returns the batch as arrays [M, R, T] by name: tokens, targets, positions, segments, loss_mask and `fields`.

    The batch's inputs are included, [M, R, T, ...].
    """
    shape = (micro_batches, pack.rows_per_micro_batch, pack.row_tokens)
    named = {name: getattr(batch, name) for name in ("tokens", "targets", "positions", "segments", "loss_mask")}
    named |= {name: batch.values[name] for name in fields} | batch.inputs
    return {name: np.ascontiguousarray(array.reshape(*shape, *array.shape[2:])) for name, array in named.items()}


def work(arrays: Mapping[str, np.ndarray], read: str = "loss_mask") -> flops.Work:
    """Returns the work of a batch's arrays [M, R, T] by true lengths; a head is read where `read` is above 0.

    A shared prompt counts once in each row, and each of its samples sees it.
    """
    held = arrays["segments"] > 0
    pairs = (arrays["positions"][held] + 1).sum()
    return flops.Work(float(held.sum()), float(pairs), float((arrays[read] > 0).sum()))


def batch_shapes(pack: PackConfig, micro_batches: int, fields: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of `batch_arrays`, without a loss's own inputs."""
    shape = (micro_batches, pack.rows_per_micro_batch, pack.row_tokens)
    whole, real = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, np.float32)
    shapes = dict.fromkeys(("tokens", "targets", "positions", "segments"), whole)
    return shapes | dict.fromkeys(("loss_mask", *fields), real)


def filled_micro_batches(batch: PackedBatch, pack: PackConfig) -> int:
    """Returns how many leading micro-batches hold at least one token (at least 1)."""
    rows = np.flatnonzero(batch.segments.any(axis=1))
    last = int(rows[-1]) + 1 if rows.size else 1
    return -(-last // pack.rows_per_micro_batch)


class Trainer:
    """Builds and runs the update of one model, optimiser and loss on one mesh."""

    def __init__(
        self,
        network: Network,
        optimizer: OptimizerConfig,
        mesh: Mesh,
        loss: Loss,
        total_updates: int,
    ):
        self.network, self.config, self.mesh, self.loss = network, optimizer, mesh, loss
        self.specs = decoder.specs(network.model, network.scalar_head)
        self.transform = optimizers.make(optimizer, total_updates)
        self.param_shardings = sharding.spec_shardings(self.specs, mesh)
        self.rate = optimizers.learning_rate(optimizer, total_updates)
        self._init = jax.jit(self._fresh, out_shardings=self.state_shardings())
        self._update = jax.jit(self._step, donate_argnums=0, out_shardings=(self.state_shardings(), None))
        self._compiled: dict[tuple, Any] = {}  # programs made by `compile`, by the shapes of their batches

    def abstract_state(self) -> TrainState:
        """Returns the shapes of the state, without shardings."""
        params = sharding.abstract(self.specs, jnp.dtype(self.config.param_dtype))
        return jax.eval_shape(lambda p: TrainState(p, self.transform.init(p), jnp.zeros((), jnp.int32)), params)

    def state_shardings(self, on_device: bool = False) -> TrainState:
        """Returns the sharding of every leaf: moments are sharded as their parameters are, all else is replicated.

        Offloaded moments are in host memory, or with `on_device` where an update computes with them.
        """
        everywhere = sharding.replicated(self.mesh)
        structure = jax.tree.structure(self.param_shardings)

        def is_params(node) -> bool:
            return jax.tree.structure(node, is_leaf=optimizers.is_masked) == structure

        def place(node):
            if not is_params(node):
                return everywhere
            kept = lambda leaf, place: leaf if optimizers.is_masked(leaf) else place  # noqa: E731
            return jax.tree.map(kept, node, self.param_shardings, is_leaf=optimizers.is_masked)

        placed = jax.tree.map(place, self.abstract_state(), is_leaf=is_params)
        if self.config.offload and not on_device:
            return dataclasses.replace(placed, optimizer=sharding.on_host(placed.optimizer))
        return placed

    def init(self, params: decoder.Params) -> TrainState:
        """Returns the state of a fresh run; `params` are copied into the master dtype."""
        return self._init(params)

    def _fresh(self, params: decoder.Params) -> TrainState:
        dtype = jnp.dtype(self.config.param_dtype)
        params = jax.tree.map(lambda p, s: jnp.array(p, s.dtype or dtype, copy=True), params, self.specs)
        return TrainState(params, self.transform.init(params), jnp.zeros((), jnp.int32))

    def lower_init(self, params: decoder.Params) -> jax.stages.Lowered:
        """Returns the program of `init` lowered for shape structs with shardings, without arrays."""
        return self._init.lower(params)

    def lower_update(self, batch: Mapping[str, Any], arguments: Any) -> jax.stages.Lowered:
        """Returns the update lowered, without arrays, for a batch of these shapes [M, R, T] and these arguments."""
        placed = {name: tree.structs(array, self._batch_sharding(array.shape)) for name, array in batch.items()}
        with use_mesh(self.mesh):
            return self._update.lower(self.restore_target(), placed, np.int32(1), arguments)

    def restore_target(self) -> TrainState:
        """Returns shape structs with shardings, for reading a checkpoint of the state."""
        return jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            self.abstract_state(),
            self.state_shardings(),
        )

    def state(self, params: decoder.Params, optimizer: Any, update: int) -> TrainState:
        """Returns the state after `update` updates from restored parts."""
        count = sharding.place(np.int32(update), sharding.replicated(self.mesh))
        return jax.device_put(TrainState(params, optimizer, count), self.state_shardings())

    def compile(self, batch: Mapping[str, np.ndarray], arguments: Any) -> None:
        """Compiles the update for batches of these shapes from shapes alone: no state is copied and nothing is run."""
        self._compiled[_shapes(batch)] = self.lower_update(batch, arguments).compile()

    def update(self, state: TrainState, batch: Mapping[str, np.ndarray], num_filled: int, arguments: Any):
        """Returns (new state, statistics as device scalars). The old state is donated.

        `skipped_updates` is 1 when loss or gradient norm is not finite. The new state then equals the old one, except
        for `update` and the schedule's count, which advance.
        """
        placed = {name: sharding.place(array, self._batch_sharding(array.shape)) for name, array in batch.items()}
        program = self._compiled.get(_shapes(batch), self._update)
        with use_mesh(self.mesh):
            return program(state, placed, np.int32(num_filled), arguments)

    @property
    def compilations(self) -> int:
        """Programs compiled for the update so far: one for each kind of batch."""
        return len(self._compiled) + private_jax.compilations(self._update)

    def _batch_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        return sharding.sharding(self.mesh, (None, "batch", "sequence"), shape)

    def gradients(self, params: decoder.Params, batch: dict[str, jax.Array], num_filled: jax.Array, arguments: Any):
        """Returns (loss, statistics, gradients) summed over the first `num_filled` micro-batches; traced under jit.

        Statistics named max_... are maxima instead. Gradients are summed in float32.
        """
        compute = jnp.dtype(self.network.compute.compute_dtype)

        def objective(params, micro):
            return self.loss(tree.cast(params, compute), micro, arguments)

        gradient = jax.value_and_grad(objective, has_aux=True)
        first = jax.tree.map(lambda x: x[0], batch)
        shapes = jax.eval_shape(gradient, params, first)
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        start = (start[0], jax.tree.map(lambda g: g.astype(jnp.float32), start[1]))

        def accumulate(index, total):
            (loss, stats), grads = gradient(params, jax.tree.map(lambda x: x[index], batch))
            (old_loss, old_stats), old_grads = total
            stats = {
                name: jnp.maximum(old_stats[name], value) if name.startswith("max_") else old_stats[name] + value
                for name, value in stats.items()
            }
            return (old_loss + loss, stats), jax.tree.map(lambda a, b: a + b.astype(a.dtype), old_grads, grads)

        (loss, stats), grads = jax.lax.fori_loop(0, num_filled, accumulate, start)
        return loss, stats, grads

    def _step(self, state: TrainState, batch, num_filled, arguments):
        loss, stats, grads = self.gradients(state.params, batch, num_filled, arguments)
        norm = tree.global_norm(grads)
        weights: Any = state.params  # a tree, which optax's annotations know as dicts and lists alone
        moments = state.optimizer
        if self.config.offload:
            moments = jax.device_put(moments, self.state_shardings(on_device=True).optimizer)
        with jax.named_scope("optimizer"):
            updates, opt_state = self.transform.update(grads, moments, weights)
            params: Any = optax.apply_updates(weights, updates)
        experts_load, mtp_load = stats.pop("expert_load", None), stats.pop("mtp_expert_load", None)
        if rate := self.network.auxiliary.router_bias_update_rate:
            params = _balanced(params, experts_load, mtp_load, rate)
        # Selected element by element, which the compiler does in place where the state is donated.
        with jax.named_scope("optimizer"):
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            params = jax.tree.map(lambda new, old: jnp.where(finite, new, old), params, state.params)
            opt_state = optimizers.select_state(finite, opt_state, moments)
        stats |= {"loss": loss, "grad_norm": norm, "learning_rate": self.rate(state.update)}
        stats[guard.SKIPPED] = 1 - finite.astype(jnp.float32)
        if experts_load is not None:
            stats["max_expert_share"] = (experts_load / jnp.maximum(experts_load.sum(-1, keepdims=True), 1)).max()
        return TrainState(params, opt_state, state.update + 1), stats


def _shapes(batch: Mapping[str, np.ndarray]) -> tuple:
    return tuple(sorted((name, array.shape) for name, array in batch.items()))


@jax.named_scope("router_bias")
def _balanced(params: decoder.Params, load, mtp_load, rate: float) -> decoder.Params:
    """Returns the parameters with the routers' selection biases moved against the loads that are not None."""

    def moved(stack, counts):
        bias = moe.updated_bias(stack.ffw.bias, counts, rate)
        return dataclasses.replace(stack, ffw=dataclasses.replace(stack.ffw, bias=bias))

    if load is not None:
        params = dataclasses.replace(params, sparse=moved(params.sparse, load))
    if mtp_load is not None:
        assert params.mtp is not None
        params = dataclasses.replace(
            params, mtp=dataclasses.replace(params.mtp, block=moved(params.mtp.block, mtp_load))
        )
    return params


def auxiliary_loss(
    params: decoder.Params,
    hidden: jax.Array,
    auxiliary: decoder.Auxiliary,
    micro: dict[str, jax.Array],
    weights: jax.Array,
    network: Network,
    head_alone: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns (alpha * balance loss + lambda * multi-token prediction loss, statistics), both 0 unless configured.

    `weights` [R, T] are the main loss's weights of each position's target. A sequence's balance loss is weighted by
    its tokens' weights. The prediction of token i + 2 has the weight of the main loss's prediction of that token, so
    both sums have the same normaliser (V3 report eq. 24-25). With `head_alone` the prediction loss trains the module
    only and gives the main model, embedding and output matrix no gradient: in RL only the reward trains them.
    """
    total, stats = jnp.zeros((), jnp.float32), {}
    experts, settings = network.model.n_routed_experts, network.auxiliary
    valid = micro["segments"] > 0
    if auxiliary.experts is not None:
        stats["expert_load"] = moe.load(auxiliary.experts, valid, experts)
    if auxiliary.balance is not None:
        stats["balance"] = jnp.sum(auxiliary.balance * weights)
        total += settings.aux_loss_alpha * stats["balance"]
    if not settings.mtp_loss_weight:
        return total, stats
    if head_alone:
        kept = jax.lax.stop_gradient(dataclasses.replace(params, mtp=None))
        params, hidden, auxiliary = (
            dataclasses.replace(kept, mtp=params.mtp),
            *jax.lax.stop_gradient((hidden, auxiliary)),
        )
    further, routing = decoder.predict_further(
        params, hidden, auxiliary, micro["tokens"], micro["positions"], micro["segments"], network
    )
    targets = mtp.following(micro["targets"], micro["segments"])
    matrix, how = decoder.unembedding(params), logprobs.settings(network.compute)
    logp, _ = logprobs.token_logprobs(further, matrix, targets, **how)
    stats["mtp"] = -jnp.sum(logp * mtp.following(weights, micro["segments"]))
    total += settings.mtp_loss_weight * stats["mtp"]
    if routing.experts is not None:
        stats["mtp_expert_load"] = moe.load(routing.experts, valid, experts)
    if routing.balance is not None:
        total += settings.aux_loss_alpha * jnp.sum(routing.balance * weights)
    return total, stats
