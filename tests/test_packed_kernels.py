"""Attention within packed samples and log-probs of trained positions alone, value and gradient, against plain float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.kernels.packed_attention import packed_attention
from r1jax.kernels.trained_logprob import trained_logprobs

SEGMENTS = {  # rows of 13 tokens: several samples, padding inside and at the end, one sample alone, one token
    "packed": [[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]],
    "short": [[1, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 2, 2, 2, 2, 0, 0, 3, 3, 3]],
    "prefixed": [[1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 6, 0], [1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3]],
}
PREFIXES = {"prefixed": [[0, 0, 1, 1, 1, 1, 0, 4, 4, 4, 4, 4, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]}


def plain_attention(q, k, v, segments, scale, prefixes):
    """Returns softmax(q k / sqrt(d)) v over earlier tokens of the same segment and of the prefix, by the formula."""
    places = np.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    if prefixes is not None:
        same |= (prefixes[:, :, None] == segments[:, None, :]) & (prefixes > 0)[:, :, None]
    seen = (places[:, None] >= places) & same
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * scale
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    return jnp.einsum("bkgts,bskv->btkgv", jax.nn.softmax(scores, axis=-1), v)


@pytest.mark.parametrize("block", [1, 4, 5, 13, 64])
@pytest.mark.parametrize("name", SEGMENTS)
def test_attention_in_blocks_is_the_plain_formula_in_value_and_gradient(name, block):
    segments, generator = np.asarray(SEGMENTS[name]), np.random.default_rng(0)
    prefixes = np.asarray(PREFIXES[name]) if name in PREFIXES else None
    shapes = ((2, 13, 2, 3, 8), (2, 13, 2, 8), (2, 13, 2, 4))  # three query heads share a key head
    arrays = [generator.normal(size=shape).astype(np.float32) for shape in shapes]
    weight = generator.normal(size=(2, 13, 2, 3, 4)).astype(np.float32) * (segments > 0)[:, :, None, None, None]

    def total(attend):
        def function(q, k, v):
            out = attend(q, k, v)
            return jnp.sum(jnp.where(weight != 0, out, 0) * weight), out

        (_, out), grads = jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))(*arrays)
        return np.asarray(out)[segments > 0], grads

    found = total(lambda q, k, v: packed_attention(q, k, v, segments, 0.35, block, prefixes))
    wanted = total(lambda q, k, v: plain_attention(q, k, v, segments, 0.35, prefixes))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6)


def test_a_block_without_tokens_is_refused():
    ones = jnp.ones((1, 2, 1, 1, 2))
    with pytest.raises(ValueError, match="block=0 must be at least 1"):
        packed_attention(ones, ones[:, :, :, 0], ones[:, :, :, 0], jnp.ones((1, 2), int), 1.0, 0)


def by_formula(hidden, matrix, targets, mask, temperature, d_logp, d_entropy):
    """Returns (log-probs, entropies, gradient of hidden, of the matrix) in float64."""
    hidden, matrix = hidden.astype(np.float64), matrix.astype(np.float64)
    logits = hidden @ matrix / temperature
    every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    probs, entropy = np.exp(every), -(np.exp(every) * every).sum(-1)
    hot = np.eye(matrix.shape[1])[targets]
    d_logits = (hot - probs) * d_logp[..., None] - probs * (every + entropy[..., None]) * d_entropy[..., None]
    d_logits *= (mask > 0)[..., None] / temperature
    logp = (every * hot).sum(-1)
    return logp * mask, entropy * mask, d_logits @ matrix.T, np.einsum("btd,btv->dv", hidden, d_logits)


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
@pytest.mark.parametrize("trained", [0.0, 0.4, 1.0])
def test_log_probs_of_trained_positions_are_the_formula_in_value_and_gradient(chunk, trained):
    generator = np.random.default_rng(1)
    hidden = generator.normal(size=(2, 7, 6)).astype(np.float32)
    matrix, targets = generator.normal(size=(6, 11)).astype(np.float32), generator.integers(0, 11, (2, 7))
    mask = (generator.random((2, 7)) < trained).astype(np.float32)
    d_logp, d_entropy = generator.normal(size=(2, 2, 7)).astype(np.float32)

    def function(hidden, matrix):
        logp, entropy = trained_logprobs(hidden, matrix, jnp.asarray(targets), jnp.asarray(mask), 0.7, chunk)
        return jnp.sum(logp * d_logp) + jnp.sum(entropy * d_entropy), (logp, entropy)

    (_, values), grads = jax.jit(jax.value_and_grad(function, (0, 1), has_aux=True))(hidden, matrix)
    wanted = by_formula(hidden, matrix, targets, mask, 0.7, d_logp, d_entropy)
    for a, b in zip((*values, *grads), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)


def test_the_matrix_s_gradient_is_summed_in_float32_whatever_the_chunk():
    """4,096 equal terms of a bfloat16 sum would stop growing at 256 of them."""
    hidden, matrix = jnp.ones((1, 4096, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)
    targets, mask = jnp.zeros((1, 4096), int), jnp.ones((1, 4096))
    function = lambda matrix: jnp.sum(trained_logprobs(hidden, matrix, targets, mask, 1.0, 8)[0])  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.grad(function))(matrix), np.asarray([[2048.0, -2048.0]]))
