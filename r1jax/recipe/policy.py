"""What every RL stage does: start weights, prompts by phase, the loop, curves, evaluation before and after."""

import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import checkpoint, hosts, sharding, tree
from r1jax.core.metrics import read, read_timing
from r1jax.core.say import say
from r1jax.evals.behaviour import reflective_count
from r1jax.models import decoder
from r1jax.recipe import (
    common,
    compute,
    evaluate,
    lineage,
    parts,
    prompts,
    reward_models,
    stage_report,
    template_check,
    train_eval,
)
from r1jax.recipe.parts import PromptParts
from r1jax.recipe.progress import Progress
from r1jax.report import curves
from r1jax.report.phases import PHASES, mfu_by_phase, seconds_by_phase
from r1jax.rewards import plugins
from r1jax.rewards.models.reward_model import RewardModel
from r1jax.rl import losses
from r1jax.rl.assemble import Training, assemble
from r1jax.rl.objective import Objective
from r1jax.rl.rollout import EncodedPrompt, Mixture, PromptPhases
from r1jax.rl.settings import RunSettings, of_config
from r1jax.rl.state import RunInputs
from r1jax.sampler import jetstream
from r1jax.schema import Config, MeshConfig, ModelConfig, PackConfig, parts_of

CURVES = ("accuracy", "length", "reflective_words")


def run(config: Config, workdir: Path) -> dict:
    """Trains, resuming a stopped run, evaluates base and result on held-out problems and returns the figures."""
    folder = common.StageFolder(config, workdir)
    folder.check()
    inputs = lineage.inputs(config, workdir) | lineage.reward_models(config, workdir)
    if (figures := evaluate.finished(folder, inputs)) is not None:
        return figures
    resolved, tokenizer, mesh = common.prepare(config, lineage.start_folder(config, workdir))
    stage_prompts = prompts.load(parts_of(parts.PromptParts, resolved), tokenizer)
    template_check.check(resolved.stage, resolved.data, resolved.reward, tokenizer, stage_prompts.training.all)
    if notice := jetstream.notice():
        say(notice)
    if losses.k1_in_loss(config.grpo):
        say(f"warning: {losses.K1_WARNING}")
    started, name = time.monotonic(), lineage.result_name(config.stage)
    folders = lineage.reward_model_folders(resolved, workdir)
    sampling_mesh = sampler_mesh(resolved.mode, resolved.sampler_mesh, mesh)
    progress = Progress(name, resolved.grpo.updates)
    measure = train_eval.measure(parts_of(train_eval.TrainEvalParts, resolved), tokenizer, stage_prompts)
    folder.hold()
    training = make_training(
        of_config(resolved),
        tokenizer,
        mesh,
        stage_prompts.training,
        None if folder.newest_checkpoint() is not None else lineage.start_weights(resolved, mesh, workdir),
        folder.path,
        later(parts_of(parts.PromptParts, resolved), tokenizer, stage_prompts),
        on_update=lambda update, row, timing: progress.update(update, **shown(row, timing)),
        describe=lambda texts: describe(texts, stage_prompts.source.reflective_words),
        reward_models=load_reward_models(folders, tokenizer, sampling_mesh, resolved.pack, resolved.model),
        measure=measure,
    )
    folder.start(inputs)
    template = prompts.template(resolved.stage, resolved.data, tokenizer)
    common.write_model(folder.path, resolved.model, resolved.data, tokenizer, template)
    updates, every_s = resolved.grpo.updates, resolved.watch.report_every_s
    with stage_report.while_working(folder.path, name, every_s, updates) as work:
        with progress:
            trained = training.train()
        work.updates = None
        programs = training.run.programs.counts()
        del training
        # Its parts refer to one another; optimiser, reference and sampler would stay beside the evaluation's.
        gc.collect()
        if hosts.is_writer():
            write_curves(folder.path)
        figures: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), "updates": updates}
        figures["programs"] = programs
        figures |= train_eval.kept(resolved.train_eval, folder.path)
        figures["data"] = stage_prompts.counts
        figures["compute"] = hosts.decide(
            lambda: compute.of_policy_training(read(folder.path), resolved.network, resolved.grpo)
        )
        figures["split"] = hosts.decide(time_split, folder.path)
        if mfu := hosts.decide(lambda: mfu_by_phase(read_timing(folder.path)), name="the MFU of the run"):
            figures["mfu"] = mfu
        figures |= evaluate.before_and_after(
            parts_of(parts.EvaluationParts, resolved),
            tokenizer,
            mesh,
            stage_prompts,
            lineage.base(resolved, mesh, workdir),
            trained,
            workdir,
            folder.path,
        )
        if stage_prompts.held_out:
            figures["ratios"] = ratios(figures[lineage.BASE], figures[name])
        checkpoint.write_json(folder.path / "figures.json", figures)
        digest = tree.digest(trained)
    evaluate.write_report(config.stage, workdir, name, figures)
    return folder.finish(figures, inputs, digest)


