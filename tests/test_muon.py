"""Claims about Muon: one orthogonalised matrix per layer and expert, AdamW for the rest, state divided as its parameter."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from r1jax.core import rng, sharding
from r1jax.models import decoder
from r1jax.schema import MeshConfig, OptimizerConfig
from r1jax.train import optimizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Every kind of parameter: query low rank, a dense and two sparse layers, shared expert, prediction module, scalar head.
MODEL = small.network(
    vocab_size=24,
    hidden_size=12,
    intermediate_size=10,
    num_hidden_layers=3,
    q_lora_rank=6,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=5,
    n_routed_experts=4,
    n_shared_experts=1,
    moe_intermediate_size=7,
    num_nextn_predict_layers=1,
    scalar_head=True,
)
GROUPED = small.network(
    family="qwen2", vocab_size=24, hidden_size=12, intermediate_size=10, head_dim=6, attention_bias=True, qk_norm=True
)
CONFIG = OptimizerConfig(kind="muon", learning_rate=0.5, clip_norm=0)


def newton_schulz(matrix):
    """Returns five steps of x -> a x + b (x x') x + c (x x')^2 x from x = matrix / its Frobenius norm, in float64."""
    x = np.asarray(matrix, np.float64)
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def drawn(seed, params):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(generator.normal(size=p.shape), jnp.float32), params)


@pytest.fixture(scope="module")
def two_updates():
    """Returns (parameters, two gradients, the two updates of Muon, those of AdamW)."""
    mesh = sharding.make_mesh(MeshConfig())
    network = small.changed(MODEL, num_nextn_predict_layers=0)
    params = sharding.initialize(
        decoder.specs(network.model, network.scalar_head), rng.key(0, "muon", "init"), "float32", mesh
    )
    grads, found = (drawn(1, params), drawn(2, params)), []
    for config in (CONFIG, OptimizerConfig(learning_rate=0.5, clip_norm=0)):
        transform = optimizer.make(config, 10)
        state, step = transform.init(params), jax.jit(transform.update)
        for grad in grads:
            update, state = step(grad, state, params)
            found.append(jax.device_get(update))
    return params, grads, found[:2], found[2:]


MATRICES = {  # leaf -> (index of one of its matrices, rows x columns of that)
    "sparse.ffw.gate": ((1, 2), (12, 7)),
    "sparse.ffw.down": ((0, 3), (7, 12)),
    "sparse.ffw.shared.up": ((1,), (12, 7)),
    "dense.ffw.down": ((0,), (10, 12)),
    "sparse.attention.q_a": ((1,), (12, 6)),
    "sparse.attention.q_b": ((1,), (6, 2 * 6)),
    "dense.attention.kv_b": ((0,), (8, 2 * 9)),
    "sparse.attention.out": ((0,), (2 * 5, 12)),
}


def leaf(tree, name):
    for part in name.split("."):
        tree = getattr(tree, part)
    return np.asarray(tree, np.float64)


@pytest.mark.parametrize("name", MATRICES)
def test_each_matrix_of_a_stack_moves_by_the_orthogonalised_momentum_computed_in_float64(two_updates, name):
    _, grads, (first, second), _ = two_updates
    index, shape = MATRICES[name]
    one, two = (leaf(grad, name)[index].reshape(shape) for grad in grads)
    scale, beta = -0.5 * 0.2 * np.sqrt(max(shape)), 0.95
    np.testing.assert_allclose(
        leaf(first, name)[index].reshape(shape), scale * newton_schulz(one), atol=2e-5 * abs(scale)
    )
    momentum = beta * (1 - beta) * one + (1 - beta) * two
    looked_ahead = beta * momentum / (1 - beta**3) + (1 - beta) * two / (1 - beta**2)
    np.testing.assert_allclose(
        leaf(second, name)[index].reshape(shape), scale * newton_schulz(looked_ahead), atol=2e-5 * abs(scale)
    )


def test_a_multiple_of_the_identity_moves_as_computed_by_hand():
    """2 I has Frobenius norm 2 sqrt(2), so x = 1 / sqrt(2), and each step maps it to 3.4445 x - 4.775 x^3 + 2.0315 x^5:
    0.7071 -> 1.1065 -> 0.7121 -> 1.1006 -> 0.7058 -> 1.1081. An update is -rate * 0.2 * sqrt(2) times that."""
    grads = {"ffw": decoder.block.SwiGLU(jnp.asarray([2 * np.eye(2)]), None, None)}
    transform = optimizer.make(CONFIG, 10)
    update, _ = transform.update(grads, transform.init(grads), grads)
    np.testing.assert_allclose(update["ffw"].gate[0], -0.5 * 0.2 * np.sqrt(2) * 1.1081 * np.eye(2), atol=2e-5)


@pytest.mark.parametrize("network", [MODEL, GROUPED], ids=["deepseek", "grouped"])
def test_muon_takes_the_matrices_inside_the_layers_and_adamw_the_rest(network):
    specs = sharding.abstract(decoder.specs(network.model, network.scalar_head), jnp.float32)
    taken = {"adamw": set(), "muon": set()}
    owners = jax.tree_util.tree_leaves_with_path(optimizer._owners(specs))
    for path, owner in owners:
        taken[owner].add(path[-1].name)
    assert taken["muon"] <= set(optimizer._MATRICES)
    if network is MODEL:
        assert taken["muon"] == {"gate", "up", "down", "q_a", "q_b", "kv_a", "kv_b", "out", "projection"}
        assert {"embedding", "unembedding", "scalar_head", "router", "bias", "final_norm"} <= taken["adamw"]
    else:
        assert taken["muon"] == {"query", "key", "value", "out", "gate", "up", "down"}
        assert {"query_bias", "key_norm", "embedding"} <= taken["adamw"]


def test_parameters_left_to_adamw_move_as_adamw_moves_them(two_updates):
    _, _, muon, adamw = two_updates
    for ours, theirs in zip(muon, adamw, strict=True):
        for name in ("embedding", "unembedding", "final_norm", "scalar_head", "sparse.ffw.router", "dense.ffw_norm"):
            assert np.array_equal(leaf(ours, name), leaf(theirs, name)), name
        assert not np.allclose(ours.sparse.ffw.gate, theirs.sparse.ffw.gate, rtol=0.1)


def test_a_matrix_update_has_about_the_configured_root_mean_square(two_updates):
    for name, (index, shape) in MATRICES.items():
        update = leaf(two_updates[2][0], name)[index].reshape(shape)
        assert np.sqrt(np.mean(update**2)) == pytest.approx(0.5 * 0.2, rel=0.35), name  # singular values 0.7 to 1.2


def test_decay_schedule_and_clip_hold_for_muon_and_momentum_takes_the_dtype_of_the_moments():
    params = {"a": decoder.block.SwiGLU(*(jnp.ones((1, 3, 3)) for _ in range(3)))}
    grads = jax.tree.map(lambda p: 1e3 * p, params)
    config = OptimizerConfig(
        kind="muon", learning_rate=1.0, schedule="cosine", weight_decay=0.5, clip_norm=1.0, moment_dtype="bfloat16"
    )
    transform = optimizer.make(config, 4)
    state, updates = transform.init(params), []
    for _ in range(3):
        update, state = jax.jit(transform.update)(grads, state, params)
        updates.append(float(update["a"].gate[0, 0, 0]))
    # Same gradient and weights each time: the updates stand to each other as the rates do.
    rates = [float(optimizer.learning_rate(config, 4)(update)) for update in range(3)]
    np.testing.assert_allclose(np.asarray(updates) / rates, updates[0], rtol=1e-2)
    plain = optimizer.make(OptimizerConfig(kind="muon", learning_rate=1.0, clip_norm=1.0), 4)
    undecayed, after = plain.update(grads, plain.init(params), params)
    assert updates[0] == pytest.approx(float(undecayed["a"].gate[0, 0, 0]) - 0.5, rel=1e-2)
    momentum = [leaf for leaf in jax.tree.leaves(after) if leaf.shape == (1, 3, 3)]
    total = np.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in momentum))
    assert total == pytest.approx(0.05, rel=1e-5)  # (1 - 0.95) of a gradient clipped to norm 1
    kinds = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim == 3}
    assert kinds == {jnp.dtype("bfloat16")}
    coefficients = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (5, 3)]
    assert {leaf.dtype for leaf in coefficients} == {jnp.dtype("float32")}


def test_an_all_zero_gradient_gives_no_update():
    params = {"a": decoder.block.SwiGLU(*(jnp.ones((1, 3, 3)) for _ in range(3)))}
    transform = optimizer.make(CONFIG, 4)
    update, _ = transform.update(jax.tree.map(jnp.zeros_like, params), transform.init(params), params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(update))


@pytest.fixture(scope="module")
def report():
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
    }
    command = [sys.executable, str(ROOT / "tests" / "muon_driver.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_on_eight_devices_every_moment_lies_as_its_parameter_although_parameters_share_a_shape(report):
    assert report["moments"] == 2 * report["parameters"] - report["matrices"]  # AdamW keeps two, Muon one
    assert report["elsewhere"] == []
    assert report["same_shape_otherwise_divided"] > 0


def test_on_eight_devices_an_update_equals_that_of_one_within_rounding(report):
    print(f"largest difference {report['difference']:.1e} of a largest move of {report['largest_move']:.1e}")
    assert report["largest_move"] > 1e-3
    assert report["difference"] < 1e-3 * report["largest_move"]  # five steps multiply rounding by up to 3.4445^5 = 485
