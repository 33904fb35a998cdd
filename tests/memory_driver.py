"""Runs an RL stage in this process and prints, by phase, the bytes of arrays that live and those that its plan says.

Usage: memory_driver.py FOLDER NAME:PRESET FIELD=VALUE ...
"""

import json
import pathlib
import sys

import jax

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.core import rng, runtime, sharding
from r1jax.data import tasks
from r1jax.models import decoder
from r1jax.recipe import policy, programs, prompts
from r1jax.recipe.parts import AskingParts
from r1jax.rl.recorder import Recorder
from r1jax.rl.settings import of_config
from r1jax.schema import parts_of

WATCHED = {"grading": "rollout", "update": "update"}  # phase of the recorder -> of the plan


def main(folder: str, spec: str, *fields: str) -> None:
    runtime.setup()
    config = configs.load(spec, [tuple(field.split("=", 1)) for field in fields])
    words, mesh = tokenizer.tiny(), sharding.make_mesh(config.mesh)
    train = prompts.encode(tasks.linear_prompts("train")[:30], parts_of(AskingParts, config), words)
    live: dict[str, int] = {}
    write = Recorder.phase

    def watched(recorder, name: str) -> None:
        if name in WATCHED:
            live[WATCHED[name]] = sum(array.nbytes for array in jax.live_arrays())
        write(recorder, name)

    Recorder.phase = watched
    specs = decoder.specs(config.model)
    start = [sharding.initialize(specs, rng.key(0, "memory", "init"), "float32", mesh)]
    path = pathlib.Path(folder)
    training = policy.make_training(of_config(config), words, mesh, train, start.pop(), path, describe=policy.describe)
    training.train()
    planned = {phase.name: sum(phase.resident.values()) for phase in programs.phases(config)}
    print(json.dumps({name: {"live": size, "planned": planned[name]} for name, size in live.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