def make_training(
    run: RunSettings,
    tokenizer: Tokenizer,
    mesh: Mesh,
    training: Mixture | Sequence[EncodedPrompt],
    params: decoder.Params | None,
    folder: Path,
    later: tuple | None = None,
    objective: Objective | None = None,
    **more,
) -> Training:
    """Returns the parts of a run on the devices of `run.mode`; ValueError when the sampler's devices do not exist.

    `params` are the start weights, which are not kept, or None where the folder has a checkpoint to go on from.
    `later` is (update, sources, weights): the mixture of prompts from that update on, in place of `training`. Without
    an `objective`, config.grpo.advantage chooses it. `more` are further fields of RunInputs.
    """
    if run.mode == "disaggregated":
        hosts.require_one("config.mode=disaggregated")
        more["sampler_mesh"] = sampler_mesh(run.mode, run.sampler_mesh, mesh)
    phases = PromptPhases(training, later, run)
    return assemble(run, RunInputs(tokenizer, mesh, phases, params, folder, **more), objective)


def sampler_mesh(mode: str, sampler_mesh: MeshConfig, mesh: Mesh) -> Mesh:
    """Returns the mesh of the sampler and the reward models: the trainer's, or the devices after it (disaggregated)."""
    if mode == "colocated":
        return mesh
    return sharding.make_mesh(sampler_mesh, jax.devices()[mesh.size :], "sampler_mesh")


def later(settings: PromptParts, tokenizer: Tokenizer, stage_prompts: prompts.StagePrompts):
    """Returns (update, prompt sources, weights) of the mixture with general and safety prompts, or None without one.

    Raises ValueError when there are no such prompts, or nothing rewards them: rows of files need a reward model, or a
    grader of config.reward.graders.
    """
    scenarios = settings.scenarios
    if scenarios.from_update < 0:
        return None
    scenario_problems = {"general": stage_prompts.source.general(), "safety": stage_prompts.source.safety()}
    custom_graders = plugins.parse(settings.reward.graders)
    for use in lineage.REWARD_MODELS.values():
        task, field = use.task, use.field
        if not scenario_problems[task]:
            raise ValueError(
                f"{settings.stage}: no row of task {task} for config.scenarios.from_update={scenarios.from_update}; "
                f"give some in config.data.path or config.data.{task}_path, or set it to -1"
            )
        if stage_prompts.source.inputs and not getattr(scenarios, field) and task not in custom_graders:
            raise ValueError(
                f"{settings.stage}: nothing rewards the rows of task {task}; name a reward model with "
                f"--config.scenarios.{field}=FOLDER, or a grader with --config.reward.graders={task}=FILE.py:FUNCTION"
            )
    reasoning_fraction = 1 - scenarios.general_fraction - scenarios.safety_fraction
    weights = [
        weight * reasoning_fraction / sum(stage_prompts.training.weights) for weight in stage_prompts.training.weights
    ]
    sources = [
        *stage_prompts.training.sources,
        *(prompts.encode(problems, settings, tokenizer) for problems in scenario_problems.values()),
    ]
    return scenarios.from_update, sources, (*weights, scenarios.general_fraction, scenarios.safety_fraction)


def load_reward_models(
    folders: Mapping[str, Path], tokenizer: Tokenizer, mesh: Mesh, pack: PackConfig, model: ModelConfig
) -> dict[str, RewardModel]:
    """Returns the reward models of {task: folder}, by task."""
    return {
        use.task: reward_models.load(folders[use.task], use.kind, tokenizer, mesh, pack, model)
        for use in lineage.REWARD_MODELS.values()
        if use.task in folders
    }


def describe(texts: list[str], words: Sequence[str] = ()) -> dict[str, float]:
    """Returns the behaviour figures of a rollout's texts; `words` are reflective words besides the paper's."""
    counts = [reflective_count(text, words) for text in texts]
    return {"reflective_words": sum(counts) / max(len(counts), 1)}


def shown(row: dict[str, float], timing: dict[str, float]) -> dict[str, float]:
    """Returns the figures of the progress line: reward, accuracy, length, words, tokens/s, MFU, split of the time."""
    phases = {phase: timing[f"{phase}_s"] for phase in PHASES if f"{phase}_s" in timing}
    total = sum(phases.values()) or 1.0
    speed = {"tok/s": timing["rollout_tokens_per_s"]} if "rollout_tokens_per_s" in timing else {}
    figures = {name: row[name] for name in ("reward", "accuracy", "length", "reflective_words") if name in row}
    speed |= {"mfu": timing["update_mfu"]} if "update_mfu" in timing else {}
    return figures | speed | {name: seconds / total for name, seconds in phases.items()}


def time_split(folder: Path) -> dict[str, float]:
    """Returns the share of each phase in the measured time of all updates."""
    seconds = seconds_by_phase(read_timing(folder))
    total = sum(seconds.values()) or 1.0
    return {phase: one / total for phase, one in seconds.items()}


def ratios(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Returns after / before of accuracy, length and reflective words."""
    names = {"pass@1": "pass@1", "mean_tokens": "length", "reflective_per_response": "reflective_words"}
    return {short: after[name] / before[name] if before[name] else float("inf") for name, short in names.items()}


def write_curves(folder: Path) -> None:
    """Writes curves.csv and curves.png: accuracy, length and reflective words per update."""
    rows = read(folder)
    curves.write_csv(rows, folder / "curves.csv", ("update", "reward", *CURVES))
    curves.plot(rows, folder / "curves.png")
