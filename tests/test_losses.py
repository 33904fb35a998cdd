"""Claims about advantages and the GRPO loss, against float64 NumPy written from the paper's formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.core import rng, sharding
from r1jax.kernels.fused_logprob import token_logprobs
from r1jax.models import decoder
from r1jax.rl import losses
from r1jax.rl.advantages import group_advantages
from r1jax.schema import GRPOConfig, MeshConfig, ModelConfig, replace

MODEL = ModelConfig(
    family="llama",
    vocab_size=23,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.4,
    scan_layers=False,
)


def advantages(rewards, group_size, scorable=None, epsilon=1e-6):
    rewards = np.asarray(rewards, np.float32)
    scorable = np.ones(len(rewards), bool) if scorable is None else np.asarray(scorable)
    return group_advantages(rewards[:, None], np.ones(1, np.float32), scorable, group_size, epsilon)


def test_advantage_is_centred_and_divided_by_the_population_deviation():
    values, rewards, signal = advantages([1, 0, 0, 0, 3, 1, 1, 3], 4, epsilon=0.0)
    np.testing.assert_allclose(values[:4], np.asarray([0.75, -0.25, -0.25, -0.25]) / np.sqrt(3 / 16), rtol=1e-6)
    np.testing.assert_allclose(values[4:], [1, -1, -1, 1], rtol=1e-6)
    assert signal.tolist() == [True, True]
    assert rewards.tolist() == [1, 0, 0, 0, 3, 1, 1, 3]


@pytest.mark.parametrize("tie", [0.0, 1.0, 0.3, 1.2])
def test_advantages_are_exactly_zero_when_every_reward_ties(tie):
    values, _, signal = advantages([tie] * 7 + [tie] * 7, 7)
    assert not np.asarray(values).any() and not np.asarray(signal).any()


def test_unscorable_samples_leave_the_statistics_and_get_zero():
    values, _, _ = advantages([1, 0, 9, 0], 4, scorable=[True, True, False, True], epsilon=0.0)
    deviation = np.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 3)
    np.testing.assert_allclose(values, np.asarray([2 / 3, -1 / 3, 0, -1 / 3]) / deviation, rtol=1e-6)
    nothing, _, signal = advantages([1, 0], 2, scorable=[False, False])
    assert not np.asarray(nothing).any() and not signal[0]


def test_a_group_of_one_has_no_signal():
    values, _, signal = advantages([5.0], 1)
    assert values.tolist() == [0.0] and not signal[0]


def test_reward_weights_are_an_argument():
    parts = np.asarray([[1, 0], [0, 1]], np.float32)
    before = group_advantages._cache_size()
    for weights in ([1, 0], [0, 1], [1, 0.2]):
        _, rewards, _ = group_advantages(parts, np.asarray(weights, np.float32), np.ones(2, bool), 2)
        np.testing.assert_allclose(rewards, parts @ np.asarray(weights), rtol=1e-6)
    assert group_advantages._cache_size() <= before + 1


def test_samples_that_do_not_split_into_groups_are_refused():
    with pytest.raises(ValueError, match="5 samples do not split into groups of group_size=2"):
        advantages([1, 2, 3, 4, 5], 2)


def test_k3_is_never_negative_and_zero_only_where_the_two_agree():
    logp, reference = np.random.default_rng(0).normal(size=(2, 200))
    u = np.exp(reference - logp)
    np.testing.assert_allclose(losses.k3_kl(logp, reference), u - np.log(u) - 1, rtol=2e-4, atol=1e-6)
    assert float(losses.k3_kl(jnp.asarray(-1.5), jnp.asarray(-1.5))) == 0.0
    assert np.asarray(losses.k3_kl(logp, reference)).min() > 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip", "expected"),
    [
        (1.5, 1.0, 0.2, 1.2),
        (1.5, -1.0, 0.2, -1.5),  # the unclipped branch: the optimistic max would give -1.2
        (0.5, -1.0, 0.2, -0.8),
        (0.5, 1.0, 0.2, 0.5),
        (12.0, 1.0, 10.0, 11.0),  # epsilon 10 of the paper cuts only here
        (12.0, -1.0, 10.0, -12.0),  # and bounds nothing here
        (0.0, -2.0, 10.0, 0.0),
    ],
)
def test_surrogate_takes_the_pessimistic_branch(ratio, advantage, clip, expected):
    assert float(losses.clipped_surrogate(jnp.asarray(ratio), advantage, clip)) == pytest.approx(expected)


def test_token_weights_give_each_aggregation_its_denominator():
    lengths = [1, 4, 5]

    def total(aggregation, **fields):
        config = GRPOConfig(aggregation=aggregation, **fields)
        return losses.token_weights(lengths, config, max_new_tokens=8)

    np.testing.assert_allclose(total("seq_mean_token_mean"), [1 / 3, 1 / 12, 1 / 15], rtol=1e-6)
    np.testing.assert_allclose(total("token_mean"), [0.1] * 3, rtol=1e-6)
    np.testing.assert_allclose(total("seq_mean_token_sum"), [1 / 24] * 3, rtol=1e-6)
    np.testing.assert_allclose(total("seq_mean_token_sum", length_divisor=2), [1 / 6] * 3, rtol=1e-6)


@pytest.fixture(scope="module")
def problem():
    """Returns (params, micro-batch) of two rows: three samples, padding, a masked prompt, ratios far from 1."""
    generator = np.random.default_rng(1)
    params = sharding.initialize(
        decoder.specs(MODEL), rng.key(0, "losses", "init"), "float32", sharding.make_mesh(MeshConfig())
    )
    shape = (2, 9)
    micro = {
        "tokens": generator.integers(0, 23, shape).astype(np.int32),
        "targets": generator.integers(0, 23, shape).astype(np.int32),
        "positions": np.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0, 0, 0]], np.int32),
        "segments": np.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0, 0]], np.int32),
        "loss_mask": np.asarray([[0, 1, 1, 1, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0, 0, 0]], np.float32),
        "weight": generator.uniform(0.1, 1, shape).astype(np.float32),
        "advantage": generator.normal(size=shape).astype(np.float32),
        "behaviour_logp": generator.normal(-4, 1.5, shape).astype(np.float32),
        "reference_logp": generator.normal(-4, 1, shape).astype(np.float32),
    }
    return params, micro


def reference_loss(logits, micro, clip, beta, temperature):
    """GRPO as TRL's `_compute_loss` (trl/trainer/grpo_trainer.py) and the paper write it, per token, in float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    norm = np.log(np.exp(scaled - scaled.max(-1, keepdims=True)).sum(-1)) + scaled.max(-1)
    logp = np.take_along_axis(scaled, micro["targets"][..., None], -1)[..., 0] - norm
    ratio = np.exp(logp - micro["behaviour_logp"])
    a = micro["advantage"].astype(np.float64)
    policy = -np.minimum(ratio * a, np.clip(ratio, 1 - clip, 1 + clip) * a)
    gap = micro["reference_logp"] - logp
    kl = np.exp(gap) - gap - 1
    return float((micro["loss_mask"] * micro["weight"] * (policy + beta * kl)).sum()), logp, ratio, kl


