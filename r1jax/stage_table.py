"""The stages: the function of each, the parts of the config it reads, and whether several processes can run it.

Imports no JAX.

An override of anything else is refused before a run: it would change nothing but the run's name and hash. The values of
a preset are its author's and are not checked.
"""

import importlib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from r1jax.schema import ROW_AXES, Config

# Read by every stage that starts from the results of other stages and evaluates its own.
_PLACE = ("seed", "start", "inputs", "input_preset", "rebuild_base", "checkpointing", "watch", "evaluation")
_MODEL = ("model", "compute", "mesh", "data", "sampler", "reward")
_TRAINING = (*_MODEL, *_PLACE, "auxiliary", "optimizer", "pack")
_RL_STAGES = ("r1_zero", "ppo_baseline", "stage2_reasoning_rl", "stage4_all_scenarios", "student_rl")
_RL = (*_TRAINING, "train_eval", "mode", "sampler_mesh", "grpo", "ppo", "scenarios")
_SFT = (*_TRAINING, "train_eval", "sft")
_SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens_schedule")
_WEIGHTS = dict.fromkeys((f"reward.{name}" for name in ("accuracy", "format", "language")), "")
DERIVED = {"compute.vocab_used": "the tokenizer"}  # fields that follow from something else
BY_GRAPH = ("gate",)  # the parts of a stage's config that are read by the graph which runs it
_HANDED_ON = (
    "seed",
    "evaluation",
    "model.checkpoint",
    "data",
    "watch",
)  # to the stages that a graph or an ablation runs
_GRAPH = (*_HANDED_ON, "rebuild_base", "only", "from_stage", "list", "set")


@dataclass(frozen=True)
class Stage:
    """One stage.

    It reads everything under `reads` except the keys of `unread`, whose values name the field that counts instead.
    """

    function: str  # MODULE:NAME below r1jax, called with (config, workdir)
    reads: tuple[str, ...]  # dotted: a part of the config, or a field
    unread: Mapping[str, str] = field(default_factory=dict)  # dotted -> field that counts in its place, "" for none
    several_processes: bool = False  # whether several processes can run it together
    updates: bool = False  # whether it trains, or runs stages that do


def _other_sampling(**instead: str) -> dict[str, str]:
    """Returns {sampling parameter in config.sampler: field that counts instead} of a stage that samples by others."""
    return {f"sampler.{name}": instead.get(name, "") for name in _SAMPLING}


_EVALUATION = _other_sampling(temperature="evaluation.temperature", top_p="evaluation.top_p")
_NO_RL = {"pack.shared_prompts": ""}
_NO_ROLLOUTS = _NO_RL | dict.fromkeys(("watch.rollout_samples", "watch.rollouts_kept"), "")
_JUDGE = {"judge.sampler.max_new_tokens_schedule": "judge.sampler.max_new_tokens"}
_SAMPLES_ALONE = {"compute.logprob_implementation": ""}  # the sampler scores by whole logits
_RL_STAGE = Stage("recipe.policy:run", _RL, several_processes=True, updates=True)
_REWARD_MODEL = Stage(
    "recipe.reward_models:run",
    (*_TRAINING, "reward_model"),
    _other_sampling()
    | _NO_ROLLOUTS
    | dict.fromkeys(("pack.trained_chunk", "auxiliary.mtp_loss_weight", "auxiliary.mtp_hidden"), "")
    | dict.fromkeys(("data.weights", "data.columns", "data.task"), ""),
    several_processes=True,
    updates=True,
)
_RECIPE = Stage("recipe.graph:run", _GRAPH, several_processes=True, updates=True)

