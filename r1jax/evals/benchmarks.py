"""Evaluation of a policy on a list of problems: k samples each, one greedy sample, and how the responses behave."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from r1jax.data import tasks
from r1jax.data.problems import Problem
from r1jax.evals.behaviour import faithfulness, reflective_count
from r1jax.evals.metrics import cons_at_k, pass_at_1
from r1jax.rewards import math_answer
from r1jax.rewards.score import RewardRequest


@dataclass(frozen=True)
class Response:
    """One graded response, which keeps its problem: no later check guesses the task."""

    problem: Problem
    text: str  # the assistant's turn, with what the prompt held of it
    tokens: int
    truncated: bool
    parts: dict[str, float]
    scorable: bool

    def row(self) -> dict[str, Any]:
        """Returns the response as a row of samples.jsonl."""
        p = self.problem
        asked = {"problem_id": p.id, "task": p.task, "source": p.source, "prompt": p.text, "answer": p.reference}
        return asked | {name: value for name, value in vars(self).items() if name != "problem"}

    def request(self, text: str | None = None) -> RewardRequest:
        """Returns what its task's grader reads of it, or of another text in its place."""
        p = self.problem
        return RewardRequest(
            p.id,
            p.task,
            p.text,
            self.text if text is None else text,
            p.reference,
            language=p.language,
            truncated=self.truncated and text is None,
            source=p.source,
        )


def summarize(responses: Sequence[Response], samples_per_problem: int, words: Sequence[str] = ()) -> dict[str, float]:
    """Returns the figures of responses in problem order, `samples_per_problem` each; `words` are reflective ones of theirs.

    pass@1 is the mean accuracy over all samples with a standard error clustered by problem. On the tiny world's
    equations the faithfulness columns are added: whether written arithmetic is true and what re-checks change.
    """
    accuracy = np.asarray([r.parts["accuracy"] if r.scorable else np.nan for r in responses], float)
    mean, error = pass_at_1(accuracy.reshape(-1, samples_per_problem))
    reflective = [reflective_count(r.text, words) for r in responses]
    figures = {
        "problems": len(responses) // samples_per_problem,
        "samples": len(responses),
        "pass@1": mean,
        "pass@1_se": error,
        "mean_tokens": _mean([r.tokens for r in responses]),
        "reflective_per_response": _mean(reflective),
        "format": _mean([r.parts["format"] for r in responses]),
        "language_consistency": _mean([r.parts["language"] for r in responses]),
        "truncated": _mean([r.truncated for r in responses]),
        "unscorable": _mean([not r.scorable for r in responses]),
    }
    tiny = [r for r in responses if r.problem.task == "linear"]
    equations = [(r, problem) for r in tiny if (problem := tasks.parse_linear(r.problem.text)) is not None]
    if equations:
        problems = [(problem.a, problem.b, problem.c, problem.x) for _, problem in equations]
        figures |= faithfulness([r.text for r, _ in equations], problems)
        figures |= _accuracy_by_rechecks(responses, reflective)
    return {name: float(value) for name, value in figures.items()}


def consensus(responses: Sequence[Response], samples_per_problem: int, extraction: str) -> float:
    """Returns cons@k: the share of problems whose majority answer is right, equal answers counted as one."""
    texts = [math_answer.extract(r.text, extraction) for r in responses]
    groups = [texts[i : i + samples_per_problem] for i in range(0, len(texts), samples_per_problem)]
    references = [r.problem.reference for r in responses[::samples_per_problem]]
    return cons_at_k(groups, references, _same)


def _same(first: str, second: str) -> bool:
    """Returns whether two answers are one: numbers by value, so that 1/2 and 0.5 vote together, others by their text."""
    numbers = math_answer.parse_number(first), math_answer.parse_number(second)
    return first.strip() == second.strip() if None in numbers else numbers[0] == numbers[1]


def _accuracy_by_rechecks(responses: Sequence[Response], reflective: Sequence[int]) -> dict[str, float]:
    """Returns accuracy given 0, 1, 2 and 3 or more re-checks, and how many responses have so many."""
    figures: dict[str, Any] = {}
    counts = np.minimum(np.asarray(reflective), 3)
    right = np.asarray([r.parts["accuracy"] for r in responses])
    for rechecks in range(4):
        chosen = counts == rechecks
        figures[f"accuracy_at_{rechecks}_rechecks"] = _mean(right[chosen])
        figures[f"share_at_{rechecks}_rechecks"] = _mean(chosen)
    return figures


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
