"""Token log-probabilities from hidden states and the unembedding; the place where fused versions slot in.

The vocabulary is never held for all tokens at once: tokens are scored in chunks whose logits are recomputed in the
backward pass.
"""

import functools

import jax
import jax.numpy as jnp


def _score(hidden, unembedding_DV, targets, temperature):
    """Returns (log p(target), entropy) of [..., D] hidden states; no operation mixes parts of a divided vocabulary."""
    logits = jnp.einsum("...D,DV->...V", hidden, unembedding_DV, preferred_element_type=jnp.float32)
    logits = logits.astype(jnp.float32) / temperature
    norm = jax.nn.logsumexp(logits, axis=-1)
    at_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    picked = jnp.sum(jnp.where(at_target, logits, 0), axis=-1)
    probs_logits = jnp.sum(jnp.exp(logits - norm[..., None]) * logits, axis=-1)
    return picked - norm, jax.lax.stop_gradient(norm - probs_logits)


@functools.partial(jax.jit, static_argnames=("chunk_tokens",), inline=True)
def token_logprobs(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, temperature=1.0, chunk_tokens: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Returns (log p(target), entropy), float32 [B, T] in nats, of softmax(hidden @ unembedding / temperature).

    hidden is [B, T, D], unembedding [D, V], targets int32 [B, T]. With chunk_tokens > 0 at most that many tokens' logits
    exist at once (B * T is padded to whole chunks); 0 scores all at once. The entropy carries no gradient.
    """
    batch, length, width = hidden.shape
    if not chunk_tokens or chunk_tokens >= batch * length:
        return _score(hidden, unembedding, targets, temperature)
    total = batch * length
    padding = -total % chunk_tokens
    flat = jnp.pad(hidden.reshape(total, width), ((0, padding), (0, 0))).reshape(-1, chunk_tokens, width)
    goal = jnp.pad(targets.reshape(total), (0, padding)).reshape(-1, chunk_tokens)
    score = jax.checkpoint(functools.partial(_score, temperature=temperature))
    logp, entropy = jax.lax.map(lambda xs: score(xs[0], unembedding, xs[1]), (flat, goal))
    return logp.reshape(-1)[:total].reshape(batch, length), entropy.reshape(-1)[:total].reshape(batch, length)
