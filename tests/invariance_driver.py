"""Loss and gradients of one batch in several layouts, micro-batches and meshes; prints differences as JSON.

Takes the name of a model; set XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import json
import sys

import jax
import numpy as np
import small

from r1jax.core import rng, runtime, sharding
from r1jax.core.sharding import use_mesh
from r1jax.data.packing import PackItem, pack, pack_batch, spread
from r1jax.models import decoder
from r1jax.rl import losses
from r1jax.schema import GRPOConfig, MeshConfig, OptimizerConfig, PackConfig
from r1jax.train import sft, step

MODELS = {
    "moe": small.changed(small.MIXTURE, num_hidden_layers=1, first_k_dense_replace=0, aux_loss_alpha=0.01),
    "dense": small.network(
        family="llama",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        head_dim=8,
        initializer_range=0.3,
        scan_layers=False,
    ),
}
ROW_TOKENS, LENGTHS, MASKED = 16, (16, 3, 9, 7, 12, 4, 5, 16), 7  # the last sample fills a row and counts nowhere
VARIANTS = {  # micro-batches, rows in each, one sample a row, mesh
    "1 micro-batch, packed, 1 device": (1, 8, False, MeshConfig()),
    "1 micro-batch, padded, 1 device": (1, 8, True, MeshConfig()),
    "4 micro-batches, packed, 1 device": (4, 2, False, MeshConfig()),
    "2 micro-batches, packed, 2 devices": (2, 4, False, MeshConfig(data=2)),
    "1 micro-batch, padded, 4 devices": (1, 8, True, MeshConfig(fsdp=2, expert=2)),
    "2 micro-batches, packed, 4 devices": (2, 4, False, MeshConfig(data=4)),
}


GRPO = {"grpo": GRPOConfig(clip_ratio=0.2), "gspo": GRPOConfig(clip_ratio=0.2, ratio="sequence")}
LAYOUTS = {  # the variants that an objective is computed in, beside the first
    "grpo": list(VARIANTS)[1:],
    "sft": [name for name in VARIANTS if name[0] != "2"],
    "gspo": ["1 micro-batch, padded, 1 device", "2 micro-batches, packed, 4 devices"],
}


def samples():
    """Returns (items with all that a GRPO batch has, which tokens count)."""
    generator, items = np.random.default_rng(0), []
    for index, length in enumerate(LENGTHS):
        mask = np.zeros(length, np.float32)
        mask[2:] = index != MASKED
        values = {
            "advantage": np.full(length, generator.normal(), np.float32),
            "behaviour_logp": generator.normal(-3.5, 0.3, length).astype(np.float32),
            "reference_logp": generator.normal(-3.5, 0.3, length).astype(np.float32),
            "weight": np.full(length, 1 / (len(LENGTHS) * (length - 2)), np.float32),
        }
        items.append(PackItem(generator.integers(1, 32, length).astype(np.int32), mask, values))
    return items


def gradients(network, params, objective, micro_batches, rows, alone, mesh_config):
    """Returns (loss, gradient leaves) of the samples laid out so."""
    items, mesh = samples(), sharding.make_mesh(mesh_config)
    layout = [[index] for index in range(len(items))] if alone else pack(LENGTHS, ROW_TOKENS)
    layout = spread(layout, LENGTHS, rows, sharding.row_shards(rows, mesh_config))
    packed, size = pack_batch(items, ROW_TOKENS, micro_batches * rows, layout), PackConfig(ROW_TOKENS, rows)
    if objective in GRPO:
        config = GRPO[objective]
        loss, fields = losses.make_loss(network, config), losses.fields(config)
        arguments = losses.arguments(config, 0.05, 1.0)
    else:
        loss, fields, arguments = sft.make_loss(network), (), np.float32(1 / packed.loss_mask.sum())
    trainer = step.Trainer(network, OptimizerConfig(), mesh, loss, 1)
    batch = step.batch_arrays(packed, size, micro_batches, fields)
    batch = {name: sharding.place(array, trainer._batch_sharding(array.shape)) for name, array in batch.items()}
    params = jax.device_put(params, trainer.param_shardings)
    filled = step.filled_micro_batches(packed, size)
    with use_mesh(mesh):
        value, _, grads = jax.device_get(jax.jit(trainer.gradients)(params, batch, np.int32(filled), arguments))
    return float(value), jax.tree.leaves(grads)


def main():
    runtime.setup()
    network, report = MODELS[sys.argv[1]], {}
    one = sharding.make_mesh(MeshConfig())
    params = jax.device_get(
        sharding.initialize(decoder.specs(network.model), rng.key(0, "same", "init"), "float32", one)
    )
    for objective, layouts in LAYOUTS.items():
        expected = None
        for name in dict.fromkeys((next(iter(VARIANTS)), *layouts)):
            loss, grads = gradients(network, params, objective, *VARIANTS[name])
            expected = expected or (loss, grads)
            pairs = [(a, b) for a, b in zip(grads, expected[1], strict=True) if np.abs(b).max()]
            report[f"{objective}: {name}"] = {
                "loss": abs(loss - expected[0]) / abs(expected[0]),
                "gradient": max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs),
                "leaves": len(pairs),
                "all_leaves": len(grads),
            }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
