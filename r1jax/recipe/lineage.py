"""Where a stage's starting weights come from, which stages it needs, and how a missing one is made."""

import functools
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from r1jax import config as configs
from r1jax import stage_table
from r1jax.core import hosts, remote, tree
from r1jax.data import files
from r1jax.recipe import common, inherited, parts, problems, stage0_base
from r1jax.rewards import plugins
from r1jax.rewards.models.reward_model import Kind
from r1jax.schema import Config, RewardConfig, parts_of, replace

# The name of each stage's result in tables and in summary.json.
RESULTS = {
    "stage0_base": "base",
    "r1_zero": "r1_zero",
    "stage1_coldstart": "dev1",
    "stage2_reasoning_rl": "dev2",
    "stage3_rejection_sft": "dev3",
    "stage4_all_scenarios": "r1",
    "distill": "student_distilled",
    "student_rl": "student_rl",
    "reward_helpful": "reward_helpful",
    "reward_safety": "reward_safety",
}
BASE = "base"


@dataclass(frozen=True)
class RewardModelUse:
    """What a reward model is, and where stage 4 uses it."""

    kind: Kind
    task: str  # of the rows that it rewards
    field: str  # of config.scenarios: names its folder


REWARD_MODELS = {  # by the stage that trains it
    "reward_helpful": RewardModelUse("helpful", "general", "helpful_model"),
    "reward_safety": RewardModelUse("safety", "safety", "safety_model"),
}


@dataclass(frozen=True)
class Base:
    """The base that a stage's result is compared with: its name among the evaluations, and what loads its weights."""

    name: str
    load: Callable[[], Any]


def result_name(stage: str) -> str:
    """Returns the name of this stage's result."""
    return RESULTS.get(stage, stage)


def base_name(input_preset: str) -> str:
    """Returns the name of this stage's base among the evaluations: a student has a base of its own."""
    return f"student_{BASE}" if input_preset else BASE


def require(stage: str, config: Config, workdir: Path) -> Path:
    """Returns the folder of a finished stage in `workdir`; in the tiny world a missing stage is run first, with what it
    inherits from `config`.

    Raises ValueError with the command that runs the stage at the other sizes, and where a model or problems are given.
    """
    workdir = Path(config.inputs or workdir)
    folder, preset = workdir / stage, config.input_preset or config.preset
    if hosts.decide((folder / common.DONE).exists, name=f"what is in {folder}"):
        return folder
    if problems.has_files(config.data) or config.model.checkpoint or config.data.world != "tiny":
        raise ValueError(
            f"{folder} is missing or unfinished; make it with: python -m r1jax.launch --config={stage}:{preset} "
            f"--workdir={workdir} and the same --config.data.path and --config.model.checkpoint"
        )
    stage_config = inherited.stage_config(config, f"{stage}:{preset}")
    stage_config = replace(stage_config, rebuild_base=config.rebuild_base)
    stage_table.function(stage)(stage_config, workdir)
    return folder


def output_digest(folder: Path) -> str:
    """Returns the digest of a finished stage's result, from its DONE marker."""
    return hosts.decide(_output_digest, folder, name=f"the digest of {folder}")


def _output_digest(folder: Path) -> str:
    return json.loads((folder / common.DONE).read_text())["output"]


def digest_now(name: str, workdir: Path, default: str) -> str:
    """Returns the current digest of a stage's input: a stage of `workdir`, a checkpoint or a file.

    Returns `default` for anything else and for an input that does not exist.
    """
    if (workdir / name / common.DONE).exists():
        return output_digest(workdir / name)
    path = Path(remote.known(name))
    if not default or name in RESULTS or not path.exists():
        return default
    if path.suffix == ".safetensors" or any((path / inside).exists() for inside in ("checkpoints", "config.json")):
        return common.checkpoint_digest(path)
    return files.digest(str(path))


def inputs(config: Config, workdir: Path, compared: bool = True) -> dict[str, str]:
    """Returns {input of a stage: digest of its content}: its start, its base, its problems, the user's own graders.

    The stage that it starts from is run first if it is missing and can be made. With `compared` its result is compared
    with the base, which is then an input of the figures even if config.model.checkpoint does not name it.
    """
    digests = {}
    if config.start:
        digests[config.start] = output_digest(require(config.start, config, workdir))
    recorded_base, recorded_digest = _base_of_start(config.start, config.inputs, workdir)
    if compared and not config.model.checkpoint:
        recorded_base = remote.local_if_any(recorded_base)
    if base := config.model.checkpoint or (recorded_base if compared else ""):
        digests[base] = _base_digest(config.stage, config.start, base, recorded_base, recorded_digest)
    elif not config.start:
        digests[BASE] = ""
    return digests | problems.digests(config.data) | grader_digests(config.reward)


def _base_digest(stage: str, start: str, base: str, recorded_base: str, recorded_digest: str) -> str:
    """Returns the digest of a stage's base; `recorded_base` and its digest are those that its start was made from.

    Raises ValueError when the base does not exist, or is a Hugging Face model that differs from the recorded one.
    """
    recorded_base = remote.known(recorded_base)
    if base == recorded_base and not Path(base).exists():
        raise ValueError(
            f"{stage}: {start} was made from {recorded_base}, which is not there; name its place with "
            "--config.model.checkpoint=DIR"
        )
    digest = common.checkpoint_digest(base)
    if recorded_digest and digest != recorded_digest and not _is_stage(recorded_base):
        now = (
            "is another model by now"
            if base == recorded_base
            else f"is another model than config.model.checkpoint={base}"
        )
        raise ValueError(
            f"{stage}: {start} was made from {recorded_base}, which {now}; make {start} again from the base that "
            "counts, or give the one that it was made from with --config.model.checkpoint=DIR"
        )
    return digest


