"""The compiled programs of a stage, and the arrays beside them on the devices, from its config alone: nothing is run.

`phases` is in the order of a run. A phase names what is on the devices while its programs run, so that the memory of a
whole stage is a sum: the arrays of a phase, and what its largest program needs besides.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1jax import config as configs
from r1jax import stage_table
from r1jax.core import sharding, tree
from r1jax.models import decoder
from r1jax.models.moe import MoE
from r1jax.plan.compile import LoweredProgram
from r1jax.recipe import lineage
from r1jax.rewards.models import reward_model
from r1jax.rl import logprobs, losses, minibatch, ppo, settings
from r1jax.rl.logprobs import Scorer
from r1jax.rl.objective import GroupObjective
from r1jax.rl.settings import RunSettings
from r1jax.sampler.engine import Engine
from r1jax.schema import Config, Network, PackConfig, SamplerConfig
from r1jax.train import reward, sft, step

REWARD_MODEL = "reward model"
_STOP = (0,)  # stop ids are numbers in the decode state; which ones changes no program
RL = tuple(name for name, stage in stage_table.STAGES.items() if stage.function == "recipe.policy:run")
SFT = tuple(name for name in stage_table.STAGES if stage_table.reads(name, "sft"))
REWARD_MODELS = tuple(lineage.REWARD_MODELS)
SAMPLING = ("evaluate", "preference_pairs")


@dataclass(frozen=True, eq=False)
class StageProgram:
    """One program: `lower` lowers it for a mesh. `reads` are its arguments among its phase's arrays, by name or themselves."""

    mesh: Mesh
    lower: Callable[[], jax.stages.Lowered]
    reads: tuple[Any, ...] = ()
    gives: Any = None  # structs of a result that stays on the devices
    kept: Mapping[str, tuple] = field(default_factory=dict)  # expert weights, which no collective should gather

    def lowered(self) -> jax.stages.Lowered:
        """Returns the program lowered; on one device too, where kernels learn the kind of chip from a mesh in force."""
        if self.mesh.size > 1:
            return self.lower()
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self.lower()


@dataclass(frozen=True, eq=False)
class Phase:
    """A part of a run: structs with shardings of the arrays on the devices, by name, and the programs that run then."""

    name: str
    arrays: Mapping[str, Any]
    programs: Mapping[str, StageProgram]

    @functools.cached_property
    def resident(self) -> dict[str, int]:
        """The bytes of each array on a device."""
        return {name: tree.bytes_per_device(one) for name, one in self.arrays.items()}


def programs(config: Config, devices: Sequence | None = None) -> dict[str, StageProgram]:
    """Returns the programs of a stage by name, in the order in which a run compiles them. See `phases`."""
    return {name: program for phase in phases(config, devices) for name, program in phase.programs.items()}


def phases(config: Config, devices: Sequence | None = None) -> list[Phase]:
    """Returns the phases of a stage on the first of `devices` (default: this machine's).

    A checkpoint's own shape is not read: the model is that of the config. Raises ValueError for a stage that runs no
    program of its own, and for a mesh of more devices than there are.
    """
    mesh = sharding.make_mesh(config.mesh, None if devices is None else list(devices))
    if config.stage in RL:
        return _reinforcement(config, mesh, devices)
    if config.stage in SFT:
        return _supervised(config, mesh)
    if config.stage in REWARD_MODELS:
        return _reward_model(config, mesh)
    if config.stage == "stage0_base":
        size = config.pretrain.rows_per_update
        loss = sft.make_loss(config.network)
        trainer = step.Trainer(config.network, config.optimizer, mesh, loss, config.pretrain.updates)
        return _training(trainer, config.pack, size, np.float32(1))
    if config.stage in SAMPLING:
        weights = {"weights": _weights(config.network, mesh, jnp.float32)}
        return _sampling("sampling", config.network, config.sampler, mesh, weights)
    raise ValueError(
        f"--plan: {config.stage} runs no programs of its own; plan one of {', '.join((*RL, *SFT, *REWARD_MODELS))}, "
        f"stage0_base or {' or '.join(SAMPLING)}"
    )


