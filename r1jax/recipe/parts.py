"""The parts of a config that steps of several stages share, each set under one name: `schema.parts_of` fills them."""

from dataclasses import dataclass

from r1jax.schema import (
    DataConfig,
    EvalConfig,
    MeshConfig,
    Network,
    OptimizerConfig,
    PackConfig,
    RewardConfig,
    SamplerConfig,
    ScenarioConfig,
)


@dataclass(frozen=True)
class AskingParts:
    """What rendering problems as the prompts of a model uses."""

    stage: str
    network: Network
    data: DataConfig
    sampler: SamplerConfig


@dataclass(frozen=True)
class PromptParts(AskingParts):
    """What reading a stage's problems and rendering them as prompts uses."""

    preset: str
    reward: RewardConfig
    scenarios: ScenarioConfig


@dataclass(frozen=True)
class SamplingParts(AskingParts):
    """What sampling a policy's responses and grading them uses. `stage` and `seed` key every draw."""

    seed: int
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
