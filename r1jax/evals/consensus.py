"""cons@k: the commonest answer of k samples, where answers that the task's own grader takes for one vote together.

What votes is what the grader reads of a response: a formula or number, an option's letter, the value and the numbers of a
countdown expression, a literal. Tasks whose responses are programs, and graders of the user's, say nothing of when two
answers are one: their problems are left out. No sample votes that was cut off, that holds no answer or that could not be
graded.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from r1jax.evals.metrics import majority
from r1jax.rewards import plugins
from r1jax.rewards.answers import choice, countdown, extraction, math_answer
from r1jax.rewards.code import io as code_io
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig, replace

COMPARED = (
    "math",
    "code_io",
)  # whose graders compare an answer with another one; the labels of other tasks are compared as text
DISTINCT = ("reasoning_gym",)  # where several answers are right that are not equal


class Vote(NamedTuple):
    """What one sample votes for, and the grader's verdict on it: votes with other verdicts are never for one answer."""

    label: str
    verdict: float


class Ballot(NamedTuple):
    """One problem's samples: its task, whether any of them could be graded, and their votes, None where one has none."""

    task: str
    graded: bool
    votes: list[Vote | None]


Labels = Callable[[RewardRequest, RewardConfig], str | None]


def _math(request: RewardRequest, reward: RewardConfig) -> str | None:
    answer = extraction.extract(request.text, reward.extraction)
    return None if answer is None else extraction.without_dollars(extraction.without_lead(answer).rstrip(" ."))


def _linear(request: RewardRequest, reward: RewardConfig) -> str | None:
    answer = extraction.extract(request.text, "answer_tag")
    number = None if answer is None else math_answer.parse_number(answer)
    return answer if number is None else str(number)


def _countdown(request: RewardRequest, reward: RewardConfig) -> str | None:
    answer = extraction.final_answer(request.text, reward.extraction)
    read = None if answer is None else countdown.evaluate(answer)
    return answer if read is None else f"{read[0]} of {sorted(read[1])}"


def _code_io(request: RewardRequest, reward: RewardConfig) -> str | None:
    answer = _text(request, reward)
    return None if answer is None else code_io.unfenced(answer)


def _text(request: RewardRequest, reward: RewardConfig) -> str | None:
    answer = extraction.final_answer(request.text, reward.extraction)
    return None if answer is None else answer.strip()


LABELS: Mapping[str, Labels] = {
    "math": _math,
    "mcq": choice.named_option,
    "linear": _linear,
    "countdown": _countdown,
    "code_io": _code_io,
    "reasoning_gym": _text,
}


def votes_of(task: str, reward: RewardConfig) -> bool:
    """Returns whether the answers of a task are voted on: it has a built-in grader that says when two are one."""
    return task in LABELS and task not in plugins.parse(reward.graders)


def vote(request: RewardRequest, verdict: float, scorable: bool, reward: RewardConfig) -> Vote | None:
    """Returns what a graded sample votes for; None for one cut off, without an answer, or that could not be graded."""
    if request.truncated or not scorable:
        return None
    label = LABELS[request.task](request, reward)
    return None if label is None else Vote(label, verdict)


def verdicts(ballots: Sequence[Ballot], reward: RewardConfig) -> list[float]:
    """Returns the grader's verdict on each problem's commonest answer: 0 where no sample votes, NaN where it is left out.

    Left out are tasks without votes and problems none of whose samples could be graded. Of answers that occur equally often
    the one drawn first is taken. Answers are compared under the deadlines of `reward`; those not compared in time differ.
    """
    counted = [ballot.graded and votes_of(ballot.task, reward) for ballot in ballots]
    open_pairs = [_open_pairs(ballot) if kept else [] for ballot, kept in zip(ballots, counted, strict=True)]
    same = _compared([(b.task, *pair) for b, pairs in zip(ballots, open_pairs, strict=True) for pair in pairs], reward)
    return [_verdict(ballot, same) if kept else math.nan for ballot, kept in zip(ballots, counted, strict=True)]


def _verdict(ballot: Ballot, same: set[tuple[str, str, str]]) -> float:
    def one(first: Vote, other: Vote) -> bool:
        if first.verdict != other.verdict:
            return False
        if first.verdict == 1.0 and ballot.task not in DISTINCT:
            return True  # both equal the reference
        return first.label == other.label or (ballot.task, first.label, other.label) in same

    winner = majority(ballot.votes, one)
    return 0.0 if winner is None else winner.verdict


def _open_pairs(ballot: Ballot) -> list[tuple[str, str]]:
    """Returns the pairs of wrong answers whose comparison can change the verdict: none unless wrong ones may outvote right ones."""
    cast = [found for found in ballot.votes if found is not None]
    wrong = [found.label for found in cast if found.verdict != 1.0]
    right = len(cast) - len(wrong)
    if ballot.task not in COMPARED or not right or len(wrong) < right:
        return []
    labels = [label for label in dict.fromkeys(wrong) if len(label) <= math_answer.MAX_ANSWER_CHARACTERS]
    return list(itertools.combinations(labels, 2))


def _compared(pairs: Sequence[tuple[str, str, str]], reward: RewardConfig) -> set[tuple[str, str, str]]:
    """Returns the (task, answer, answer) among `pairs`, either way round, that the task's grader takes for one answer.

    Each is graded as an answer with the other as its reference, in workers that a slow comparison cannot hang.
    """
    pairs = list(dict.fromkeys(pairs))
    both = [each for task, one, other in pairs for each in ((task, one, other), (task, other, one))]
    asked = [RewardRequest(f"pair {i}", task, "", answer, other) for i, (task, answer, other) in enumerate(both)]
    if not asked:
        return set()
    with RewardPool(replace(reward, extraction="whole", graders=())) as pool:
        scores = pool.score(asked)
    equal = {
        pair for pair, score in zip(both, scores, strict=True) if score.scorable and score.parts["accuracy"] == 1.0
    }
    return equal | {(task, other, answer) for task, answer, other in equal}