def build(devices: Sequence, spec: str, overrides: Sequence[Sequence[str]], name: str) -> LoweredProgram:
    """Returns the program `name` of the config `spec` with `overrides`, lowered: a builder of `plan.compile`."""
    program = programs(configs.load(spec, [(key, value) for key, value in overrides]), devices)[name]
    return LoweredProgram(program.lowered(), program.mesh, program.kept)


def expert_weights(network: Network, mesh: Mesh, rules: sharding.Rules) -> dict[str, tuple]:
    """Returns (a device's part of one layer, the whole) of each expert weight."""
    specs, weights = decoder.specs(network.model), {}
    for stack, ffw in {"sparse": specs.sparse and specs.sparse.ffw, "mtp": specs.mtp and specs.mtp.block.ffw}.items():
        for name in ("gate", "up", "down") if isinstance(ffw, MoE) else ():
            spec: Any = getattr(ffw, name)
            part = sharding.sharding(mesh, spec.axes, spec.shape, rules).shard_shape(spec.shape)
            weights[f"{stack}/{name}"] = (part[1:], spec.shape[1:])
    return weights


def _weights(network: Network, mesh: Mesh, dtype) -> decoder.Params:
    """Returns structs of a network's weights, placed as in training."""
    specs = decoder.specs(network.model, network.scalar_head)
    return sharding.abstract(specs, jnp.dtype(dtype), mesh)


def _copy(network: Network, params: decoder.Params, mesh: Mesh) -> tuple[Any, decoder.Params]:
    """Returns (the program that copies weights in the compute dtype, structs of its result), placed as in training."""
    placed = sharding.spec_shardings(decoder.specs(network.model, network.scalar_head), mesh)
    copy = tree.copier(network.compute.compute_dtype, placed)
    return copy, tree.structs(jax.eval_shape(copy, params), placed)


def _start(trainer: step.Trainer, others: Mapping[str, Any], name: str = "start") -> Phase:
    """Returns the phase in which the state is made of the start weights."""
    weights = sharding.abstract(trainer.specs, jnp.float32, trainer.mesh)
    init = StageProgram(trainer.mesh, lambda: trainer.lower_init(weights), ("start weights",), trainer.restore_target())
    return Phase(name, {"start weights": weights, **others}, {f"{name}: state": init})


def _sampling(
    name: str,
    network: Network,
    sampler: SamplerConfig,
    mesh: Mesh,
    others: Mapping[str, Any],
    params: decoder.Params | None = None,
    record_experts: bool = False,
    like: Sequence[Phase] = (),
) -> list[Phase]:
    """Returns the phase that hands weights to a sampler, and the one that samples, beside the arrays `others`.

    The weights are `params`, a part of an array of `others`, or its array "weights". Programs that are the same as in
    the phases `like`, by their name there, are those: all, or where the slots there have another length the prefills.
    """
    engine = Engine(network, sampler, mesh, _STOP, record_experts=record_experts)
    source = others["weights"] if params is None else params
    slots, weights = engine.state_structs(), engine.param_structs(source)
    known = {key.partition(": ")[2]: one for phase in like for key, one in phase.programs.items()}
    if like and like[-1].arrays["slots"] != slots:
        known = {key: one for key, one in known.items() if key.startswith("prefill")}
    lowerings, kept = engine.lowerings(source), expert_weights(network, mesh, engine.rules)
    if all(one.mesh == mesh for one in known.values()):
        lowerings |= {key: one.lower for key, one in known.items()}
    place = StageProgram(mesh, lowerings.pop("place"), ("weights",) if params is None else (source,), weights, kept)
    reads = {"prefill": ("sampler weights",), "insert": ("slots",), "decode": ("sampler weights", "slots")}
    running = {
        f"{name}: {key}": StageProgram(mesh, lower, reads[key.split()[0]], kept=kept)
        for key, lower in lowerings.items()
    }
    return [
        Phase(f"{name}: weights", {**others, "slots": slots}, {f"{name}: place": place}),
        Phase(name, {**others, "sampler weights": weights, "slots": slots}, running),
    ]


