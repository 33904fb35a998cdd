"""Runs a very small RL stage to its end and prints the digests of what it leaves: resume_driver.py FOLDER [FIELDS].

FIELDS is a JSON object of fields with other values. SIGTERM ends it as it ends a run of the launcher.

With SLOW=1 in the environment, grading, updates and the renames of a checkpoint take longer, so that a SIGKILL from
outside can land inside them, and FOLDER/renaming exists during a rename; what runs is the same code.
"""

import json
import os
import pathlib
import sys
import time

import small

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.core import metrics, preempt, rng, runtime, sharding, tree
from r1jax.data import tasks
from r1jax.models import decoder
from r1jax.recipe import policy, prompts
from r1jax.recipe.parts import AskingParts
from r1jax.rewards.pool import RewardPool
from r1jax.rl.settings import of_config
from r1jax.schema import parts_of
from r1jax.train.step import Trainer

UPDATES, PER_ROLLOUT, CHECKPOINT_EVERY, REFRESH = 24, 3, 2, 4
FIELDS = {
    **small.RL_FIELDS,
    "grpo.updates": UPDATES,
    "grpo.updates_per_rollout": PER_ROLLOUT,
    "grpo.prompts_per_update": 4,
    "grpo.group_size": 4,
    "grpo.reference_refresh_updates": REFRESH,
    "sampler.slots": 16,
    "sampler.max_new_tokens": 24,
    "pack.rows_per_micro_batch": 8,
    "checkpointing.every_updates": CHECKPOINT_EVERY,
    "reward.language": 1.0,  # random text earns some of it, so that groups have a signal
    "train_eval.every": 4,
    "train_eval.metric": "language_consistency",
    "evaluation.samples_per_problem": 1,
    "evaluation.greedy": False,
}


def delayed(function, seconds: float):
    def slower(*arguments, **keywords):
        time.sleep(seconds)
        result = function(*arguments, **keywords)
        time.sleep(seconds)
        return result

    return slower


def marked(function, folder: pathlib.Path, marker: pathlib.Path):
    """Returns the rename `function`, slower inside `folder`, where `marker` exists meanwhile."""

    def marking(source, target, *arguments, **keywords):
        if folder not in pathlib.Path(target).parents:
            return function(source, target, *arguments, **keywords)
        marker.write_text(f"{pathlib.Path(target).name}\n")
        try:
            return delayed(function, 0.04)(source, target, *arguments, **keywords)
        finally:
            marker.unlink(missing_ok=True)

    return marking


def slow_down(folder: pathlib.Path) -> None:
    RewardPool.finish = delayed(RewardPool.finish, 0.05)
    Trainer.update = delayed(Trainer.update, 0.02)
    checkpoints = (folder / "checkpoints").resolve()
    os.rename, os.replace = (marked(function, checkpoints, folder / "renaming") for function in (os.rename, os.replace))


def main(folder: pathlib.Path, fields: dict) -> None:
    runtime.setup()
    config = configs.load("r1_zero:tiny", [(name, str(value)) for name, value in {**FIELDS, **fields}.items()])
    words, mesh = tokenizer.tiny(), sharding.make_mesh(config.mesh)
    train = prompts.encode(tasks.linear_prompts("train")[:60], parts_of(AskingParts, config), words)
    params = sharding.initialize(decoder.specs(config.model), rng.key(0, "resume", "init"), "float32", mesh)
    if os.environ.get("SLOW"):
        slow_down(folder)
    measure = small.measure_of(config, 4)
    training = policy.make_training(
        of_config(config), words, mesh, train, params, folder, describe=policy.describe, measure=measure
    )
    training.train()
    state = training.run.state
    found = {
        "params": tree.digest(state.params),
        "optimizer": tree.digest(state.optimizer),
        "reference": tree.digest(training.run.reference),
        "cursor": vars(training.run.cursor),
        "programs": training.run.programs.counts(),
        "best": small.best_weights(folder, config),
        "evaluations": metrics.read_evaluation(folder),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    preempt.listen(float(os.environ.get("GRACE_S", preempt.GRACE_S)))
    try:
        main(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
    except preempt.Preempted:
        sys.exit(preempt.PREEMPTED_EXIT)
