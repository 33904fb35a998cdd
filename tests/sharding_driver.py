"""One GRPO update and one rollout of a tiny policy under a mesh; prints figures as JSON.

The meshes are those of MESHES that fit the visible devices; set XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import json
import sys

import jax
import numpy as np

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.core import rng, runtime, sharding, tree
from r1jax.data import tasks
from r1jax.data.packing import PackItem, pack_batch
from r1jax.models import decoder
from r1jax.rl import losses
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import RolloutRequest, SamplingLaw
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import MeshConfig, OptimizerConfig, PackConfig, SamplerConfig, replace
from r1jax.train import step

MESHES = {
    "one": MeshConfig(),
    "data2_expert2": MeshConfig(data=2, expert=2),
    "fsdp2_tensor2": MeshConfig(fsdp=2, tensor=2),
}
PACK = PackConfig(row_tokens=48, rows_per_micro_batch=4)
WORDS = tokenizer.tiny()


def batch():
    """Returns eight samples of uneven length with everything a GRPO batch has; one row is wholly masked."""
    generator = np.random.default_rng(0)
    items = []
    for index, length in enumerate((47, 12, 30, 9, 22, 41, 17, 5)):
        mask = np.zeros(length, np.float32)
        mask[4:] = 0.0 if index == 0 else 1.0
        values = {
            "advantage": np.full(length, generator.normal(), np.float32),
            "behaviour_logp": generator.normal(-5, 0.3, length).astype(np.float32),
            "weight": np.full(length, 1 / (8 * length), np.float32),
            "reference_logp": generator.normal(-5, 0.3, length).astype(np.float32),
        }
        items.append(PackItem(generator.integers(4, 190, length).astype(np.int32), mask, values))
    packed = pack_batch(items, PACK.row_tokens, 8)
    return step.batch_arrays(packed, PACK, 2, losses.FIELDS), step.filled_micro_batches(packed, PACK)


def run(model, mesh_config):
    mesh = sharding.make_mesh(mesh_config)
    params = sharding.initialize(decoder.specs(model), rng.key(0, "mesh", "init"), "float32", mesh)
    optimizer = OptimizerConfig(learning_rate=1e-3, eps=1e-3)  # a large eps: an update in proportion to the gradient
    trainer = step.Trainer(model, optimizer, mesh, losses.make_loss(model), 10)
    arrays, filled = batch()
    arguments = losses.LossArguments(*(np.float32(value) for value in (10.0, 0.01, 1.0)))
    state, stats = trainer.update(trainer.init(params), arrays, filled, arguments)
    figures = {name: np.asarray(value).tolist() for name, value in jax.device_get(stats).items()}
    sampler = SamplerConfig(slots=8, steps_per_dispatch=4, max_prompt_tokens=16, max_new_tokens=12)
    rollout = RolloutSampler(Engine(model, sampler, mesh, (WORDS.eos_id,), WORDS))
    law = SamplingLaw(max_new_tokens=12, stop_ids=(WORDS.eos_id,))
    requests = [
        RolloutRequest(
            draw,
            np.asarray(WORDS.encode(prompt.text), np.int32),
            rng.sample_keys(0, "mesh", np.full(6, draw), np.arange(6), "sample"),
            law,
        )
        for draw, prompt in enumerate(tasks.linear_prompts("train")[:4])
    ]
    tokens = [sample.token_ids.tolist() for sample in rollout.generate(requests, params)]
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state.params))]
    start = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(params))]
    return figures, tokens, [a - b for a, b in zip(leaves, start, strict=True)], tree.count(params)


def main():
    runtime.setup()
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    moe = replace(configs.load("r1_zero:tiny").model, **small, moe_intermediate_size=16, initializer_range=0.2)
    dense = replace(
        configs.load("r1_zero:tiny_dense").model, **small, head_dim=16, num_key_value_heads=2, initializer_range=0.2
    )
    report = {}
    for name, model in {"moe": moe, "dense": dense}.items():
        single = None
        for mesh_name, mesh in MESHES.items():
            figures, tokens, moved, _ = run(model, mesh)
            single = single or (figures, tokens, moved)
            largest = max(float(np.abs(a).max()) for a in single[2])
            difference = max(float(np.abs(a - b).max()) for a, b in zip(moved, single[2], strict=True))
            report[f"{name}/{mesh_name}"] = {
                "figures": figures,
                "same_tokens": sum(a == b for a, b in zip(tokens, single[1], strict=True)),
                "samples": len(tokens),
                "largest_move": largest,
                "difference": difference,
            }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
