"""Claims about advantages and the GRPO loss, against float64 NumPy written from the paper's formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from r1jax.core import private_jax, rng, sharding
from r1jax.kernels.fused_logprob import token_logprobs
from r1jax.models import decoder
from r1jax.rewards.compose import PART_NAMES
from r1jax.rl import losses
from r1jax.rl import rollout as rollouts
from r1jax.rl.advantages import group_advantages
from r1jax.rl.journal import Rollout
from r1jax.rl.logprobs import Scorer
from r1jax.sampler.sample import RolloutSample
from r1jax.schema import Config, GRPOConfig, MeshConfig, PackConfig, RewardConfig, replace
from r1jax.train import step

MODEL = small.network(
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


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ((1, 0.2, 1), [(0, 1, 0.025), (0, 0, 0.225)]),  # accuracy, format, language of the tiny world
        ((1, 0.2, 1), [(0, 1, 0.04), (0, 0, 0.24), (0, 1, 0.04)]),
        ((1, 1, 1), [(0.1, 0.2, 0), (0.3, 0, 0), (0, 0.1, 0.2)]),
        ((1, 1, 1), [(0.1, 0.2, 0.3), (0.3, 0.2, 0.1), (0.6, 0, 0)]),
        ((1, 1, -1), [(0.1, 0.2, 0.3), (0.7, 0.1, 0.8)]),  # sums that cancel
    ],
)
def test_rewards_that_differ_by_rounding_alone_tie(weights, parts):
    parts = np.asarray(parts, np.float32)
    values, _, signal = group_advantages(parts, np.asarray(weights, np.float32), np.ones(len(parts), bool), len(parts))
    assert not np.asarray(values).any() and not signal[0]


def test_the_smallest_real_difference_between_rewards_is_a_signal():
    values, _, signal = advantages([1, 1, 1, 1 - 1e-4], 4, epsilon=0.0)
    assert signal[0]
    np.testing.assert_allclose(values, np.asarray([1, 1, 1, -3]) / np.sqrt(3), rtol=2e-3)


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
    before = private_jax.compilations(group_advantages)
    for weights in ([1, 0], [0, 1], [1, 0.2]):
        _, rewards, _ = group_advantages(parts, np.asarray(weights, np.float32), np.ones(2, bool), 2)
        np.testing.assert_allclose(rewards, parts @ np.asarray(weights), rtol=1e-6)
    assert private_jax.compilations(group_advantages) <= before + 1


def test_samples_that_do_not_split_into_groups_are_refused():
    with pytest.raises(ValueError, match="5 samples do not split into groups of group_size=2"):
        advantages([1, 2, 3, 4, 5], 2)


def test_k3_is_never_negative_and_zero_only_where_the_two_agree():
    logp, reference = np.random.default_rng(0).normal(size=(2, 200))
    u = np.exp(reference - logp)
    np.testing.assert_allclose(losses.kl_divergence(logp, reference, "k3"), u - np.log(u) - 1, rtol=2e-4, atol=1e-6)
    assert float(losses.kl_divergence(jnp.asarray(-1.5), jnp.asarray(-1.5), "k3")) == 0.0
    assert np.asarray(losses.kl_divergence(logp, reference, "k3")).min() > 0


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
    assert float(losses.clipped_surrogate(jnp.asarray(ratio), advantage, clip, clip)) == pytest.approx(expected)


def test_token_weights_give_each_aggregation_its_denominator():
    lengths = [1, 4, 5]

    def total(aggregation, **fields):
        config = GRPOConfig(aggregation=aggregation, **fields)
        return losses.token_weights(lengths, config, max_new_tokens=8)

    np.testing.assert_allclose(total("seq_mean_token_mean"), [1 / 3, 1 / 12, 1 / 15], rtol=1e-6)
    np.testing.assert_allclose(total("token_mean"), [0.1] * 3, rtol=1e-6)
    np.testing.assert_allclose(total("seq_mean_token_sum"), [1 / 24] * 3, rtol=1e-6)
    np.testing.assert_allclose(total("seq_mean_token_sum", length_divisor=2), [1 / 6] * 3, rtol=1e-6)


def test_token_weights_of_a_mini_batch_sum_to_one_or_to_its_share_of_the_constant_length():
    lengths = np.random.default_rng(5).integers(1, 40, 50)

    def sums(**fields):
        weights = losses.token_weights(lengths, GRPOConfig(**fields), max_new_tokens=40)
        return float((weights.astype(np.float64) * lengths).sum()), weights * lengths

    total, each = sums(aggregation="seq_mean_token_mean")
    assert total == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(each, 1 / 50, rtol=1e-6)  # every output counts alike, whatever its length
    assert sums(aggregation="token_mean")[0] == pytest.approx(1, rel=1e-6)
    assert sums(aggregation="seq_mean_token_sum")[0] == pytest.approx(lengths.mean() / 40, rel=1e-6)
    assert sums(aggregation="seq_mean_token_sum", length_divisor=7)[0] == pytest.approx(lengths.mean() / 7, rel=1e-6)


@pytest.fixture(scope="module")
def problem():
    """Returns (params, micro-batch) of two rows: three samples, padding, a masked prompt, ratios far from 1."""
    generator = np.random.default_rng(1)
    params = sharding.initialize(
        decoder.specs(MODEL.model), rng.key(0, "losses", "init"), "float32", sharding.make_mesh(MeshConfig())
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
    arguments = losses.arguments(GRPOConfig(clip_ratio=clip), beta, temperature)
    value, stats = jax.jit(losses.make_loss(MODEL, GRPOConfig()))(params, micro, arguments)
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
    arguments = losses.arguments(GRPOConfig(clip_ratio=0.2), 0.04, 1.0)
    grads = jax.jit(jax.grad(lambda p: losses.make_loss(MODEL, GRPOConfig())(p, micro, arguments)[0]))(params)
    hidden, _, _ = decoder.forward(params, micro["tokens"], micro["positions"], micro["segments"], MODEL)
    hidden, table = np.asarray(hidden, np.float64), np.asarray(params.unembedding, np.float64)
    generator = np.random.default_rng(2)
    for _ in range(6):
        direction = generator.normal(size=table.shape)
        up, down = (reference_loss(hidden @ (table + s * direction), micro, 0.2, 0.04, 1.0)[0] for s in (1e-6, -1e-6))
        expected = (up - down) / 2e-6
        assert float((np.asarray(grads.unembedding) * direction).sum()) == pytest.approx(expected, rel=2e-4, abs=1e-5)


def test_gradient_of_every_parameter_follows_the_reference_along_random_directions(problem):
    params, micro = problem
    clip, beta, temperature = 10.0, 0.04, 0.7
    arguments = losses.arguments(GRPOConfig(clip_ratio=clip), beta, temperature)
    grads = jax.jit(jax.grad(lambda p: losses.make_loss(MODEL, GRPOConfig())(p, micro, arguments)[0]))(params)

    @jax.jit
    def all_logits(params):
        hidden, _, _ = decoder.forward(params, micro["tokens"], micro["positions"], micro["segments"], MODEL)
        return decoder.logits(params, hidden)

    def value(scale, direction):
        moved = jax.tree.map(lambda p, d: p + scale * d, params, direction)
        return reference_loss(all_logits(moved), micro, clip, beta, temperature)[0]

    generator = np.random.default_rng(6)
    for _ in range(4):
        direction = jax.tree.map(lambda p: generator.normal(size=p.shape).astype(np.float32), params)
        expected = (value(1e-3, direction) - value(-1e-3, direction)) / 2e-3
        products = jax.tree.map(lambda g, d: float((np.asarray(g, np.float64) * d).sum()), grads, direction)
        assert sum(jax.tree.leaves(products)) == pytest.approx(expected, rel=2e-3, abs=2e-3)


def mini_rollout():
    """Returns six samples of two questions, of unequal lengths; one cannot be scored."""
    generator = np.random.default_rng(7)
    samples = [
        RolloutSample(
            request_id=index // 3,
            sample_index=index % 3,
            prompt_ids=generator.integers(0, 23, 2 + index // 3).astype(np.int32),
            token_ids=generator.integers(0, 23, length).astype(np.int32),
            logps=np.zeros(length, np.float32),
            behaviour_logps=generator.normal(-4, 1.5, length).astype(np.float32),
            finish_reason="stop",
            weight_version=0,
            routed_experts=None,
        )
        for index, length in enumerate((1, 5, 3, 4, 2, 6))
    ]
    parts = generator.random((6, len(PART_NAMES))).astype(np.float32)
    return Rollout(samples, parts, np.asarray([True, True, True, True, False, True]), 2)


@jax.jit
def logits_alone(params, ids):
    """Returns logits [T, V] of one sequence in a row of its own; what follows its end cannot reach back into it."""
    hidden, _, _ = decoder.forward(params, ids[None], jnp.arange(ids.size)[None], jnp.ones((1, ids.size), int), MODEL)
    return decoder.logits(params, hidden)[0]


def log_probs(params, sample, temperature):
    """Returns float64 log p of a sample's response tokens, from a forward pass over that sample alone."""
    ids = np.concatenate([sample.prompt_ids, sample.token_ids])
    scaled = np.asarray(logits_alone(params, np.pad(ids, (0, 9 - len(ids)))), np.float64) / temperature
    every = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    first = len(sample.prompt_ids) - 1
    return every[np.arange(first, first + len(sample.token_ids)), sample.token_ids]