def _is_stage(recorded: str) -> bool:
    """Returns whether a recorded base is a stage, whose result is another one when it has gone on."""
    folder = remote.records(recorded)
    return folder.exists() and not common.is_hugging_face(folder)


def grader_digests(reward: RewardConfig) -> dict[str, str]:
    """Returns {file or module: digest of its source} of the graders of config.reward.graders."""
    digests = {}
    for target in plugins.parse(reward.graders).values():
        name = target.rpartition(":")[0]
        try:
            path = name if name.endswith(".py") else getattr(importlib.util.find_spec(name), "origin", None)
        except (ImportError, ValueError):
            continue  # plugins.check raises the error
        if path and Path(path).is_file():
            digests[name] = common.file_digest(path)
    return digests


def start_folder(config: Config, workdir: Path) -> Path | None:
    """Returns the folder of the stage whose result this one starts from, None if it starts from a base."""
    return require(config.start, config, workdir) if config.start else None


def start_weights(config: Config, mesh, workdir: Path) -> Any:
    """Returns the float32 weights a stage starts from: the result of config.start, else the base."""
    folder = start_folder(config, workdir)
    if folder is None:
        return base_weights(config, mesh, workdir)
    return tree.cast(common.load_weights(config.model, mesh, str(folder)), jnp.float32)


def base_weights(config: Config, mesh, workdir: Path) -> Any:
    """Returns the base that a stage's result is compared with: config.model.checkpoint, else the base that the stage it
    starts from names in its config.json, else the preset's own base model.
    """
    source = config.model.checkpoint
    if source or (source := remote.local(_base_of_start(config.start, config.inputs, workdir)[0])):
        return tree.cast(common.load_weights(config.model, mesh, source), jnp.float32)
    known = {entry.name: entry.presets for entry in configs.entries()}["stage0_base"]
    if config.preset not in known:
        raise ValueError(
            f"preset '{config.preset}' has no base model of its own; give the starting weights with "
            "--config.model.checkpoint=DIR (a Hugging Face folder)"
        )
    base = replace(configs.load(f"stage0_base:{config.preset}"), seed=0)
    return _own_base(config, base, mesh, workdir)


def _own_base(config: Config, base: Config, mesh, workdir: Path) -> Any:
    """Returns the base model: the shipped one if it fits `base` (the stage0_base config), else a newly trained one."""
    path = stage0_base.asset_path(config.preset)
    if not config.rebuild_base and path.exists():
        key = stage0_base.base_key(base.model, base.pretrain, base.optimizer, base.pack, base.auxiliary)
        if common.asset_metadata(path).get("key") == key:
            return common.load_asset(path, config.model, mesh)
    folder = common.StageFolder(base, Path(workdir) / f"base_{config.preset}")  # teacher and student have their own
    if folder.finished({}) is None:
        resolved, tokenizer, base_mesh = common.prepare(replace(base, mesh=config.mesh))
        stage0_base.pretrain(parts_of(parts.TrainingParts, resolved), resolved.pretrain, tokenizer, base_mesh, folder)
    return common.load_weights(config.model, mesh, str(folder.path))


def base(config: Config, mesh, workdir: Path) -> Base:
    """Returns the base of a stage; its weights are those of `base_weights`, loaded when they are asked for."""
    return Base(base_name(config.input_preset), functools.partial(base_weights, config, mesh, workdir))


def _base_of_start(start: str, inputs: str, workdir: Path) -> tuple[str, str]:
    """Returns (base, digest of it then) of the run that made config.start, or of the nearest earlier one that names a
    base in config.model.checkpoint; "" for what is not known."""
    if not start:
        return "", ""
    folder = Path(inputs or workdir) / start
    return hosts.decide(_base_of_run, folder, name=f"the base of {folder}")


def _base_of_run(folder: Path) -> tuple[str, str]:
    seen: set[Path] = set()
    while folder not in seen and (folder / "config.json").exists():
        seen.add(folder)
        fields = json.loads((folder / "config.json").read_text())
        if base := fields.get("model.checkpoint", ""):
            marker = folder / common.DONE
            return base, json.loads(marker.read_text())["inputs"].get(base, "") if marker.exists() else ""
        if not fields.get("start"):
            break
        folder = remote.records(f"{fields.get('inputs') or remote.beside(folder)}/{fields['start']}")
    return "", ""


def reward_model_folders(config: Config, workdir: Path) -> dict[str, Path]:
    """Returns {task: folder} of the reward models that config.scenarios uses; a missing stage is run first.

    Raises ValueError for a folder without a finished stage.
    """
    folders = {}
    for use in REWARD_MODELS.values():
        name = getattr(config.scenarios, use.field)
        if not name or config.scenarios.from_update < 0:
            continue
        folders[use.task] = require(name, config, workdir) if name in RESULTS else Path(name)
        if not hosts.decide((folders[use.task] / common.DONE).exists, name=f"what is in {folders[use.task]}"):
            raise ValueError(f"{name} holds no finished reward model; give a folder of reward_helpful or reward_safety")
    return folders


def reward_models(config: Config, workdir: Path) -> dict[str, str]:
    """Returns {stage or folder: digest of its result} of the reward models that config.scenarios uses."""
    folders = reward_model_folders(config, workdir)
    return {
        getattr(config.scenarios, use.field): output_digest(folders[use.task])
        for use in REWARD_MODELS.values()
        if use.task in folders
    }
