"""Hashes that never change: the same in every process, on every machine and in every version of Python or NumPy."""

import hashlib
import operator

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: the increment of splitmix64
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Returns one splitmix64 output per uint64 state, same shape; a bijection, so distinct states never collide.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    mixed = np.asarray(values, np.uint64) + np.full(1, GOLDEN)  # an array operand, so that wrapping is silent
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MULTIPLIER_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MULTIPLIER_2
    return (mixed ^ (mixed >> np.uint64(31))).reshape(np.shape(values))


def hash64(*parts: int | str) -> int:
    """Returns a 64-bit unsigned hash of the parts in order (blake2b).

    1 and "1" have different hashes, and so do ("ab", "c") and ("a", "bc"). Raises ValueError for a part that is neither a whole number nor text.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, str):
            kind, encoded = b"s", part.encode("utf-8", "surrogatepass")
        else:
            try:
                kind, encoded = b"i", str(operator.index(part)).encode()
            except TypeError:
                raise ValueError(f"hash64: got {part!r} ({type(part).__name__}), needs int or str") from None
        digest.update(kind + len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")
