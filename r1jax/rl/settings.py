"""The parts of a stage's config that an RL run uses."""

from dataclasses import dataclass
from typing import Literal

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
    parts_of,
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


def of_config(config: Config) -> RunSettings:
    """Returns the settings of a stage's run. Raises ValueError for routing replay on a model without routers."""
    config.require_mixture()
    return parts_of(RunSettings, config)
