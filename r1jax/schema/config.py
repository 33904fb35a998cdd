"""The whole config of one stage's run: the parts from the other modules and single fields."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from r1jax.schema.bench import BenchConfig
from r1jax.schema.checks import Check, Checked
from r1jax.schema.compute import NETWORK_CHECKS, ComputeConfig, MeshConfig, Network, PackConfig
from r1jax.schema.data import DataConfig
from r1jax.schema.evaluation import EvalConfig, GateConfig, TrainEvalConfig
from r1jax.schema.model import ModelConfig
from r1jax.schema.optim import AuxiliaryConfig, CheckpointConfig, OptimizerConfig
from r1jax.schema.reward import JudgeConfig, PreferenceConfig, RewardConfig, RewardModelConfig
from r1jax.schema.rl import GRPOConfig, PPOConfig, ScenarioConfig
from r1jax.schema.sampling import SamplerConfig
from r1jax.schema.supervised import ColdStartConfig, DistillConfig, PretrainConfig, RejectionConfig, SFTConfig
from r1jax.schema.tools import BuildTestsConfig, ExportConfig
from r1jax.schema.watch import WatchConfig

_MIXTURE = Check(
    "grpo.routing_replay",
    lambda c: not c.grpo.routing_replay or c.model.num_moe_layers > 0,
    "needs a model with mixture-of-experts layers (model.n_routed_experts={c.model.n_routed_experts}); set it to false",
)

Parts = TypeVar("Parts")


def _editor(stage: str) -> Check:
    return Check(
        f"{stage}.editor",
        lambda c: c.judge.checkpoint or not getattr(c, stage).editor,
        "needs a model: set judge.checkpoint",
    )


def _reward_model(field: str) -> Check:
    return Check(
        f"scenarios.{field}",
        lambda c: not getattr(c.scenarios, field) or c.reward.reward_model > 0,
        "needs reward.reward_model above 0",
    )


def _shared_prompts(holds: Callable[["Config"], bool], wanted: str) -> Check:
    return Check("pack.shared_prompts", lambda c: not c.pack.shared_prompts or holds(c), f"needs {wanted}")


@dataclass(frozen=True)
class Config(Checked):
    """The config of one stage's run. `stage` selects its function; each stage reads only some parts
    (stage_table.py)."""

    stage: str = ""
    preset: str = "tiny"
    seed: int = 0
    model: ModelConfig = ModelConfig()
    compute: ComputeConfig = ComputeConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    mesh: MeshConfig = MeshConfig()
    mode: Literal["colocated", "disaggregated"] = (
        "colocated"  # RL: trainer and sampler share devices, or have their own
    )
    sampler_mesh: MeshConfig = MeshConfig()  # disaggregated: the sampler's, on the devices after those of `mesh`
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    sampler: SamplerConfig = SamplerConfig()
    reward: RewardConfig = RewardConfig()
    grpo: GRPOConfig = GRPOConfig()
    pack: PackConfig = PackConfig()
    checkpointing: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()
    evaluation: EvalConfig = EvalConfig()
    train_eval: TrainEvalConfig = TrainEvalConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SFTConfig = SFTConfig()
    distill: DistillConfig = DistillConfig()
    coldstart: ColdStartConfig = ColdStartConfig()
    rejection: RejectionConfig = RejectionConfig()
    scenarios: ScenarioConfig = ScenarioConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    gate: GateConfig = GateConfig()
    export: ExportConfig = ExportConfig()
    start: str = ""  # stage of the working folder whose result this one starts from; "" is the base model
    inputs: str = ""  # working folder with the stages that this one reads; "" is its own
    variants: tuple[str, ...] = ()  # ablation: "NAME STAGE FIELD=VALUE ..." each
    seeds: tuple[int, ...] = ()  # ablation: runs each variant with each seed, on that seed's own stages; () is `seed`
    input_preset: str = ""  # preset of missing stages that this one reads and makes; "" is its own
    only: tuple[str, ...] = ()  # graph: run only these stages
    from_stage: str = ""  # graph, --config.from=STAGE: run this stage and all that depend on it again
    list: bool = False  # graph: print which stages are done, stale or missing, and run nothing
    set: tuple[str, ...] = ()  # graph: STAGE.FIELD=VALUE overrides of single stages
    checkpoint: str = ""  # evaluate, export: the stage folder or Hugging Face folder to read
    output: str = ""  # grade: the JSONL to write
    explain: str | None = (
        None  # grade, --explain[=ID]: show how this row is graded, "" the first rows, and write nothing
    )
    rebuild_base: bool = False  # quickstart, r1_zero: pretrain the tiny base instead of using the shipped one
    ppo: PPOConfig = PPOConfig()
    bench: BenchConfig = BenchConfig()
    judge: JudgeConfig = JudgeConfig()
    preferences: PreferenceConfig = PreferenceConfig()
    build_tests: BuildTestsConfig = BuildTestsConfig()

    checks = (
        *NETWORK_CHECKS,
        Check(
            "grpo.rollouts_ahead",
            lambda c: c.mode == "disaggregated" or not c.grpo.rollouts_ahead,
            "needs mode=disaggregated: one set of devices cannot sample and train at once",
        ),
        Check(
            "rejection.judged_prompts",
            lambda c: c.judge.checkpoint or not c.rejection.judged_prompts,
            "needs a judge: set judge.checkpoint",
        ),
        _editor("coldstart"),
        _editor("rejection"),
        _reward_model("helpful_model"),
        _reward_model("safety_model"),
        _shared_prompts(lambda c: c.mesh.context == 1, "mesh.context=1"),
        _shared_prompts(lambda c: not c.auxiliary.mtp_loss_weight, "auxiliary.mtp_loss_weight=0"),
        _shared_prompts(lambda c: not c.auxiliary.aux_loss_alpha, "auxiliary.aux_loss_alpha=0"),
        _shared_prompts(lambda c: c.grpo.advantage != "gae", "grpo.advantage other than gae"),
        Check(
            "grpo.routing_replay",
            lambda c: not (c.grpo.routing_replay and c.grpo.advantage == "gae"),
            "does not go with PPO (grpo.advantage=gae): a critic has routers of its own",
        ),
        Check(
            "train_eval.metric",
            lambda c: not c.train_eval.every or c.train_eval.metric in c.train_eval.metrics(c.evaluation),
            lambda c: f"is not measured; choose one of {', '.join(c.train_eval.metrics(c.evaluation))}",
        ),
        Check(
            "grpo.routing_replay",
            lambda c: c.model.checkpoint or _MIXTURE.holds(c),  # a checkpoint's shape is read later
            _MIXTURE.message,
        ),
    )

    @property
    def network(self) -> Network:
        """The model with how it is run."""
        return Network(self.model, self.compute, self.auxiliary)

    def require_mixture(self) -> None:
        """Raises ValueError when routing replay is asked of a model without routers."""
        _MIXTURE(self)


def parts_of(kind: type[Parts], config: Config) -> Parts:
    """Returns what the dataclass `kind` takes of a config: each of its fields is named after a part or field there."""
    return kind(**{name: getattr(config, name) for name in kind.__dataclass_fields__})  # ty: ignore[missing-attribute]
