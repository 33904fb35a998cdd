"""The form of attention that each forward pass carries, and what `constrain` does without a mesh; prints JSON.

Set XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import json
import sys

import jax.numpy as jnp
import small

from r1jax.core import sharding
from r1jax.models import cache, decoder, forms
from r1jax.schema import MeshConfig

MODELS = {"latent": small.MIXTURE, "grouped": small.GROUPED}
MESHES = {"one": MeshConfig(), "context2": MeshConfig(context=2), "fsdp2": MeshConfig(fsdp=2)}


def chosen(model: str, mesh: str, tokens: int, cached: bool, kernels: str, block: int) -> str:
    """Returns the name of the form for two rows of `tokens` tokens."""
    network = small.changed(MODELS[model], attention_implementation=kernels, attention_block=block)
    rules = sharding.DECODE if cached else sharding.TRAIN
    rows = jnp.ones((2, tokens), jnp.int32)
    with sharding.use_mesh(sharding.make_mesh(MESHES[mesh]), rules):
        kv = cache.CacheSpec(network, slots=2, rows=16).zeros() if cached else None
        return forms.build_context(rows, rows, network, kv, 16 if cached else 0).form.__name__


def message(function, *arguments) -> str:
    """Returns the text of the ValueError that the call raises, "" for none."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def main():
    asked = json.loads(sys.argv[1])
    report = {"forms": [chosen(*arguments) for arguments in asked]}
    x, rows = jnp.ones((8, 4)), jnp.ones((2, 4), jnp.int32)
    report["no_mesh"] = message(sharding.constrain, x, "batch", None)
    params = sharding.map_specs(lambda spec: jnp.zeros(spec.shape), decoder.specs(small.GROUPED.model))
    report["forward"] = message(decoder.forward, params, rows, rows, rows, small.GROUPED)
    for name, mesh in MESHES.items():
        with sharding.use_mesh(sharding.make_mesh(mesh)):
            report[name] = len(sharding.constrain(x, "batch", None).sharding.device_set)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