def objective_by_hand(rollout, policy, reference, weights, grpo, temperature, longest):
    """DeepSeek-R1, eq. 1-3, output by output; the means as Tunix's `grpo_loss_fn` (tunix/rl/algo_core.py) takes them."""
    rewards = rollout.reward_terms.astype(np.float64) @ weights
    advantages, total, tokens = np.zeros(6), 0.0, sum(len(s.token_ids) for s in rollout.samples)
    for group in (slice(0, 3), slice(3, 6)):
        scorable = rollout.scorable[group]
        known = rewards[group][scorable]
        deviation = np.sqrt(((known - known.mean()) ** 2).mean()) + grpo.advantage_epsilon
        advantages[group] = np.where(scorable, (rewards[group] - known.mean()) / deviation, 0)
    for sample, advantage, scorable in zip(rollout.samples, advantages, rollout.scorable, strict=True):
        if not scorable:
            continue
        logp, inner = log_probs(policy, sample, temperature), 0.0
        for now, old, base in zip(logp, sample.behaviour_logps, log_probs(reference, sample, temperature), strict=True):
            ratio, u = np.exp(now - old), np.exp(base - now)
            clipped = min(max(ratio, 1 - grpo.clip_ratio), 1 + grpo.clip_ratio)
            inner += min(ratio * advantage, clipped * advantage) - grpo.kl_coef * (u - np.log(u) - 1)
        total += {
            "seq_mean_token_mean": inner / len(logp) / 6,
            "token_mean": inner / tokens,
            "seq_mean_token_sum": inner / longest / 6,
        }[grpo.aggregation]
    return -total


