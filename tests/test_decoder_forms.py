"""Every way to compute the decoder gives the same numbers: packed, cached, absorbed, unrolled, each expert form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from r1jax.core import sharding
from r1jax.core.sharding import ParamSpec
from r1jax.models import attention, cache, decoder, moe, rope
from r1jax.schema import Network, RopeScaling

TOLERANCE = 1e-5  # of the largest value: float32 sums in another order

YARN = RopeScaling("yarn", 8.0, 8, mscale=1.0, mscale_all_dim=1.0)
DEEPSEEK = small.network(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    rope_scaling=YARN,
    initializer_range=0.2,
)
QWEN2 = small.network(
    family="qwen2",
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    attention_bias=True,
    tie_word_embeddings=True,
    initializer_range=0.2,
)
V2 = small.changed(
    DEEPSEEK,
    family="deepseek_v2",
    scoring_func="softmax",
    norm_topk_prob=False,
    q_lora_rank=0,
    n_group=1,
    topk_group=1,
    rope_scaling=RopeScaling(),
)
QWEN3 = small.changed(QWEN2, family="qwen3", attention_bias=False, qk_norm=True)
CONFIGS = {"deepseek_v3": DEEPSEEK, "deepseek_v2": V2, "qwen2": QWEN2, "qwen3": QWEN3}
families = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
both_attentions = pytest.mark.parametrize("config", [DEEPSEEK, QWEN2], ids=["latent", "grouped"])


@functools.cache
def weights(config: Network) -> decoder.Params:
    """Returns random weights; those that start at zero or one are moved away from it."""
    draw = np.random.default_rng(0)

    def value(spec: ParamSpec) -> jax.Array:
        centre = 1.0 if spec.init is sharding.ones else 0.0
        return jnp.asarray(centre + 0.2 * draw.normal(size=spec.shape), jnp.float32)

    return sharding.map_specs(value, decoder.specs(config.model, config.scalar_head))


def draw_tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 67, (rows, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("config", "window"))
def run(params, tokens, positions, segments, config, kv=None, window=None):
    hidden, kv, auxiliary = decoder.forward(params, tokens, positions, segments, config, kv, window)
    return decoder.logits(params, hidden), kv, auxiliary.experts


def whole(tokens: np.ndarray, config: Network) -> np.ndarray:
    """Returns the logits of rows that are one segment each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return np.asarray(run(weights(config), tokens, positions, np.ones_like(tokens), config)[0])


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    scale = np.abs(wanted).max()
    assert scale > 0.1  # large enough that an error would show
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * scale, rtol=0)


@families
def test_packed_segments_equal_separate_rows(config):
    lengths = (5, 9, 3)
    tokens = draw_tokens(1, 20)
    segments = np.repeat([1, 2, 3, 0], (*lengths, 3))[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 3)])[None].astype(np.int32)
    packed = np.asarray(run(weights(config), tokens, positions, segments, config)[0])[0]
    starts = np.asarray([0, 5, 14])
    rows = np.stack([np.roll(tokens[0], -start) for start in starts])
    separate = whole(rows, config)  # what follows a row's own tokens cannot reach back to them
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert_close(packed[start : start + length], separate[row, :length])


@families
def test_a_later_token_changes_no_earlier_logit(config):
    tokens = draw_tokens(1, 12)
    changed = tokens.copy()
    changed[0, 7] = (changed[0, 7] + 1) % 67
    before, after = whole(tokens, config)[0], whole(changed, config)[0]
    assert_close(after[:7], before[:7])
    assert np.abs(after[7:] - before[7:]).max() > 0.01


@families
@pytest.mark.parametrize("unrolled", [False, True], ids=["scanned", "unrolled"])
def test_prefill_in_pieces_and_decode_through_the_cache_equal_one_pass(config, unrolled):
    config = small.changed(config, scan_layers=not unrolled)
    tokens, lengths = draw_tokens(3, 24), (9, 16, 13)
    wanted = whole(tokens, config)
    kv = cache.CacheSpec(config, slots=3, rows=24).zeros()
    found = np.zeros_like(wanted)
    for start in (0, 8):  # two pieces of 8 tokens, shorter rows padded
        piece = np.arange(start, start + 8)
        segments = (piece < np.asarray(lengths)[:, None]).astype(np.int32)
        positions = np.broadcast_to(piece, segments.shape).astype(np.int32)
        logits, kv, _ = run(weights(config), tokens[:, start : start + 8], positions, segments, config, kv, start + 8)
        found[:, start : start + 8] = logits
    for offset in range(8):  # rows stand at different positions
        at = np.asarray(lengths)[:, None] + offset
        token = np.take_along_axis(tokens, at, 1)
        logits, kv, _ = run(weights(config), token, at.astype(np.int32), np.ones_like(token), config, kv)
        found[np.arange(3), at[:, 0]] = np.asarray(logits)[:, 0]
    for row, length in enumerate(lengths):
        assert_close(found[row, : length + 8], wanted[row, : length + 8])


