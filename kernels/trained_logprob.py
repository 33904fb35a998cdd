"""Token log-probabilities of the trained positions alone: no logits where nothing is learned.

Prompts, padding and the last token of a sample have no target that counts. The others are brought together, and the
vocabulary is scored for them in chunks, as many as there are trained tokens, forward and backward.
"""

import functools

import jax
import jax.numpy as jnp

from r1jax.kernels.fused_logprob import token_logprobs


def trained_logprobs(hidden, unembedding, targets, mask, temperature, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns (log p(target), entropy), float32 [B, T] in nats, where mask > 0, and 0 elsewhere.

    hidden is [B, T, D], unembedding [D, V], targets int32 and mask [B, T]; values and gradients are those of
    `fused_logprob.token_logprobs`. `chunk` tokens are scored at a time, and the work is that of whole chunks. Arrays are
    not divided over a mesh. Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"trained_logprobs: chunk={chunk} must be at least 1")
    logp, entropy = _scored(min(chunk, targets.size), hidden, unembedding, targets, mask, jnp.float32(temperature))
    return logp, entropy


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored(chunk, hidden, unembedding, targets, mask, temperature):
    return _forward(chunk, hidden, unembedding, targets, mask, temperature)[0]


def _forward(chunk, hidden, unembedding, targets, mask, temperature):
    places, chunks = _places(chunk, mask)
    flat, goals = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)

    def one(number, found):
        at = jax.lax.dynamic_slice_in_dim(places, number * chunk, chunk)
        scored = token_logprobs(flat[at][None], unembedding, goals[at][None], temperature)
        return tuple(old.at[at].set(new[0], mode="drop") for old, new in zip(found, scored, strict=True))

    zeros = jnp.zeros(goals.shape, jnp.float32)
    logp, entropy = jax.lax.fori_loop(0, chunks, one, (zeros, zeros))
    found = tuple(jnp.where(mask > 0, value.reshape(mask.shape), 0) for value in (logp, entropy))
    return found, (hidden, unembedding, targets, mask, temperature)


def _backward(chunk, saved, gradients):
    hidden, unembedding, targets, mask, temperature = saved
    places, chunks = _places(chunk, mask)
    flat, goals = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    flat_gradients = [jnp.where(mask > 0, value, 0).reshape(-1) for value in gradients]

    def one(number, found):
        d_flat, d_unembedding = found
        at = jax.lax.dynamic_slice_in_dim(places, number * chunk, chunk)
        score = lambda states, matrix: token_logprobs(states[None], matrix, goals[at][None], temperature)  # noqa: E731
        _, pull = jax.vjp(score, flat[at], unembedding)
        d_states, d_matrix = pull(tuple(jnp.take(value, at, fill_value=0)[None] for value in flat_gradients))
        return d_flat.at[at].set(d_states, mode="drop"), d_unembedding + d_matrix.astype(jnp.float32)

    start = jnp.zeros_like(flat), jnp.zeros(unembedding.shape, jnp.float32)
    d_flat, d_unembedding = jax.lax.fori_loop(0, chunks, one, start)
    d_unembedding = d_unembedding.astype(unembedding.dtype)
    return d_flat.reshape(hidden.shape), d_unembedding, None, jnp.zeros_like(mask), jnp.zeros_like(temperature)


_scored.defvjp(_forward, _backward)


def _places(chunk: int, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (the trained positions of the flat rows in order, then places outside the rows; how many chunks hold one)."""
    trained = mask.reshape(-1) > 0
    padding = -trained.size % chunk
    order = jnp.nonzero(trained, size=trained.size + padding, fill_value=trained.size)[0]
    return order, -(-trained.sum() // chunk)
