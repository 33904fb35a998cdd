"""Claims about the KL estimators, exact: every token of a small vocabulary is enumerated, in float64.

They are the derivation of docs/losses.md, checked on `losses.kl_divergence` itself.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.rl import losses

VOCABULARY = 11
UNBIASED = ("k1", "k3", "k3_straight_through")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def log_softmax(logits):
    return logits - jax.scipy.special.logsumexp(logits, axis=-1, keepdims=True)


def policies(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the logits of the policy, of the reference and of an older policy, [VOCABULARY] each."""
    drawn = np.random.default_rng(seed).normal(0, 1.5, (3, VOCABULARY))
    return tuple(jnp.asarray(row) for row in drawn)


def kl(logits, other) -> jax.Array:
    """Returns the exact KL(softmax(logits) || softmax(other))."""
    logp, logq = log_softmax(logits), log_softmax(other)
    return jnp.sum(jnp.exp(logp) * (logp - logq))


def expectation(logits, reference, estimator: str, older=None) -> jax.Array:
    """Returns the mean of an estimator over all tokens, each weighted by the probability that it is drawn.

    Tokens are drawn from `older`, or from the policy itself; no gradient reaches what draws them, as in training.
    """
    logp, drawn_by = log_softmax(logits), log_softmax(logits if older is None else older)
    drawn_by = jax.lax.stop_gradient(drawn_by)
    estimates = losses.kl_divergence(logp, log_softmax(reference), estimator, jnp.exp(logp - drawn_by))
    return jnp.sum(jnp.exp(drawn_by) * estimates)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("estimator", UNBIASED)
def test_expected_estimate_on_the_policys_own_tokens_is_the_exact_kl(estimator, seed):
    policy, reference, _ = policies(seed)
    np.testing.assert_allclose(expectation(policy, reference, estimator), kl(policy, reference), rtol=1e-14)


def test_expected_k3_summed_over_the_tokens_of_a_sample_is_the_exact_kl_of_whole_samples():
    rng, words, length = np.random.default_rng(3), 4, 3
    tables = [  # logits of the next token after every prefix, of policy and reference
        {prefix: jnp.asarray(rng.normal(0, 1, words)) for prefix in prefixes(words, length)} for _ in range(2)
    ]
    expected, exact = 0.0, 0.0
    for sample in itertools.product(range(words), repeat=length):
        logp, logq = (
            jnp.stack([log_softmax(table[sample[:t]])[token] for t, token in enumerate(sample)]) for table in tables
        )
        probability = jnp.exp(logp.sum())
        expected += probability * losses.kl_divergence(logp, logq, "k3").sum()
        exact += probability * (logp - logq).sum()
    np.testing.assert_allclose(expected, exact, rtol=1e-13)


def prefixes(words: int, length: int) -> list[tuple[int, ...]]:
    return [prefix for size in range(length) for prefix in itertools.product(range(words), repeat=size)]


@pytest.mark.parametrize("seed", range(3))
def test_k2_is_biased_by_what_the_second_order_leaves_out(seed):
    policy, reference, _ = policies(seed)
    exact, difference = kl(policy, reference), log_softmax(reference) - log_softmax(policy)
    k2 = expectation(policy, reference, "k2")
    np.testing.assert_allclose(k2, jnp.sum(jnp.exp(log_softmax(policy)) * difference**2) / 2, rtol=1e-14)
    assert abs(k2 / exact - 1) > 0.05
    near = policy + 1e-3 * (reference - policy)
    assert abs(expectation(policy, near, "k2") / kl(policy, near) - 1) < 2e-3


@pytest.mark.parametrize("estimator", ["k2", "k3_straight_through"])
def test_expected_gradient_of_k2_is_that_of_the_exact_kl(estimator):
    policy, reference, _ = policies(5)
    gradient = jax.grad(expectation)(policy, reference, estimator)
    np.testing.assert_allclose(gradient, jax.grad(kl)(policy, reference), atol=1e-14)


def test_expected_gradient_of_k3_is_that_of_the_kl_the_other_way_round():
    policy, reference, _ = policies(6)
    gradient, other = jax.grad(expectation)(policy, reference, "k3"), jax.grad(kl, argnums=1)(reference, policy)
    np.testing.assert_allclose(gradient, other, atol=1e-14)
    assert np.abs(gradient - jax.grad(kl)(policy, reference)).max() > 0.01


def test_expected_gradient_of_k1_is_zero():
    policy, reference, _ = policies(7)
    np.testing.assert_allclose(jax.grad(expectation)(policy, reference, "k1"), 0, atol=1e-14)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_on_tokens_of_an_older_policy_an_estimate_without_the_ratio_is_biased(estimator):
    policy, reference, older = policies(8)
    assert abs(expectation(policy, reference, estimator, older) / kl(policy, reference) - 1) > 0.05


def test_k3_clamped_is_biased_where_a_bound_cuts_and_k3_elsewhere():
    policy, reference, _ = policies(9)  # exp(d) - 1 - d is above 10 at some tokens
    assert expectation(policy, reference, "k3_clamped") < 0.9 * kl(policy, reference)
    near = policy + 0.2 * (reference - policy)
    assert expectation(policy, near, "k3_clamped") == expectation(policy, near, "k3")


def test_near_the_reference_k3_varies_less_than_k1_and_its_gradient_is_that_of_the_kl_to_first_order():
    policy, direction, _ = policies(10)
    apart = []
    for step in (1e-2, 1e-3):
        reference = policy + step * direction
        logp, logq = log_softmax(policy), log_softmax(reference)
        spread = {name: jnp.sum(jnp.exp(logp) * losses.kl_divergence(logp, logq, name) ** 2) for name in ("k1", "k3")}
        assert spread["k3"] < 0.01 * spread["k1"]
        exact = jax.grad(kl)(policy, reference)
        apart.append(jnp.abs(jax.grad(expectation)(policy, reference, "k3") - exact).max() / jnp.abs(exact).max())
    assert apart[0] < 0.1 and 8 < apart[0] / apart[1] < 12  # ten times nearer, ten times closer


def test_on_tokens_of_an_older_policy_k3_weighted_by_the_ratio_is_exact_in_value_and_gradient():
    policy, reference, older = policies(8)
    exact, exact_gradient = kl(policy, reference), jax.grad(kl)(policy, reference)
    np.testing.assert_allclose(expectation(policy, reference, "k3_weighted", older), exact, rtol=1e-14)
    gradient = jax.grad(expectation)(policy, reference, "k3_weighted", older)
    np.testing.assert_allclose(gradient, exact_gradient, atol=1e-14)
