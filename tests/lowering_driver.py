"""Lowers the programs of every stage at a size for its own mesh of TPU devices, and prints how many there are.

Usage: lowering_driver.py SIZE STAGE ...

Stages share programs: one that was lowered for the same model, mesh and lengths is not lowered again.
"""

import json
import math
import sys

from r1jax import config as configs
from r1jax.plan import compile as compiler
from r1jax.recipe import programs
from r1jax.schema import replace

SLICES = {1: "v5p:1x1x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4", 32: "v5p:2x4x4", 512: "v5p:8x8x8"}


def main(size: str, *stages: str) -> None:
    lowered: dict[tuple, int] = {}
    counts = {}
    for stage in stages:
        config = configs.load(f"{stage}:{size}")
        devices = compiler.devices(SLICES[math.prod(config.mesh.shape)])
        counts[stage] = 0
        for name, program in programs.programs(config, devices).items():
            sampler = replace(config.sampler, temperature=1.0, top_p=1.0, max_new_tokens_schedule=())
            shared = name.partition(": ")[2] if sampling(name) else name
            parts = (sampler,) if sampling(name) else (config.pack, config.optimizer.kind, config.grpo, kind(stage))
            key = (shared, config.network, config.mesh, *parts)
            if key not in lowered:
                lowered[key] = len(program.lowered().as_text())
            assert lowered[key] > 0
            counts[stage] += 1
    print(json.dumps({"programs": counts, "lowered": len(lowered)}))


def sampling(name: str) -> bool:
    return name.partition(": ")[2].split()[0:1] in (["place"], ["prefill"], ["insert"], ["decode"])


def kind(stage: str) -> str:
    """Returns what stages with the same update have in common."""
    groups = (programs.RL, programs.SFT, programs.REWARD_MODELS)
    return next((str(number) for number, group in enumerate(groups) if stage in group), stage)


if __name__ == "__main__":
    main(*sys.argv[1:])
