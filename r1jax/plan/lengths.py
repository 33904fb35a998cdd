"""How long responses are, and what that does to a rollout: how many slots are busy, and with how much context.

A length law is an assumption about the model that is trained, which nothing here can know: it is an input of a plan.
Everything follows from the law's quantiles, so nothing is drawn and the same law gives the same figures.
"""

import functools
import heapq
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()
_P99 = _NORMAL.inv_cdf(0.99)
_GOLDEN = (math.sqrt(5) - 1) / 2
WIDEST = math.exp(_P99**2 / 2)  # the largest 99th percentile over the mean that a log-normal law can have


@dataclass(frozen=True)
class LengthLaw:
    """Response lengths in tokens: log-normal by mean and 99th percentile, both before the cut at `longest`.

    A 99th percentile that equals the mean gives all responses that length. Raises ValueError for a percentile that no
    log-normal law with this mean has.
    """

    mean: float
    p99: float
    longest: int  # max_new_tokens: longer responses are cut to this

    def __post_init__(self):
        if self.mean < 1 or self.longest < 1:
            raise ValueError(f"LengthLaw: mean={self.mean:g} and longest={self.longest:g} must be 1 or more")
        if not self.mean <= self.p99 <= WIDEST * self.mean:
            raise ValueError(
                f"LengthLaw: p99={self.p99:g} of a log-normal law must be from mean={self.mean:g} to "
                f"{WIDEST * self.mean:.0f}, {WIDEST:.1f} times the mean"
            )

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm: the smaller root of p99 / mean = exp(z * sigma - sigma**2 / 2)."""
        return _P99 - math.sqrt(max(_P99**2 - 2 * math.log(self.p99 / self.mean), 0.0))

    @property
    def mu(self) -> float:
        """Mean of the logarithm."""
        return math.log(self.mean) - self.sigma**2 / 2

    def quantile(self, share: float) -> float:
        """Returns the length that this share of responses does not exceed, the cut included."""
        return min(math.exp(self.mu + self.sigma * _NORMAL.inv_cdf(share)), self.longest)

    def longest_of(self, samples: int) -> float:
        """Returns the median of the longest of so many responses."""
        return self.quantile(0.5 ** (1 / samples))

    def lengths(self, samples: int) -> np.ndarray:
        """Returns so many lengths int64 [samples], one in each equal share of the law, in an order without a trend.

        Neighbours in the order are unlike (multiples of the golden ratio), as responses to different prompts are. That
        samples of one prompt are alike is not modelled.
        """
        return _lengths(self, samples)


@functools.lru_cache(maxsize=32)
def _lengths(law: LengthLaw, samples: int) -> np.ndarray:
    rising = np.array([law.quantile((index + 0.5) / samples) for index in range(samples)])
    rank = np.argsort(np.argsort(np.arange(1, samples + 1) * _GOLDEN % 1.0))
    return np.maximum(np.rint(rising), 1).astype(np.int64)[rank]


@dataclass(frozen=True, eq=False)
class Occupancy:
    """Slots over the decode steps of one rollout, in intervals during which no slot changes hands."""

    slots: int
    tokens: int  # emitted by all samples
    steps: np.ndarray  # [I] decode steps of each interval
    busy: np.ndarray  # [I] slots that decode
    context: np.ndarray  # [I] cache rows that they see, summed over slots; the mean over the interval's steps

    @property
    def total_steps(self) -> int:
        return int(self.steps.sum())

    @property
    def share(self) -> float:
        """Share of the slots' steps that emitted a token."""
        return self.tokens / (self.slots * self.total_steps)

    @property
    def mean_context(self) -> float:
        """Mean of the cache rows that a decoding slot sees, over the rollout."""
        return float((self.steps * self.context).sum() / (self.steps * self.busy).sum())

    @property
    def tail_share(self) -> float:
        """Share of the steps in which fewer than half of the slots decode."""
        return float(self.steps[self.busy < self.slots / 2].sum() / self.total_steps)


def occupancy(lengths: np.ndarray, slots: int, prompt_tokens: float, dispatch: int = 1) -> Occupancy:
    """Returns how slots are used by responses of these lengths, which take the free slots in order.

    A slot is free again when the dispatch ends in which its response ends; a dispatch has `dispatch` steps. Every
    response starts with a prompt of `prompt_tokens` in the cache.
    """
    free = [0] * min(slots, len(lengths))
    starts, ends = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    for index, length in enumerate(lengths.tolist()):
        starts[index] = heapq.heappop(free)
        ends[index] = starts[index] + length
        heapq.heappush(free, -(-int(ends[index]) // dispatch) * dispatch)
    times = np.unique(np.concatenate([starts, ends]))
    # A sample that began at s has prompt + t - s + 1 rows after the step at t: sums over those that are running at t.
    began = np.searchsorted(np.sort(starts), times[:-1], "right")
    ended = np.searchsorted(np.sort(ends), times[:-1], "right")
    busy = began - ended
    begin_sums = np.concatenate([[0], np.cumsum(np.sort(starts))])[began]
    by_end = np.argsort(ends, kind="stable")
    end_sums = np.concatenate([[0], np.cumsum(starts[by_end])])[ended]
    steps = np.diff(times)
    middle = times[:-1] + (steps - 1) / 2
    context = busy * (prompt_tokens + middle + 1) - (begin_sums - end_sums)
    run = busy > 0  # a dispatch ends when no slot decodes
    return Occupancy(slots, int(lengths.sum()), steps[run], busy[run], context[run])
