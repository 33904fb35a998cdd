"""Builders of programs that tests compile for a TPU, from shapes alone: those of a stage, and some made to be wrong."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from r1jax import config as configs
from r1jax.core import sharding
from r1jax.plan.compile import LoweredProgram
from r1jax.recipe import programs
from r1jax.schema import MeshConfig


def stage(devices, spec: str, name: str, rules: dict | None = None, **fields):
    """Returns the program `name` of a stage whose config has these fields, a__b for a.b.

    It is traced under `rules`, but weights are where the stage puts them.
    """
    overrides = [(key.replace("__", "."), str(value)) for key, value in fields.items()]
    program = programs.programs(configs.load(spec, overrides), devices)[name]
    sharding.TRAIN.update({axis: tuple(names) for axis, names in (rules or {}).items()})
    return LoweredProgram(program.lowered(), program.mesh, program.kept)


def product(devices, rows: int, inner: int, columns: int, gather: bool = False):
    """Returns (w + 1, x @ tanh(w)) with w's rows over four devices; with `gather` w is put on every device first."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), devices)
    divided, whole = NamedSharding(mesh, PartitionSpec("fsdp", None)), sharding.replicated(mesh)

    def product_step(w, x):
        return w + 1, x @ jnp.tanh(jax.lax.with_sharding_constraint(w, whole) if gather else w)

    jitted = jax.jit(product_step, donate_argnums=0, out_shardings=(divided, whole))
    w = jax.ShapeDtypeStruct((inner, columns), "float32", sharding=divided)
    x = jax.ShapeDtypeStruct((rows, inner), "float32", sharding=whole)
    return LoweredProgram(jitted.lower(w, x), mesh, {"w": ((inner // 4, columns), (inner, columns))})


def reordered(devices):
    """Returns a change of sharding that XLA's partitioner can only make by replicating the array."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, expert=2), devices)
    tiles = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(("fsdp", "data", "expert"), None))

    def reorder(x):
        y = jax.lax.with_sharding_constraint(jnp.sin(x), tiles)
        return jax.lax.with_sharding_constraint(jnp.tanh(y), rows)

    x = jax.ShapeDtypeStruct((64, 1024), "float32", sharding=sharding.replicated(mesh))
    return LoweredProgram(jax.jit(reorder).lower(x), mesh)