@pytest.mark.parametrize("aggregation", ["seq_mean_token_mean", "token_mean", "seq_mean_token_sum"])
def test_packed_loss_of_a_scored_rollout_is_the_papers_objective(problem, aggregation):
    policy, mesh = problem[0], sharding.make_mesh(MeshConfig())
    reference = sharding.initialize(decoder.specs(MODEL.model), rng.key(1, "losses", "init"), "float32", mesh)
    grpo = GRPOConfig(group_size=3, prompts_per_update=2, clip_ratio=2.0, kl_coef=0.05, aggregation=aggregation)
    config = Config(grpo=grpo, pack=PackConfig(14, 2), reward=RewardConfig(format=0.2, language=1.0))
    weights = np.asarray([getattr(config.reward, name) for name in PART_NAMES])
    scored, temperature = mini_rollout(), 0.8
    advantages = rollouts.compute_advantages(scored, config, 6)
    packed = rollouts.pack_mini_batch(scored, np.asarray([4, 0, 3, 5, 1, 2]), advantages, config, 6)
    fields = ("advantage", "behaviour_logp", "weight")
    arrays = step.batch_arrays(packed, config.pack, rollouts.micro_batches(config), fields)
    filled = step.filled_micro_batches(packed, config.pack)
    arrays["reference_logp"] = Scorer(MODEL, mesh)(reference, arrays, filled, temperature)
    arguments = losses.arguments(grpo, grpo.kl_coef, temperature)
    loss = jax.jit(losses.make_loss(MODEL, GRPOConfig()))
    parts = [loss(policy, {name: array[i] for name, array in arrays.items()}, arguments) for i in range(filled)]
    expected = objective_by_hand(scored, policy, reference, weights, grpo, temperature, longest=6)
    assert filled == 2
    assert sum(float(value) for value, _ in parts) == pytest.approx(expected, rel=1e-5)
    assert sum(float(stats["tokens"]) for _, stats in parts) == 1 + 5 + 3 + 4 + 6


