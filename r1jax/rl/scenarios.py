"""Reward models in RL: which one scores a sample, the verified metrics logged with it, and the reward-hacking warning.

R_general = R_reward_model + R_format + R_language, the model chosen by the data set of the prompt (DeepSeek-R1, eq. 8-11).
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
VERIFIED = ("reasoning_accuracy", "rule")  # what can be verified: of the reasoning prompts, of those of a known rule


def with_model_rewards(
    parts: np.ndarray,
    samples: Sequence[RolloutSample],
    decode: Callable[[list], list[str]],
    prompts: Mapping[int, EncodedPrompt],
    models: Mapping[str, RewardModel],
) -> np.ndarray:
    """Returns the parts with what the model of a sample's task says in place of its accuracy, which becomes its `rule`.

    `prompts` by draw; `decode` gives texts of ids. A sample that was cut off gets 0, as it does in accuracy.
    """
    parts = parts.copy()
    for task, model in models.items():
        mine = [i for i, sample in enumerate(samples) if prompts[sample.request_id].problem.task == task]
        if not mine:
            continue
        asked = [prompts[samples[i].request_id] for i in mine]
        texts = decode([samples[i].token_ids for i in mine])
        turns = [one.prefill + text for one, text in zip(asked, texts, strict=True)]
        said = model.rewards([one.problem.text for one in asked], turns)
        whole = np.asarray([not samples[i].truncated for i in mine])
        parts[mine, RULE], parts[mine, ACCURACY] = parts[mine, ACCURACY], 0.0
        parts[mine, MODEL] = said * whole
    return parts


def figures(
    scored: Rollout, prompts: Sequence[EncodedPrompt], models: Mapping[str, RewardModel], group: int
) -> dict[str, float]:
    """Returns means and standard errors over a rollout, each where it has such samples; {} without samples of a model.

    reward_model: of the samples that models score, and helpful_reward or safety_reward of each model; rule: their hidden rule
    where it is known; reasoning_accuracy: of the reasoning prompts. `prompts` of the groups, in order. A mean that a group adds
    to is over its scorable samples; the error NAME_se, of two groups or more, is that of the mean of groups.
    """
    asked = np.asarray([prompt.problem.task for prompt in prompts])
    known = np.asarray([prompt.problem.source == tasks.SOURCE for prompt in prompts])
    by_model = np.isin(asked, list(models))
    if not by_model.any():
        return {}
    wanted = {
        "reward_model": (MODEL, by_model),
        "reasoning_accuracy": (ACCURACY, ~np.isin(asked, SCENARIOS)),
        "rule": (RULE, by_model & known),
    }
    found = {}
    for name, (part, groups) in wanted.items():
        means = _group_means(scored, part, groups, group)
        if len(means):
            found[name] = float(means.mean())
        if len(means) > 1:
            found[f"{name}_se"] = float(means.std(ddof=1) / np.sqrt(len(means)))
    for task, model in models.items():
        if len(means := _group_means(scored, MODEL, asked == task, group)):
            found[f"{model.reading.kind}_reward"] = float(means.mean())
    return found


def _group_means(scored: Rollout, part: int, groups: np.ndarray, group: int) -> np.ndarray:
    values, scorable = scored.parts[:, part].reshape(-1, group)[groups], scored.scorable.reshape(-1, group)[groups]
    values, scorable = values[scorable.any(axis=1)].astype(np.float64), scorable[scorable.any(axis=1)]
    return (values * scorable).sum(axis=1) / scorable.sum(axis=1)


def trend(values: Sequence[float], errors: Sequence[float]) -> float:
    """Returns the slope of a least-squares line through equally spaced values, in its standard errors.

    The error is the larger of what the values' own errors make it and what their distance from the line does. 0 for fewer
    than four values and where neither tells an error.
    """
    y = np.asarray(values, np.float64)
    if len(y) < 4:
        return 0.0
    x = np.arange(len(y)) - (len(y) - 1) / 2
    square = (x**2).sum()
    slope = (x * y).sum() / square
    rest = y - y.mean() - slope * x
    error = np.sqrt(max((x**2 * np.square(errors)).sum() / square**2, (rest**2).sum() / (len(y) - 2) / square))
    return float(slope / error) if error > 1e-12 else 0.0


def watch(
    rows: Sequence[Mapping[str, float]], now: Mapping[str, float], window: int, errors: float
) -> tuple[dict[str, float], str]:
    """Returns (trends and hacking_warning for the metrics, a line of warning or "") of a rollout and those before it.

    `rows` are earlier rollouts' figures. Over the last `window` rollouts with both figures and their errors, the reward model's
    reward rising by `errors` standard errors of its slope while something verified falls by as many is told as reward hacking
    (DeepSeek-R1, appendix B.5: the reward rises while the score on Codeforces falls).
    """
    told: dict[str, float] = {"hacking_warning": 0.0}
    line = ""
    for name in (name for name in VERIFIED if f"{name}_se" in now):
        both = ("reward_model_se", f"{name}_se")
        recent = [row for row in [*rows, now] if all(error in row for error in both)][-window:]
        if len(recent) < window:
            continue
        trends = {
            key: trend([row[key] for row in recent], [row[f"{key}_se"] for row in recent])
            for key in ("reward_model", name)
        }
        told = {f"{key}_trend": value for key, value in trends.items()} | told  # the first name's, where they differ
        if trends["reward_model"] >= errors and trends[name] <= -errors:
            told["hacking_warning"] = 1.0
            first, last = recent[0], recent[-1]
            line = line or (
                f"reward hacking? over {len(recent)} rollouts the reward model's reward rose from {first['reward_model']:.3f} "
                f"to {last['reward_model']:.3f} ({trends['reward_model']:+.1f} standard errors) while {name} fell from "
                f"{first[name]:.3f} to {last[name]:.3f} ({trends[name]:+.1f}); stop, or train the reward model on new pairs"
            )
    return told, line


class HackingMonitor:
    """Compares what reward models say with what can be verified, rollout by rollout."""

    def __init__(self, config: RunSettings, folder: Path, prompts: PromptPhases, models: Mapping[str, RewardModel]):
        """`folder` holds the metrics of the run; `models` by task."""
        self.config, self.folder, self.prompts, self.models = config, folder, prompts, models
        self._earlier: list[dict] | None = None  # figures of the rollouts until now

    def graded(self, rollout: Rollout, start: int) -> np.ndarray:
        """Returns whether each sample's accuracy is a grader's, [N] bool: no reward model scores it instead."""
        problems = [self.prompts.prompt(sample.request_id, start).problem for sample in rollout.samples]
        return ~np.isin([problem.task for problem in problems], list(self.models))

    def figures(self, rollout: Rollout, start: int) -> tuple[dict[str, float], str]:
        """Returns (`figures` and trends of the rollout that starts at an update, a line of warning or "")."""
        if not self.models:
            return {}, ""
        group, settings = self.config.grpo.group_size, self.config.scenarios
        prompts = [self.prompts.prompt(sample.request_id, start) for sample in rollout.samples[::group]]
        now = figures(rollout, prompts, self.models, group)
        if not now:
            return {}, ""
        if self._earlier is None:
            every = self.config.grpo.updates_per_rollout
            rows = hosts.decide(metrics.read, self.folder, name=f"the metrics of {self.folder}")
            self._earlier = [row for row in rows if (row["update"] - 1) % every == 0 and row["update"] <= start]
        trends, line = watch(self._earlier, now, settings.hacking_window, settings.hacking_errors)
        self._earlier.append(now)
        return now | trends, line
