"""Checks a data set's references before a run: counts them by type and grades each as if it were the answer."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from r1jax.rewards import compose
from r1jax.rewards.answers import math_answer, reading
from r1jax.rewards.answers.tokens import Unreadable
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig

# Task -> type of its references. References of math have the types of answers/values.py.
TYPES = {
    "math": "",
    "mcq": "choice",
    "linear": "number",
    "code_io": "output",
    "reasoning_gym": "puzzle",
    "countdown": "puzzle",
}
ANSWERED = ("math", "mcq", "linear", "code_io")  # tasks whose reference is itself a right answer
UNREADABLE = "unreadable"
IDS_SHOWN = 5


@dataclass(frozen=True)
class GoldReport:
    """How many references of each type there are and can be graded, and which score 0 when graded as answers."""

    types: dict[str, tuple[int, int]]  # type -> (references, those that can be graded)
    tried: int  # references that were graded as answers
    missed: dict[str, str]  # id -> reason, of those that did not score 1

    def lines(self) -> list[str]:
        """Returns the report: the types, commonest first, and how many golds are right, with the first that are not."""
        if not self.types:
            return []
        counts = [
            f"{kind} {count}" + (f" ({graded} can be graded)" if graded < count else "")
            for kind, (count, graded) in sorted(self.types.items(), key=lambda item: (-item[1][0], item[0]))
        ]
        lines = [f"references by type: {', '.join(counts)}"]
        if self.tried:
            lines.append(
                f"golds graded as answers: {self.tried - len(self.missed)} of {self.tried} score 1{self._missed()}"
            )
        return lines

    def _missed(self) -> str:
        if not self.missed:
            return ""
        shown = ", ".join(list(self.missed)[:IDS_SHOWN])
        more = f" and {len(self.missed) - IDS_SHOWN} more" if len(self.missed) > IDS_SHOWN else ""
        return f"; not {shown}{more} ({next(iter(self.missed.values()))})"


def check(requests: Sequence[RewardRequest], unscorable: Collection[str], config: RewardConfig) -> GoldReport:
    """Returns the report of the requests' references; those with an id in `unscorable` are known to be ungradable.

    Responses are not read. Tasks outside TYPES and tasks with a plug-in grader are not counted. A mathematical gold
    that has the same value when it is read as an answer is right without further work, so that thousands take
    seconds.
    """
    graders = compose.graders(config)
    chosen = [
        request
        for request in requests
        if request.task in TYPES and graders[request.task] == compose.GRADERS[request.task]
    ]
    counts, usable = Counter(), Counter()
    left: list[RewardRequest] = []
    tried = 0
    for request in chosen:
        kind, decided = _read(request)
        counts[kind] += 1
        usable[kind] += request.id not in unscorable
        if request.id not in unscorable and request.task in ANSWERED:
            tried += 1
            left += [] if decided else [_as_answer(request)]
    with RewardPool(dataclasses.replace(config, workers=0, extraction="answer_tag")) as pool:
        scores = pool.score(left)
    missed = {
        request.id: score.detail
        for request, score in zip(left, scores, strict=True)
        if not score.scorable or score.parts["accuracy"] != 1.0
    }
    return GoldReport({kind: (count, usable[kind]) for kind, count in counts.items()}, tried, missed)


def _read(request: RewardRequest) -> tuple[str, bool]:
    """Returns (type of a reference, whether it is known without grading to be right as an answer)."""
    return _read_math(request.reference) if request.task == "math" else (TYPES[request.task], False)


@functools.lru_cache(maxsize=65536)  # a file of responses repeats its references
def _read_math(reference: str) -> tuple[str, bool]:
    gold = math_answer.reference_answer(reference)
    try:
        wanted = reading.read(gold, reference=True)
    except Unreadable:
        return UNREADABLE, False
    try:
        return wanted.type, reading.read(gold) == wanted
    except Unreadable:
        return wanted.type, False


def _as_answer(request: RewardRequest) -> RewardRequest:
    gold = math_answer.reference_answer(request.reference) if request.task == "math" else request.reference
    return dataclasses.replace(request, response=f"<answer>{gold}</answer>", prefill="", truncated=False)
