"""Counts the bytes that Pallas kernels move between HBM and VMEM, by evaluating their index maps over the grid.

No kernel is run. A block of an input is read when its index differs from the step before; a block of a result is
written when its index is about to change. Blocks are counted in a TPU's layout: 128 lanes by 8 rows of 32 bits, the
last dimension padded to lanes. A block that extends past an array's end counts whole.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from r1jax.kernels.tpu import SUBLANES, rounded


@dataclass(frozen=True)
class Traffic:
    """The bytes that one call of a kernel moves."""

    name: str
    steps: int
    read: tuple[int, ...]  # bytes of each input
    written: tuple[int, ...]  # bytes of each result

    @property
    def bytes(self) -> int:
        return sum(self.read) + sum(self.written)


def kernels(function: Callable, *arguments) -> list[Traffic]:
    """Returns the traffic of every kernel that `function` calls on arrays like `arguments`, in program order.

    Raises ValueError for a kernel whose grid or index maps depend on values.
    """
    calls: list[Traffic] = []
    _collect(jax.make_jaxpr(function)(*arguments).jaxpr, calls)
    return calls


def _collect(jaxpr, calls: list[Traffic]) -> None:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            calls.append(_traffic(equation))
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                _collect(inner, calls)


def _traffic(equation) -> Traffic:
    grid_mapping, name = equation.params["grid_mapping"], str(equation.params["name"])
    if grid_mapping.num_index_operands or grid_mapping.num_dynamic_grid_bounds:
        raise ValueError(f"traffic: the steps of {name} depend on values; count a call whose grid is known")
    grid = tuple(int(size) for size in grid_mapping.grid)
    mappings, inputs = grid_mapping.block_mappings, grid_mapping.num_inputs
    sizes = [_moves(mapping, grid) * _block_bytes(mapping) for mapping in mappings]
    return Traffic(name, math.prod(grid), tuple(sizes[:inputs]), tuple(sizes[inputs:]))


def _moves(mapping, grid: tuple[int, ...]) -> int:
    """Returns how often the block's index changes, counting the first, over the grid with the last axis fastest."""
    index_map = mapping.index_map_jaxpr
    places = jnp.asarray(np.indices(grid).reshape(len(grid), -1), jnp.int32)
    indices = jax.vmap(lambda place: jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *place), in_axes=1)(places)
    table = np.stack([np.broadcast_to(np.asarray(index), places.shape[1]) for index in indices], axis=1)
    return 1 + int(np.any(table[1:] != table[:-1], axis=1).sum())


def _block_bytes(mapping) -> int:
    *rest, last = (1, *(_size(dimension) for dimension in mapping.block_shape))
    size = mapping.array_aval.dtype.itemsize
    if rest[1:]:
        *rest, rows = rest
        rest = [*rest, rounded(rows, SUBLANES * max(4 // size, 1))]
    return math.prod(rest) * rounded(last) * size


def _size(dimension) -> int:
    """Returns how many elements a block has in a dimension; a squeezed dimension has one."""
    return dimension if isinstance(dimension, int) else getattr(dimension, "block_size", 1)
