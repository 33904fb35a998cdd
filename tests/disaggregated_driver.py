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
from r1jax.recipe import policy, prompts
from r1jax.recipe.parts import AskingParts
from r1jax.rl.settings import of_config
from r1jax.schema import parts_of

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


def build(folder: pathlib.Path, name: str = "r1_zero:tiny", **more):
    fields = {**FIELDS, **{field.replace("__", "."): value for field, value in more.items()}}
    config = configs.load(name, [(field, str(value)) for field, value in fields.items()])
    mesh = sharding.make_mesh(config.mesh)
    train = prompts.encode(tasks.linear_prompts("train")[:30], parts_of(AskingParts, config), WORDS)
    params = sharding.initialize(decoder.specs(config.model), rng.key(0, "loop", "init"), "float32", mesh)
    measure = small.measure_of(config, 4)
    return policy.make_training(
        of_config(config), WORDS, mesh, train, params, folder, describe=policy.describe, measure=measure
    )


def run(folder: pathlib.Path, **more) -> dict:
    """Returns rows, timing, devices, events (name, update, seconds) and the digest of the weights of one run."""
    training, events = build(folder, **more), []

    def watch(owner, name: str):
        function = getattr(owner, name)

        def watched(*arguments):
            begun = time.perf_counter()
            result = function(*arguments)
            update = arguments[0] if name == "draw" else training.run.cursor.update + 1
            events.append((name, update, begun, time.perf_counter()))
            return result

        setattr(owner, name, watched)

    watch(training.source.sampling, "draw")
    watch(training.objective, "update")
    training.train()
    first = min(begun for _, _, begun, _ in events)
    cache = training.source.sampling.sampler.engine.init_decode_state().cache.keys
    return {
        "rows": metrics.read(folder),
        "evaluations": metrics.read_evaluation(folder),
        "timing": metrics.read_timing(folder),
        "events": [(name, update, begun - first, end - first) for name, update, begun, end in events],
        "digest": tree.digest(training.run.state),
        "critic": tree.digest(getattr(training.objective, "critic_state", None)),
        "trainer_devices": sorted(d.id for d in jax.tree.leaves(training.run.state.params)[0].sharding.device_set),
        "sampler_devices": sorted(d.id for d in cache.sharding.device_set),
        "programs": training.run.programs.counts(),
    }


def fail(folder: pathlib.Path) -> dict:
    """Returns the error of a run whose third update fails while rollouts are under way, and the threads left of it."""
    training = build(folder, mode="disaggregated", grpo__rollouts_ahead=2)
    update = training.objective.update

    def failing(*arguments):
        if training.run.cursor.update == 2:
            raise RuntimeError("the third update")
        return update(*arguments)

    training.objective.update = failing
    try:
        training.train()
    except RuntimeError as error:
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("rollout")]
        return {"error": str(error), "threads": threads}
    return {}


def main() -> None:
    runtime.setup()
    folder = pathlib.Path(sys.argv[1])
    measured = dict(train_eval__every=4, evaluation__samples_per_problem=2, evaluation__greedy=False)
    report = {
        "colocated": run(folder / "colocated", **measured),
        "in_step": run(folder / "in_step", mode="disaggregated", **measured),
        "ahead_1": run(folder / "ahead_1", mode="disaggregated", grpo__rollouts_ahead=1),
        "ahead_1_again": run(folder / "again", mode="disaggregated", grpo__rollouts_ahead=1),
        "ahead_2": run(folder / "ahead_2", mode="disaggregated", grpo__rollouts_ahead=2, **measured),
    }
    ppo = dict(name="ppo_baseline:tiny", grpo__kl_coef=0.1)
    longer = "((0, 8), (4, 16))"  # while older rollouts are trained on the next ones have longer slots
    ahead = dict(mode="disaggregated", grpo__rollouts_ahead=1, sampler__max_new_tokens_schedule=longer)
    report |= {
        "ppo_colocated": run(folder / "ppo_colocated", **ppo, grpo__updates=2),
        "ppo_in_step": run(folder / "ppo_in_step", **ppo, grpo__updates=2, mode="disaggregated"),
        "ppo_ahead_1": run(folder / "ppo_ahead", **ppo, **ahead),
        "ppo_ahead_1_again": run(folder / "ppo_again", **ppo, **ahead),
    }
    report["failed"] = fail(folder / "failed")
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
