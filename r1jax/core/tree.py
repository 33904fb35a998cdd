"""Small helpers on pytrees of arrays."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.core import sharding


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


def first(tree: Any) -> Any:
    """Returns the first leaf of a tree."""
    return jax.tree.leaves(tree)[0]


def digest(tree: Any) -> str:
    """Returns a SHA-256 over names, shapes, dtypes and bytes of all leaves: equal digests mean bit-equal trees."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = sharding.to_host(leaf)
        sha.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