def test_masked_tokens_and_padding_change_nothing(problem):
    params, micro = problem
    arguments = losses.arguments(GRPOConfig(clip_ratio=0.2), 0.04, 1.0)
    generator = np.random.default_rng(3)
    other = dict(micro)
    hidden_tokens = micro["loss_mask"] == 0
    for name in ("advantage", "behaviour_logp", "reference_logp", "weight"):
        other[name] = np.where(hidden_tokens, generator.normal(size=hidden_tokens.shape) * 50, micro[name])
    other["tokens"] = np.where(micro["segments"] == 0, 5, micro["tokens"])
    loss = jax.jit(losses.make_loss(MODEL, GRPOConfig()))
    assert float(loss(params, micro, arguments)[0]) == pytest.approx(float(loss(params, other, arguments)[0]), rel=1e-6)


def test_entropy_is_that_of_the_tempered_softmax():
    hidden, table = jnp.ones((1, 1, 1)), jnp.log(jnp.asarray([[0.5, 0.25, 0.25]]))
    logp, entropy = token_logprobs(hidden, table, jnp.asarray([[1]]), 0.5)
    probs = np.asarray([4, 1, 1]) / 6
    assert float(logp[0, 0]) == pytest.approx(np.log(1 / 6), rel=1e-5)
    assert float(entropy[0, 0]) == pytest.approx(-(probs * np.log(probs)).sum(), rel=1e-5)


def test_loss_arguments_change_without_compiling_again(problem):
    params, micro = problem
    compiled = jax.jit(lambda p, m, a: losses.make_loss(MODEL, GRPOConfig())(p, m, a)[0])
    values = {
        float(compiled(params, micro, losses.arguments(GRPOConfig(clip_ratio=triple[0]), *triple[1:])))
        for triple in ((0.2, 0.0, 1.0), (10.0, 0.1, 1.0), (0.2, 0.04, 0.5))
    }
    assert len(values) == 3
    assert private_jax.compilations(compiled) == 1


def test_the_defaults_are_the_papers():
    grpo = GRPOConfig()
    assert (grpo.group_size, grpo.prompts_per_update, grpo.updates_per_rollout) == (16, 32, 16)
    assert (grpo.clip_ratio, grpo.kl_coef, grpo.reference_refresh_updates) == (10.0, 0.001, 400)
    assert replace(grpo, clip_ratio=0.2).clip_ratio == 0.2
