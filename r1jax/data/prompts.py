"""The stream that deals prompts: a pure function from a draw's number to a prompt.

Draw d belongs to cycle d // CYCLE_DRAWS. A cycle holds an exact number of draws of each source, in an order shuffled by
a key; the n-th draw of a source reads entry n % size of the keyed permutation of epoch n // size. So the position in
the data is one integer, and any process that knows it deals the same prompts.
"""

import math
import operator
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from r1jax.data.hashing import hash64, splitmix64
from r1jax.data.problems import Problem

CYCLE_DRAWS = 1000  # draws within which the mixture weights are realised exactly


def keyed_permutation(size: int, key: int) -> np.ndarray:
    """Returns the permutation of range(size) that belongs to a 64-bit key, [size] int64."""
    return np.argsort(splitmix64(np.arange(size, dtype=np.uint64) ^ np.full(1, key, np.uint64)), kind="stable")


def mixture_counts(weights: Sequence[float], draws: int = CYCLE_DRAWS) -> list[int]:
    """Returns how many of `draws` fall to each weight, by largest remainder (ties to the earlier); they sum to `draws`.

    Raises ValueError for weights that are negative, not finite or all zero, or a positive one that gets no draw.
    """
    if not weights or not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(f"mixture_counts: weights {list(weights)}, needs finite numbers >= 0, at least one above 0")
    total = math.fsum(weights)
    shares = [weight / total * draws for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: (counts[index] - shares[index], index))
    for index in by_remainder[: draws - sum(counts)]:
        counts[index] += 1
    for weight, count in zip(weights, counts, strict=True):
        if weight > 0 and count == 0:
            raise ValueError(f"mixture_counts: weight {weight} of {list(weights)} is less than one draw in {draws}")
    return counts


class PromptStream:
    """The prompts of a stage, `stream[draw]` for draw 0, 1, 2, ...; no state: only the next draw's number is saved."""

    def __init__(
        self,
        sources: Sequence[Sequence[Problem]],
        weights: Sequence[float] = (1.0,),
        seed: int = 0,
        stage: str = "",
    ):
        """Builds the stream of one or more sources, mixed by weight.

        Raises ValueError when there is no source, one of them is empty, or the weights do not fit (see mixture_counts).
        """
        if not sources or len(sources) != len(weights):
            raise ValueError(
                f"PromptStream: {len(sources)} sources and {len(weights)} weights, needs one weight a source"
            )
        for index, source in enumerate(sources):
            if not len(source):
                raise ValueError(f"PromptStream: source {index} of stage {stage!r} has no prompts, needs at least 1")
        self.sources = tuple(tuple(source) for source in sources)
        self.counts = mixture_counts(weights)
        self.seed, self.stage = operator.index(seed), stage
        self._cycle = lru_cache(maxsize=4)(self._make_cycle)
        self._order = lru_cache(maxsize=3 * len(sources))(self._make_order)

    def _make_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source of each draw of a cycle, and how many draws of that source come before it in the cycle."""
        source = np.repeat(np.arange(len(self.counts)), self.counts)
        if len(self.counts) > 1:
            source = source[keyed_permutation(CYCLE_DRAWS, hash64("cycle", self.seed, self.stage, cycle))]
        rank = np.zeros(CYCLE_DRAWS, np.int64)
        for index, count in enumerate(self.counts):
            rank[source == index] = np.arange(count)
        return source, rank

    def _make_order(self, source: int, epoch: int) -> np.ndarray:
        return keyed_permutation(len(self.sources[source]), hash64("epoch", self.seed, self.stage, source, epoch))

    def _locate(self, draw: int) -> tuple[int, int, int]:
        """Returns (source, epoch of that source, position in the epoch) of a draw."""
        draw = operator.index(draw)
        if draw < 0:
            raise ValueError(f"PromptStream: draw {draw}, needs 0 or more")
        cycle, place = divmod(draw, CYCLE_DRAWS)
        sources, ranks = self._cycle(cycle)
        source = int(sources[place])
        count = cycle * self.counts[source] + int(ranks[place])
        return source, *divmod(count, len(self.sources[source]))

    def __getitem__(self, draw: int) -> Problem:
        """Returns the prompt of a draw; ValueError when the draw is negative."""
        source, epoch, position = self._locate(draw)
        return self.sources[source][int(self._order(source, epoch)[position])]

    def epoch(self, draw: int) -> int:
        """Returns how many whole passes over the source of a draw come before it."""
        return self._locate(draw)[1]
