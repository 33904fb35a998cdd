"""Token log-probabilities of the trained positions only: no logits are computed where nothing is learned.

Prompts, padding and the last token of a sample have no target in the loss. The other positions are gathered, and the
vocabulary is scored for them in chunks, only as many as the trained tokens fill, forward and backward.
"""

import functools

import jax
import jax.numpy as jnp

from r1jax.kernels.fused_logprob import KernelChoice, backward_part, forward_part, tile_of, tiles_of


def trained_logprobs(
    hidden, unembedding, targets, mask, temperature, chunk: int, kernel: KernelChoice | None = None, used: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Returns (log p(target), entropy), float32 [B, T] in nats, where mask > 0, and 0 elsewhere.

    hidden is [B, T, D], unembedding [D, V], targets int32 and mask [B, T]; values and gradients are those of
    `fused_logprob.token_logprobs`, and `used` is as there. `chunk` tokens are scored at a time, always whole chunks;
    with `kernel` the Pallas kernels score each chunk in blocks of their own sizes. Arrays are not divided over a mesh.
    Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"trained_logprobs: chunk={chunk} must be at least 1")
    chunk, vocab = min(chunk, targets.size), unembedding.shape[1]
    tile = tile_of(chunk, vocab, chunk)
    assert tile is not None  # given a chunk
    tiles = tiles_of(tile, kernel, chunk, vocab, hidden)
    return _scored(tiles, used, hidden, unembedding, targets, mask, jnp.float32(temperature))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scored(form, used, hidden, unembedding, targets, mask, temperature):
    return _forward(form, used, hidden, unembedding, targets, mask, temperature)[0]


def _forward(form, used, hidden, unembedding, targets, mask, temperature):
    places, tiles = _places(form.forward.tokens, mask)
    states, goals = _gathered(places, hidden.reshape(-1, hidden.shape[-1])), _gathered(places, targets.reshape(-1))
    logp, entropy, top, log_sum = forward_part(form.forward, None, states, unembedding, goals, temperature, tiles, used)
    results = tuple(_scattered(places, value, mask) for value in (logp, entropy))
    return results, (hidden, unembedding, targets, mask, temperature, top, log_sum, entropy)


def _backward(form, used, saved, gradients):
    hidden, unembedding, targets, mask, temperature, *sums = saved
    places, tiles = _places(form.forward.tokens, mask)
    states, goals = _gathered(places, hidden.reshape(-1, hidden.shape[-1])), _gathered(places, targets.reshape(-1))
    d_results = [_gathered(places, value.reshape(-1)) for value in gradients]
    d_states, d_unembedding = backward_part(
        form.backward, None, states, unembedding, goals, temperature, *sums, *d_results, tiles=tiles, used=used
    )
    d_hidden = jnp.zeros((targets.size, hidden.shape[-1]), hidden.dtype).at[places].set(d_states, mode="drop")
    return d_hidden.reshape(hidden.shape), d_unembedding, None, jnp.zeros_like(mask), jnp.zeros_like(temperature)


_scored.defvjp(_forward, _backward)


def _places(chunk: int, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (trained positions of the flat rows in order, then indices out of range; chunks with a trained one)."""
    trained = mask.reshape(-1) > 0
    padding = -trained.size % chunk
    order = jnp.nonzero(trained, size=trained.size + padding, fill_value=trained.size)[0]
    return order, -(-trained.sum() // chunk)


def _gathered(places, flat):
    """Returns the entries of `flat` at `places`, 0 for a place outside it."""
    return jnp.take(flat, places, axis=0, mode="fill", fill_value=0)


def _scattered(places, values, mask):
    """Returns an array of the mask's shape with the values at their places and 0 elsewhere."""
    return jnp.zeros(mask.size, jnp.float32).at[places].set(values, mode="drop").reshape(mask.shape)
