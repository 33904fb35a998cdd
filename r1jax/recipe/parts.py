"""The parts of a config that steps of several stages share, each set under one name: `schema.parts_of` fills them."""

from dataclasses import dataclass

from r1jax.schema import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    Network,
    OptimizerConfig,
    PackConfig,
    RewardConfig,
    SamplerConfig,
    ScenarioConfig,
)


@dataclass(frozen=True)
class PromptParts:
    """What reading a stage's problems and rendering them as prompts uses."""

    stage: str
    preset: str
    model: ModelConfig
    data: DataConfig
    sampler: SamplerConfig
    reward: RewardConfig
    scenarios: ScenarioConfig


@dataclass(frozen=True)
class SamplingParts:
    """What sampling a policy's responses and grading them uses. `stage` and `seed` key every draw."""

    stage: str
    seed: int
    network: Network
    data: DataConfig
    sampler: SamplerConfig
    reward: RewardConfig


@dataclass(frozen=True)
class TrainingParts:
    """What supervised training uses. `stage` and `seed` key the order of the examples."""

    stage: str
    seed: int
    network: Network
    mesh: MeshConfig
    optimizer: OptimizerConfig
    pack: PackConfig


@dataclass(frozen=True)
class EvaluationParts:
    """What the figures of a checkpoint depend on besides its weights and the prompts; `stage` names its result."""

    stage: str
    seed: int
    network: Network
    sampler: SamplerConfig
    reward: RewardConfig
    evaluation: EvalConfig
