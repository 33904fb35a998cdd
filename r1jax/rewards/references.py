"""Which references can be graded at all, told before a run and not sample by sample."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from r1jax.rewards import compose
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig

TASKS = frozenset(
    ("math", "mcq", "linear", "reasoning_gym", "countdown", "code_io")
)  # whose graders read the reference first
IDS_SHOWN = 5
_PROBE = "<answer>\\boxed{1}</answer>"  # any answer, so that the comparison runs too


@dataclass(frozen=True)
class ReferenceReport:
    """How many references of TASKS there are, and the ids of those that make their samples unscorable, with the reason."""

    checked: int
    unscorable: dict[str, str]

    @property
    def rate(self) -> float:
        """The share that can be graded; 1 without any."""
        return 1.0 - len(self.unscorable) / self.checked if self.checked else 1.0

    def line(self) -> str:
        """Returns the report in one line, with the first unscorable ids."""
        text = f"references: {self.checked - len(self.unscorable)} of {self.checked} can be graded ({self.rate:.2%})"
        if not self.unscorable:
            return text
        shown = ", ".join(list(self.unscorable)[:IDS_SHOWN])
        more = f" and {len(self.unscorable) - IDS_SHOWN} more" if len(self.unscorable) > IDS_SHOWN else ""
        return (
            f"{text}; unscorable, left out of every statistic: {shown}{more} ({next(iter(self.unscorable.values()))})"
        )


def check(requests: Sequence[RewardRequest], config: RewardConfig) -> ReferenceReport:
    """Returns the report of the requests' references; their responses are not read, and tasks outside TASKS or with a grader of the user's not counted.

    Under the deadlines of `config`: a reference that the grader cannot read in time counts as unscorable.
    """
    chosen = [dataclasses.replace(request, response=_PROBE, prefill="", truncated=False) for request in requests]
    graders = compose.graders(config)
    chosen = [
        request
        for request in chosen
        if request.task in TASKS and graders[request.task] == compose.GRADERS[request.task]
    ]
    with RewardPool(dataclasses.replace(config, workers=0)) as pool:  # numbers and words need no worker
        scores = pool.score(chosen)
    found = {request.id: score.detail for request, score in zip(chosen, scores, strict=True) if not score.scorable}
    return ReferenceReport(len(chosen), found)
