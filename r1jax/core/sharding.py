"""Meshes, logical axis rules and parameter specs: the only module that writes mesh axis names.

A `ParamSpec` declares a parameter once. Abstract arrays, sharded initial values, checkpoint targets and the shapes for
ahead-of-time compilation are all derived from the tree of specs.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.schema import MeshConfig

AXES = ("data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = ("data", "fsdp", "expert")  # tokens are spread over these; experts over `expert`

# Logical axis -> mesh axes. A logical axis that is absent here is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "slots": BATCH_AXES,
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "ffw": ("tensor",),
    "experts": ("expert",),
}

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def normal(std: float) -> Initializer:
    return lambda key, shape, dtype: (jax.random.normal(key, shape) * std).astype(dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jnp.ones(shape, dtype)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape, a logical axis name (or None) for each dimension, initialiser, dtype (None: the policy's)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    dtype: Any = None

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), f"{self.shape} and {self.axes} differ in rank"


def is_spec(value: Any) -> bool:
    return isinstance(value, ParamSpec)


def map_specs(function: Callable[[ParamSpec], Any], specs: Any) -> Any:
    return jax.tree.map(function, specs, is_leaf=is_spec)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Returns a mesh over the first devices. Raises ValueError when there are too few."""
    devices = jax.devices() if devices is None else devices
    needed = math.prod(config.shape)
    if needed > len(devices):
        raise ValueError(
            f"mesh: {dict(zip(AXES, config.shape, strict=True))} needs {needed} devices, {len(devices)} are here; "
            "make config.mesh smaller"
        )
    return Mesh(np.asarray(devices[:needed]).reshape(config.shape), AXES)


def partition(axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None, mesh: Mesh | None = None):
    """Returns the PartitionSpec of logical axes; an axis that does not divide its dimension is replicated."""
    entries = []
    for index, axis in enumerate(axes):
        names = RULES.get(axis, ()) if axis else ()
        if names and shape is not None and mesh is not None:
            size = math.prod(mesh.shape[name] for name in names)
            if shape[index] % size:
                names = ()
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None) -> NamedSharding:
    return NamedSharding(mesh, partition(axes, shape, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def spec_shardings(specs: Any, mesh: Mesh) -> Any:
    """Returns the NamedSharding of every spec."""
    return map_specs(lambda spec: sharding(mesh, spec.axes, spec.shape), specs)


def abstract(specs: Any, dtype, mesh: Mesh | None = None) -> Any:
    """Returns shape structs of every spec, with shardings when a mesh is given."""
    return map_specs(
        lambda s: jax.ShapeDtypeStruct(
            s.shape, s.dtype or dtype, sharding=sharding(mesh, s.axes, s.shape) if mesh is not None else None
        ),
        specs,
    )


def initialize(specs: Any, key: jax.Array, dtype, mesh: Mesh) -> Any:
    """Returns freshly drawn parameters, created sharded. Each leaf's key is folded from its place in the tree."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=is_spec)

    def draw(key):
        values = [
            spec.init(jax.random.fold_in(key, index), spec.shape, spec.dtype or dtype)
            for index, spec in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, values)

    return jax.jit(draw, out_shardings=spec_shardings(specs, mesh))(key)


_active = threading.local()


@contextlib.contextmanager
def use_mesh(mesh: Mesh):
    """Makes `mesh` the one that `constrain` and `current_mesh` see while programs are traced."""
    previous = getattr(_active, "mesh", None)
    _active.mesh = mesh
    try:
        yield mesh
    finally:
        _active.mesh = previous


def current_mesh() -> Mesh | None:
    return getattr(_active, "mesh", None)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x with the sharding of its logical axes, when a mesh is active."""
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape))


def with_mesh(mesh: Mesh, function: Callable) -> Callable:
    """Returns the function traced with `mesh` active."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with use_mesh(mesh):
            return function(*args, **kwargs)

    return traced
