"""Every config dataclass: frozen, typed, hashable, one module an area. Imports no JAX.

Comments of fields give the unit and the source of the default. A `Schedule` is a tuple of (update, value) pairs in
rising order, the first at update 0.
"""

from dataclasses import replace

from r1jax.schema.bench import BenchConfig
from r1jax.schema.checks import Schedule
from r1jax.schema.compute import ROW_AXES, ComputeConfig, MeshConfig, Network, PackConfig
from r1jax.schema.config import Config, parts_of
from r1jax.schema.data import DataConfig
from r1jax.schema.evaluation import EvalConfig, GateConfig, TrainEvalConfig
from r1jax.schema.model import ModelConfig, RopeScaling
from r1jax.schema.optim import AuxiliaryConfig, CheckpointConfig, OptimizerConfig
from r1jax.schema.reward import JudgeConfig, Limits, PreferenceConfig, RewardConfig, RewardModelConfig, SandboxConfig
from r1jax.schema.rl import LOSS_PRESETS, GRPOConfig, PPOConfig, ScenarioConfig
from r1jax.schema.sampling import SamplerConfig
from r1jax.schema.supervised import (
    COLD_START_SOURCES,
    KINDS,
    REASONING,
    ColdStartConfig,
    DistillConfig,
    PretrainConfig,
    RejectionConfig,
    SFTConfig,
)
from r1jax.schema.tools import BuildTestsConfig, ExportConfig
from r1jax.schema.watch import WatchConfig

__all__ = [
    "AuxiliaryConfig",
    "BenchConfig",
    "BuildTestsConfig",
    "COLD_START_SOURCES",
    "CheckpointConfig",
    "ColdStartConfig",
    "ComputeConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "EvalConfig",
    "ExportConfig",
    "GRPOConfig",
    "GateConfig",
    "JudgeConfig",
    "KINDS",
    "LOSS_PRESETS",
    "Limits",
    "MeshConfig",
    "ROW_AXES",
    "ModelConfig",
    "Network",
    "OptimizerConfig",
    "PPOConfig",
    "PackConfig",
    "PreferenceConfig",
    "PretrainConfig",
    "REASONING",
    "RejectionConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RopeScaling",
    "SFTConfig",
    "SamplerConfig",
    "SandboxConfig",
    "ScenarioConfig",
    "Schedule",
    "TrainEvalConfig",
    "WatchConfig",
    "parts_of",
    "replace",
]
