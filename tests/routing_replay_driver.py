"""One GRPO update and one scoring with routing replay of random records under eight devices; prints figures as JSON.

Set XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import json
import sys

import jax
import numpy as np
import sharding_driver as driver
import small

from r1jax import config as configs
from r1jax.core import rng, runtime, sharding
from r1jax.models import decoder
from r1jax.rl import losses
from r1jax.rl.logprobs import ROUTED, Scorer
from r1jax.schema import GRPOConfig, OptimizerConfig
from r1jax.train import step

RUNS = ("one", "data2_expert4_routed", "expert2_context4")


def run(network, mesh_config, arrays, filled):
    """Returns (statistics, changes of the parameters, reference log-probs)."""
    mesh = sharding.make_mesh(mesh_config)
    params = sharding.initialize(decoder.specs(network.model), rng.key(0, "mesh", "init"), "float32", mesh)
    scores = Scorer(network, mesh)(params, arrays, filled, 1.0)
    optimizer = OptimizerConfig(learning_rate=1e-3, eps=1e-3)  # a large eps: an update in proportion to the gradient
    trainer = step.Trainer(network, optimizer, mesh, losses.make_loss(network, GRPOConfig()), 10)
    arguments = losses.arguments(GRPOConfig(), 0.01, 1.0)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(params))]
    state, stats = trainer.update(trainer.init(params), arrays, filled, arguments)
    after = jax.tree.leaves(jax.device_get(state.params))
    moved = [np.asarray(a) - b for a, b in zip(after, before, strict=True)]
    return {name: float(value) for name, value in jax.device_get(stats).items()}, moved, scores


def main():
    runtime.setup()
    network = small.changed(
        configs.load("r1_zero:tiny").network,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        moe_intermediate_size=16,
        initializer_range=0.2,
    )
    arrays, filled = driver.batch()
    generator = np.random.default_rng(2)
    shape = (*arrays["tokens"].shape, network.model.num_moe_layers)
    drawn = np.argsort(generator.random((*shape, network.model.n_routed_experts)), axis=-1)[
        ..., : network.model.num_experts_per_tok
    ]
    arrays[ROUTED] = np.where(arrays["segments"][..., None, None] > 0, drawn, -1).astype(np.int16)
    report, single = {}, None
    for name in RUNS:
        own = (
            small.changed(network, moe_dispatch="routed", moe_buffer_factor=0.4)
            if name.endswith("_routed")
            else network
        )
        figures, moved, scores = run(own, driver.MESHES[name.removesuffix("_routed")], arrays, filled)
        single = single or (moved, scores)
        difference = max(float(np.abs(a - b).max()) for a, b in zip(moved, single[0], strict=True))
        report[name] = figures | {"difference": difference, "reference": float(np.abs(scores - single[1]).max())}
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
