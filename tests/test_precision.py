"""The claim behind float32 master weights: at a rate of 3e-6, bfloat16 compute follows float32; bfloat16 weights freeze."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from r1jax.core import rng, sharding
from r1jax.models import decoder
from r1jax.schema import MeshConfig, OptimizerConfig, PackConfig
from r1jax.train import sft, step

MODEL = small.network(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=4,
    n_shared_experts=1,
    moe_intermediate_size=16,
    initializer_range=0.1,
    scan_layers=False,
)
PACK = PackConfig(row_tokens=32, rows_per_micro_batch=16)
UPDATES = 50


@pytest.fixture(scope="module")
def moves():
    """Returns {variant: how far each weight moved in 50 updates}, and the share of weights that did not move."""
    generator = np.random.default_rng(0)
    rows = np.cumsum(generator.integers(0, 3, (UPDATES, 16, 32)), axis=-1) % 60 + 2  # learnable: small steps up
    mesh = sharding.make_mesh(MeshConfig())
    start = sharding.initialize(decoder.specs(MODEL.model), rng.key(0, "precision", "init"), "float32", mesh)
    variants = {
        "float32": (MODEL, "float32"),
        "bfloat16 compute": (small.changed(MODEL, compute_dtype="bfloat16"), "float32"),
        "bfloat16 weights": (small.changed(MODEL, compute_dtype="bfloat16"), "bfloat16"),
    }
    result = {}
    for name, (network, param_dtype) in variants.items():
        optimizer = OptimizerConfig(learning_rate=3e-6, param_dtype=param_dtype)
        trainer = step.Trainer(network, optimizer, mesh, sft.make_loss(network), UPDATES)
        state = trainer.init(start)
        before = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(jax.device_get(state.params))]
        for update in range(UPDATES):
            items = [sft.example(row[:1], row[1:]) for row in rows[update]]
            state, _ = trainer.update(state, *sft.make_batch(items, PACK, 1))
        after = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(jax.device_get(state.params))]
        result[name] = np.concatenate([(a - b).ravel() for a, b in zip(after, before, strict=True)])
    return result


def test_bfloat16_compute_moves_float32_weights_as_far_as_float32_does(moves):
    exact, rounded = moves["float32"], moves["bfloat16 compute"]
    ratio = np.linalg.norm(rounded) / np.linalg.norm(exact)
    cosine = rounded @ exact / (np.linalg.norm(rounded) * np.linalg.norm(exact))
    print(f"movement ratio {ratio:.4f}, cosine {cosine:.4f}")
    assert abs(ratio - 1) < 0.05
    assert cosine > 0.9


def test_bfloat16_weights_freeze(moves):
    frozen, exact = moves["bfloat16 weights"], moves["float32"]
    still = float(np.mean(frozen == 0))
    print(f"{still:.3f} of the bfloat16 weights did not move; of the float32 ones {float(np.mean(exact == 0)):.3f}")
    assert still > 0.7
    assert float(np.mean(exact == 0)) < 0.1


def test_moments_can_be_kept_in_bfloat16():
    mesh = sharding.make_mesh(MeshConfig())
    trainer = step.Trainer(MODEL, OptimizerConfig(moment_dtype="bfloat16"), mesh, sft.make_loss(MODEL), 1)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(trainer.abstract_state().optimizer) if leaf.ndim > 2}
    assert kinds == {jnp.dtype("bfloat16")}
