"""An ablation: variants of stages over the same inputs, one table."""

import importlib
import sys
from pathlib import Path

from r1jax import config as configs
from r1jax.core import checkpoint
from r1jax.report import table
from r1jax.schema import Config, replace
from r1jax.stages import lineage

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


def run(config: Config, workdir: Path) -> dict:
    """Runs every variant in `workdir/NAME/VARIANT/` on the stages in `workdir`, which are made when missing.

    Returns {variant: figures} and writes it to `workdir/NAME/table.json`. Raises ValueError for a malformed variant.
    """
    folder, found = Path(workdir) / config.stage / config.output, {}
    parsed = [parse(variant) for variant in config.variants]
    for name, stage, overrides in parsed:
        own = configs.load(f"{stage}:{config.preset}", overrides)
        own = replace(own, seed=config.seed, evaluation=config.evaluation, inputs=str(workdir))
        print(f"== {name}", file=sys.stderr)
        figures = importlib.import_module(f"r1jax.stages.{stage}").run(own, folder / name)
        found[name] = figures[lineage.RESULTS[stage]] | {"compute": figures["compute"]}
    table.render([{"variant": name, **figures} for name, figures in found.items()], COLUMNS, config.output)
    checkpoint.write_json(folder / "table.json", found)
    return found


def parse(variant: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Returns (name, stage, overrides) of `NAME STAGE FIELD=VALUE ...`. Raises ValueError for anything else."""
    name, *rest = variant.split()
    if not rest or rest[0] not in lineage.RESULTS or not all("=" in entry for entry in rest[1:]):
        raise ValueError(
            f"config.variants: {variant!r} is not NAME STAGE FIELD=VALUE ...; stages: {', '.join(lineage.RESULTS)}"
        )
    overrides = [tuple(entry.split("=", 1)) for entry in rest[1:]]
    return name, rest[0], overrides
