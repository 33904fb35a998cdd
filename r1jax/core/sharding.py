"""Meshes, logical axis rules and parameter specs: the only module that writes mesh axis names.

A `ParamSpec` declares a parameter once. Abstract arrays, sharded initial values, checkpoint targets and the shapes for
ahead-of-time compilation are all derived from the tree of specs.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.core import hosts
from r1jax.schema import ROW_AXES, MeshConfig

AXES = ("slice", "data", "fsdp", "expert", "tensor", "context")

Rules = dict[str, tuple[str, ...]]  # logical axis -> mesh axes; a logical axis that is absent is replicated

# Experts are divided over context, fsdp and expert together, so that tokens travel to experts and expert weights never
# move. `context` comes first because leading axes are dropped where experts are too few for all.
TRAIN: Rules = {
    "batch": ROW_AXES,
    "slots": ROW_AXES,
    "sequence": ("context",),
    "embed": ("context", "fsdp"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "ffw": ("tensor",),
    "expert_ffw": ("tensor",),
    "experts": ("context", "fsdp", "expert"),
    "dense": (),  # mesh axes by which `decode_rules` divides dense weights
}
# A decode step reads every weight for a handful of tokens: gathering fsdp's parts each time would cost more than
# holding the dense weights whole; where they are too large for that, see `decode_rules`. A step has one token per slot,
# which leaves nothing to divide along a row, so `context` divides slots too.
DECODE: Rules = {
    **TRAIN,
    "batch": (*ROW_AXES, "context"),
    "slots": (*ROW_AXES, "context"),
    "sequence": (),
    "embed": (),
}

# Dense weights that a device holds whole when it decodes. Reading as many takes 1.5 ms of a step on a v5p, as long as
# the collectives that divided weights need in 60 layers.
WHOLE_DENSE_BYTES = 4 * 2**30
_DIVIDED_DENSE = ("heads", "ffw", "vocab")  # logical axes of dense weights that `decode_rules` divides further

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def normal(std: float) -> Initializer:
    return lambda key, shape, dtype: (jax.random.normal(key, shape) * std).astype(dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    return jnp.ones(shape, dtype)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape, a logical axis or None for each dimension, initialiser, and dtype (None: the policy's)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    dtype: Any = None

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), f"{self.shape} and {self.axes} differ in rank"


def param(shape: tuple[int, ...], axes: tuple[str | None, ...], init: Initializer, dtype: Any = None) -> Any:
    """Returns the ParamSpec of one parameter. Its type is Any: in the tree of a layer it takes the place of an array."""
    return ParamSpec(shape, axes, init, dtype)


def is_spec(value: Any) -> bool:
    return isinstance(value, ParamSpec)


def map_specs(function: Callable[[ParamSpec], Any], specs: Any) -> Any:
    return jax.tree.map(function, specs, is_leaf=is_spec)


def make_mesh(config: MeshConfig, devices: list | None = None, field: str = "mesh") -> Mesh:
    """Returns a mesh over the first devices. Raises ValueError when there are too few, and in a process of a pod that
    was started as if it were alone.

    On TPUs neighbours on a mesh axis are neighbours in the machine, and only the `slice` axis crosses between slices.
    """
    if devices is None:
        hosts.refuse_unconnected()
        devices = jax.devices()
    needed = math.prod(config.shape)
    if needed > len(devices):
        raise ValueError(
            f"{field}: {dict(zip(AXES, config.shape, strict=True))} needs {needed} devices, {len(devices)} are here; "
            f"make config.{field} smaller"
        )
    if hosts.process_count() > 1 and needed != len(devices):
        raise ValueError(
            f"mesh: {dict(zip(AXES, config.shape, strict=True))} uses {needed} devices, the "
            f"{hosts.process_count()} processes hold {len(devices)}; make config.mesh use all"
        )
    if devices[0].platform != "tpu" or needed < len(devices):
        return Mesh(np.asarray(devices[:needed]).reshape(config.shape), AXES)
    if config.slice == 1:
        placed = mesh_utils.create_device_mesh(config.shape, devices, allow_split_physical_axes=True)
    else:
        inner, outer = (1, *config.shape[1:]), (config.slice, *[1] * (len(AXES) - 1))
        placed = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES)


def partition(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...] | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
):
    """Returns the PartitionSpec of logical axes under `rules` (default: those in force).

    Mesh axes of size 1, and those that divide an earlier dimension, are left out. Where the rest do not divide a
    dimension, leading axes are dropped until they do: rows too few for (data, fsdp) together are divided over fsdp only.
    `weight_rows`, of rows where they meet dense weights, are `batch` without the axes that divide these.
    """
    rules = current_rules() if rules is None else rules
    entries, taken = [], set()
    for index, axis in enumerate(axes):
        of_axis = rules.get("batch" if axis == "weight_rows" else axis, ()) if axis else ()
        names = tuple(name for name in of_axis if name not in taken)
        if shape is not None and mesh is not None:
            names = _dividing(names, shape[index], mesh.shape)
        if axis == "weight_rows":
            names = tuple(name for name in names if name not in rules["dense"])
        taken.update(names)
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*entries)


def _dividing(names: tuple[str, ...], size: int, axes: Mapping[str, int]) -> tuple[str, ...]:
    names = tuple(name for name in names if axes[name] > 1)
    while names and size % math.prod(axes[name] for name in names):
        names = names[1:]
    return names


def decode_rules(specs: Any, mesh: Mesh, dtype: Any) -> Rules:
    """Returns the rules for decoding with the weights of `specs`: DECODE, or the same with dense weights divided.

    They are divided where heads, feed-forward layers and vocabulary together exceed WHOLE_DENSE_BYTES on a device, over
    `expert`, `fsdp` or both, the fewest devices first that bring them below it. Then rows are gathered before such a
    weight and scattered behind it (`gathered_rows`, `own_rows`): in a decode step these are far smaller than weights.
    """
    weights = [spec for spec in jax.tree.leaves(specs, is_leaf=is_spec) if set(spec.axes) & set(_DIVIDED_DENSE)]
    choices = [axes for axes in (("expert",), ("fsdp",), ("fsdp", "expert")) if all(mesh.shape[a] > 1 for a in axes)]
    rules = DECODE
    for axes in [(), *sorted(choices, key=lambda axes: math.prod(mesh.shape[name] for name in axes))]:
        rows = tuple(name for name in DECODE["batch"] if name not in axes)
        whole = (*rows, *axes)  # in this order the rows that are gathered are neighbours
        rules = DECODE | {"batch": whole, "slots": whole, "dense": axes}
        rules |= {name: (*axes, *DECODE[name]) for name in _DIVIDED_DENSE}
        parts = [sharding(mesh, spec.axes, spec.shape, rules).shard_shape(spec.shape) for spec in weights]
        if sum(math.prod(part) for part in parts) * jnp.dtype(dtype).itemsize <= WHOLE_DENSE_BYTES:
            break
    return rules


def row_shards(rows: int, mesh: MeshConfig) -> int:
    """Returns into how many equal, contiguous parts a training mesh divides the rows of a micro-batch."""
    axes = dict(zip(AXES, mesh.shape, strict=True))
    return math.prod(axes[name] for name in _dividing(TRAIN["batch"], rows, axes))


def local_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """Returns which rows of a training micro-batch have a device of this process, [rows] bool."""
    local = np.zeros(rows, bool)
    for index in sharding(mesh, ("batch",), (rows,)).addressable_devices_indices_map((rows,)).values():
        assert index is not None  # every device of the mesh has a part
        local[index] = True
    return local


def dividing_axes(
    axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: MeshConfig, rules: Rules = TRAIN
) -> tuple[tuple[str, ...], ...]:
    """Returns the mesh axes that divide each dimension of an array with these logical axes; needs no devices."""
    sizes = dict(zip(AXES, mesh.shape, strict=True))
    names = (rules.get(axis, ()) if axis else () for axis in axes)
    return tuple(_dividing(of_axis, size, sizes) for of_axis, size in zip(names, shape, strict=True))


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def sharding(
    mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None, rules: Rules | None = None
) -> NamedSharding:
    return NamedSharding(mesh, partition(axes, shape, mesh, rules))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def spec_shardings(specs: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """Returns the NamedSharding of every spec under `rules` (default: those in force)."""
    return map_specs(lambda spec: sharding(mesh, spec.axes, spec.shape, rules), specs)


def place(value: Any, sharding: NamedSharding) -> jax.Array:
    """Returns a host value, the same in every process, as an array with this sharding."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def to_host(array: Any, place: tuple[int, ...] = ()) -> np.ndarray:
    """Returns a whole array, or its part at these leading indices, in the memory of every process.

    Where the array is divided between processes, all must call this.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(jax.device_get(array[place] if place else array))
    return np.asarray(_replicate(array.sharding.mesh)(array, *map(np.int32, place)))


@functools.cache
def _replicate(mesh: Mesh) -> Callable[..., jax.Array]:
    return jax.jit(lambda x, *place: x[place] if place else x, out_shardings=replicated(mesh))


def on_host(shardings: Any) -> Any:
    """Returns the shardings with arrays placed in the host's memory instead of the device's."""
    return jax.tree.map(lambda place: place.with_memory_kind("pinned_host"), shardings)


def abstract(specs: Any, dtype, mesh: Mesh | None = None) -> Any:
    """Returns shape structs of every spec, with shardings when a mesh is given."""
    return map_specs(
        lambda s: jax.ShapeDtypeStruct(
            s.shape, s.dtype or dtype, sharding=sharding(mesh, s.axes, s.shape) if mesh is not None else None
        ),
        specs,
    )


def initialize(specs: Any, key: jax.Array, dtype, mesh: Mesh) -> Any:
    """Returns freshly drawn parameters, created sharded. Each leaf's key is folded from its index in the tree."""
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
def use_mesh(mesh: Mesh, rules: Rules = TRAIN):
    """Puts `mesh` and `rules` in force for this thread: `constrain` and others use them while programs are traced."""
    previous = current_mesh(), current_rules()
    _active.mesh, _active.rules = mesh, rules
    try:
        yield mesh
    finally:
        _active.mesh, _active.rules = previous


