"""Balance and multi-token prediction losses: against sums written out in float64, and inside documents only."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from r1jax.core import sharding
from r1jax.models import decoder, moe
from r1jax.rl import losses
from r1jax.schema import GRPOConfig, MeshConfig, Network, OptimizerConfig
from r1jax.train import sft, step

MODEL = small.changed(
    small.MIXTURE,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    num_nextn_predict_layers=1,
    mtp_loss_weight=0.3,
)
LENGTHS = (7, 4, 6)
SEGMENTS = np.repeat([1, 2, 3, 0], (*LENGTHS, 3))[None].astype(np.int32)
POSITIONS = np.concatenate([np.arange(n) for n in (*LENGTHS, 3)])[None].astype(np.int32)
TOKENS = np.random.default_rng(0).integers(1, 32, (1, 20)).astype(np.int32)


@functools.cache
def weights(network: Network = MODEL) -> decoder.Params:
    params = sharding.initialize(
        decoder.specs(network.model), jax.random.key(0), jnp.float32, sharding.make_mesh(MeshConfig())
    )
    # Under a gain of one the prediction layer's own norm would hide which hidden state it is given.
    return params.replace(final_norm=jnp.linspace(0.5, 1.5, network.model.hidden_size))


def micro_batch(tokens=TOKENS, segments=SEGMENTS, positions=POSITIONS) -> dict[str, np.ndarray]:
    """Returns one row whose every token but a document's first is trained."""
    continues = np.zeros(segments.shape, bool)
    continues[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = np.where(continues, np.roll(tokens, -1, axis=1), 0).astype(np.int32)
    mask = continues.astype(np.float32)
    return dict(tokens=tokens, targets=targets, positions=positions, segments=segments, loss_mask=mask)


def balance_by_hand(scores: np.ndarray, k: int) -> float:
    """Returns sum_i f_i P_i of one sequence's scores [T, E] (V3 report eq. 17-20)."""
    tokens, experts = scores.shape
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    f = np.bincount(chosen.reshape(-1), minlength=experts) * experts / (k * tokens)
    return float(f @ (scores / scores.sum(1, keepdims=True)).mean(0))


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_the_balance_loss_of_each_document_equals_the_papers_sums(scoring):
    config = small.changed(MODEL, scoring_func=scoring)
    draw = np.random.default_rng(1)
    router, x = draw.normal(size=(16, 8)).astype(np.float32), draw.normal(size=(1, 20, 16)).astype(np.float32)
    found = np.asarray(moe.sequence_balance(router, x, SEGMENTS, config.model))[0]
    logits = x[0].astype(np.float64) @ router.astype(np.float64)
    scores = (
        1 / (1 + np.exp(-logits)) if scoring == "sigmoid" else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    )
    for segment in (1, 2, 3):
        inside = SEGMENTS[0] == segment
        np.testing.assert_allclose(found[inside], balance_by_hand(scores[inside], 2), rtol=1e-5)
    assert not found[SEGMENTS[0] == 0].any()


def test_perfect_balance_costs_one_and_a_collapsed_router_costs_experts_over_k():
    x = np.eye(8, dtype=np.float32)[None]
    config = small.changed(MODEL, num_experts_per_tok=1)
    ones = np.ones((1, 8), np.int32)
    even = moe.sequence_balance(
        9 * np.eye(8, dtype=np.float32), x, ones, small.changed(config, scoring_func="softmax").model
    )
    np.testing.assert_allclose(even, 1.0, rtol=1e-3)
    one = np.zeros((8, 8), np.float32)
    one[:, 3] = 20
    collapsed = moe.sequence_balance(one, x, ones, small.changed(config, scoring_func="softmax").model)
    np.testing.assert_allclose(collapsed, 8.0, rtol=1e-3)


def loss_and_gradient(network: Network, micro: dict, inverse: float = 0.1):
    loss = sft.make_loss(network)
    run = jax.jit(jax.value_and_grad(lambda p: loss(p, micro, np.float32(inverse)), has_aux=True))
    return run(weights(MODEL))


def test_alpha_times_the_balance_loss_is_added_and_pulls_the_router_alone_of_the_last_layer():
    plain = small.changed(MODEL, mtp_loss_weight=0.0)
    (base, _), before = loss_and_gradient(plain, micro_batch())
    (total, stats), after = loss_and_gradient(small.changed(plain, aux_loss_alpha=0.5), micro_batch())
    np.testing.assert_allclose(total - base, 0.5 * stats["balance"], rtol=1e-4)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    assert moved.sparse.ffw.router > 1e-3
    assert moved.final_norm == moved.unembedding == moved.sparse.ffw.down == 0.0


def prediction_by_hand(micro: dict, network: Network) -> float:
    """Returns minus the sum of log p(token i + 2), one document at a time, with no packing."""
    total, start = 0.0, 0
    for length in LENGTHS:
        tokens = micro["tokens"][:, start : start + length]
        positions, ones = np.arange(length, dtype=np.int32)[None], np.ones_like(tokens)
        hidden, _, auxiliary = decoder.forward(weights(MODEL), tokens, positions, ones, network)
        further, _ = decoder.predict_further(weights(MODEL), hidden, auxiliary, tokens, positions, ones, network)
        logp = jax.nn.log_softmax(decoder.logits(weights(MODEL), further))[0]
        total -= sum(float(logp[i, tokens[0, i + 2]]) for i in range(length - 2))
        start += length
    return total


@pytest.mark.parametrize("state", ["post_norm", "pre_norm"])
def test_the_prediction_loss_of_packed_documents_equals_that_of_each_alone(state):
    network = small.changed(MODEL, mtp_hidden=state)
    (total, stats), _ = loss_and_gradient(network, micro_batch())
    wanted = prediction_by_hand(micro_batch(), network)
    np.testing.assert_allclose(stats["mtp"], 0.1 * wanted, rtol=1e-5)
    (base, _), _ = loss_and_gradient(small.changed(network, mtp_loss_weight=0.0), micro_batch())
    np.testing.assert_allclose(total - base, 0.3 * 0.1 * wanted, rtol=1e-4)


def test_the_two_hidden_states_give_different_predictions():
    found = [prediction_by_hand(micro_batch(), small.changed(MODEL, mtp_hidden=s)) for s in ("post_norm", "pre_norm")]
    assert abs(found[0] - found[1]) > 1e-3


def test_in_fine_tuning_the_prediction_loss_trains_the_whole_model():
    _, before = loss_and_gradient(small.changed(MODEL, mtp_loss_weight=0.0), micro_batch())
    _, after = loss_and_gradient(MODEL, micro_batch())
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(before.mtp))
    still = {"bias"}  # the selection bias has no gradient
    for path, value in jax.tree_util.tree_leaves_with_path(moved):
        name = path[-1].name
        # the module's own attention may be nearly flat, but nothing it is fed from is left out
        assert name in still or value > 0, path


