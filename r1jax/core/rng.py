"""The one key scheme: every random draw is keyed by (seed, stage, draw, sample, position, purpose).

`draw` is the global counter of the prompt stream, `sample` the index in its group, `position` the index of the new
token. No key depends on slot, batch, mesh, order or time.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

PURPOSES = ("sample", "accept", "shuffle", "evaluate", "init", "greedy")


@functools.partial(jax.jit, static_argnames=("stage_hash", "purpose"))
def _keys(seed, draws, samples, stage_hash, purpose):
    root = jax.random.key(seed, impl="threefry2x32")
    root = jax.random.fold_in(jax.random.fold_in(root, stage_hash), purpose)

    def one(draw, sample):
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(root, draw), sample))

    return jax.vmap(one)(draws, samples)


def sample_keys(seed: int, stage: str, draws: np.ndarray, samples: np.ndarray, purpose: str) -> np.ndarray:
    """Returns the key of each (draw, sample) pair, uint32 [N, 2]; the position is folded in on the device.

    Raises ValueError for a seed outside 0..2^32 - 1.
    """
    size = 1 << max(4, (len(draws) - 1).bit_length())  # few shapes, so few compilations
    padded = np.zeros((2, size), np.uint32)
    padded[0, : len(draws)], padded[1, : len(samples)] = draws, samples
    keys = _keys(_checked(seed), padded[0], padded[1], _stage_hash(stage), PURPOSES.index(purpose))
    return np.asarray(keys)[: len(draws)]


def key(seed: int, stage: str, purpose: str) -> jax.Array:
    """Returns a stage-wide key, for initial weights and the like. Raises ValueError as `sample_keys`."""
    root = jax.random.key(_checked(seed), impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(root, _stage_hash(stage)), PURPOSES.index(purpose))


def at_position(key_data: jax.Array, position: jax.Array) -> jax.Array:
    """Returns the typed keys of each slot at a position, from uint32 [S, 2] and int32 [S]."""
    fold = jax.vmap(lambda data, p: jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), p))
    return fold(key_data, position.astype(jnp.uint32))


def _stage_hash(stage: str) -> int:
    return zlib.crc32(stage.encode())


def _checked(seed: int) -> np.uint32:
    if not 0 <= seed < 2**32:
        raise ValueError(f"config.seed={seed} must be between 0 and {2**32 - 1}")
    return np.uint32(seed)
