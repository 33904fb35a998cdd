"""One GRPO update and one rollout of a tiny policy under a mesh; prints figures as JSON.

The meshes are those of MESHES; set XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import json
import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import small

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.core import rng, runtime, sharding, tree
from r1jax.data import tasks
from r1jax.data.packing import PackItem, pack_batch
from r1jax.models import decoder
from r1jax.models.logprobs import token_logprobs
from r1jax.rl import losses
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import RolloutRequest, SamplingParams
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import GRPOConfig, MeshConfig, OptimizerConfig, PackConfig, SamplerConfig
from r1jax.train import step

MESHES = {
    "one": MeshConfig(),
    "slice2_data4": MeshConfig(slice=2, data=4),
    "fsdp8": MeshConfig(fsdp=8),
    "data2_expert4": MeshConfig(data=2, expert=4),
    "fsdp2_expert2_tensor2": MeshConfig(fsdp=2, expert=2, tensor=2),
    "expert2_context4": MeshConfig(expert=2, context=4),
    "fsdp2_tensor2_context2": MeshConfig(fsdp=2, tensor=2, context=2),
    "slice2_expert2_context2": MeshConfig(slice=2, expert=2, context=2),
}
ROUTED = ("fsdp8", "data2_expert4", "fsdp2_expert2_tensor2", "expert2_context4")  # also with tokens sent to experts
DIVIDED = ("fsdp8", "fsdp2_expert2_tensor2", "expert2_context4")  # also with dense weights divided in decoding
PACK = PackConfig(row_tokens=48, rows_per_micro_batch=8)
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
    packed = pack_batch(items, PACK.row_tokens, 16)
    return step.batch_arrays(packed, PACK, 2, losses.fields(GRPOConfig())), step.filled_micro_batches(packed, PACK)


def run(network, mesh_config):
    mesh = sharding.make_mesh(mesh_config)
    params = sharding.initialize(decoder.specs(network.model), rng.key(0, "mesh", "init"), "float32", mesh)
    optimizer = OptimizerConfig(learning_rate=1e-3, eps=1e-3)  # a large eps: an update in proportion to the gradient
    trainer = step.Trainer(network, optimizer, mesh, losses.make_loss(network, GRPOConfig()), 10)
    arrays, filled = batch()
    arguments = losses.arguments(GRPOConfig(), 0.01, 1.0)
    state, stats = trainer.update(trainer.init(params), arrays, filled, arguments)
    figures = {name: np.asarray(value).tolist() for name, value in jax.device_get(stats).items()}
    tokens = rollout(network, mesh, params)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state.params))]
    start = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(params))]
    return figures, tokens, [a - b for a, b in zip(leaves, start, strict=True)], tree.count(params)


def rollout(network, mesh, params):
    """Returns the token ids of the 24 samples of four prompts."""
    sampler = SamplerConfig(slots=8, steps_per_dispatch=4, max_prompt_tokens=16, max_new_tokens=12)
    sampled = RolloutSampler(Engine(network, sampler, mesh, (WORDS.eos_id,), WORDS))
    sampling = SamplingParams(max_new_tokens=12, stop_ids=(WORDS.eos_id,))
    requests = [
        RolloutRequest(
            draw,
            np.asarray(WORDS.encode(prompt.text), np.int32),
            rng.sample_keys(0, "mesh", np.full(6, draw), np.arange(6), "sample"),
            sampling,
        )
        for draw, prompt in enumerate(tasks.linear_prompts("train")[:4])
    ]
    placed = sampled.engine.load_params(params)
    return [sample.token_ids.tolist() for sample in sampled.generate(requests, placed)]


def divided_dense(network, config):
    """Returns (token ids, share of the dense weights that one device holds) of a rollout with dense weights divided."""
    mesh, specs = sharding.make_mesh(config), decoder.specs(network.model)
    params = sharding.initialize(specs, rng.key(0, "mesh", "init"), "float32", mesh)
    with mock.patch.object(sharding, "WHOLE_DENSE_BYTES", 0):
        places = sharding.spec_shardings(specs, mesh, sharding.decode_rules(specs, mesh, "float32"))
        tokens = rollout(network, mesh, params)
    dense = [(leaf, place) for leaf, place in ((params.embedding, places.embedding), (params.dense, places.dense))]
    whole = sum(array.size for leaf, _ in dense for array in jax.tree.leaves(leaf))
    held = sum(
        np.prod(place.shard_shape(array.shape))
        for leaf, places in dense
        for array, place in zip(jax.tree.leaves(leaf), jax.tree.leaves(places), strict=True)
    )
    return tokens, float(held / whole)


CONTEXT_TOKENS = 4096


def context_parallel(network):
    """Returns how a row of 4,096 tokens over four devices differs from one device: hidden states, loss and gradients."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(4, 190, (1, CONTEXT_TOKENS)).astype(np.int32)
    lengths = (1700, 2300, 96)  # a document over three devices, one over three more, and padding
    segments = np.repeat([1, 2, 0], lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    targets, mask = np.roll(tokens, -1, axis=1), (segments > 0).astype(np.float32)

    def loss(params):
        hidden, _, _ = decoder.forward(params, tokens, positions, segments, network)
        logp, _ = token_logprobs(hidden, decoder.unembedding(params), targets)
        return -np.float32(1 / 4000) * jnp.sum(logp * mask), hidden

    found = []
    for config in (MeshConfig(), MeshConfig(context=4)):
        mesh = sharding.make_mesh(config)
        params = sharding.initialize(decoder.specs(network.model), rng.key(0, "mesh", "init"), "float32", mesh)
        with sharding.use_mesh(mesh):
            (value, hidden), grads = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
        found.append((float(value), hidden[segments > 0], jax.tree.leaves(grads)))
    (loss_1, hidden_1, grads_1), (loss_4, hidden_4, grads_4) = found
    return {
        "loss": [loss_1, loss_4],
        "hidden": float(np.abs(hidden_1 - hidden_4).max() / np.abs(hidden_1).max()),
        "gradient": max(
            float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-6)) for a, b in zip(grads_1, grads_4, strict=True)
        ),
        "smallest_gradient": min(float(np.abs(a).max()) for a in grads_1 if a.ndim > 2),
    }


