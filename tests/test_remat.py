"""Claims about recomputed blocks: what is kept for the backward pass changes its memory and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from r1jax import config as configs
from r1jax.core import rng, sharding
from r1jax.models import decoder
from r1jax.schema import MeshConfig

SHAPE = (4, 64)
FAST = {"xla_backend_optimization_level": 0}  # to compile
DEEP = dict(num_hidden_layers=4, scan_layers=True)
MODELS = {
    "moe": small.changed(small.MIXTURE, **DEEP, moe_implementation="dense"),
    "dense": small.network(
        family="llama", vocab_size=32, hidden_size=16, intermediate_size=32, head_dim=8, initializer_range=0.3, **DEEP
    ),
}
KEPT = ("nothing", "dots_no_batch", "dots", "everything")  # rising: `everything` is a run without recomputation


@pytest.fixture(scope="module", params=MODELS)
def compiled(request):
    """Returns (gradients, bytes of temporaries) by what is kept."""
    network, found = MODELS[request.param], {}
    params = sharding.initialize(
        decoder.specs(network.model), rng.key(0, "remat", "init"), "float32", sharding.make_mesh(MeshConfig())
    )
    tokens = np.random.default_rng(0).integers(0, 32, SHAPE).astype(np.int32)
    positions = np.broadcast_to(np.arange(SHAPE[1], dtype=np.int32), SHAPE)
    for kept in KEPT:
        own = small.changed(
            network, remat=kept != "everything", remat_policy=kept if kept != "everything" else "nothing"
        )

        def loss(params, own=own):
            hidden = decoder.forward(params, tokens, positions, np.ones_like(tokens), own)[0]
            return jnp.mean(jnp.square(decoder.logits(params, hidden)))

        program = jax.jit(jax.grad(loss)).lower(params).compile(FAST)
        found[kept] = jax.device_get(program(params)), program.memory_analysis().temp_size_in_bytes
    return found


def test_what_is_kept_changes_no_gradient(compiled):
    """Up to the rounding of sums over 256 tokens, which fusions of another form take in another order."""
    expected = jax.tree.leaves(compiled["everything"][0])
    for kept in KEPT[:-1]:
        for found, leaf in zip(jax.tree.leaves(compiled[kept][0]), expected, strict=True):
            np.testing.assert_allclose(found, leaf, rtol=0, atol=3e-6 * max(np.abs(leaf).max(), 1e-6))


def test_the_more_is_kept_the_more_memory_a_gradient_takes(compiled):
    taken = [compiled[kept][1] for kept in KEPT]
    print(dict(zip(KEPT, taken, strict=True)))
    assert all(a < b for a, b in zip(taken, taken[1:], strict=False))


def test_a_policy_without_recomputation_is_refused_and_the_switch_stays_a_boolean():
    with pytest.raises(ValueError, match="remat_policy=dots needs remat=true"):
        configs.load("r1_zero:tiny", [("compute.remat_policy", "dots")])
    found = configs.load("r1_zero:tiny", [("compute.remat_policy", "dots"), ("compute.remat", "true")]).compute
    assert (found.remat, found.remat_policy) == (True, "dots")