def _training(
    trainer: step.Trainer, pack: PackConfig, rows: int, arguments: Any, inputs: Sequence[str] = ()
) -> list[Phase]:
    """Returns the phases of supervised training on `rows` rows an update; `inputs` are int32 arrays of a loss's own."""
    batch = step.batch_shapes(pack, -(-rows // pack.rows_per_micro_batch), ())
    batch |= dict.fromkeys(inputs, batch["tokens"])
    kept = expert_weights(trainer.network, trainer.mesh, sharding.TRAIN)
    update = StageProgram(trainer.mesh, lambda: trainer.lower_update(batch, arguments), ("state",), kept=kept)
    return [_start(trainer, {}), Phase("update", {"state": trainer.restore_target()}, {"update": update})]


def _supervised(config: Config, mesh: Mesh) -> list[Phase]:
    """Returns the phases of an SFT stage; an update has a row for each example, its longest case."""
    network = config.network
    weights = {"weights": _weights(network, mesh, jnp.float32)}
    sampled = [] if config.stage == "distill" else _sampling("traces", network, config.sampler, mesh, weights)
    trainer = step.Trainer(network, config.optimizer, mesh, sft.make_loss(network, config.pack.trained_chunk), 1)
    training = _training(trainer, config.pack, config.sft.examples_per_update, np.float32(1))
    evaluated = _sampling("evaluation", network, config.sampler, mesh, weights, like=sampled)
    return [*sampled, *training, *evaluated]


def _reward_model(config: Config, mesh: Mesh) -> list[Phase]:
    """Returns the phases of a reward model's stage, whose blocks are all trained."""
    network = reward_model.architecture(config.network)
    kind = lineage.REWARD_MODELS[config.stage].kind
    trainer = step.Trainer(network, config.optimizer, mesh, reward.make_loss(network, kind), 1)
    arguments = reward.RewardLossArguments(np.float32(1), np.float32(1))
    rows = config.reward_model.examples_per_update * (2 if kind == "helpful" else 1)
    training = _training(trainer, config.pack, rows, arguments, (reward.UNIT, reward.POSITIVE))
    weights = _weights(network, mesh, jnp.float32)
    return [*training, _scoring(network, mesh, config.pack, {"weights": weights}, "evaluation")]


def _scoring(network: Network, mesh: Mesh, pack: PackConfig, others: Mapping[str, Any], name: str) -> Phase:
    """Returns the phase in which a reward model, the array REWARD_MODEL, scores texts beside the arrays `others`."""
    copied = _copy(network, _weights(network, mesh, jnp.float32), mesh)[1]
    text_format, rows = reward_model.TextFormat("helpful", "plain"), pack.rows_per_micro_batch
    model = reward_model.RewardModel(copied, network, mesh, text_format, None, rows, pack.row_tokens)
    score = StageProgram(mesh, model.lower, (REWARD_MODEL,), kept=expert_weights(network, mesh, sharding.TRAIN))
    return Phase(name, {**others, REWARD_MODEL: copied}, {f"{name}: score": score})


def _reinforcement(config: Config, mesh: Mesh, devices: Sequence | None) -> list[Phase]:
    run, objective = settings.of_config(config), GroupObjective(settings.of_config(config))
    network, grpo = run.network, run.grpo
    trainer = step.Trainer(network, run.optimizer, mesh, objective.loss, grpo.updates)
    critic = ppo.critic_trainer(run, mesh) if grpo.advantage == "gae" else None
    always: dict[str, Any] = {"critic": critic.restore_target()} if critic else {}
    phase_list = [_start(trainer, {})]
    if critic:
        phase_list.append(_start(critic, {"state": trainer.restore_target()}, "critic"))
    always["state"] = trainer.restore_target()
    copy, copied = _copy(network, always["state"].params, mesh)
    if grpo.uses_reference:
        copying = StageProgram(
            mesh, lambda: copy.lower(trainer.restore_target().params), (trainer.restore_target().params,), copied
        )
        phase_list.append(Phase("reference", dict(always), {"reference: copy": copying}))
        always |= {} if grpo.offload_reference else {"reference": copied}
    rewarded = reward_model.architecture(network)
    tasks = [use.task for use in lineage.REWARD_MODELS.values() if getattr(config.scenarios, use.field)]
    for task in tasks:
        always[f"{REWARD_MODEL} ({task})"] = _copy(rewarded, _weights(rewarded, mesh, jnp.float32), mesh)[1]
    sampler_mesh = mesh
    if config.mode == "disaggregated":
        rest = list(jax.devices() if devices is None else devices)[mesh.size :]
        sampler_mesh = sharding.make_mesh(config.sampler_mesh, rest, "sampler_mesh")
    params, replayed, rollouts = always["state"].params, grpo.routing_replay, []
    lengths = [one for _, one in settings.length_phases(run)]
    for one in lengths:
        note = "" if one is lengths[-1] else f" ({one.sampler.max_new_tokens} tokens)"
        rollouts = _sampling(
            f"rollout{note}", network, one.sampler, sampler_mesh, always, params, replayed, like=rollouts
        )
        phase_list += rollouts
        sampling = rollouts[-1].arrays
        if tasks:  # all have the same shape, so one stands for them
            first = f"{REWARD_MODEL} ({tasks[0]})"
            others = {name: value for name, value in sampling.items() if name != first}
            phase_list.append(_scoring(rewarded, sampler_mesh, run.pack, others, f"reward models{note}"))
        kept = {"slots": sampling["slots"]} if config.mode == "disaggregated" else {}
        phase_list += _updates(one, objective, trainer, critic, always | kept, copied, note)
    trained = {"weights": _weights(network, mesh, jnp.float32)}
    return phase_list + _sampling("evaluation", network, run.sampler, mesh, trained, like=() if replayed else rollouts)


def _updates(
    run: RunSettings,
    objective: GroupObjective,
    trainer: step.Trainer,
    critic: step.Trainer | None,
    arrays: Mapping[str, Any],
    copied: decoder.Params,
    note: str,
) -> list[Phase]:
    """Returns the phases that score a rollout under the policy before its updates, and that update.

    `note` ends the names of phases and of their programs' steps.
    """
    mesh, network, grpo, phase_list = trainer.mesh, run.network, run.grpo, []
    fields = (*objective.fields, *(ppo.CRITIC_FIELDS if critic else ()))
    batch = minibatch.batch_shapes(run, fields)
    kept, scorer = expert_weights(network, mesh, sharding.TRAIN), Scorer(network, mesh, grpo.offload_reference)
    frozen = tree.structs(copied, sharding.on_host(trainer.param_shardings)) if grpo.offload_reference else copied
    score = StageProgram(mesh, lambda: scorer.lower(frozen, batch), ("old policy",), kept=kept)
    if grpo.old_logp == "recomputed" or (grpo.uses_reference and grpo.kl_placement == "reward"):
        scoring = {f"scoring{note}: log-probabilities": score}
        phase_list.append(Phase(f"scoring{note}", {**arrays, "old policy": frozen}, scoring))
    policy_batch, critic_batch = ppo.split(batch) if critic else (batch, {})
    arguments = losses.arguments(grpo, 0.0, run.sampler.temperature)
    updating: dict[str, StageProgram] = {}
    if "reference_logp" in objective.fields:
        updating[f"update{note}: reference"] = dataclasses.replace(score, reads=("reference",))
    updating[f"update{note}"] = StageProgram(
        mesh, lambda: trainer.lower_update(policy_batch, arguments), ("state",), kept=kept
    )
    if critic:
        values = Scorer(critic.network, mesh, read=logprobs.values)
        critic_copy = _copy(critic.network, critic.restore_target().params, mesh)[1]
        score = StageProgram(mesh, lambda: values.lower(critic_copy, batch), ("frozen critic",))
        scoring = {f"values{note}: score": score}
        phase_list.append(Phase(f"values{note}", {**arrays, "frozen critic": critic_copy}, scoring))
        clip = ppo.ValueArguments(np.float32(0))
        lower = lambda: critic.lower_update(critic_batch, clip)  # noqa: E731
        updating[f"update{note}: critic"] = StageProgram(mesh, lower, ("critic",))
    return [*phase_list, Phase(f"update{note}", arrays, updating)]
