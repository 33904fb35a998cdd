"""One process of a very small RL run that several share: multihost_driver.py SETTINGS, a JSON object.

{folder, preset, fields, processes, index, port, mesh {axis: size}, updates, checkpoint_every, heartbeat_s, grace_s,
listens, delays, slow_s, weights}.
SIGTERM is a notice to this package, or, unless it `listens`, to JAX alone. With
`delays`, a list of (call number, seconds), this process sleeps at those of its calls into rollout, grading, journal,
packing, update and checkpoint. With `slow_s` every update takes so much longer. Prints what the run left, as JSON;
process 0 also writes the weights to the file `weights`.
"""

import json
import pathlib
import sys
import time

import numpy as np

from r1jax.core import hosts, preempt, sharding


def interrupted(function, pause):
    def pausing(*arguments, **keywords):
        pause()
        return function(*arguments, **keywords)

    return pausing


class Pauses:
    """Sleeps at the given numbers of its calls."""

    def __init__(self, delays):
        self.delays, self.calls, self.slept_s = {int(call): seconds for call, seconds in delays}, 0, 0.0

    def __call__(self) -> None:
        seconds = self.delays.get(self.calls, 0.0)
        self.calls, self.slept_s = self.calls + 1, self.slept_s + seconds
        time.sleep(seconds)


def build(settings: dict):
    import jax
    import small

    from r1jax import config as configs
    from r1jax.checkpoints import tokenizer
    from r1jax.core import runtime, sharding
    from r1jax.data import tasks
    from r1jax.models import decoder
    from r1jax.recipe import policy, prompts
    from r1jax.recipe.parts import AskingParts
    from r1jax.rl.settings import of_config
    from r1jax.schema import MeshConfig, parts_of

    runtime.setup()
    fields = settings["fields"] | {
        "grpo.updates": settings["updates"],
        "checkpointing.every_updates": settings["checkpoint_every"],
    }
    config = configs.load(f"r1_zero:{settings['preset']}", [(name, str(value)) for name, value in fields.items()])
    words, mesh = tokenizer.tiny(), sharding.make_mesh(MeshConfig(**settings["mesh"]))
    train = prompts.encode(tasks.linear_prompts("train")[:60], parts_of(AskingParts, config), words)
    specs, random = (
        decoder.specs(config.model),
        np.random.default_rng(0),
    )  # drawn on the host: one program less to compile
    drawn = sharding.map_specs(lambda spec: 0.05 * random.standard_normal(spec.shape, np.float32), specs)
    params = jax.tree.map(sharding.place, drawn, sharding.spec_shardings(specs, mesh))
    return policy.make_training(
        of_config(config),
        words,
        mesh,
        train,
        params,
        pathlib.Path(settings["folder"]),
        describe=policy.describe,
        measure=small.measure_of(config, 6),
    )


def run(settings: dict) -> dict:
    from r1jax.core import tree
    from r1jax.rewards.pool import RewardPool
    from r1jax.rl import minibatch

    training, pauses, graded = build(settings), Pauses(settings["delays"]), []
    begin = RewardPool.begin

    def noting(pool, requests):
        graded.extend(int(request.id.split("/")[-2]) for request in requests)
        pauses()
        return begin(pool, requests)

    RewardPool.begin = noting
    engine, journal, store = training.source.sampling.sampler.engine, training.source.journal, training.run.store
    for owner, name in (
        (engine, "decode"),
        (journal, "write"),
        (minibatch, "_scored"),
        (training.objective, "update"),
        (store, "save"),
    ):
        setattr(owner, name, interrupted(getattr(owner, name), pauses))
    objective = training.objective
    objective.update = interrupted(objective.update, lambda: time.sleep(settings["slow_s"]))
    training.train()
    if settings["weights"]:
        leaves = tree_leaves(training.run.state.params)
        if hosts.is_writer():
            np.savez(settings["weights"], *leaves)
    return {
        "params": tree.digest(training.run.state.params),
        "optimizer": tree.digest(training.run.state.optimizer),
        "reference": tree.digest(training.run.reference),
        "cursor": vars(training.run.cursor),
        "programs": training.run.programs.counts(),
        "graded": sorted(set(graded)),
        "calls": pauses.calls,
        "slept_s": pauses.slept_s,
    }


def tree_leaves(params) -> list[np.ndarray]:
    import jax

    return [sharding.to_host(leaf) for leaf in jax.tree.leaves(params)]


def main(settings: dict) -> None:
    started = time.monotonic()
    preempt.listen(settings["grace_s"])
    if settings["processes"] > 1:
        address = f"127.0.0.1:{settings['port']}"
        hosts.start(address, settings["processes"], settings["index"], settings["heartbeat_s"])
        if settings["listens"]:
            preempt.listen(settings["grace_s"])
    try:
        found = run(settings)
        hosts.stop()
    except preempt.Preempted:
        hosts.leave(preempt.PREEMPTED_EXIT)
        sys.exit(preempt.PREEMPTED_EXIT)
    except Exception as error:
        hosts.await_verdict(error)
        print(f"error: {error}", file=sys.stderr)
        hosts.fail(error, 1)
        raise
    print(json.dumps(found | {"seconds": round(time.monotonic() - started, 1)}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
