"""Figures of a reward model on held-out examples: accuracy or AUC with intervals, calibration, length correlation."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit
from scipy.stats import norm, rankdata

BINS = 10
RESAMPLES = 1000  # of the prompts, for the error of an AUC
Z95 = float(norm.ppf(0.975))


def of_pairs(
    chosen: ArrayLike,
    rejected: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    prompts: Sequence[Hashable],
) -> dict:
    """Returns the figures of pairs, from scores and lengths in tokens of their responses; errors are clustered by
    prompt.

    A tie counts as half right. Confidence is sigmoid(|margin|), the chance that the response with the higher score is
    better.
    """
    chosen, rejected = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    margins, longer = chosen - rejected, np.subtract(chosen_lengths, rejected_lengths)
    right = np.where(margins == 0, 0.5, margins > 0)
    figures: dict[str, Any] = {"pairs": len(right), **proportion("accuracy", right, prompts)}
    figures |= calibration(expit(np.abs(margins)), right, low=0.5)
    figures["length_correlation"] = correlation(
        np.concatenate([chosen, rejected]), np.concatenate([chosen_lengths, rejected_lengths])
    )
    figures["margin_length_correlation"] = correlation(margins, longer)
    for name, chosen_pairs in (("chosen_longer", longer > 0), ("chosen_shorter", longer < 0)):
        figures |= {f"accuracy_{name}": _mean(right[chosen_pairs]), f"pairs_{name}": int(chosen_pairs.sum())}
    return figures


def of_labels(scores: ArrayLike, safe: ArrayLike, lengths: ArrayLike, prompts: Sequence[Hashable]) -> dict:
    """Returns the figures of labelled responses, from scores, labels and lengths; sigmoid(score) is P(safe)."""
    scores, is_safe = np.asarray(scores, np.float64), np.asarray(safe, bool)
    chance = expit(scores)
    right = np.where(scores == 0, 0.5, (scores > 0) == is_safe)
    figures: dict[str, Any] = {
        "responses": len(is_safe),
        "share_safe": _mean(is_safe),
        **proportion("accuracy", right, prompts),
    }
    figures["auc"] = auc(scores, is_safe)
    error = cluster_error(lambda some: auc(scores[some], is_safe[some]), prompts)
    figures |= {"auc_se": error, "auc_low": max(figures["auc"] - Z95 * error, 0.0)}
    figures["auc_high"] = min(figures["auc"] + Z95 * error, 1.0)
    figures |= calibration(chance, is_safe.astype(np.float64), low=0.0)
    figures["length_correlation"] = correlation(scores, lengths)
    return figures


def proportion(name: str, right: np.ndarray, prompts: Sequence[Hashable]) -> dict[str, float]:
    """Returns {name, name_se, name_low, name_high}: mean, standard error clustered by prompt, 95% Wilson interval.

    The examples of one prompt are not independent, so the interval is for the number of independent examples that would
    have the same error; if all examples are equal, for the number of prompts.
    """
    right, groups = np.asarray(right, np.float64), _groups(prompts)
    mean = float(right.mean())
    sums = np.asarray([(right[group] - mean).sum() for group in groups])
    count = len(groups)
    error = float(np.sqrt((sums**2).sum() * count / max(count - 1, 1)) / len(right))
    spread = mean * (1 - mean)
    effective = min(spread / error**2, len(right)) if error > 0 and spread > 0 else count
    middle = (mean + Z95**2 / (2 * effective)) / (1 + Z95**2 / effective)
    half = Z95 * np.sqrt(spread / effective + Z95**2 / (4 * effective**2)) / (1 + Z95**2 / effective)
    return {
        name: mean,
        f"{name}_se": error,
        f"{name}_low": float(max(middle - half, 0)),
        f"{name}_high": float(min(middle + half, 1)),
    }


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns the chance that a positive scores above a negative (ties count half); NaN if one kind is missing."""
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def cluster_error(statistic: Callable[[np.ndarray], float], prompts: Sequence[Hashable], seed: int = 0) -> float:
    """Returns the bootstrap standard error of a statistic of example indices; whole prompts are resampled."""
    groups, rng = _groups(prompts), np.random.Generator(np.random.Philox(seed))
    values = [
        statistic(np.concatenate([groups[place] for place in rng.integers(len(groups), size=len(groups))]))
        for _ in range(RESAMPLES)
    ]
    return float(np.nanstd(values, ddof=1))


def calibration(chance: np.ndarray, outcome: np.ndarray, low: float) -> dict:
    """Returns {"ece", "reliability"}: equal bins of [low, 1], each {"chance", "share", "examples"}, without empty bins.

    The expected calibration error is the mean over examples of |share - chance| of their bin (arXiv 1706.04599, eq. 3).
    """
    place = np.minimum((np.asarray(chance) - low) / (1 - low) * BINS, BINS - 1).astype(int)
    bins: list[dict[str, Any]] = [
        {"chance": _mean(chance[place == b]), "share": _mean(outcome[place == b]), "examples": int((place == b).sum())}
        for b in range(BINS)
        if (place == b).any()
    ]
    gaps = [abs(entry["chance"] - entry["share"]) * entry["examples"] for entry in bins]
    return {"ece": float(sum(gaps) / len(chance)), "reliability": bins}


def correlation(values: ArrayLike, lengths: ArrayLike) -> float:
    """Returns Pearson's correlation, 0 if one of the two is constant."""
    values, lengths = np.asarray(values, np.float64), np.asarray(lengths, np.float64)
    if values.std() == 0 or lengths.std() == 0:
        return 0.0
    return float(np.corrcoef(values, lengths)[0, 1])


def _groups(prompts: Sequence[Hashable]) -> list[np.ndarray]:
    indices: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        indices.setdefault(prompt, []).append(index)
    return [np.asarray(members) for members in indices.values()]


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