def test_in_rl_the_prediction_loss_trains_its_module_alone():
    micro = micro_batch()
    tokens = micro["loss_mask"]
    micro |= dict(advantage=tokens, behaviour_logp=-tokens, reference_logp=-tokens, weight=0.1 * tokens)
    arguments = losses.arguments(GRPOConfig(), 0.001, 1.0)

    def gradient(network):
        loss = losses.make_loss(network, GRPOConfig())
        return jax.jit(jax.grad(lambda p: loss(p, micro, arguments)[0]))(weights(MODEL))

    without, with_it = gradient(small.changed(MODEL, mtp_loss_weight=0.0)), gradient(MODEL)
    trunk = zip(*(jax.tree.leaves(g.replace(mtp=None)) for g in (without, with_it)), strict=True)
    for a, b in trunk:
        np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(with_it.mtp.projection).max()) > 0 == float(jnp.abs(without.mtp.projection).max())


def test_an_update_moves_the_prediction_layers_selection_bias_by_its_own_load():
    network = small.changed(MODEL, router_bias_update_rate=0.01)
    mesh = sharding.make_mesh(MeshConfig())
    trainer = step.Trainer(network, OptimizerConfig(learning_rate=1e-3), mesh, sft.make_loss(network), 1)
    micro = {name: value[None] for name, value in micro_batch().items()}
    state, stats = trainer.update(trainer.init(weights(MODEL)), micro, 1, np.float32(0.1))
    for bias in (state.params.mtp.block.ffw.bias, state.params.sparse.ffw.bias):
        assert set(np.round(np.abs(np.asarray(bias, np.float64)).reshape(-1), 6).tolist()) <= {0.0, 0.01} and np.any(
            bias
        )
    assert float(stats["mtp"]) > 0
