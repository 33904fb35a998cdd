"""What a stage inherits from the graph, the ablation or the stage that needs it: size, seed, base and problems."""

import dataclasses
from collections.abc import Sequence

from r1jax import config as configs
from r1jax import stage_table
from r1jax.recipe import problems
from r1jax.schema import Config, DataConfig, replace

OF_STUDENT = ("distill", "student_rl")  # stages that train a student, from a base of its own


def preset(stage: str, size: str) -> str:
    """Returns the preset of a stage in a recipe of `size`: a student's size differs from the teacher's."""
    return configs.student_of(size) if stage in OF_STUDENT else size


def stage_config(config: Config, spec: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Returns the config NAME:PRESET of a stage with seed, evaluation, base and problems of `config`, watched as it is.

    `config` is that of the graph, the ablation or the stage that needs it. Stages that train the policy or start from
    it get the base (config.model.checkpoint), stages that read problems get the changed fields of config.data, if
    those are of problems too. Overrides win over both.
    """
    loaded = replace(configs.load(spec), seed=config.seed, evaluation=config.evaluation, watch=config.watch)
    if loaded.stage not in OF_STUDENT and not loaded.model.checkpoint:
        loaded = replace(loaded, model=replace(loaded.model, checkpoint=config.model.checkpoint))
    if not (_learns_from_pairs(loaded.stage) or _learns_from_pairs(config.stage)):
        loaded = replace(loaded, data=_with_changes(loaded.data, config.data))
    return configs.override(loaded, overrides)


def _learns_from_pairs(stage: str) -> bool:
    """Returns whether a stage trains a reward model: its rows are pairs or labels, not problems."""
    return stage_table.reads(stage, "reward_model")


def _with_changes(stage_data: DataConfig, changes: DataConfig) -> DataConfig:
    """Returns a stage's data with the fields of `changes` that are not the defaults."""
    changed = {
        field.name: getattr(changes, field.name)
        for field in dataclasses.fields(DataConfig)
        if getattr(changes, field.name) != field.default
    }
    return replace(stage_data, **changed)


def require(stage_config: Config, setting: str, config: Config) -> None:
    """Raises ValueError, in one line, if a stage outside the tiny world has no weights or no rows.

    `config` is the graph's or the ablation's, which the line names; `setting` is the option that sets a field of this
    stage alone, with FIELD in place of the field and its value.
    """
    if stage_config.data.world == "tiny":
        return
    who = f"{config.stage}:{config.preset}: {stage_config.stage}"
    if not stage_config.model.checkpoint:
        base = "--config.model.checkpoint=DIR"
        if stage_config.stage in OF_STUDENT:
            who, base = f"{who}:{stage_config.preset}", setting.replace("FIELD", "model.checkpoint=DIR")
        raise ValueError(f"{who} has no weights to start from; give its base with {base} (a Hugging Face folder)")
    if _learns_from_pairs(stage_config.stage):
        if not stage_config.data.path:
            raise ValueError(
                f"{who} has no rows to learn from; give some with {setting.replace('FIELD', 'data.path=FILE.jsonl')} "
                "(rows with prompt and chosen, rejected or a label)"
            )
    elif stage_config.stage != "distill" and not problems.has_files(stage_config.data):
        raise ValueError(
            f"{who} has no problems; give some with --config.data.path=FILE.jsonl (rows with id, task, prompt and "
            "answer)"
        )
