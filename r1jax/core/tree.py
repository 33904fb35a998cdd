"""Small helpers on pytrees of arrays."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def cast(tree: Any, dtype) -> Any:
    """Returns the tree with its floating-point leaves in `dtype`; others are left alone."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def global_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm over all leaves, in float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def count(tree: Any) -> int:
    """Returns the number of elements in all leaves (arrays or shape structs)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def digest(tree: Any) -> str:
    """Returns a SHA-256 over names, shapes, dtypes and bytes of all leaves: equal digests mean bit-equal trees."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(jax.device_get(leaf))
        sha.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
