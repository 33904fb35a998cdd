"""A short R1-Zero with trainer and sampler on four devices each; prints what happened when, as JSON.

Usage: python tests/disaggregated_driver.py FOLDER, with XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import json
import pathlib
import sys
import threading
import time

import jax
import small

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.core import metrics, rng, runtime, sharding, tree
from r1jax.data import tasks
from r1jax.models import decoder
from r1jax.stages import policy, prompts

WORDS = tokenizer.tiny()
FIELDS = {
    **small.RL_FIELDS,
    "grpo.updates": 8,
    "grpo.updates_per_rollout": 2,
    "grpo.prompts_per_update": 2,
    "grpo.group_size": 4,
    "reward.language": 1,  # what random weights write differs in it alone, and only then do weights move
    "sampler.slots": 8,
    "sampler.max_new_tokens": 16,
    "pack.rows_per_micro_batch": 4,
    "checkpointing.every_updates": 100,
    "mesh.data": 2,
    "mesh.expert": 2,
    "sampler_mesh.expert": 4,
}


def build(folder: pathlib.Path, **more):
    fields = {**FIELDS, **{name.replace("__", "."): value for name, value in more.items()}}
    config = configs.load("r1_zero:tiny", [(name, str(value)) for name, value in fields.items()])
    mesh = sharding.make_mesh(config.mesh)
    train = prompts.encode(tasks.linear_prompts("train")[:30], config, WORDS)
    params = sharding.initialize(decoder.specs(config.model), rng.key(0, "loop", "init"), "float32", mesh)
    return policy.make_training(config, WORDS, mesh, train, params, folder, lambda *_: None, policy.describe)


def run(folder: pathlib.Path, **more) -> dict:
    """Returns rows, timing, devices, events (name, update, seconds) and the digest of the weights of one run."""
    training, events = build(folder, **more), []

    def watch(name: str):
        function = getattr(training, name)

        def watched(*arguments):
            begun = time.perf_counter()
            result = function(*arguments)
            update = arguments[0] if name == "roll_out" else training.cursor.update
            events.append((name, update, begun, time.perf_counter()))
            return result

        setattr(training, name, watched)

    watch("roll_out")
    watch("update")
    training.run()
    first = min(begun for _, _, begun, _ in events)
    cache = training.sampler._state.cache.keys
    return {
        "rows": metrics.read(folder),
        "timing": metrics.read_timing(folder),
        "events": [(name, update, begun - first, end - first) for name, update, begun, end in events],
        "digest": tree.digest(training.state),
        "trainer_devices": sorted(d.id for d in jax.tree.leaves(training.state.params)[0].sharding.device_set),
        "sampler_devices": sorted(d.id for d in cache.sharding.device_set),
        "programs": training.programs.counts(),
    }


def fail(folder: pathlib.Path) -> dict:
    """Returns the error of a run whose third update fails while rollouts are under way, and the threads left of it."""
    training = build(folder, mode="disaggregated", grpo__rollouts_ahead=2)
    update = training.update

    def failing(*arguments):
        if training.cursor.update == 2:
            raise RuntimeError("the third update")
        return update(*arguments)

    training.update = failing
    try:
        training.run()
    except RuntimeError as error:
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("rollout")]
        return {"error": str(error), "threads": threads}
    return {}


def main() -> None:
    runtime.setup()
    folder = pathlib.Path(sys.argv[1])
    report = {
        "colocated": run(folder / "colocated"),
        "in_step": run(folder / "in_step", mode="disaggregated"),
        "ahead_1": run(folder / "ahead_1", mode="disaggregated", grpo__rollouts_ahead=1),
        "ahead_1_again": run(folder / "again", mode="disaggregated", grpo__rollouts_ahead=1),
        "ahead_2": run(folder / "ahead_2", mode="disaggregated", grpo__rollouts_ahead=2),
    }
    report["failed"] = fail(folder / "failed")
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
