"""cons@k: the commonest answer of k samples; answers that the task's own grader finds equal count as one.

A vote is the answer that the grader reads in a response: a formula or number, an option's letter, the value and the
numbers of a countdown expression, a literal. For programs and for the user's own graders it is undefined when two
answers are equal, so their problems are left out. Samples that were cut off, have no answer or could not be graded do
not vote.
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

COMPARED = ("math", "code_io")  # tasks whose graders compare two answers; other tasks' labels are compared as text
DISTINCT = ("reasoning_gym",)  # tasks with several right answers that are not equal


class Vote(NamedTuple):
    """The answer that one sample votes for, and the grader's verdict; votes with different verdicts are never equal."""

    label: str
    verdict: float


class Ballot(NamedTuple):
    """One problem's samples: its task, whether any could be graded, and their votes (None without an answer)."""

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
    """Returns whether the answers of a task are voted on: it has a built-in grader that can compare two of them."""
    return task in LABELS and task not in plugins.parse(reward.graders)


def vote(request: RewardRequest, verdict: float, scorable: bool, reward: RewardConfig) -> Vote | None:
    """Returns the vote of a graded sample; None if it was cut off, has no answer, or could not be graded."""
    if request.truncated or not scorable:
        return None
    label = LABELS[request.task](request, reward)
    return None if label is None else Vote(label, verdict)


def verdicts(ballots: Sequence[Ballot], reward: RewardConfig) -> list[float]:
    """Returns the grader's verdict on each problem's commonest answer: 0 if no sample votes, NaN if it is left out.

    Tasks without votes are left out, and problems none of whose samples could be graded. Of answers that occur equally
    often the one sampled first counts. Answers are compared under the deadlines of `reward`; answers that are not
    compared in time count as different.
    """
    included = [ballot.graded and votes_of(ballot.task, reward) for ballot in ballots]
    open_pairs = [_open_pairs(ballot) if kept else [] for ballot, kept in zip(ballots, included, strict=True)]
    equal_answers = _compared(
        [(b.task, *pair) for b, pairs in zip(ballots, open_pairs, strict=True) for pair in pairs], reward
    )
    return [
        _verdict(ballot, equal_answers) if kept else math.nan for ballot, kept in zip(ballots, included, strict=True)
    ]


def _verdict(ballot: Ballot, equal_answers: set[tuple[str, str, str]]) -> float:
    def are_equal(first: Vote, other: Vote) -> bool:
        if first.verdict != other.verdict:
            return False
        if first.verdict == 1.0 and ballot.task not in DISTINCT:
            return True  # both are equal to the reference
        return first.label == other.label or (ballot.task, first.label, other.label) in equal_answers

    winner = majority(ballot.votes, are_equal)
    return 0.0 if winner is None else winner.verdict


def _open_pairs(ballot: Ballot) -> list[tuple[str, str]]:
    """Returns the pairs of wrong answers to compare; none unless wrong answers together can outvote right ones."""
    cast = [vote for vote in ballot.votes if vote is not None]
    wrong = [vote.label for vote in cast if vote.verdict != 1.0]
    right = len(cast) - len(wrong)
    if ballot.task not in COMPARED or not right or len(wrong) < right:
        return []
    labels = [label for label in dict.fromkeys(wrong) if len(label) <= math_answer.MAX_ANSWER_CHARACTERS]
    return list(itertools.combinations(labels, 2))


def _compared(pairs: Sequence[tuple[str, str, str]], reward: RewardConfig) -> set[tuple[str, str, str]]:
    """Returns the (task, answer, answer) among `pairs`, in both orders, that the task's grader finds equal.

    Each answer is graded with the other as its reference, in workers that a slow comparison cannot block.
    """
    pairs = list(dict.fromkeys(pairs))
    directed = [each for task, one, other in pairs for each in ((task, one, other), (task, other, one))]
    requests = [RewardRequest(f"pair {i}", task, "", answer, other) for i, (task, answer, other) in enumerate(directed)]
    if not requests:
        return set()
    with RewardPool(replace(reward, extraction="whole", graders=())) as pool:
        scores = pool.score(requests)
    equal = {
        pair for pair, score in zip(directed, scores, strict=True) if score.scorable and score.parts["accuracy"] == 1.0
    }
    return equal | {(task, other, answer) for task, answer, other in equal}
