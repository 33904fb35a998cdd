"""AdamW and Muon through optax, with the recipe's schedules and moments in float32 or bfloat16."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from r1jax.core import tree
from r1jax.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, total_updates: int) -> optax.Schedule:
    """Returns the rate at each update: linear warm-up, then constant or cosine to `final_fraction` of the peak."""
    peak = config.learning_rate
    if config.schedule == "cosine":
        decay = max(total_updates - config.warmup_updates, 1)
        main = optax.cosine_decay_schedule(peak, decay, alpha=config.final_fraction)
    else:
        main = optax.constant_schedule(peak)
    if not config.warmup_updates:
        return main
    warmup = optax.linear_schedule(peak / config.warmup_updates, peak, config.warmup_updates)
    return optax.join_schedules([warmup, main], [config.warmup_updates])


def _store_moments(inner: optax.GradientTransformation, dtype) -> optax.GradientTransformation:
    """Returns the transformation with its state kept in `dtype` between updates and computed in float32."""

    def init(params):
        return tree.cast(inner.init(params), dtype)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, tree.cast(state, jnp.float32), params)
        return updates, tree.cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _decays(params) -> object:
    """Returns which leaves take weight decay: matrices, but not norms or biases (which have two axes when stacked)."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf.ndim >= 2 and not name.endswith("norm") and "bias" not in name

    return jax.tree_util.tree_map_with_path(one, params)


# Input and output axes of a weight matrix, counted from the back; the axes before them (layers, experts) count
# matrices.
_DOWN, _TO_HEADS, _FROM_HEADS = ((-2,), (-1,)), ((-3,), (-2, -1)), ((-3, -2), (-1,))
_MATRICES = {
    **dict.fromkeys(("gate", "up", "down", "q_a", "kv_a", "projection"), _DOWN),
    **dict.fromkeys(("query", "key", "value", "q_b", "kv_b"), _TO_HEADS),
    "out": _FROM_HEADS,
}


def matrix_axes(path: tuple) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns (input axes, output axes) of the matrices that Muon updates in the leaf at a path, None where AdamW does.

    Muon updates the matrices inside the layers. AdamW updates embedding, output matrix, router, heads, norms and
    biases.
    """
    return _MATRICES.get(getattr(path[-1], "name", "")) if path else None


# Coefficients of Muon's five steps, listed step by step so that optax loops over them instead of unrolling.
_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def _scale_by_muon(momentum: float, update_rms: float, dtype) -> optax.GradientTransformation:
    """Returns optax's Muon over every matrix of every leaf, scaled to one root mean square for all shapes.

    The update of an m x n matrix is U * update_rms * sqrt(max(m, n)), U the orthogonalised Nesterov momentum
    (arXiv 2502.16982, eq. 4). The layer axis is mapped and not merged with the experts', so experts stay sharded.
    """
    init = optax.contrib.scale_by_muon(_NEWTON_SCHULZ, beta=momentum, mu_dtype=dtype).init

    def one(path, grad, mu, state):
        inputs_outputs = matrix_axes(path)
        assert inputs_outputs is not None  # the other leaves go to AdamW
        axes = optax.contrib.MuonDimensionNumbers(*inputs_outputs)
        muon: Any = optax.contrib.scale_by_muon(
            _NEWTON_SCHULZ, beta=momentum, mu_dtype=dtype, weight_dimension_numbers=axes
        )
        after = optax.contrib.MuonState(None, 0, None)  # ty: ignore[invalid-argument-type] axes in place of values
        step = jax.vmap(lambda g, m: muon.update(g, state._replace(mu=m)), out_axes=(0, after))
        update, state = step(grad, mu)
        size = max(math.prod(grad.shape[axis] for axis in axes) for axes in inputs_outputs)
        return update * (update_rms * math.sqrt(size)), state

    def update(updates, state, params=None):
        del params
        pairs = jax.tree_util.tree_map_with_path(lambda path, g, m: one(path, g, m, state), updates, state.mu)
        is_pair = lambda node: type(node) is tuple  # noqa: E731
        updates = jax.tree.map(lambda pair: pair[0], pairs, is_leaf=is_pair)
        mu = jax.tree.map(lambda pair: pair[1].mu, pairs, is_leaf=is_pair)
        return updates, state._replace(mu=mu, count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def make(config: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """Returns the optimiser: global-norm clip, AdamW or Muon, weight decay, schedule.

    Master weights keep the dtype of the parameters. With Muon, clip, decay and schedule apply to all parameters alike.
    """
    dtype = jnp.dtype(config.moment_dtype)
    scale = _store_moments(optax.scale_by_adam(config.beta1, config.beta2, config.eps), dtype)
    if config.kind == "muon":
        muon = _scale_by_muon(config.muon_momentum, config.muon_update_rms, dtype)
        scale = optax.partition({"muon": muon, "adamw": scale}, _owners)
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(scale)
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decays))
    parts.append(optax.scale_by_learning_rate(learning_rate(config, total_updates)))
    return optax.chain(*parts)


def _owners(params) -> Any:
    """Returns the name of the transformation that updates each leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if matrix_axes(path) else "adamw", params)


def is_masked(node) -> bool:
    """Returns whether a node of an optimiser's state is a placeholder for a parameter that another part updates."""
    return isinstance(node, optax.MaskedNode)


def select_state(moved: jax.Array, new: Any, old: Any) -> Any:
    """Returns the optimiser's state `new` if the scalar `moved` is true, else `old` with the schedule's new count."""

    def select(after, before):
        if isinstance(after, optax.ScaleByScheduleState):
            return after
        return jnp.where(moved, after, before)

    return jax.tree.map(select, new, old, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