@pytest.mark.parametrize(("clip", "beta", "temperature"), [(0.2, 0.04, 1.0), (10.0, 0.001, 1.0), (0.3, 0.0, 0.7)])
def test_loss_equals_the_float64_reference(problem, clip, beta, temperature):
    params, micro = problem
    arguments = losses.LossArguments(*(np.float32(value) for value in (clip, beta, temperature)))
    value, stats = losses.make_loss(MODEL)(params, micro, arguments)
    hidden, _, _ = decoder.forward(params, micro["tokens"], micro["positions"], micro["segments"], MODEL)
    expected, logp, ratio, kl = reference_loss(decoder.logits(params, hidden), micro, clip, beta, temperature)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    mask = micro["loss_mask"]
    assert float(stats["kl"]) == pytest.approx((kl * mask).sum(), rel=1e-5)
    assert float(stats["tokens"]) == mask.sum()
    assert float(stats["max_ratio"]) == pytest.approx(ratio[mask > 0].max(), rel=1e-5)
    differences = np.abs(logp - micro["behaviour_logp"])[mask > 0]
    assert float(stats["max_logprob_difference"]) == pytest.approx(differences.max(), rel=1e-5)


def test_gradient_equals_finite_differences_of_the_reference(problem):
    params, micro = problem
    arguments = losses.LossArguments(*(np.float32(value) for value in (0.2, 0.04, 1.0)))
    grads = jax.grad(lambda p: losses.make_loss(MODEL)(p, micro, arguments)[0])(params)
    hidden, _, _ = decoder.forward(params, micro["tokens"], micro["positions"], micro["segments"], MODEL)
    hidden, table = np.asarray(hidden, np.float64), np.asarray(params.unembedding, np.float64)
    generator = np.random.default_rng(2)
    for _ in range(6):
        direction = generator.normal(size=table.shape)
        up, down = (reference_loss(hidden @ (table + s * direction), micro, 0.2, 0.04, 1.0)[0] for s in (1e-6, -1e-6))
        expected = (up - down) / 2e-6
        assert float((np.asarray(grads.unembedding) * direction).sum()) == pytest.approx(expected, rel=2e-4, abs=1e-5)


