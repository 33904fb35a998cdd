"""The examples of each update of supervised training: the epochs' shuffled orders, one after another."""

import numpy as np

from r1jax.data.hashing import hash64
from r1jax.data.prompts import keyed_permutation


def examples_of_updates(count: int, epochs: int, size: int, *key: str | int) -> list[np.ndarray]:
    """Returns the indices of the examples of each update; each of `count` examples occurs once in every epoch.

    The shuffled orders of the epochs, one per key and epoch, are concatenated and cut into updates of `size` examples
    (or of all, where there are fewer). The last update may be smaller.
    """
    orders = [keyed_permutation(count, hash64(*key, "shuffle", epoch)) for epoch in range(epochs)]
    stream, size = np.concatenate(orders), min(size, count)
    return [stream[start : start + size] for start in range(0, len(stream), size)]
