"""The quick start: R1-Zero from the shipped tiny base, with the figures before and after and the curves to look at."""

import json
import sys
import time
from pathlib import Path

from r1jax.core import checkpoint
from r1jax.schema import Config, replace
from r1jax.stages import r1_zero


def run(config: Config, workdir: Path) -> dict:
    """Runs r1_zero in `workdir`, prints where its artefacts are and returns its figures."""
    started = time.monotonic()
    figures = r1_zero.run(replace(config, stage="r1_zero"), workdir)
    folder = Path(workdir) / "r1_zero"
    summary = {"checkpoints": {name: figures[name] for name in ("base", "r1_zero")}, "ratios": figures["ratios"]}
    summary["wall_s"] = round(time.monotonic() - started, 1)
    checkpoint.write_json(Path(workdir) / "summary.json", summary)
    shown = {name: round(value, 2) for name, value in figures["ratios"].items()}
    print(f"R1-Zero over base: {json.dumps(shown)}", file=sys.stderr)
    for name in ("curves.png", "curves.csv", "samples.jsonl", "metrics.jsonl"):
        print(f"  {folder / name}", file=sys.stderr)
    return {**figures, **summary}