STAGES: dict[str, Stage] = {
    "r1_zero": _RL_STAGE,
    "ppo_baseline": _RL_STAGE,
    "stage2_reasoning_rl": _RL_STAGE,
    "stage4_all_scenarios": _RL_STAGE,
    "student_rl": _RL_STAGE,
    "stage1_coldstart": Stage(
        "recipe.stage1_coldstart:run",
        (*_SFT, "coldstart", "judge"),
        _EVALUATION | _NO_ROLLOUTS | _JUDGE,
        several_processes=True,
        updates=True,
    ),
    "stage3_rejection_sft": Stage(
        "recipe.stage3_rejection_sft:run",
        (*_SFT, "rejection", "judge"),
        _EVALUATION | _NO_ROLLOUTS | _JUDGE | {"sampler.temperature": "rejection.temperature"},
        several_processes=True,
        updates=True,
    ),
    "distill": Stage(
        "recipe.distill:run", (*_SFT, "distill"), _EVALUATION | _NO_ROLLOUTS, several_processes=True, updates=True
    ),
    "reward_helpful": _REWARD_MODEL,
    "reward_safety": _REWARD_MODEL,
    "stage0_base": Stage(
        "recipe.stage0_base:run",
        (
            *("seed", "model", "compute", "auxiliary", "mesh", "optimizer", "pack", "checkpointing", "watch"),
            *("pretrain", "output", "sampler.stop_ids"),
        ),
        _NO_ROLLOUTS | {"pack.trained_chunk": "", "model.max_position_embeddings": ""},
        several_processes=True,
        updates=True,
    ),
    "evaluate": Stage(
        "recipe.evaluate:run",
        ("seed", *_MODEL, "evaluation", "checkpoint"),
        _EVALUATION | _SAMPLES_ALONE | {"model.checkpoint": "checkpoint"},
        several_processes=True,
    ),
    "export_hf": Stage(
        "recipe.export_hf:run",
        ("model.checkpoint", "mesh", "checkpoint", "output", "export"),
        several_processes=True,
    ),
    "grade": Stage(
        "tools.grade:run",
        ("data.path", "data.max_rows", "output", "explain", "reward"),
        _WEIGHTS,
    ),
    "build_tests": Stage(
        "tools.build_tests:run",
        (
            *("seed", "data.path", "data.max_rows", "output", "mesh", "judge", "build_tests"),
            *("reward.deadline_s", "reward.sandbox"),
        ),
        _JUDGE,
        several_processes=True,
    ),
    "preference_pairs": Stage(
        "tools.preference_pairs:run",
        ("seed", "model", "compute", "mesh", "data", "sampler", "output", "judge", "preferences"),
        _JUDGE
        | _SAMPLES_ALONE
        | {"sampler.max_new_tokens_schedule": "sampler.max_new_tokens"}
        | dict.fromkeys(("data.holdout_fraction", "data.weights", "data.task"), ""),
        several_processes=True,
    ),
    "quickstart": _RECIPE,
    "r1": _RECIPE,
    "ablation": Stage("tools.ablation:run", (*_HANDED_ON, "variants", "seeds", "output"), updates=True),
    "bench_code": Stage(
        "bench.code:run",
        ("seed", "bench.code_files", "bench.samples", "bench.mutants_per_row", "data.max_rows", "reward"),
        _WEIGHTS,
    ),
    "bench_grading": Stage("bench.grading:run", ("data.path", "data.max_rows", "reward")),
    "bench_import": Stage("bench.checkpoint_import:run", ("model", "optimizer.param_dtype")),
    "bench_kernels": Stage("bench.kernels:run", ("bench.topology",)),
    "bench_loss": Stage(
        "bench.loss:run",
        (
            *("pack.row_tokens", "pack.rows_per_micro_batch"),
            *("model.hidden_size", "model.vocab_size", "compute.compute_dtype"),
        ),
    ),
    "bench_rewards": Stage("bench.rewards:run", ("bench.samples", "reward")),
    "bench_saving": Stage(
        "bench.saving:run",
        ("seed", "model", "compute", "mesh", "optimizer", "pack", "bench.repeats"),
        _NO_RL
        | dict.fromkeys(("model.max_position_embeddings", "model.checkpoint"), "")
        | dict.fromkeys(("optimizer.max_skipped_updates", "pack.trained_chunk"), ""),
    ),
    "bench_tokens": Stage("bench.tokens:run", ("model.checkpoint", "bench.samples", "bench.threads", "bench.repeats")),
    "bench_update": Stage(
        "bench.update:run",
        (
            *("seed", "model", "compute", "auxiliary", "mesh", "optimizer", "sampler", "reward", "grpo", "pack"),
            *("checkpointing", "bench"),
        ),
        dict.fromkeys(("bench.code_files", "bench.mutants_per_row", "bench.topology"), ""),
    ),
}


def _reads_rows(config: Config) -> bool:
    """Returns whether a config names a file of rows of any kind."""
    data = config.data
    listed = (data.path, data.eval_path, data.general_path, data.safety_path, config.distill.examples)
    more = (config.coldstart.examples, config.rejection.general_path, config.rejection.judged_prompts)
    return any((*listed, *more))


def _holds_out(config: Config) -> bool:
    """Returns whether a share of config.data.path's rows is held out, which config.data.eval_path would replace."""
    return bool(config.data.path) and not (config.data.eval_path and config.data.holdout_fraction)


_WITH_ROWS = ("data.path", _reads_rows)
_LATER = ("scenarios.from_update>=0", lambda config: config.scenarios.from_update >= 0)
# Parts and fields that are read only under a condition: key -> (the condition as text, whether a config meets it).
_CONDITIONS = {
    "ppo": ("grpo.advantage=gae", lambda config: config.grpo.advantage == "gae"),
    "sampler_mesh": ("mode=disaggregated", lambda config: config.mode == "disaggregated"),
    "data.weights": ("data.path", lambda config: bool(config.data.path)),
    "data.columns": _WITH_ROWS,
    "data.task": _WITH_ROWS,
    **{
        f"scenarios.{name}": _LATER
        for name in (
            "general_fraction",
            "safety_fraction",
            "helpful_model",
            "safety_model",
            "hacking_window",
            "hacking_errors",
        )
    },
}
_HOLDOUT = ("data.path and without config.data.eval_path", _holds_out)  # of stages that ask problems
_ASKS_PROBLEMS = (*_RL_STAGES, "stage1_coldstart", "stage3_rejection_sft", "distill", "evaluate")


