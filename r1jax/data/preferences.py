"""Preference pairs: which are kept, and how a set is balanced so that length does not predict the chosen response."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TypeVar

from r1jax.data.hashing import hash64
from r1jax.data.templates import summary

LENGTH_TOLERANCE = 0.25  # powers of two by which the length ratios of two pairs that balance each other may differ: 19%

Pair = TypeVar("Pair", bound=Mapping)


def mean_margin(margins: Sequence[int | None], least: int = 1) -> float | None:
    """Returns the mean of the readable margins (not None), or None with fewer than `least` of them."""
    readable = [margin for margin in margins if margin is not None]
    return sum(readable) / len(readable) if len(readable) >= max(least, 1) else None


def length_difference(pair: Mapping) -> float:
    """Returns log2 of the chosen response's length over the rejected one's, in characters after the thinking."""
    chosen, rejected = (len(summary(pair[name])) + 1 for name in ("chosen", "rejected"))
    return math.log2(chosen / rejected)


def balance_lengths(pairs: Sequence[Pair], seed: int = 0) -> list[Pair]:
    """Returns pairs {id, chosen, rejected}, in order, thinned so that length does not predict which response is chosen.

    A pair whose chosen response is longer is kept only together with one whose rejected response is longer by about the
    same ratio (LENGTH_TOLERANCE). As many such couples as possible are kept, and all pairs of equal length, so that the
    longer response is the chosen one exactly as often as not. The choice among pairs of one ratio is by hash, whatever
    the order. The paper balances the lengths of the whole set (P2 B.2) without a method.
    """
    differences = [length_difference(pair) for pair in pairs]

    def rank(index: int) -> tuple[float, int]:
        pair = pairs[index]
        key = hash64("balance lengths", seed, str(pair["id"]), pair["chosen"], pair["rejected"])
        return abs(differences[index]), key

    longer = deque(sorted((i for i, difference in enumerate(differences) if difference > 0), key=rank))
    shorter = deque(sorted((i for i, difference in enumerate(differences) if difference < 0), key=rank))
    kept = {i for i, difference in enumerate(differences) if difference == 0}
    while longer and shorter:
        gap = abs(differences[longer[0]]) - abs(differences[shorter[0]])
        if abs(gap) <= LENGTH_TOLERANCE:
            kept |= {longer.popleft(), shorter.popleft()}
        else:
            (shorter if gap > 0 else longer).popleft()
    return [pair for index, pair in enumerate(pairs) if index in kept]


def length_bias(pairs: Sequence[Mapping]) -> dict[str, float]:
    """Returns how often the longer response is chosen (ties count half), and the mean of log2(chosen / rejected)."""
    differences = [length_difference(pair) for pair in pairs]
    count = max(len(differences), 1)
    longer = sum((difference > 0) + 0.5 * (difference == 0) for difference in differences)
    return {"longer_chosen": longer / count, "mean_log2_length_ratio": sum(differences) / count}
