"""Which examples each update of supervised training takes: the epochs' keyed orders, one after another."""

import numpy as np

from r1jax.data.hashing import hash64
from r1jax.data.prompts import keyed_permutation


def examples_of_updates(count: int, epochs: int, size: int, *key: str | int) -> list[np.ndarray]:
    """Returns the numbers of the examples of each update: each of `count` examples occurs once in every epoch.

    The keyed orders of the epochs follow one another, cut into updates of `size` (of all examples where there are
    fewer); the last update is smaller where that leaves a rest.
    """
    orders = [keyed_permutation(count, hash64(*key, "shuffle", epoch)) for epoch in range(epochs)]
    stream, size = np.concatenate(orders), min(size, count)
    return [stream[start : start + size] for start in range(0, len(stream), size)]