def reads(stage: str, key: str) -> bool:
    """Returns whether a stage reads the field, or anything of the part, at a dotted key."""
    return _covers(STAGES[stage].reads, key) and not _covers((*STAGES[stage].unread, *DERIVED), key)


def function(stage: str) -> Callable[[Config, Path], dict]:
    """Returns the function that runs a stage in a working folder. Raises ValueError when there is no such stage."""
    if stage not in STAGES:
        raise ValueError(f"no stage named '{stage}'; the stages are {', '.join(STAGES)}")
    module, _, name = STAGES[stage].function.partition(":")
    return getattr(importlib.import_module(f"r1jax.{module}"), name)


def planner() -> Callable[..., dict]:
    """Returns the function behind --plan."""
    return importlib.import_module("r1jax.tools.plan").run


def several_processes(stage: str) -> bool:
    """Returns whether several processes can run a stage together; every other stage runs in one."""
    return stage in STAGES and STAGES[stage].several_processes


def check(config: Config, keys: Iterable[str], also: tuple[str, ...] = ()) -> None:
    """Raises ValueError, in one line, for the first overridden key that config.stage does not read.

    Rows, tokens of a row and slots that do not divide over the mesh are refused as well, whoever set them. `also` are
    parts that whoever runs the stage reads. A stage that is not in the table is not checked.
    """
    for key in keys:
        if config.stage not in STAGES or _covers(also, key):
            continue
        if key in DERIVED:
            raise ValueError(f"config.{key} follows from {DERIVED[key]}; leave it out")
        if not reads(config.stage, key):
            raise ValueError(_refusal(config.stage, key))
        for needed, met in _conditions(config.stage, key):
            if not met(config):
                raise ValueError(f"config.{key} is read with config.{needed} alone; set that, or leave it out")
    if config.stage in STAGES:
        _check_division(config)


def _check_division(config: Config) -> None:
    """Raises ValueError where devices of a mesh would compute copies: for what does not divide over it."""
    stage, apart = config.stage, config.mode == "disaggregated"
    if not reads(stage, "mesh"):
        return
    slots_mesh, slots_field = (config.sampler_mesh, "sampler_mesh") if apart else (config.mesh, "mesh")
    for field_, mesh, mesh_field, axes in (
        ("pack.rows_per_micro_batch", config.mesh, "mesh", ROW_AXES),
        ("pack.row_tokens", config.mesh, "mesh", ("context",)),
        ("sampler.slots", slots_mesh, slots_field, (*ROW_AXES, "context")),
    ):
        devices = math.prod(getattr(mesh, axis) for axis in axes)
        value = operator.attrgetter(field_)(config)
        if reads(stage, field_) and value % devices:
            shape = ", ".join(f"{axis}={getattr(mesh, axis)}" for axis in axes if getattr(mesh, axis) > 1)
            raise ValueError(
                f"config.{field_}={value} does not divide over the {devices} devices of config.{mesh_field} ({shape}), "
                f"some would compute copies; give a multiple of {devices}, or make config.{mesh_field} smaller"
            )


def _conditions(stage: str, key: str) -> list[tuple[str, Callable[[Config], bool]]]:
    """Returns the conditions under which a stage reads a key, as (condition as text, whether a config meets it)."""
    conditions: list[tuple[str, Callable[[Config], bool]]]
    conditions = [condition for part, condition in _CONDITIONS.items() if _covers((part,), key)]
    return [*conditions, _HOLDOUT] if key == "data.holdout_fraction" and stage in _ASKS_PROBLEMS else conditions


def _covers(parts: Iterable[str], key: str) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def _refusal(stage: str, key: str) -> str:
    if STAGES[stage].reads == _GRAPH:
        return f"config.{key} is no setting of the whole graph; give it to a stage: --config.set=STAGE.{key}=VALUE"
    part = _unread_part(stage, key)
    others = [name for name in STAGES if reads(name, key) and name != stage]
    if instead := STAGES[stage].unread.get(part):
        remedy = f"what counts here is config.{instead}"
    elif _covers(BY_GRAPH, key):
        remedy = f"the graph does: --config=r1 --config.set={stage}.{key}=VALUE"
    elif stage == "ablation" and any(STAGES[name].reads != _GRAPH for name in others):
        remedy = f"give it to a variant: --config.variants=('NAME STAGE {key}=VALUE',)"
    else:
        shown = ", ".join(others[:6]) + (", ..." if len(others) > 6 else "")
        remedy = f"leave it out (it is read by {shown})" if others else "leave it out"
    return f"{stage} does not read config.{part}; {remedy}"


def _unread_part(stage: str, key: str) -> str:
    """Returns the shortest beginning of a key under which the stage reads nothing."""
    names, table = key.split("."), STAGES[stage]
    for length in range(1, len(names)):
        part = ".".join(names[:length])
        if not reads(stage, part) and not any(name.startswith(f"{part}.") for name in table.reads):
            return part
    return key