@families
def test_a_window_of_the_cache_gives_the_logits_of_the_whole_cache(config):
    tokens = draw_tokens(2, 12)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    kv = cache.CacheSpec(config, slots=2, rows=40).zeros()
    narrow, _, _ = run(weights(config), tokens, positions, np.ones_like(tokens), config, kv, 12)
    full, _, _ = run(weights(config), tokens, positions, np.ones_like(tokens), config, kv)
    assert_close(np.asarray(narrow), np.asarray(full))


def test_padding_and_idle_slots_leave_the_cache_as_it_was():
    kv = cache.CacheSpec(DEEPSEEK, slots=2, rows=16).zeros()
    tokens, positions = draw_tokens(2, 4), np.tile(np.arange(4, dtype=np.int32), (2, 1))
    segments = np.asarray([[1, 1, 0, 0], [0, 0, 0, 0]], np.int32)
    _, kv, _ = run(weights(DEEPSEEK), tokens, positions, segments, DEEPSEEK, kv)
    rows = np.asarray(kv.keys)[:, :, :-1]  # without the scratch row
    assert np.abs(rows[:, 0, :2]).min(axis=-1).shape == (3, 2) and rows[:, 0, :2].any(axis=-1).all()
    assert not rows[:, 0, 2:].any() and not rows[:, 1].any()


def test_absorbed_attention_equals_expanded_attention(monkeypatch):
    tokens, hidden = draw_tokens(2, 9), {}
    for most in (attention.ABSORBED_MAX_QUERIES, 0):
        monkeypatch.setattr(attention, "ABSORBED_MAX_QUERIES", most)
        kv = cache.CacheSpec(DEEPSEEK, slots=2, rows=16).zeros()
        for first, last in ((0, 6), (6, 9)):
            places = np.tile(np.arange(first, last, dtype=np.int32), (2, 1))
            piece = tokens[:, first:last], places, np.ones_like(places)
            hidden[most], kv, _ = decoder.forward(weights(DEEPSEEK), *piece, DEEPSEEK, kv)
    absorbed, expanded = map(np.asarray, hidden.values())
    assert (absorbed != expanded).any()  # two ways of computing
    assert_close(absorbed, expanded)


@families
def test_unrolled_layers_equal_scanned_layers(config):
    tokens = draw_tokens(2, 16)
    assert_close(whole(tokens, small.changed(config, scan_layers=False)), whole(tokens, config))


@both_attentions
def test_a_scalar_head_reads_the_hidden_states_and_leaves_the_logits_as_they_are(config):
    headed, tokens = small.changed(config, scalar_head=True), draw_tokens(1, 8)
    params = weights(headed)
    positions, segments = np.arange(8, dtype=np.int32)[None], np.ones_like(tokens)

    def values(params):
        return decoder.scalars(params, decoder.forward(params, tokens, positions, segments, headed)[0])

    hidden = np.asarray(jax.jit(lambda p: decoder.forward(p, tokens, positions, segments, headed)[0])(params))
    found, gradient = jax.jit(jax.value_and_grad(lambda p: values(p)[0, -1]))(params)
    np.testing.assert_allclose(found, hidden[0, -1] @ np.asarray(params.scalar_head), rtol=1e-5)
    np.testing.assert_allclose(gradient.scalar_head, hidden[0, -1], rtol=1e-5)
    assert float(jnp.abs(gradient.embedding).max()) > 0
    assert_close(whole(tokens, headed), whole(tokens, config))
    with pytest.raises(ValueError, match="no scalar head; only reward models and critics have one"):
        decoder.scalars(weights(config), hidden)