def current_mesh() -> Mesh | None:
    return getattr(_active, "mesh", None)


def device() -> jax.Device:
    """Returns a device of the mesh in force, or the first device without one."""
    mesh = current_mesh()
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def use_pallas(field: str, value: str) -> bool:
    """Returns whether config.compute.<field>=value asks for the Pallas TPU kernels; `auto` does on a TPU, `xla` never.

    Raises ValueError where it asks for them and the device is neither a TPU nor a CPU, which interprets them.
    """
    platform = device().platform
    if value == "xla" or (value == "auto" and platform != "tpu"):
        return False
    if platform not in ("tpu", "cpu"):
        raise ValueError(
            f"ComputeConfig.{field}={value} needs a TPU, or a CPU to interpret it; a {platform} needs {field}=xla"
        )
    return True


def current_rules() -> Rules:
    return getattr(_active, "rules", TRAIN)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x with the sharding of its logical axes on the mesh in force, or as it is on a single device.

    Raises ValueError without a mesh where there are several devices: it is then unknown how x is to be divided.
    """
    mesh = current_mesh()
    if mesh is None and jax.device_count() > 1:
        raise ValueError(
            f"constrain: no mesh is in force, and there are {jax.device_count()} devices; trace the program inside "
            "`with sharding.use_mesh(mesh)`, for one device with sharding.make_mesh(MeshConfig())"
        )
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape))


def gathered_rows(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x [B, ...], about to meet dense weights, with rows whole over the mesh axes that divide these.

    `axes` are the logical axes of the other dimensions. Where the rules in force divide no dense weights, x is left as
    it is.
    """
    return x if _whole_dense() else constrain(x, "weight_rows", *(axes or (None,) * (x.ndim - 1)))


def own_rows(x: jax.Array, *axes: str | None) -> jax.Array:
    """Returns x [B, ...], made by dense weights, with its rows divided as tokens are: the way back of `gathered_rows`."""
    return x if _whole_dense() else constrain(x, "batch", *(axes or (None,) * (x.ndim - 1)))


def _whole_dense() -> bool:
    return not current_rules()["dense"]
