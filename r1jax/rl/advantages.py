"""Group-relative advantages, on whole groups and before a rollout is split into mini-batches."""

import functools

import jax
import jax.numpy as jnp

ROUNDING = 1e-6  # relative; a float32 sum of a few terms is off by a few 6e-8


@functools.partial(jax.jit, static_argnames=("group_size",))
def group_advantages(
    parts: jax.Array, weights: jax.Array, scorable: jax.Array, group_size: int, epsilon: float | jax.Array = 1e-6
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (advantages [N], rewards [N], whether each group has a signal [N / G]).

    parts is float32 [N, P], the reward terms of samples in group order, weights [P]; scorable bool [N]. A sample's reward
    is the weighted sum; its advantage (r - mean) / (population std + epsilon) over the scorable samples of its group.
    Groups whose scorable rewards tie, and unscorable samples, get 0; rewards that differ by less than the rounding of
    their sums tie (0.2 + 0.025 and 0.225 are one reward). Source: DeepSeek-R1, eq. 3.
    """
    if parts.shape[0] % group_size:
        raise ValueError(f"group_advantages: {parts.shape[0]} samples do not split into groups of {group_size=}")
    rewards = parts @ weights
    grouped = rewards.reshape(-1, group_size)
    counted = scorable.reshape(-1, group_size)
    number = jnp.maximum(counted.sum(axis=1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(counted, grouped, 0), axis=1, keepdims=True) / number
    centred = jnp.where(counted, grouped - mean, 0)
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) / number)
    low = jnp.min(jnp.where(counted, grouped, jnp.inf), axis=1, keepdims=True)
    high = jnp.max(jnp.where(counted, grouped, -jnp.inf), axis=1, keepdims=True)
    size = jnp.where(counted, (jnp.abs(parts) @ jnp.abs(weights)).reshape(grouped.shape), 0)
    signal = high - low > ROUNDING * jnp.max(size, axis=1, keepdims=True)
    advantages = jnp.where(signal, centred / (std + epsilon), 0)
    return advantages.reshape(-1), rewards, signal[:, 0]
