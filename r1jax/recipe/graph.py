"""The recipe as a graph of stages: finished ones are skipped, stopped ones resumed, stale ones refused."""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from r1jax import config as configs
from r1jax import stage_table
from r1jax.core import checkpoint, files, hosts, lock, remote, wandb_log
from r1jax.core.say import say
from r1jax.recipe import common, evaluate, export_hf, inherited, lineage, reward_models, stage_report
from r1jax.report import html, table
from r1jax.schema import Config, GateConfig, replace

# Stage -> the stages whose results it reads, in an order that can be run.
GRAPH: dict[str, tuple[str, ...]] = {
    "r1_zero": (),
    "stage1_coldstart": ("r1_zero",),
    "stage2_reasoning_rl": ("stage1_coldstart",),
    "stage3_rejection_sft": ("stage2_reasoning_rl",),
    "reward_helpful": ("stage3_rejection_sft",),
    "reward_safety": ("stage3_rejection_sft",),
    "stage4_all_scenarios": ("stage3_rejection_sft", "reward_helpful", "reward_safety"),
    "distill": ("stage3_rejection_sft",),
    "student_rl": (),
}
EXPORTED = ("stage4_all_scenarios", "distill")  # R1 and the student are exported as Hugging Face folders
LOCK = ".graph.lock"
REMADE = ".graph_from.json"  # what a stopped run with --config.from has removed
COLUMNS = (
    *("checkpoint", "problems", "pass@1", "pass@1_se", "greedy", "mean_tokens", "truncated", "unscorable"),
    "reflective_per_response",
    *(
        "language_consistency",
        "arithmetic_true",
        "first_guess_accuracy",
        "final_accuracy",
        "fixed",
        "broken",
        "compute",
    ),
)


def run(config: Config, workdir: Path) -> dict:
    """Runs the stages that are not done, in order, and returns the summary, which is also `workdir/summary.json`.

    Raises ValueError for an unknown stage, a stale one, a missing input of `only`, or a result below its gate.
    """
    workdir, stages = Path(workdir), stage_configs(config)
    if config.list:
        return hosts.decide(listing, stages, workdir, name="the states of the stages")
    chosen, again = chosen_stages(config), bool(config.from_stage)
    for stage in chosen:
        inherited.require(stages[stage], f"--config.set={stage}.FIELD", config)
        wandb_log.require(stages[stage].watch.wandb_project)
    hosts.decide(_refuse_unready, chosen, stages, workdir, again, name="the states of the stages")
    hosts.decide(lock.hold, workdir / LOCK, name="the lock of the graph")
    try:
        return _run(config, chosen, stages, workdir)
    finally:
        lock.release(workdir / LOCK)


def _run(config: Config, chosen: list[str], stages: dict[str, Config], workdir: Path) -> dict:
    started, mark = time.monotonic(), workdir / REMADE
    remade = {"config": configs.config_hash(config, remote.shown), "stages": list(chosen)}
    if config.from_stage:
        older = hosts.decide(_older, mark, remade, stages, workdir, name=str(mark))
        for stage in older:
            common.StageFolder(stages[stage], workdir).hold()
        hosts.decide(_remove, older, workdir, name="the removal of older results")
        checkpoint.write_json(mark, remade)
    with _report_while_working(chosen, workdir, config.watch.report_every_s):
        for stage in chosen:
            say(f"== {stage}")
            figures = stage_table.function(stage)(stages[stage], workdir)
            if awaited := figures.get("awaits"):
                raise ValueError(f"{stage} waits for the verdicts in {awaited}; run again when they are complete")
            hosts.decide(hold_gate, stage, stages[stage].gate, workdir, name=f"the gate of {stage}")
        export(hosts.decide(_to_export, workdir, name="what is exported"), stages, workdir)
        summary = hosts.decide(summarize, workdir, round(time.monotonic() - started, 1), name="the summary")
        checkpoint.write_json(workdir / "summary.json", summary)
    if hosts.is_writer():
        _show(summary, workdir)
        mark.unlink(missing_ok=True)
    return summary


