"""Reward models in RL: which one scores a sample, the verified metrics logged with it, and the reward-hacking warning.

R_general = R_reward_model + R_format + R_language; the prompt's data set chooses the model (DeepSeek-R1, eq. 8-11).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from r1jax.core import hosts, metrics
from r1jax.data import tasks
from r1jax.data.problems import SCENARIOS
from r1jax.rewards.compose import PART_NAMES
from r1jax.rewards.models.reward_model import RewardModel
from r1jax.rl.journal import Rollout
from r1jax.rl.rollout import EncodedPrompt, PromptPhases
from r1jax.rl.settings import RunSettings
from r1jax.sampler.sample import RolloutSample

ACCURACY, MODEL, RULE = (PART_NAMES.index(name) for name in ("accuracy", "reward_model", "rule"))
VERIFIED = ("reasoning_accuracy", "rule")  # verified metrics: of the reasoning prompts, and of those with a known rule


def with_model_rewards(
    reward_terms: np.ndarray,
    samples: Sequence[RolloutSample],
    decode: Callable[[list], list[str]],
    prompts: Mapping[int, EncodedPrompt],
    models: Mapping[str, RewardModel],
) -> np.ndarray:
    """Returns the reward terms with model scores: a model of the task replaces accuracy, which becomes `rule`.

    `prompts` by prompt index; `decode` turns token ids into texts. A sample that was cut off gets 0, as in accuracy.
    """
    reward_terms = reward_terms.copy()
    for task, model in models.items():
        indices = [i for i, sample in enumerate(samples) if prompts[sample.request_id].problem.task == task]
        if not indices:
            continue
        prompted = [prompts[samples[i].request_id] for i in indices]
        texts = decode([samples[i].token_ids for i in indices])
        turns = [one.prefill + text for one, text in zip(prompted, texts, strict=True)]
        rewards = model.rewards([one.problem.text for one in prompted], turns)
        complete = np.asarray([not samples[i].truncated for i in indices])
        reward_terms[indices, RULE], reward_terms[indices, ACCURACY] = reward_terms[indices, ACCURACY], 0.0
        reward_terms[indices, MODEL] = rewards * complete
    return reward_terms


def figures(
    scored: Rollout, prompts: Sequence[EncodedPrompt], models: Mapping[str, RewardModel], group: int
) -> dict[str, float]:
    """Returns means of a rollout and their standard errors NAME_se; {} if no reward model scores a sample of it.

    reward_model: score of the samples that models score, and helpful_reward or safety_reward of each model alone;
    rule: their task's hidden rule, if it is known; reasoning_accuracy: of the reasoning prompts. A figure without
    samples is left out. `prompts` are those of the groups, in order. A mean is over groups, each the mean of its
    scorable samples; NAME_se is the standard error of that mean and needs two groups.
    """
    group_tasks = np.asarray([prompt.problem.task for prompt in prompts])
    has_rule = np.asarray([prompt.problem.source == tasks.SOURCE for prompt in prompts])
    by_model = np.isin(group_tasks, list(models))
    if not by_model.any():
        return {}
    columns = {
        "reward_model": (MODEL, by_model),
        "reasoning_accuracy": (ACCURACY, ~np.isin(group_tasks, SCENARIOS)),
        "rule": (RULE, by_model & has_rule),
    }
    means_by_name = {}
    for name, (part, groups) in columns.items():
        means = _group_means(scored, part, groups, group)
        if len(means):
            means_by_name[name] = float(means.mean())
        if len(means) > 1:
            means_by_name[f"{name}_se"] = float(means.std(ddof=1) / np.sqrt(len(means)))
    for task, model in models.items():
        if len(means := _group_means(scored, MODEL, group_tasks == task, group)):
            means_by_name[f"{model.text_format.kind}_reward"] = float(means.mean())
    return means_by_name


def _group_means(scored: Rollout, part: int, groups: np.ndarray, group: int) -> np.ndarray:
    values, scorable = (
        scored.reward_terms[:, part].reshape(-1, group)[groups],
        scored.scorable.reshape(-1, group)[groups],
    )
    values, scorable = values[scorable.any(axis=1)].astype(np.float64), scorable[scorable.any(axis=1)]
    return (values * scorable).sum(axis=1) / scorable.sum(axis=1)


def trend(values: Sequence[float], errors: Sequence[float]) -> float:
    """Returns the slope of a least-squares line through equally spaced values, in its standard errors.

    The standard error is the larger of two: propagated from the values' own errors, or estimated from their distance to
    the line. Returns 0 for fewer than four values, and when both errors are 0.
    """
    y = np.asarray(values, np.float64)
    if len(y) < 4:
        return 0.0
    x = np.arange(len(y)) - (len(y) - 1) / 2
    square = (x**2).sum()
    slope = (x * y).sum() / square
    residuals = y - y.mean() - slope * x
    error = np.sqrt(max((x**2 * np.square(errors)).sum() / square**2, (residuals**2).sum() / (len(y) - 2) / square))
    return float(slope / error) if error > 1e-12 else 0.0


def hacking_trends(
    rows: Sequence[Mapping[str, float]], now: Mapping[str, float], window: int, errors: float
) -> tuple[dict[str, float], str]:
    """Returns (trends and hacking_warning for the metrics, a line of warning or "") of a rollout and those before it.

    `rows` are the figures of earlier rollouts, `now` those of this one. The warning is given when, over the last
    `window` rollouts with both figures and their errors, the reward model's reward rises by `errors` standard errors
    of its slope while a verified figure falls by as many (DeepSeek-R1, appendix B.5: the reward rises while the score
    on Codeforces falls).
    """
    statistics: dict[str, float] = {"hacking_warning": 0.0}
    warning = ""
    for name in (name for name in VERIFIED if f"{name}_se" in now):
        needed = ("reward_model_se", f"{name}_se")
        recent = [row for row in [*rows, now] if all(error in row for error in needed)][-window:]
        if len(recent) < window:
            continue
        trends = {
            key: trend([row[key] for row in recent], [row[f"{key}_se"] for row in recent])
            for key in ("reward_model", name)
        }
        statistics = {
            f"{key}_trend": value for key, value in trends.items()
        } | statistics  # the first name's, where they differ
        if trends["reward_model"] >= errors and trends[name] <= -errors:
            statistics["hacking_warning"] = 1.0
            first, last = recent[0], recent[-1]
            warning = warning or (
                f"reward hacking? over {len(recent)} rollouts the reward model's reward rose from "
                f"{first['reward_model']:.3f} to {last['reward_model']:.3f} ({trends['reward_model']:+.1f} standard "
                f"errors) while {name} fell from {first[name]:.3f} to {last[name]:.3f} ({trends[name]:+.1f}); stop, or "
                "train the reward model on new pairs"
            )
    return statistics, warning


class HackingMonitor:
    """Compares the scores of reward models with verified figures, rollout by rollout."""

    def __init__(self, config: RunSettings, folder: Path, prompts: PromptPhases, models: Mapping[str, RewardModel]):
        """`folder` holds the metrics of the run; `models` by task."""
        self.config, self.folder, self.prompts, self.models = config, folder, prompts, models
        self._earlier: list[dict] | None = None  # figures of the rollouts until now

    def graded(self, rollout: Rollout, first_update: int) -> np.ndarray:
        """Returns for each sample whether a grader gave its accuracy, not a reward model; bool [N]."""
        problems = [self.prompts.prompt(sample.request_id, first_update).problem for sample in rollout.samples]
        return ~np.isin([problem.task for problem in problems], list(self.models))

    def figures(self, rollout: Rollout, first_update: int) -> tuple[dict[str, float], str]:
        """Returns (figures and trends of the rollout that starts at an update, a line of warning or "")."""
        if not self.models:
            return {}, ""
        group, settings = self.config.grpo.group_size, self.config.scenarios
        prompts = [self.prompts.prompt(sample.request_id, first_update) for sample in rollout.samples[::group]]
        now = figures(rollout, prompts, self.models, group)
        if not now:
            return {}, ""
        if self._earlier is None:
            every = self.config.grpo.updates_per_rollout
            rows = hosts.decide(metrics.read, self.folder, name=f"the metrics of {self.folder}")
            self._earlier = [row for row in rows if (row["update"] - 1) % every == 0 and row["update"] <= first_update]
        trends, line = hacking_trends(self._earlier, now, settings.hacking_window, settings.hacking_errors)
        self._earlier.append(now)
        return now | trends, line
