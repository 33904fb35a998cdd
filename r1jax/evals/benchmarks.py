"""Evaluation of a policy on a list of problems: k samples each, one greedy sample, and the responses' behaviour."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from r1jax.data import tasks
from r1jax.data.problems import Problem
from r1jax.evals import consensus
from r1jax.evals.behaviour import faithfulness, reflective_count
from r1jax.evals.metrics import pass_at_1, pass_at_k
from r1jax.rewards.score import RewardRequest
from r1jax.schema import EvalConfig, RewardConfig

NO_SOURCE = "(none)"  # the name of rows without a source in figures by source


@dataclass(frozen=True)
class Response:
    """One graded response with its problem, so that later checks know the task."""

    problem: Problem
    text: str  # the assistant's turn, with the part of it that was in the prompt
    tokens: int
    truncated: bool
    parts: dict[str, float]
    scorable: bool

    def row(self) -> dict[str, Any]:
        """Returns the response as a row of samples.jsonl."""
        p = self.problem
        problem_fields = {
            "problem_id": p.id,
            "task": p.task,
            "source": p.source,
            "prompt": p.text,
            "answer": p.reference,
        }
        return problem_fields | {name: value for name, value in vars(self).items() if name != "problem"}

    def request(self, text: str | None = None) -> RewardRequest:
        """Returns the request for its task's grader, with the response's text or with another text in its place."""
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


@dataclass(frozen=True)
class Measurement:
    """The data that figures are computed from: graded responses in the order of the problems, and verdicts of votes."""

    sampled: Sequence[Response]  # `samples_per_problem` of each problem
    greedy: Sequence[Response] = ()  # one of each problem
    verdicts: Mapping[str, float] = field(default_factory=dict)  # problem id -> verdict of its vote, NaN if left out


def vote(responses: Sequence[Response], samples_per_problem: int, reward: RewardConfig) -> dict[str, float]:
    """Returns {problem id: verdict} of the votes (`consensus.verdicts`) of responses in problem order."""
    ballots: dict[str, consensus.Ballot] = {}
    for first in range(0, len(responses), samples_per_problem):
        group = responses[first : first + samples_per_problem]
        problem, votes = group[0].problem, []
        if consensus.votes_of(problem.task, reward):
            votes = [consensus.vote(r.request(), r.parts["accuracy"], r.scorable, reward) for r in group]
        ballots[problem.id] = consensus.Ballot(problem.task, any(r.scorable for r in group), votes)
    return dict(zip(ballots, consensus.verdicts(list(ballots.values()), reward), strict=True))


def summarize(measured: Measurement, settings: EvalConfig, words: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the figures of a measurement under `settings`; `words` are further reflective words of the problems.

    pass@1 is the mean accuracy over all samples with a standard error clustered by problem. `tasks` has the figures of
    each task, `sources` those of each source if a row names one, and `notes` lists what was left out of a figure. On
    the tiny world's equations the faithfulness columns are added: whether written arithmetic is true and what
    re-checks change.
    """
    reflective = [reflective_count(r.text, words) for r in measured.sampled]
    figures = _figures(measured, reflective, settings)
    equations = [
        (r, equation)
        for r in measured.sampled
        if r.problem.task == "linear" and (equation := tasks.parse_linear(r.problem.text)) is not None
    ]
    if equations:
        problems = [(equation.a, equation.b, equation.c, equation.x) for _, equation in equations]
        figures |= faithfulness([r.text for r, _ in equations], problems)
        figures |= _accuracy_by_rechecks(measured.sampled, reflective)
    result: dict[str, Any] = {name: float(value) for name, value in figures.items()}
    result["tasks"] = _figures_by(measured, reflective, settings, lambda problem: problem.task)
    if any(r.problem.source for r in measured.sampled):
        result["sources"] = _figures_by(measured, reflective, settings, lambda problem: problem.source or NO_SOURCE)
    result["notes"] = notes(measured, settings)
    return result