def _report_while_working(
    chosen: Sequence[str], workdir: Path, every_s: float
) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which `workdir/report.html` shows the results of finished stages and the curves of all."""

    def write(subtitle: str, reload_s: int) -> None:
        stages = html.collect(workdir, _results())
        html.write_run(workdir / "report.html", summarize(workdir, 0.0), stages, subtitle, reload_s)

    def status() -> str:
        waiting = [stage for stage in chosen if not (workdir / stage / common.DONE).exists()]
        return f"{waiting[0] if waiting else 'export'}, {len(chosen) - len(waiting)} of {len(chosen)} stages done"

    return stage_report.refreshed(write, status, every_s)


def _show(summary: dict, workdir: Path) -> None:
    """Writes report.html, and prints the table and where the results are."""
    stage_report.write_or_warn(workdir / "report.html", summary, workdir, _results())
    table.render(rows(summary), evaluate.columns(rows(summary), COLUMNS), "the recipe on held-out problems")
    evaluate.print_groups(rows(summary))
    evaluate.print_faithfulness(rows(summary))
    reward_models.show(summary["reward_models"])
    for name in ("report.html", "summary.json", *(f"export/{lineage.RESULTS[stage]}" for stage in EXPORTED)):
        say(f"  {workdir / name}")


def stage_configs(config: Config) -> dict[str, Config]:
    """Returns every stage's own config with what the graph hands to it and its overrides (STAGE.FIELD=VALUE).

    Raises ValueError for an override that names no stage or field, and for a field of `config` that reaches no stage.
    """
    _refuse_unread(config)
    overrides: dict[str, list[tuple[str, str]]] = {stage: [] for stage in GRAPH}
    sizes = {stage: inherited.preset(stage, config.preset) for stage in GRAPH}
    for entry in config.set:
        key, equals, value = entry.partition("=")
        stage, dot, field = key.partition(".")
        if stage not in GRAPH or not dot or not equals:
            raise ValueError(f"config.set={entry}: needs STAGE.FIELD=VALUE; {configs.hint(stage, GRAPH)}{_known()}")
        if field == "preset" and stage in inherited.OF_STUDENT:
            sizes[stage] = value
        else:
            overrides[stage].append((field, value))
    result = {}
    for stage in GRAPH:
        stage_config = inherited.stage_config(config, f"{stage}:{sizes[stage]}")
        result[stage] = configs.override(replace(stage_config, rebuild_base=config.rebuild_base), overrides[stage])
        stage_table.check(result[stage], configs.keys(overrides[stage]), also=stage_table.BY_GRAPH)
    return result


def _refuse_unread(config: Config) -> None:
    """Raises ValueError for a changed field that the graph passes to no stage."""
    usual = configs.flatten(configs.load(f"{config.stage}:{config.preset}"))
    for name, value in configs.flatten(config).items():
        if value != usual[name]:
            stage_table.check(config, [name])


def chosen_stages(config: Config) -> list[str]:
    """Returns the stages to run, in order: all, those of `only`, or `from_stage` and what depends on it.

    Raises ValueError for an unknown stage and when both fields are given.
    """
    if config.only and config.from_stage:
        raise ValueError(f"config.only={','.join(config.only)} and config.from={config.from_stage}: give one of them")
    for stage in (*config.only, *([config.from_stage] if config.from_stage else [])):
        if stage not in GRAPH:
            raise ValueError(f"no stage named '{stage}' in the graph; {configs.hint(stage, GRAPH)}{_known()}")
    if config.only:
        return [stage for stage in GRAPH if stage in config.only]
    if not config.from_stage:
        return list(GRAPH)
    wanted = {config.from_stage}
    for stage, needed in GRAPH.items():
        if wanted & set(needed):
            wanted.add(stage)
    return [stage for stage in GRAPH if stage in wanted]


def state(stage: str, stages: dict[str, Config], workdir: Path) -> str:
    """Returns done, stale, stopped or missing, and runs nothing; a stage is stale if one before it is not done."""
    own_state = _own_state(stage, stages, workdir)
    remade = any(state(name, stages, workdir) != "done" for name in GRAPH[stage])
    return "stale" if own_state == "done" and remade else own_state


def _own_state(stage: str, stages: dict[str, Config], workdir: Path) -> str:
    """Returns the state by the stage's own config and by the inputs that exist now."""
    folder = common.StageFolder(stages[stage], workdir)
    marker = folder.path / common.DONE
    if not marker.exists():
        return folder.state({})
    recorded = json.loads(marker.read_text())["inputs"]
    return folder.state({name: lineage.digest_now(name, workdir, digest) for name, digest in recorded.items()})


def listing(stages: dict[str, Config], workdir: Path) -> dict:
    """Prints and returns the state of every stage: done, stale, stopped or missing."""
    states = {stage: state(stage, stages, workdir) for stage in stages}
    shown = [{"stage": stage, "state": current, "needs": ", ".join(GRAPH[stage])} for stage, current in states.items()]
    table.render(shown, ("stage", "state", "needs"), remote.shown(str(workdir)))
    return states


def hold_gate(stage: str, gate: GateConfig, workdir: Path) -> None:
    """Raises ValueError when the stage's result is below its gate."""
    name = lineage.result_name(stage)
    figures = json.loads((workdir / stage / common.DONE).read_text())["figures"].get(name, {})
    for field, figure in (("pass_at_1", "pass@1"), ("language_consistency", "language_consistency")):
        least = getattr(gate, field)
        if least and figures.get(figure, 0.0) < least:
            raise ValueError(
                f"gate: {name} has {figure} {figures.get(figure, 0.0):.3f}, below config.gate.{field}={least} of "
                f"{stage}; the graph stops here"
            )


