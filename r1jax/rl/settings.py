"""The parts of a stage's config that an RL run uses."""

from dataclasses import dataclass
from typing import Literal

from r1jax.rl import schedules
from r1jax.schema import (
    CheckpointConfig,
    Config,
    GRPOConfig,
    MeshConfig,
    Network,
    OptimizerConfig,
    PackConfig,
    PPOConfig,
    RewardConfig,
    SamplerConfig,
    ScenarioConfig,
    TrainEvalConfig,
    WatchConfig,
    parts_of,
    replace,
)


@dataclass(frozen=True)
class RunSettings:
    """The parts of a config that sampling, scoring and updating use. `stage` and `seed` key every draw."""

    stage: str
    seed: int
    network: Network
    mesh: MeshConfig
    mode: Literal["colocated", "disaggregated"]
    sampler_mesh: MeshConfig
    sampler: SamplerConfig
    reward: RewardConfig
    scenarios: ScenarioConfig
    pack: PackConfig
    grpo: GRPOConfig
    ppo: PPOConfig
    optimizer: OptimizerConfig
    checkpointing: CheckpointConfig
    train_eval: TrainEvalConfig
    watch: WatchConfig


def of_config(config: Config) -> RunSettings:
    """Returns the settings of a stage's run. Raises ValueError for routing replay on a model without routers."""
    config.require_mixture()
    return parts_of(RunSettings, config)


def at_update(config: RunSettings, first_update: int) -> RunSettings:
    """Returns the settings of the rollout that starts at an update: cache and rows are no longer than it needs.

    Where sampler.max_new_tokens_schedule allows n tokens less than max_new_tokens, a packed row has n tokens less too,
    rounded up to what the context axis divides. Without a schedule these are the settings themselves.
    """
    longest = schedules.max_new_tokens(config.sampler, first_update)
    if longest == config.sampler.max_new_tokens:
        return config
    devices = config.mesh.context
    rows = -(-(config.pack.row_tokens - config.sampler.max_new_tokens + longest) // devices) * devices
    sampler = replace(config.sampler, max_new_tokens=longest, max_new_tokens_schedule=())
    return replace(config, sampler=sampler, pack=replace(config.pack, row_tokens=rows))


def length_phases(config: RunSettings) -> list[tuple[int, RunSettings]]:
    """Returns (first update, settings) of each part of a run between changes of the response length, in order."""
    grpo, phases = config.grpo, []
    asked = [update for update, _ in config.sampler.max_new_tokens_schedule if update < grpo.updates]
    starts = {schedules.first_start_at_or_after(update, grpo.updates_per_rollout) for update in (0, *asked)}
    for start in sorted(start for start in starts if start < grpo.updates):
        settings = at_update(config, start)
        if not phases or settings != phases[-1][1]:
            phases.append((start, settings))
    return phases