def _figures_by(
    measured: Measurement, reflective: Sequence[int], settings: EvalConfig, key: Callable[[Problem], str]
) -> dict[str, dict[str, float]]:
    """Returns the figures of the problems by their key, in order of appearance."""
    groups: dict[str, tuple[list, list, list, dict]] = {}
    for response, count in zip(measured.sampled, reflective, strict=True):
        sampled, counts, _, verdicts = groups.setdefault(key(response.problem), ([], [], [], {}))
        sampled.append(response)
        counts.append(count)
        if response.problem.id in measured.verdicts:
            verdicts[response.problem.id] = measured.verdicts[response.problem.id]
    for response in measured.greedy:
        groups[key(response.problem)][2].append(response)
    return {
        name: _figures(Measurement(sampled, greedy, verdicts), counts, settings)
        for name, (sampled, counts, greedy, verdicts) in groups.items()
    }


def _figures(measured: Measurement, reflective: Sequence[int], settings: EvalConfig) -> dict[str, float]:
    """Returns the figures that exist for every list of problems."""
    sampled, size = measured.sampled, settings.samples_per_problem
    scores = _scores(sampled).reshape(-1, size)
    mean, error = pass_at_1(scores)
    figures = {
        "problems": len(sampled) // size,
        "samples": len(sampled),
        "pass@1": mean,
        "pass@1_se": error,
        "mean_tokens": _mean([r.tokens for r in sampled]),
        "reflective_per_response": _mean(reflective),
        "format": _mean([r.parts["format"] for r in sampled]),
        "language_consistency": _mean([r.parts["language"] for r in sampled]),
        "truncated": _mean([r.truncated for r in sampled]),
        "unscorable": _mean([not r.scorable for r in sampled]),
    }
    if _right_or_wrong(scores):
        figures |= {f"pass@{k}": pass_at_k(scores, k) for k in settings.pass_at if k > 1}
    if measured.greedy:
        figures["greedy"] = _known_mean(_scores(measured.greedy))
    if measured.verdicts:
        verdicts = np.asarray(list(measured.verdicts.values()), float)
        figures[f"cons@{settings.consensus_samples}"] = _known_mean(verdicts)
        figures[f"cons@{settings.consensus_samples}_problems"] = int((~np.isnan(verdicts)).sum())
    return {name: float(value) for name, value in figures.items()}


def notes(measured: Measurement, settings: EvalConfig) -> list[str]:
    """Returns one line for every requested figure that leaves problems out or is missing."""
    lines, requested = [], [f"pass@{k}" for k in settings.pass_at if k > 1]
    partial = [r for r in measured.sampled if r.scorable and r.parts["accuracy"] not in (0.0, 1.0)]
    if requested and partial:
        fractional_tasks = ", ".join(dict.fromkeys(r.problem.task for r in partial))
        lines.append(
            f"{', '.join(requested)} left out: the grader of {fractional_tasks} gives fractions "
            f"({partial[0].parts['accuracy']:.3g} for {partial[0].problem.id}), and pass@k counts right and wrong"
        )
    left_out = [name for name, verdict in measured.verdicts.items() if math.isnan(verdict)]
    if left_out:
        task_of = {r.problem.id: r.problem.task for r in measured.sampled}
        counts = Counter(task_of[name] for name in left_out)
        lines.append(
            f"cons@{settings.consensus_samples} leaves out {len(left_out)} of {len(measured.verdicts)} problems, whose "
            "task has no answers to vote on or whose samples could not be graded: "
            f"{', '.join(f'{t} {n}' for t, n in counts.items())}"
        )
    return lines


def _right_or_wrong(scores: np.ndarray) -> bool:
    return bool(np.isin(scores[~np.isnan(scores)], (0.0, 1.0)).all())


def _scores(responses: Sequence[Response]) -> np.ndarray:
    """Returns the accuracy of each response, NaN for one that could not be graded."""
    return np.asarray([r.parts["accuracy"] if r.scorable else np.nan for r in responses], float)


def _known_mean(values: np.ndarray) -> float:
    """Returns the mean of the values that are not NaN; NaN if there are none."""
    return _mean(values[~np.isnan(values)])


def _accuracy_by_rechecks(responses: Sequence[Response], reflective: Sequence[int]) -> dict[str, float]:
    """Returns accuracy at 0, 1, 2 and 3 or more re-checks, and the share of responses with each number."""
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
