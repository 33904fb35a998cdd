"""Claims about the router: the recipe's rule in another hand, forbidden groups, load, and a bias that stays float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from r1jax.core import sharding, tree
from r1jax.models import decoder, moe
from r1jax.schema import MeshConfig, OptimizerConfig, PackConfig
from r1jax.train import sft, step

MODEL = small.changed(
    small.MIXTURE,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    initializer_range=0.02,
)
NEAR_TIE = 1e-5


route = jax.jit(moe.route, static_argnums=3)


def route_by_hand(router, bias, x, c, masked=-np.inf):
    """Returns (experts as a set, weight by expert, smallest margin of a choice) of one token, in float64."""
    scores = 1 / (1 + np.exp(-(x.astype(np.float64) @ router.astype(np.float64))))
    choice = scores + bias
    per_group = c.n_routed_experts // c.n_group
    groups = [
        sum(sorted(choice[g * per_group : (g + 1) * per_group])[-2:]) for g in range(c.n_group)
    ]  # the two best of each
    order = sorted(range(c.n_group), key=lambda g: -groups[g])
    margins = [groups[a] - groups[b] for a in order[: c.topk_group] for b in order[c.topk_group :]]
    allowed = np.full(c.n_routed_experts, masked)
    for g in order[: c.topk_group]:
        allowed[g * per_group : (g + 1) * per_group] = choice[g * per_group : (g + 1) * per_group]
    ranked = np.argsort(-allowed, kind="stable")
    chosen = ranked[: c.num_experts_per_tok]
    margins.append(allowed[chosen[-1]] - allowed[ranked[c.num_experts_per_tok]])
    weights = scores[chosen]
    if c.norm_topk_prob:
        weights = weights / (weights.sum() + 1e-20)
    return dict(zip(chosen.tolist(), weights * c.routed_scaling_factor, strict=True)), min(margins)


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_group": 1, "topk_group": 1}, {"norm_topk_prob": False, "routed_scaling_factor": 1.0}, {"topk_group": 1}],
    ids=["grouped", "ungrouped", "not_normalised", "one_group"],
)
@pytest.mark.parametrize("shift", [0.0, -3.0], ids=["bias_around_zero", "bias_below_minus_one"])
def test_router_equals_the_recipes_rule_written_for_one_token(changes, shift):
    config = small.changed(MODEL, **changes).model
    draw = np.random.default_rng(1)
    router = draw.normal(size=(16, 16)).astype(np.float32)
    bias = (shift + draw.normal(0, 0.3, 16)).astype(np.float32)
    x = draw.normal(size=(3, 50, 16)).astype(np.float32)
    experts, weights = route(router, bias, x, config)
    ties = 0
    for row, ids, found in zip(x.reshape(150, 16), experts.reshape(150, 4), weights.reshape(150, 4), strict=True):
        wanted, margin = route_by_hand(router, bias, row, config)
        ties += margin < NEAR_TIE
        if margin >= NEAR_TIE:
            assert set(np.asarray(ids).tolist()) == set(wanted)
            np.testing.assert_allclose(found, [wanted[e] for e in np.asarray(ids).tolist()], rtol=1e-5)
    assert ties <= 1


def test_masking_dropped_groups_with_zero_would_pick_forbidden_experts():
    draw = np.random.default_rng(2)
    router, x = draw.normal(size=(16, 16)).astype(np.float32), draw.normal(size=(40, 16)).astype(np.float32)
    bias = (draw.normal(0, 0.3, 16) - 3.0).astype(np.float32)
    experts, _ = route(router, bias, x[None], MODEL.model)
    forbidden = 0
    for row, ids in zip(x, np.asarray(experts)[0], strict=True):
        right, _ = route_by_hand(router, bias, row, MODEL.model)
        zeroed, _ = route_by_hand(router, bias, row, MODEL.model, masked=0.0)
        assert set(ids.tolist()) == set(right)
        forbidden += not set(right) & set(zeroed)
    assert forbidden == 40  # every choice is below 0, so 0.0 wins each time


def test_no_gradient_reaches_the_bias_and_the_scores_carry_the_routers():
    draw = np.random.default_rng(3)
    router, x = draw.normal(size=(16, 16)).astype(np.float32), draw.normal(size=(1, 8, 16)).astype(np.float32)

    def total(router, bias):
        experts, weights = route(router, bias, x, MODEL.model)
        return jnp.sum(weights * jnp.cos(experts))

    to_router, to_bias = jax.grad(total, argnums=(0, 1))(router, np.zeros(16, np.float32))
    assert not np.asarray(to_bias).any()
    assert np.abs(to_router).max() > 1e-3


def test_load_counts_valid_tokens_only():
    experts = np.asarray([[[[0, 1], [1, 2], [3, 3]], [[2, 0], [0, 1], [1, 3]]]], np.int32)
    valid = np.asarray([[True, True, False], [True, False, False]])
    assert np.asarray(moe.load(experts, valid, 4)).tolist() == [[2.0, 2.0, 2.0, 0.0]]


def test_bias_moves_by_the_rate_towards_the_mean_load():
    load = np.asarray([[5.0, 1.0, 3.0, 3.0]], np.float32)
    moved = moe.updated_bias(np.zeros((1, 4), np.float32), load, 0.001)
    np.testing.assert_allclose(moved, [[-0.001, 0.001, 0.0, 0.0]], rtol=1e-6)


def test_a_bfloat16_copy_keeps_the_selection_bias_and_so_the_experts():
    draw = np.random.default_rng(4)
    params = sharding.map_specs(
        lambda s: jnp.asarray(draw.normal(size=s.shape), jnp.float32), decoder.specs(MODEL.model)
    )
    bias = jnp.asarray(14 + draw.normal(0, 0.05, (1, 16)), jnp.float32)  # one unit in the last place of bfloat16: 0.06
    params = params.replace(sparse=params.sparse.replace(ffw=params.sparse.ffw.replace(bias=bias)))
    half = tree.cast(params, jnp.bfloat16)
    assert np.array_equal(half.sparse.ffw.bias, bias) and half.sparse.ffw.bias.dtype == jnp.float32
    others = [leaf.dtype for leaf in jax.tree.leaves(half) if leaf is not half.sparse.ffw.bias]
    assert set(others) == {jnp.dtype("bfloat16")}
    x = jnp.asarray(draw.normal(size=(1, 64, 16)), jnp.bfloat16)
    router = half.sparse.ffw.router[0]
    exact = route(router, bias[0], x, MODEL.model)[0]
    assert np.array_equal(route(router, half.sparse.ffw.bias[0], x, MODEL.model)[0], exact)
    rounded = route(router, bias[0].astype(jnp.bfloat16), x, MODEL.model)[0]
    flipped = np.mean([set(a) != set(b) for a, b in zip(rounded[0].tolist(), exact[0].tolist(), strict=True)])
    assert flipped > 0.05  # tokens that would be sent to other experts


def test_an_update_computed_in_bfloat16_sees_the_float32_bias():
    network = small.changed(MODEL, compute_dtype="bfloat16")
    seen = []

    def loss(params, micro, arguments):
        seen.append((params.sparse.ffw.bias.dtype, params.sparse.ffw.gate.dtype))
        return jnp.sum(params.final_norm.astype(jnp.float32)), {}

    trainer = step.Trainer(network, OptimizerConfig(), sharding.make_mesh(MeshConfig()), loss, 1)
    batch = sft.make_batch([sft.example([1], [2, 3])], PackConfig(row_tokens=4, rows_per_micro_batch=1), 1)
    jax.eval_shape(trainer._step, trainer.abstract_state(), *batch)
    assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("bfloat16"))}
