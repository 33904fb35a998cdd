"""Scores of k samples per problem, and the one number each evaluation reports."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

Answer = TypeVar("Answer")


def _as_scores(name: str, scores) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"{name}: scores of shape {scores.shape}, needs [problems, samples] with at least one of each")
    return scores


def pass_at_1(scores) -> tuple[float, float]:
    """Returns (mean, standard error) of scores [P, k]: the mean over problems of the mean over their samples.

    The error is that of P problem means, std(ddof=1) / sqrt(P): samples of one problem are not independent. NaN marks
    an unscorable sample, which is left out, as is a problem without any other. The mean is NaN when nothing is
    scorable, the error when fewer than two problems are. Raises ValueError when scores is empty or not
    two-dimensional.
    """
    scores = _as_scores("pass_at_1", scores)
    scorable = ~np.isnan(scores)
    counts = scorable.sum(axis=1)
    means = np.where(scorable, scores, 0.0).sum(axis=1)[counts > 0] / counts[counts > 0]
    if not means.size:
        return math.nan, math.nan
    error = float(means.std(ddof=1) / math.sqrt(means.size)) if means.size > 1 else math.nan
    return float(means.mean()), error


def pass_at_k(scores, k: int) -> float:
    """Returns the mean over problems of the unbiased chance that one of k samples is right: 1 - C(n-c, k) / C(n, k).

    scores [P, n] are 1 (right), 0 (wrong) or NaN (unscorable: left out of n). Problems with fewer than k scorable
    samples are left out; NaN when none remains. Raises ValueError when k is below 1 or above the samples, or a score
    is another number. Source: Chen et al., arXiv 2107.03374, eq. 1.
    """
    scores = _as_scores("pass_at_k", scores)
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"pass_at_k: k={k} with {scores.shape[1]} samples a problem, needs 1 <= k <= samples")
    if not np.isin(scores[~np.isnan(scores)], (0.0, 1.0)).all():
        raise ValueError("pass_at_k: a score is neither 0 nor 1, needs right or wrong")
    chances = []
    for row in scores:
        samples, right = int((~np.isnan(row)).sum()), int(np.nansum(row))
        if samples >= k:
            chances.append(1.0 - math.comb(samples - right, k) / math.comb(samples, k))
    return float(np.mean(chances)) if chances else math.nan


def majority(answers: Sequence[Answer | None], equal: Callable[[Answer, Answer], bool]) -> Answer | None:
    """Returns the first member of the largest class of equal answers (on a tie of the earlier class), or None without
    any.

    `equal(first, other)` compares an answer with the first member of a class; None never votes.
    """
    classes: list[list] = []  # [first member, votes]
    for answer in answers:
        if answer is None:
            continue
        for entry in classes:
            if entry[0] == answer or equal(entry[0], answer):
                entry[1] += 1
                break
        else:
            classes.append([answer, 1])
    return max(classes, key=lambda entry: entry[1])[0] if classes else None
