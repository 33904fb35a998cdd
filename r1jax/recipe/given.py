"""What a graph, or an ablation, gives to the stages that it runs: their size, the base, the problems; and what it must have."""

import dataclasses

from r1jax import config as configs
from r1jax.recipe import problems
from r1jax.schema import Config, DataConfig, replace

OF_STUDENT = ("distill", "student_rl")  # stages that train a student, from a base of its own
REWARD_MODELS = ("reward_helpful", "reward_safety")  # stages whose rows are pairs and labels, not problems


def preset(stage: str, size: str) -> str:
    """Returns at which preset a stage runs for a recipe of `size`: a student has a size of its own."""
    return configs.student_of(size) if stage in OF_STUDENT else size


def stage_config(config: Config, spec: str, overrides: list[tuple[str, str]] | None = None) -> Config:
    """Returns the config NAME:PRESET with the seed, evaluation, base and problems of the graph's or the ablation's `config`.

    The base (config.model.checkpoint) goes to the stages that train the policy or start from it, the changed fields of
    config.data to all that read problems. Overrides go before the base and the problems.
    """
    own = configs.load(spec, overrides or ())
    own = replace(own, seed=config.seed, evaluation=config.evaluation)
    if own.stage not in OF_STUDENT and not own.model.checkpoint:
        own = replace(own, model=replace(own.model, checkpoint=config.model.checkpoint))
    if own.stage not in REWARD_MODELS:
        own = replace(own, data=_with_changes(own.data, config.data, configs.keys(overrides or ())))
    return own


def _with_changes(own: DataConfig, given: DataConfig, kept: list[str]) -> DataConfig:
    """Returns a stage's data with the fields of `given` that are not the defaults, apart from the dotted keys `kept`."""
    changed = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(DataConfig)
        if getattr(given, field.name) != field.default and f"data.{field.name}" not in kept
    }
    return replace(own, **changed)


def require(own: Config, setting: str, config: Config) -> None:
    """Raises ValueError, in one line, when a stage would find no weights or no rows: sizes outside the tiny world have none.

    `config` is the graph's or the ablation's, which the line names; `setting` is how a field of this stage alone is given in
    it, with FIELD in the place of the field and its value.
    """
    if own.data.world == "tiny":
        return
    who, alone = f"{config.stage}:{config.preset}: {own.stage}", setting.replace
    if not own.model.checkpoint:
        base = "--config.model.checkpoint=DIR"
        if own.stage in OF_STUDENT:
            who, base = f"{who}:{own.preset}", alone("FIELD", "model.checkpoint=DIR")
        raise ValueError(f"{who} has no weights to start from; give its base with {base} (a Hugging Face folder)")
    if own.stage in REWARD_MODELS and not own.data.path:
        raise ValueError(
            f"{who} has no rows to learn from; give some with {alone('FIELD', 'data.path=FILE.jsonl')} (rows with prompt "
            "and chosen, rejected or a label)"
        )
    if own.stage not in (*REWARD_MODELS, "distill") and not problems.has_files(own.data):
        raise ValueError(
            f"{who} has no problems; give some with --config.data.path=FILE.jsonl (rows with id, task, prompt and answer)"
        )
