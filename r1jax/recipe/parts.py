"""The parts of a config that steps of several stages share, each set under one name."""

from dataclasses import dataclass

from r1jax.schema import (
    Config,
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


def for_prompts(config: Config) -> PromptParts:
    """Returns what a stage's prompts are made with."""
    return PromptParts(
        stage=config.stage,
        preset=config.preset,
        model=config.model,
        data=config.data,
        sampler=config.sampler,
        reward=config.reward,
        scenarios=config.scenarios,
    )


def for_sampling(config: Config) -> SamplingParts:
    """Returns what a stage samples responses with."""
    return SamplingParts(
        stage=config.stage,
        seed=config.seed,
        network=config.network,
        data=config.data,
        sampler=config.sampler,
        reward=config.reward,
    )


def for_training(config: Config) -> TrainingParts:
    """Returns what a stage trains with, besides the settings of its own."""
    return TrainingParts(
        stage=config.stage,
        seed=config.seed,
        network=config.network,
        mesh=config.mesh,
        optimizer=config.optimizer,
        pack=config.pack,
    )


def for_evaluation(config: Config) -> EvaluationParts:
    """Returns what a stage evaluates checkpoints with."""
    return EvaluationParts(
        stage=config.stage,
        seed=config.seed,
        network=config.network,
        sampler=config.sampler,
        reward=config.reward,
        evaluation=config.evaluation,
    )
