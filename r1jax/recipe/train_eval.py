"""Evaluation between the updates of a stage: the figures of its held-out problems, by the sampler that it trains with.

A supervised stage has no such sampler and builds one.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import hosts
from r1jax.core.say import say
from r1jax.recipe import evaluate, progress
from r1jax.recipe.parts import EvaluationParts
from r1jax.recipe.prompts import StagePrompts
from r1jax.rewards.pool import RewardPool
from r1jax.sampler.build import build_sampler
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import TrainEvalConfig, replace
from r1jax.train import evaluations


@dataclass(frozen=True)
class TrainEvalParts(EvaluationParts):
    """What the figures of evaluations between updates depend on besides the weights and the prompts."""

    train_eval: TrainEvalConfig


def measure(
    settings: TrainEvalParts, tokenizer: Tokenizer, stage_prompts: StagePrompts | None
) -> Callable[[RolloutSampler, Any, RewardPool], dict[str, float]] | None:
    """Returns what measures weights on the held-out prompts of a stage, None with train_eval.every=0.

    Problems and random keys are those of every evaluation, so updates are compared fairly, with one another and with
    the figures of the stage's result. Raises ValueError when nothing is held out.
    """
    if not settings.train_eval.every:
        return None
    if stage_prompts is None or not stage_prompts.held_out:
        raise ValueError(
            f"config.train_eval.every={settings.train_eval.every}: {settings.stage} has no problems to evaluate; give "
            "some with --config.data.eval_path=FILE, raise config.data.holdout_fraction, or set it to 0"
        )
    return functools.partial(_row, settings, tokenizer, stage_prompts)


def measure_alone(
    settings: TrainEvalParts, tokenizer: Tokenizer, mesh: Mesh, stage_prompts: StagePrompts | None
) -> evaluations.Measure | None:
    """Returns the same for a stage that samples nothing while it trains: a sampler is built at the first evaluation.

    Between evaluations it holds neither slots nor weights.
    """
    by_sampler = measure(settings, tokenizer, stage_prompts)
    if by_sampler is None:
        return None

    @functools.cache
    def sampler() -> RolloutSampler:
        built = build_sampler(settings.network, settings.sampler, mesh, tokenizer)
        alone = functools.partial(hosts.raise_if_preempted, "a dispatch of the sampler")  # also where updates defer it
        built.between_dispatches = hosts.between_dispatches() if hosts.process_count() > 1 else alone
        return built

    def measured(params: Any) -> dict[str, float]:
        with RewardPool(settings.reward) as pool:
            row = by_sampler(sampler(), sampler().engine.load_params(params), pool)
        sampler().drop_slots()
        return row

    return measured


def _row(
    settings: TrainEvalParts,
    tokenizer: Tokenizer,
    stage_prompts: StagePrompts,
    sampler: RolloutSampler,
    params: Any,
    pool: RewardPool,
) -> dict[str, float]:
    """Returns the row of evaluation.jsonl of `params`, which are in the form that `sampler` takes."""
    evaluation = settings.train_eval.settings(settings.evaluation)
    problems = min(len(stage_prompts.held_out), evaluation.max_problems or len(stage_prompts.held_out))
    asked = problems * (2 if evaluation.greedy else 1)
    if evaluation.consensus_samples > evaluation.samples_per_problem:
        asked += min(problems, evaluation.consensus_problems)
    figures, _ = evaluate.measure(
        replace(settings, evaluation=evaluation),
        tokenizer,
        stage_prompts.held_out,
        sampler,
        params,
        pool,
        stage_prompts.source.reflective_words,
        progress.counter(f"{settings.stage}: prompts evaluated", asked),
    )
    return flat(figures)


def flat(figures: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers among figures, and pass@1 of each task as pass@1/TASK where there are several."""
    row = {name: value for name, value in figures.items() if isinstance(value, float)}
    tasks = figures["tasks"] if len(figures["tasks"]) > 1 else {}
    return row | {f"pass@1/{task}": of_task["pass@1"] for task, of_task in tasks.items()}


def kept(settings: TrainEvalConfig, folder: Path) -> dict[str, Any]:
    """Returns {"best": record} of the best weights for the figures of a stage and says where they are; {} without."""
    best = evaluations.best_of(folder) if settings.every else None
    if best is None:
        return {}
    say(
        f"best {best['metric']}: {best['value']:.4g} after update {best['update']}, weights in "
        f"{folder / evaluations.BEST}"
    )
    return {"best": best}
