"""One update with Muon on eight devices and on one; prints figures as JSON.

Set XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import json
import sys

import jax
import numpy as np
import small

from r1jax.core import rng, runtime, sharding
from r1jax.models import decoder
from r1jax.schema import MeshConfig, OptimizerConfig, PackConfig
from r1jax.train import optimizer, sft, step

# Width and inner width agree, so that gate and down have one shape and lie differently.
MODEL = small.network(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    first_k_dense_replace=0,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    n_shared_experts=1,
    moe_intermediate_size=16,
    moe_implementation="dense",
    initializer_range=0.3,
    scan_layers=False,
)


def placements(trainer, state):
    """Returns (moments, those that lie unlike their parameter, pairs of one shape that lie differently)."""
    found, elsewhere = 0, []
    masked = optimizer.is_masked
    structure = jax.tree.structure(state.params)
    is_params = lambda node: jax.tree.structure(node, is_leaf=masked) == structure  # noqa: E731
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    for node in jax.tree.leaves(state.optimizer, is_leaf=is_params):
        if not is_params(node):
            continue
        pairs = zip(paths, jax.tree.leaves(node, is_leaf=masked), jax.tree.leaves(state.params), strict=True)
        for path, moment, parameter in pairs:
            if masked(moment):
                continue
            found += 1
            if not moment.sharding.is_equivalent_to(parameter.sharding, parameter.ndim):
                elsewhere.append(path)
    leaves = jax.tree.leaves(state.params)
    differ = sum(
        a.shape == b.shape and not a.sharding.is_equivalent_to(b.sharding, a.ndim)
        for i, a in enumerate(leaves)
        for b in leaves[:i]
    )
    return found, elsewhere, differ


def main():
    runtime.setup()
    generator = np.random.default_rng(0)
    items = [sft.example(row[:1], row[1:]) for row in (generator.integers(1, 32, n) for n in (16, 3, 9, 7, 12, 16, 16))]
    moved, report = [], {}
    for config in (MeshConfig(), MeshConfig(fsdp=2, expert=2, tensor=2)):
        mesh = sharding.make_mesh(config)
        start = sharding.initialize(decoder.specs(MODEL.model), rng.key(0, "muon", "init"), "float32", mesh)
        settings = OptimizerConfig(kind="muon", learning_rate=0.1, eps=1e-3)
        trainer = step.Trainer(MODEL, settings, mesh, sft.make_loss(MODEL), 10)
        batch = sft.make_batch(items, PackConfig(row_tokens=16, rows_per_micro_batch=8), 1)
        state, _ = trainer.update(trainer.init(start), *batch)
        report["moments"], report["elsewhere"], report["same_shape_otherwise_divided"] = placements(trainer, state)
        pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(start), strict=True)
        moved.append([np.asarray(jax.device_get(a)) - np.asarray(jax.device_get(b)) for a, b in pairs])
    report["parameters"], owners = len(moved[0]), jax.tree.leaves(optimizer._owners(start))
    report["matrices"] = owners.count("muon")
    report["largest_move"] = max(float(np.abs(leaf).max()) for leaf in moved[0])
    report["difference"] = max(float(np.abs(a - b).max()) for a, b in zip(*moved, strict=True))
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