def summarize(workdir: Path, wall_s: float) -> dict:
    """Returns {"checkpoints": {name: figures}, "reward_models": {name: held-out figures}, "wall_s": seconds}.

    Only finished stages are included.
    """
    checkpoints: dict[str, dict] = {}
    models: dict[str, dict] = {}
    for stage in GRAPH:
        marker = workdir / stage / common.DONE
        if not marker.exists():
            continue
        figures = json.loads(marker.read_text())["figures"]
        name = lineage.RESULTS[stage]
        if stage in lineage.REWARD_MODELS:
            models[name] = figures["held_out"]
            continue
        if name not in figures:
            continue  # the stage had no held-out problems
        if stage == "r1_zero":
            checkpoints[lineage.BASE] = figures[lineage.BASE] | {"compute": 0.0}
        checkpoints[name] = figures[name] | {"compute": figures["compute"]}
    return {"checkpoints": checkpoints, "reward_models": models, "wall_s": wall_s}


def _to_export(workdir: Path) -> list[str]:
    """Returns the stages whose result is to be exported: once both are done, those that were made since the last time.

    What was exported of them before is removed.
    """
    if any(not (workdir / stage / common.DONE).exists() for stage in EXPORTED):
        return []
    stale = []
    for stage in EXPORTED:
        target, stamp = _exported(stage, workdir)
        if not (target.exists() and stamp.exists() and stamp.read_text() == lineage.output_digest(workdir / stage)):
            shutil.rmtree(target, ignore_errors=True)
            stale.append(stage)
    return stale


def _exported(stage: str, workdir: Path) -> tuple[Path, Path]:
    """Returns (the folder that a stage's result is exported to, the file with the digest of that result)."""
    name = lineage.RESULTS[stage]
    return workdir / "export" / name, workdir / "export" / f"{name}.digest"


def export(chosen: Sequence[str], stages: dict[str, Config], workdir: Path) -> None:
    """Writes the results of stages to `workdir/export/` as Hugging Face folders.

    Each is exported on the mesh of its stage and in the dtype of its size (configs/export_hf.py).
    """
    for stage in chosen:
        target, stamp = _exported(stage, workdir)
        changes = dict(mesh=stages[stage].mesh, checkpoint=str(workdir / stage), output=str(target))
        export_hf.run(replace(configs.load(f"export_hf:{stages[stage].preset}"), **changes), workdir)
        digest = lineage.output_digest(workdir / stage)
        if hosts.is_writer():
            files.write_text(stamp, digest)


def _results() -> dict[str, str]:
    """Returns {stage: name of its result}."""
    return {stage: lineage.RESULTS[stage] for stage in GRAPH}


def rows(summary: dict) -> list[dict]:
    """Returns the summary as table rows."""
    return [{"checkpoint": name, **figures} for name, figures in summary["checkpoints"].items()]


def _older(mark: Path, remade: dict, stages: dict[str, Config], workdir: Path) -> list[str]:
    """Returns the stages to be removed before they are made again: all that `remade` names.

    Where the same command has removed them before and did not come to its end since, it goes on: then only those that
    have become stale.
    """
    if mark.exists() and json.loads(mark.read_text()) == remade:
        return [stage for stage in remade["stages"] if state(stage, stages, workdir) == "stale"]
    return remade["stages"]


def _remove(older: list[str], workdir: Path) -> None:
    """Removes the folders of stages that are to be made again."""
    for stage in older:
        shutil.rmtree(workdir / stage, ignore_errors=True)


def _refuse_unready(chosen: list[str], stages: dict[str, Config], workdir: Path, again: bool) -> None:
    """Raises ValueError for a stage that is missing or stale; with `again` the chosen stages may be stale."""
    needed = {name for stage in chosen for name in GRAPH[stage]} - set(chosen)
    for name in (name for name in GRAPH if name in needed):
        if not (workdir / name / common.DONE).exists():
            reader = next(stage for stage in chosen if name in GRAPH[stage])
            raise ValueError(
                f"{reader} needs {name}, which is not done in {workdir}; run with --config.only={name} first"
            )
    for name in () if again or len(chosen) == 1 else chosen:
        _refuse_longer(name, stages, workdir)
    kept = needed if again else needed | set(chosen)
    for name in (name for name in GRAPH if name in kept):
        if (_own_state if name in chosen else state)(name, stages, workdir) == "stale":
            raise ValueError(
                f"{workdir / name} is stale: its config or an input has changed; run again with --config.from={name}"
            )


def _refuse_longer(name: str, stages: dict[str, Config], workdir: Path) -> None:
    """Raises ValueError for a finished stage that would become longer while other finished ones were made from it."""
    if not (workdir / name / common.DONE).exists() or _own_state(name, stages, workdir) != "stopped":
        return
    readers = [other for other in GRAPH if name in GRAPH[other] and (workdir / other / common.DONE).exists()]
    if readers:
        raise ValueError(
            f"{workdir / name} is finished and would become longer, and {readers[0]} was made from its result; run it "
            f"alone with --config.only={name}, then the others again with --config.from={readers[0]}"
        )


def _known() -> str:
    return f"known: {', '.join(GRAPH)}"
