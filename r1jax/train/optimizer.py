"""AdamW through optax, with the recipe's schedules and moments in float32 or bfloat16."""

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

    def update(grads, state, params=None):
        updates, state = inner.update(grads, tree.cast(state, jnp.float32), params)
        return updates, tree.cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _decays(params) -> object:
    """Returns which leaves take weight decay: matrices, neither norms nor biases (stacked ones have a layer axis)."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf.ndim >= 2 and not name.endswith("norm") and "bias" not in name

    return jax.tree_util.tree_map_with_path(one, params)


def make(config: OptimizerConfig, total_updates: int) -> optax.GradientTransformation:
    """Returns the optimiser: global-norm clip, AdamW, schedule. Master weights keep the dtype of the parameters."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(_store_moments(adam, jnp.dtype(config.moment_dtype)))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decays))
    parts.append(optax.scale_by_learning_rate(learning_rate(config, total_updates)))
    return optax.chain(*parts)