def vocabulary_shapes():
    """Returns the shapes, per device, of all float arrays that mention the vocabulary in a compiled divided log-prob."""
    mesh = sharding.make_mesh(MeshConfig(tensor=4))
    place = [sharding.sharding(mesh, axes) for axes in ((None, None, None), (None, "vocab"), (None, None))]
    shapes = [
        jax.ShapeDtypeStruct(s, d) for s, d in (((2, 8, 16), "float32"), ((16, 4444), "float32"), ((2, 8), "int32"))
    ]

    def loss(hidden, unembedding, targets):
        return token_logprobs(hidden, unembedding, targets)[0].sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1)), in_shardings=place).lower(*shapes).compile()
    return sorted(set(re.findall(r"f32\[([0-9,]*(?:4444|1111)[0-9,]*)\]", compiled.as_text())))


def digests():
    """Returns the digest of one tree on each mesh, its leaves being summed up where they are."""
    specs = {
        "experts": sharding.ParamSpec((3, 8, 6, 4), (None, "experts", None, "ffw"), sharding.normal(1.0)),
        "wide": sharding.ParamSpec((16, 8), ("embed", "vocab"), sharding.normal(1.0), "bfloat16"),
    }
    drawn, found = sharding.initialize(specs, jax.random.key(0), "float32", sharding.make_mesh(MESHES["one"])), {}
    for name, config in MESHES.items():
        placed = jax.device_put(drawn, sharding.spec_shardings(specs, sharding.make_mesh(config)))
        with mock.patch.object(tree, "WHOLE_BYTES", 0):
            found[name] = tree.digest(placed)
    return found


def main():
    runtime.setup()
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, initializer_range=0.2)
    moe = small.changed(configs.load("r1_zero:tiny").network, **sizes, moe_intermediate_size=16)
    dense = small.changed(configs.load("r1_zero:tiny_dense").network, **sizes, head_dim=16, num_key_value_heads=2)
    report = {}
    for name, network in {"moe": moe, "dense": dense}.items():
        runs = [(mesh_name, network, mesh) for mesh_name, mesh in MESHES.items()]
        if name == "moe":
            sent = small.changed(network, moe_dispatch="routed", moe_buffer_factor=0.4)  # more than one round
            runs += [(f"{mesh_name}_routed", sent, MESHES[mesh_name]) for mesh_name in ROUTED]
        kernel = small.changed(network, attention_implementation="flash", logprob_implementation="pallas")
        runs.append(("fsdp2_expert2_tensor2_flash", kernel, MESHES["fsdp2_expert2_tensor2"]))
        single = None
        for mesh_name, own, mesh in runs:
            figures, tokens, moved, _ = run(own, mesh)
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
        for mesh_name in DIVIDED:
            tokens, held = divided_dense(network, MESHES[mesh_name])
            same = sum(a == b for a, b in zip(tokens, single[1], strict=True))
            report[f"{name}/{mesh_name}/divided"] = {"same_tokens": same, "held": held}
        report[f"{name}/context"] = context_parallel(small.changed(network, num_hidden_layers=2))
    report["digests"] = digests()
    report["vocabulary_shapes"] = vocabulary_shapes()
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