def test_masked_tokens_and_padding_change_nothing(problem):
    params, micro = problem
    arguments = losses.LossArguments(*(np.float32(value) for value in (0.2, 0.04, 1.0)))
    generator = np.random.default_rng(3)
    other = dict(micro)
    hidden_tokens = micro["loss_mask"] == 0
    for name in ("advantage", "behaviour_logp", "reference_logp", "weight"):
        other[name] = np.where(hidden_tokens, generator.normal(size=hidden_tokens.shape) * 50, micro[name])
    other["tokens"] = np.where(micro["segments"] == 0, 5, micro["tokens"])
    loss = losses.make_loss(MODEL)
    assert float(loss(params, micro, arguments)[0]) == pytest.approx(float(loss(params, other, arguments)[0]), rel=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 100])
def test_chunked_log_probs_equal_unchunked_in_value_and_gradient(chunk_tokens):
    generator = np.random.default_rng(4)
    hidden = jnp.asarray(generator.normal(size=(2, 9, 16)), jnp.float32)
    table = jnp.asarray(generator.normal(size=(16, 23)), jnp.float32)
    targets = jnp.asarray(generator.integers(0, 23, (2, 9)))

    def total(hidden, table, chunk):
        logp, entropy = token_logprobs(hidden, table, targets, 0.7, chunk)
        return jnp.sum(jnp.sin(logp)) + jnp.sum(entropy), (logp, entropy)

    whole = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, table, 0)
    parts = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, table, chunk_tokens)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_entropy_is_that_of_the_tempered_softmax():
    hidden, table = jnp.ones((1, 1, 1)), jnp.log(jnp.asarray([[0.5, 0.25, 0.25]]))
    logp, entropy = token_logprobs(hidden, table, jnp.asarray([[1]]), 0.5)
    probs = np.asarray([4, 1, 1]) / 6
    assert float(logp[0, 0]) == pytest.approx(np.log(1 / 6), rel=1e-5)
    assert float(entropy[0, 0]) == pytest.approx(-(probs * np.log(probs)).sum(), rel=1e-5)


def test_loss_arguments_change_without_compiling_again(problem):
    params, micro = problem
    step = jax.jit(lambda p, m, a: losses.make_loss(MODEL)(p, m, a)[0])
    values = {
        float(step(params, micro, losses.LossArguments(*(np.float32(v) for v in triple))))
        for triple in ((0.2, 0.0, 1.0), (10.0, 0.1, 1.0), (0.2, 0.04, 0.5))
    }
    assert len(values) == 3
    assert step._cache_size() == 1


def test_the_defaults_are_the_papers():
    grpo = GRPOConfig()
    assert (grpo.group_size, grpo.prompts_per_update, grpo.updates_per_rollout) == (16, 32, 16)
    assert (grpo.clip_ratio, grpo.kl_coef, grpo.reference_refresh_updates) == (10.0, 0.001, 400)
    assert replace(grpo, clip_ratio=0.2).clip_ratio == 0.2