@both_attentions
def test_recomputing_blocks_changes_no_gradient(config):
    tokens = draw_tokens(1, 8)
    positions, segments = np.arange(8, dtype=np.int32)[None], np.ones_like(tokens)

    def gradient(config):
        def loss(params):
            hidden = decoder.forward(params, tokens, positions, segments, config)[0]
            return jnp.mean(jnp.square(decoder.logits(params, hidden)))

        return jax.jit(jax.grad(loss))(weights(config))

    plain, recomputed = gradient(config), gradient(small.changed(config, remat=True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(b, a, atol=TOLERANCE * max(np.abs(a).max(), 1e-3), rtol=0)


@pytest.mark.parametrize("length", [3, 16, 150], ids=["narrow_blocks", "some", "wide_blocks"])
@pytest.mark.parametrize("kind", ["blocked", "ragged"])
def test_every_expert_form_equals_the_dense_one(kind, length):
    tokens = draw_tokens(2, length)
    dense = whole(tokens, small.changed(DEEPSEEK, moe_implementation="dense"))
    assert_close(whole(tokens, small.changed(DEEPSEEK, moe_implementation=kind)), dense)


@pytest.mark.parametrize("kind", ["blocked", "ragged"])
def test_every_expert_form_has_the_gradients_of_the_dense_one(kind):
    layer = jax.tree.map(lambda leaf: leaf[0], weights(DEEPSEEK).sparse.ffw)
    x = jax.random.normal(jax.random.key(5), (2, 11, DEEPSEEK.model.hidden_size))

    def gradients(kind):
        config = small.changed(DEEPSEEK, moe_implementation=kind)
        return jax.jit(jax.grad(lambda p, x: jnp.sum(jnp.sin(moe.moe(p, x, config)[0])), argnums=(0, 1)))(layer, x)

    for a, b in zip(jax.tree.leaves(gradients("dense")), jax.tree.leaves(gradients(kind)), strict=True):
        np.testing.assert_allclose(b, a, atol=TOLERANCE * max(np.abs(a).max(), 1e-3), rtol=0)


def test_forward_reports_the_chosen_experts_of_every_mixture_layer():
    tokens = draw_tokens(2, 6)
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), tokens.shape)
    experts = np.asarray(run(weights(DEEPSEEK), tokens, positions, np.ones_like(tokens), DEEPSEEK)[2])
    assert experts.shape == (2, 2, 6, 3)
    groups = experts // 2  # 8 experts in 4 groups
    assert max(len(set(row)) for row in groups.reshape(-1, 3)) <= DEEPSEEK.model.topk_group
    assert all(len(set(row)) == 3 for row in experts.reshape(-1, 3))


# Router and rotary embedding against numbers worked out by hand


ROUTER = small.changed(DEEPSEEK, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, hidden_size=4)


def test_router_never_picks_from_a_dropped_group_even_when_every_choice_is_negative():
    bias = np.asarray([-3.0, -3.1, -2.0, -9.0], np.float32)  # group sums -6.1 and -11: the first stays
    experts, weights = moe.route(np.zeros((4, 4), np.float32), bias, np.ones((1, 1, 4), np.float32), ROUTER.model)
    assert sorted(np.asarray(experts)[0, 0].tolist()) == [0, 1]
    np.testing.assert_allclose(weights[0, 0], [1.25, 1.25], rtol=1e-6)  # equal scores, normalised, times 2.5


def test_router_bias_moves_the_choice_and_not_the_weights():
    router = np.diag([0.3, 0.2, 0.1, -0.1]).astype(np.float32)
    bias = np.asarray([0.0, 0.0, 5.0, 5.0], np.float32)
    experts, weights = moe.route(router, bias, np.ones((1, 1, 4), np.float32), ROUTER.model)
    assert sorted(np.asarray(experts)[0, 0].tolist()) == [2, 3]
    scores = 1 / (1 + np.exp(-np.asarray([0.1, -0.1])))
    np.testing.assert_allclose(np.sort(weights[0, 0]), np.sort(2.5 * scores / scores.sum()), rtol=1e-6)


def test_yarn_of_the_671b_config_keeps_ten_pairs_and_divides_from_the_twenty_third():
    scaling = RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0)
    config = small.network(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=scaling)
    ratio = rope.inverse_frequencies(64, 10000.0, RopeScaling()) / rope.inverse_frequencies(64, 10000.0, scaling)
    np.testing.assert_allclose(ratio[:11], 1.0, rtol=1e-12)
    assert 1.0 < ratio[11] < ratio[22] < 40.0
    np.testing.assert_allclose(ratio[23:], 40.0, rtol=1e-12)
    assert abs(rope.softmax_scale(config.model) - 0.1352338) < 1e-7
    assert rope.magnitude(scaling) == 1.0


@pytest.mark.parametrize(
    ("mscale", "all_dim", "wanted"),
    [(0.0, 0.0, 1.2302585), (0.0, 1.0, 1.2302585), (0.7, 0.0, 1.2302585), (0.5, 1.0, 0.9064186)],
)
def test_yarn_magnitude_is_a_ratio_only_when_both_mscales_are_stated(mscale, all_dim, wanted):
    scaling = RopeScaling("yarn", 10.0, 4096, mscale=mscale, mscale_all_dim=all_dim)
    assert abs(rope.magnitude(scaling) - wanted) < 1e-6
