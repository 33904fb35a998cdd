"""An ablation: variants of stages over the same inputs, one table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from r1jax import config as configs
from r1jax import stage_table
from r1jax.core import checkpoint
from r1jax.core.say import say
from r1jax.recipe import inherited, lineage
from r1jax.report import table
from r1jax.schema import Config, replace

COLUMNS = (
    "variant",
    "pass@1",
    "pass@1_se",
    "greedy",
    "language_consistency",
    "mean_tokens",
    "arithmetic_true",
    "compute",
)
# Stages whose result is measured on held-out problems.
COMPARED = tuple(stage for stage in lineage.RESULTS if stage not in ("stage0_base", *lineage.REWARD_MODELS))
SEEDS_COLUMNS = (
    *("variant", "seeds", "pass@1", "pass@1_sd", "language_consistency", "language_consistency_sd"),
    *("mean_tokens", "mean_tokens_sd"),
)


def run(config: Config, workdir: Path) -> dict:
    """Runs every variant in `workdir/NAME/VARIANT/` on the stages in `workdir`; missing stages are run first.

    Returns {variant: figures} and writes it to `workdir/NAME/table.json`. With config.seeds each seed has its own
    `workdir/seed_N` with inputs and table, and the result has the figures' means over the seeds, their sample standard
    deviations as FIGURE_sd, and the number of seeds. Raises ValueError for a malformed variant, one with a field that
    its stage does not read, or a seed that is given twice.
    """
    parsed, workdir = [parse(variant) for variant in config.variants], Path(workdir)
    if len(set(config.seeds)) < len(config.seeds):
        raise ValueError(f"config.seeds={config.seeds}: a seed is given twice")
    for name, stage, overrides in parsed:  # before the first one runs
        variant_config = _variant_config(config, stage, overrides)
        stage_table.check(variant_config, configs.keys(overrides))
        inherited.require(variant_config, f"--config.variants=('{name} {stage} FIELD ...', ...)", config)
    folder = workdir / config.stage / config.output
    if not config.seeds:
        figures_of_variant = _one_seed(config, parsed, workdir)
    else:
        by_seed = [_one_seed(replace(config, seed=seed), parsed, workdir / f"seed_{seed}") for seed in config.seeds]
        figures_of_variant = {name: over_seeds([figures[name] for figures in by_seed]) for name, *_ in parsed}
        rows = [{"variant": name, **figures} for name, figures in figures_of_variant.items()]
        table.render(rows, SEEDS_COLUMNS, f"{config.output}, mean of seeds {', '.join(map(str, config.seeds))}")
    checkpoint.write_json(folder / "table.json", figures_of_variant)
    return figures_of_variant


def _variant_config(config: Config, stage: str, overrides: list[tuple[str, str]]) -> Config:
    """Returns the config of a variant: its stage at the size of the ablation, or of its student."""
    return inherited.stage_config(config, f"{stage}:{inherited.preset(stage, config.preset)}", overrides)


def _one_seed(config: Config, variants: list[tuple[str, str, list[tuple[str, str]]]], workdir: Path) -> dict:
    """Returns {variant: figures} of one seed, prints them and writes them to `workdir/NAME/table.json`."""
    folder, figures_of_variant = workdir / config.stage / config.output, {}
    for name, stage, overrides in variants:
        variant_config = replace(_variant_config(config, stage, overrides), inputs=str(workdir))
        say(f"== {name}, seed {config.seed}")
        figures = stage_table.function(stage)(variant_config, folder / name)
        if (result := lineage.RESULTS[stage]) not in figures:
            raise ValueError(
                f"config.variants: {name} has no held-out problems to be compared on; give some with {stage}'s "
                "data.eval_path, or a data.holdout_fraction above 0"
            )
        figures_of_variant[name] = figures[result] | {"compute": figures["compute"]}
    table.render([{"variant": name, **figures} for name, figures in figures_of_variant.items()], COLUMNS, config.output)
    checkpoint.write_json(folder / "table.json", figures_of_variant)
    return figures_of_variant


def over_seeds(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each figure that all runs have, NAME_sd (of the sample; 0 for one run) and the number of
    seeds.

    A figure that is NaN in one run, such as a share of nothing, is NaN.
    """
    statistics: dict[str, float] = {"seeds": len(runs)}
    for name in runs[0]:
        values = [run[name] for run in runs if isinstance(run.get(name), int | float)]
        if len(values) == len(runs):
            statistics[name] = float(np.mean(values))
            statistics[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return statistics


def parse(variant: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Returns (name, stage, overrides) of `NAME STAGE FIELD=VALUE ...`. Raises ValueError for anything else."""
    name, *words = variant.split()
    if not words or words[0] not in COMPARED or not all("=" in entry for entry in words[1:]):
        raise ValueError(
            f"config.variants: {variant!r} is not NAME STAGE FIELD=VALUE ...; stages: {', '.join(COMPARED)}"
        )
    overrides = (entry.partition("=") for entry in words[1:])
    return name, words[0], [(field, value) for field, _, value in overrides]
