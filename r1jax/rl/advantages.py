"""Advantages of whole groups, computed before a rollout is split into mini-batches."""

import functools

import jax
import jax.numpy as jnp

ROUNDING = 1e-6  # relative; a float32 sum of a few terms is off by a few 6e-8


@functools.partial(jax.jit, static_argnames=("group_size", "kind", "ddof", "guard", "singleton"))
def group_advantages(
    terms: jax.Array,
    weights: jax.Array,
    scorable: jax.Array,
    group_size: int,
    epsilon: float | jax.Array = 1e-6,
    *,
    kind: str = "group_std",
    ddof: int = 0,
    guard: str = "add",
    singleton: str = "zero",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (advantages [N], rewards [N], whether each group has a signal [N / G]).

    `terms` is float32 [N, P], the reward terms of samples in group order, `weights` [P], `scorable` bool [N]. A
    sample's reward is the weighted sum; statistics are over the scorable samples of its group. `kind`:

    - group_std: (r - mean) / std of the group (DeepSeek-R1, eq. 3)
    - mean: r - mean (Dr. GRPO, arXiv 2503.20783, section 3.2)
    - batch_std: (r - mean of the group) / std of all scorable rewards (TRL's scale_rewards="batch")
    - leave_one_out: r - mean of the group's others (RLOO, arXiv 2402.14740, eq. 8)
    - per_reward: each term as in group_std, summed by weight, then normalised over all samples (GDPO, arXiv 2601.05242)

    `ddof` 0 takes the population's standard deviation, 1 the sample's; `guard` is std + epsilon (add) or max(std,
    epsilon). Groups whose scorable rewards tie, and unscorable samples, get 0; rewards that differ by less than the
    rounding of their sums tie (0.2 + 0.025 and 0.225 are one reward). A group with one scorable sample gets 0, or with
    singleton="reward" its reward, as in verl (mean 0 and deviation 1 for it), where that is not 0. Raises ValueError
    when the samples do not split into groups.
    """
    if terms.shape[0] % group_size:
        raise ValueError(f"group_advantages: {terms.shape[0]} samples do not split into groups of {group_size=}")
    rewards = terms @ weights
    grouped = rewards.reshape(-1, group_size)
    in_mean = scorable.reshape(-1, group_size)
    size = jnp.where(in_mean, (jnp.abs(terms) @ jnp.abs(weights)).reshape(grouped.shape), 0)
    has_signal = _differ(grouped, in_mean, size)
    number = jnp.maximum(in_mean.sum(axis=1, keepdims=True), 1)
    if kind == "per_reward":
        advantages = _per_reward(terms, weights, in_mean, epsilon, ddof, guard)
        has_signal = jax.vmap(_differ, in_axes=(1, None, 1))(*_by_term(terms, weights, in_mean)).any(axis=0)
    elif kind == "leave_one_out":
        advantages = _centred(grouped, in_mean) * number / jnp.maximum(number - 1, 1)
    elif kind == "mean":
        advantages = _centred(grouped, in_mean)
    else:
        over = _flat(grouped), _flat(in_mean)
        std = _deviation(*(over if kind == "batch_std" else (grouped, in_mean)), ddof)
        advantages = _centred(grouped, in_mean) / _guarded(std, epsilon, guard)
    advantages = jnp.where(has_signal, advantages, 0)
    if singleton == "reward":
        alone = in_mean & (in_mean.sum(axis=1, keepdims=True) == 1)
        advantages, has_signal = (
            jnp.where(alone, grouped, advantages),
            has_signal | (alone & (grouped != 0)).any(axis=1, keepdims=True),
        )
    return advantages.reshape(-1), rewards, has_signal[:, 0]


def _flat(array: jax.Array) -> jax.Array:
    return array.reshape(1, -1)


def _centred(values: jax.Array, in_mean: jax.Array) -> jax.Array:
    """Returns values less the mean of their row's values in `in_mean`, 0 for values outside it."""
    number = jnp.maximum(in_mean.sum(axis=1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(in_mean, values, 0), axis=1, keepdims=True) / number
    return jnp.where(in_mean, values - mean, 0)


def _deviation(values: jax.Array, in_mean: jax.Array, ddof: int) -> jax.Array:
    """Returns the standard deviation [rows, 1] of the values in `in_mean`."""
    number = jnp.maximum(in_mean.sum(axis=1, keepdims=True) - ddof, 1)
    return jnp.sqrt(jnp.sum(jnp.square(_centred(values, in_mean)), axis=1, keepdims=True) / number)


def _guarded(std: jax.Array, epsilon, guard: str) -> jax.Array:
    return std + epsilon if guard == "add" else jnp.maximum(std, epsilon)


def _differ(values: jax.Array, in_mean: jax.Array, size: jax.Array) -> jax.Array:
    """Returns whether each row's values in `in_mean` differ by more than the rounding of sums of `size`, [rows, 1]."""
    low = jnp.min(jnp.where(in_mean, values, jnp.inf), axis=1, keepdims=True)
    high = jnp.max(jnp.where(in_mean, values, -jnp.inf), axis=1, keepdims=True)
    return high - low > ROUNDING * jnp.max(size, axis=1, keepdims=True)


def _by_term(terms: jax.Array, weights: jax.Array, in_mean: jax.Array):
    """Returns (terms [groups, P, G], those of weight 0 set to 0, in_mean, the terms' sizes)."""
    terms = jnp.where(weights != 0, terms, 0).reshape(*in_mean.shape, -1).swapaxes(1, 2)
    return terms, in_mean, jnp.where(in_mean[:, None], jnp.abs(terms), 0)


def _per_reward(terms, weights, in_mean, epsilon, ddof: int, guard: str) -> jax.Array:
    def one(term):
        normal = _centred(term, in_mean) / _guarded(_deviation(term, in_mean, ddof), epsilon, guard)
        return jnp.where(_differ(term, in_mean, jnp.where(in_mean, jnp.abs(term), 0)), normal, 0)

    terms = terms.reshape(*in_mean.shape, -1)
    total = jnp.einsum("NGP,P->NG", jax.vmap(one, in_axes=2, out_axes=2)(terms), weights)
    flat, over = _flat(total), _flat(in_mean)
    return (_centred(flat, over) / _guarded(_deviation(flat, over, ddof), epsilon, guard)).reshape(total.shape)
