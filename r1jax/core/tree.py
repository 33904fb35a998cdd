"""Small helpers on pytrees of arrays."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.core import sharding

WHOLE_BYTES = 2**30  # `digest` reads leaves up to this size whole


def cast(tree: Any, dtype) -> Any:
    """Returns the tree with its floating-point leaves in `dtype`; others are left alone.

    So are the fields that a node's class names in KEEPS_DTYPE, such as the selection bias of a router.
    """

    def leaf(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    def node(x):
        kept = {name: getattr(x, name) for name in getattr(type(x), "KEEPS_DTYPE", ())}
        return jax.tree.map(leaf, x).replace(**kept) if kept else leaf(x)

    return jax.tree.map(node, tree, is_leaf=lambda x: hasattr(type(x), "KEEPS_DTYPE"))


def copier(dtype, shardings: Any) -> Callable[[Any], Any]:
    """Returns the program that copies a tree as `cast` does, placed by `shardings`."""
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, cast(tree, jnp.dtype(dtype))), out_shardings=shardings)


def global_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm over all leaves, in float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def count(tree: Any) -> int:
    """Returns the number of elements in all leaves (arrays or shape structs)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def structs(tree: Any, shardings: Any) -> Any:
    """Returns shape structs of a tree of arrays or structs, with these shardings: a tree like it, or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda leaf: shardings, tree)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, shardings)


def bytes_per_device(tree: Any) -> int:
    """Returns how many bytes a tree of arrays or structs with shardings takes on each device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def digest(tree: Any) -> str:
    """Returns a SHA-256 over names, shapes, dtypes and values of all leaves, the same on every mesh.

    Of a leaf of at most WHOLE_BYTES the bytes are hashed, so equal digests mean equal bits. A larger one is summed up
    where it is (`checksums`), since no device or process may have room for it.
    """
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        large = leaf.size * leaf.dtype.itemsize > WHOLE_BYTES
        array = sharding.to_host(checksums(leaf) if large else leaf)
        sha.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


@jax.jit
def checksums(array: jax.Array) -> jax.Array:
    """Returns eight sums modulo 2**32, uint32 [8], over numbers mixed from each element's bits and position.

    Integer sums do not depend on their order, so neither on how the array is divided. Each sum differs for arrays that
    differ in one element, and otherwise is equal by chance once in 2**32.
    """
    layers = array if array.ndim > 2 else array[None]  # of stacked layers one at a time, which bounds the memory

    def of_layer(number, total, start):
        layer, width = layers[number], array.dtype.itemsize
        bits = layer if layer.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(layer, f"uint{8 * min(width, 4)}")
        position = _mixed(start + number.astype(jnp.uint32))
        for axis in range(bits.ndim):
            position = _mixed(position + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis))
        return total + jnp.sum(_mixed(bits.astype(jnp.uint32) ^ position), dtype=jnp.uint32)

    def one_sum(start):
        return jax.lax.fori_loop(0, len(layers), lambda number, total: of_layer(number, total, start), jnp.uint32(0))

    return jax.lax.map(one_sum, jnp.arange(1, 9, dtype=jnp.uint32))


def _mixed(x: jax.Array) -> jax.Array:
    """Returns a permutation of the 32-bit numbers in which each bit depends on all: MurmurHash3's last step."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
