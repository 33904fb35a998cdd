"""Model FLOPs: equal to counts by hand, to the products in the traced forward pass, and to published figures."""

import math

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import pytest

from r1jax import config
from r1jax.core import sharding
from r1jax.models import decoder, flops
from r1jax.models.cache import CacheSpec
from r1jax.models.flops import Flops, Work
from r1jax.recipe import compute
from r1jax.schema import Network
from tests import small

V3 = config.load("stage1_coldstart:v3_671b").network
LATENT = small.changed(small.MIXTURE, n_routed_experts=0)
GROUPED = small.changed(small.GROUPED, scan_layers=False)
BATCH, TOKENS = 2, 6


def products(jaxpr) -> float:
    """Returns the operations of all matrix products of a traced program without loops."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = [equation.invars[0].aval.shape[axis] for axis in equation.params["dimension_numbers"][0][0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(contracted)
        for inner in jex.jaxprs_in_params(equation.params):
            total += products(inner)
    return total


def traced(network: Network, tokens: int, cached_rows: int = 0) -> float:
    """Returns the operations of a forward pass with logits at each token, as the decoder computes them."""
    params = sharding.abstract(decoder.specs(network.model), "float32")

    def run(params, tokens, positions, segments):
        cache = CacheSpec(network, BATCH, cached_rows).zeros() if cached_rows else None
        return decoder.logits(params, decoder.forward(params, tokens, positions, segments, network, cache)[0])

    array = jax.ShapeDtypeStruct((BATCH, tokens), jnp.int32)
    return products(jax.make_jaxpr(run)(params, array, array, array).jaxpr)


def test_a_dense_model_counts_as_by_hand():
    network = small.network(
        family="llama", vocab_size=10, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=3,
    )  # fmt: skip
    # A layer: queries and outputs 8 x 12 each, keys and values 8 x 6 each; gate, up and down 8 x 12 each.
    expected = Flops(projections=2 * 2 * 5 * 288, scores=2 * 2 * 2 * 12 * 15, dense=2 * 2 * 5 * 288, head=2 * 80 * 5)
    assert flops.forward(network, flops.of_samples([5])) == expected


def test_a_mixture_counts_the_experts_that_a_token_is_sent_to():
    network = small.network(
        vocab_size=10, hidden_size=8, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, q_lora_rank=5,
        kv_lora_rank=4, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=7, first_k_dense_replace=1,
        n_routed_experts=16, num_experts_per_tok=3, n_shared_experts=2, moe_intermediate_size=6,
    )  # fmt: skip
    # Down 8 x 5 and up 5 x 2 x 5 for queries; 8 x 6 for the latent; 4 x 2 x 10 for keys and values; 14 x 8 for outputs.
    attention = 40 + 50 + 48 + 80 + 112
    work = Work(tokens=10, pairs=7, read=4)
    assert flops.forward(network, work) == Flops(
        projections=2 * 3 * attention * 10,
        scores=2 * 3 * (2 * 5 + 2 * 7) * 7,
        dense=2 * 3 * 8 * 20 * 10,
        router=2 * 2 * 8 * 16 * 10,
        experts=2 * 2 * 3 * (3 * 8 * 6) * 10,
        shared=2 * 2 * 2 * (3 * 8 * 6) * 10,
        head=2 * 8 * 10 * 4,
    )
    assert flops.forward(network, work, absorbed=True).scores == 2 * 3 * 2 * (4 + 2 + 4) * 7


@pytest.mark.parametrize("network", [GROUPED, LATENT], ids=["grouped", "latent"])
def test_counts_equal_the_products_of_the_traced_forward_pass(network):
    """The traced pass computes scores above the diagonal too, which the count has as pairs of the whole square."""
    square = Work(BATCH * TOKENS, BATCH * TOKENS**2, BATCH * TOKENS)
    assert flops.forward(network, square).total == traced(network, TOKENS)
    rows = 11
    step = Work(BATCH, BATCH * rows, BATCH)
    assert flops.forward(network, step, absorbed=True).total == traced(network, 1, rows)


def test_without_scores_each_used_weight_counts_twice():
    """As `compute.active_parameters` has it, apart from the embedding, norms and biases, which multiply nothing."""
    model = small.MIXTURE.model
    vectors = model.num_hidden_layers * (2 * model.hidden_size + model.kv_lora_rank) + model.hidden_size
    vectors += model.num_moe_layers * model.n_routed_experts
    weights = compute.active_parameters(small.MIXTURE) - model.vocab_size * model.hidden_size - vectors
    assert flops.forward(small.MIXTURE, Work(1, 0, 1)).total == 2 * weights


def test_v3_counts_as_published():
    """36.6 billion weights multiply a token (of 37 billion active, with the embedding). MaxText's 152.4 TFLOP/s at 542
    tokens/s a chip, in rows of 8,192 tokens, are 281 GFLOP a token."""
    assert flops.per_token(V3, 0).total == pytest.approx(2 * 36.6e9, rel=1e-3)
    assert flops.update(V3, flops.of_samples([8192])).total / 8192 == pytest.approx(152.4e12 / 542, rel=1e-3)
    assert flops.update(V3, flops.of_samples([4096])).total / 4096 == pytest.approx(250.5e9, rel=1e-3)


def test_training_counts_three_passes_and_the_prediction_module_where_it_is_trained():
    idle = small.changed(small.MIXTURE, num_nextn_predict_layers=1)
    trained = small.changed(idle, mtp_loss_weight=0.3)
    work, model = flops.of_samples([5, 3], read=6), idle.model
    assert flops.update(idle, work) == flops.forward(small.MIXTURE, work) * 3.0
    # One more mixture layer and one more reading of the output matrix, and [2 * hidden, hidden] joins the two inputs.
    layer = small.changed(small.MIXTURE, num_hidden_layers=1, first_k_dense_replace=0)
    joined = Flops(projections=2.0 * 2 * model.hidden_size**2 * work.tokens)
    more = flops.forward(layer, work) + joined
    with_scalar = small.changed(trained, scalar_head=True)
    assert flops.update(with_scalar, work) == flops.forward(with_scalar, work) * 3.0
    assert flops.update(trained, work) == (flops.forward(small.MIXTURE, work) + more) * 3.0


def test_heads_read_the_vocabulary_that_is_used_or_one_number():
    work = flops.of_samples([4], read=3)
    assert (
        flops.forward(small.changed(small.GROUPED, vocab_used=7), work).head == 2 * small.GROUPED.model.hidden_size * 21
    )
    assert (
        flops.forward(small.changed(small.GROUPED, scalar_head=True), work).head
        == 2 * small.GROUPED.model.hidden_size * 3
    )


def test_a_shared_prompt_passes_once():
    alone = flops.of_samples([3 + 2, 3 + 4], read=6)
    shared = flops.of_group(3, [2, 4])
    once = flops.of_samples([3], read=0)
    assert shared + once == alone
    by_step = sum((Work(1, 3 + place + 1, 1) for size in (2, 4) for place in range(size)), once)
    assert shared == by_step
