"""Small things that several tests start from."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Mapping

import jax
import pytest
import tokenizers

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.checkpoints.tokenizer import JsonBackend, Tokenizer
from r1jax.core import rng, sharding, tree
from r1jax.data import tasks
from r1jax.data.problems import Problem, from_row
from r1jax.models import decoder
from r1jax.recipe import common, policy, prompts, train_eval
from r1jax.recipe.parts import AskingParts
from r1jax.rewards import references
from r1jax.rl.assemble import Training
from r1jax.rl.rollout import Mixture
from r1jax.rl.settings import of_config
from r1jax.schema import Config, Network, RewardConfig, parts_of, replace
from r1jax.train import evaluations

ROOT = pathlib.Path(__file__).resolve().parents[1]


def changed(network: Network, **fields) -> Network:
    """Returns a network with fields of its model, of how it is computed and of its losses changed, each by its name alone."""
    parts = {part: getattr(network, part) for part in ("model", "compute", "auxiliary")}
    of_parts: dict[str, dict] = {part: {} for part in parts}
    of_network = {}
    for name, value in fields.items():
        owner = next((part for part, held in parts.items() if hasattr(held, name)), None)
        (of_parts[owner] if owner else of_network)[name] = value
    return replace(network, **{part: replace(held, **of_parts[part]) for part, held in parts.items()}, **of_network)


def network(**fields) -> Network:
    """Returns the default network with such fields."""
    return changed(Network(), **fields)


# A mixture of experts of a few thousand parameters.
MIXTURE = network(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    moe_intermediate_size=8,
    initializer_range=0.3,
    scan_layers=False,
)
# A dense model with grouped heads.
GROUPED = network(
    family="qwen3",
    qk_norm=True,
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
)
# Overrides of r1_zero:tiny and r1_zero:tiny_dense for runs of seconds, beside their numbers of updates and samples.
RL_FIELDS = {
    "model.hidden_size": 32,
    "model.intermediate_size": 32,
    "model.num_hidden_layers": 2,
    "model.moe_intermediate_size": 16,
    "grpo.reference_refresh_updates": 4,
    "optimizer.learning_rate": 1e-2,
    "sampler.windows": (),
    "pack.row_tokens": 32,
}


def problems_of(rows: Iterable[Mapping], task: str = "") -> list[Problem]:
    """Returns the problems of rows, each checked by its task's grader."""
    reference = lambda task, fields: references.read(task, fields, RewardConfig())  # noqa: E731
    return [from_row(row, f"row {number}", reference, task) for number, row in enumerate(rows, 1)]


def finished_stage(config: Config, workdir: pathlib.Path, params: decoder.Params, figures: dict) -> pathlib.Path:
    """Returns the folder of a stage that has ended with these weights and figures."""
    folder = common.StageFolder(config, workdir)
    folder.start({})
    store = folder.checkpoints()
    store.save(1, {"params": params}, {})
    store.close()
    folder.finish(figures, {}, "")
    return folder.path


def byte_tokenizer(template: str) -> Tokenizer:
    """Returns a tokenizer of single bytes and two marks of turns."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(JsonBackend(inner), {"eos_token": "<|im_end|>"}, template, "bytes")


LOOP_FIELDS = {  # of `rl_training`
    **RL_FIELDS,
    "grpo.updates": 8,
    "grpo.updates_per_rollout": 3,
    "grpo.prompts_per_update": 2,
    "grpo.group_size": 4,
    "grpo.kl_coef_schedule": "((0, 0.5), (4, 0.25))",
    "sampler.slots": 8,
    "sampler.max_new_tokens": 20,
    "sampler.max_new_tokens_schedule": "((0, 10), (2, 20))",
    "pack.rows_per_micro_batch": 4,
    "checkpointing.every_updates": 100,
    "reward.language": 1.0,
}


def rl_training(folder: pathlib.Path, seed: int = 0, name="r1_zero:tiny", held_out: int = 0, **more) -> Training:
    """Returns an RL run of eight small updates that is ready to start; `a__b` in `more` overrides field a.b.

    With train_eval.every it is evaluated on the first `held_out` problems of the tiny world that are held out.

    As in a stage, start weights are drawn only where the folder has no checkpoint.
    """
    fields = {**LOOP_FIELDS, "seed": seed, **{field.replace("__", "."): value for field, value in more.items()}}
    config = configs.load(name, [(field, str(value)) for field, value in fields.items()])
    mesh = sharding.make_mesh(config.mesh)
    words = tokenizer.tiny()
    train = prompts.encode(tasks.linear_prompts("train")[:30], parts_of(AskingParts, config), words)
    params = None
    if not any((folder / "checkpoints").glob("*")):
        params = sharding.initialize(decoder.specs(config.model), rng.key(0, "loop", "init"), "float32", mesh)
    measure = measure_of(config, held_out)
    return policy.make_training(
        of_config(config), words, mesh, train, params, folder, describe=policy.describe, measure=measure
    )


def measure_of(config: Config, held_out: int):
    """Returns what evaluates the weights of an RL run on the first so many held-out problems of the tiny world."""
    words = tokenizer.tiny()
    asked = prompts.encode(tasks.linear_prompts("test")[:held_out], parts_of(AskingParts, config), words)
    stage_prompts = prompts.StagePrompts(tasks.TinyWorld(), Mixture([]), asked, {})
    return train_eval.measure(parts_of(train_eval.TrainEvalParts, config), words, stage_prompts)


def best_weights(folder: pathlib.Path, config: Config) -> list:
    """Returns [their record, the digest of the weights] of the best weights in the folder of a run."""
    weights = common.load_weights(config.model, sharding.make_mesh(config.mesh), str(folder / evaluations.BEST))
    return [evaluations.best_of(folder), tree.digest(weights)]


def traced_calls(monkeypatch) -> list[str]:
    """Returns a list of what is asked of JAX's profiler from now on: start, begin N and end N of update N, stop."""
    calls: list[str] = []

    @contextlib.contextmanager
    def annotation(name, step_num):
        calls.append(f"begin {step_num}")
        yield
        calls.append(f"end {step_num}")

    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", annotation)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, profiler_options: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


class Stopped(Exception):
    """What ends a run in the middle."""


def run_until(training: Training, updates: int) -> None:
    """Runs and stops where an update would be made after `updates` of them, as a process that is killed there."""
    update = training.objective.update

    def stopping(*arguments):
        if training.run.cursor.update == updates:
            raise Stopped
        return update(*arguments)

    training.objective.update = stopping
    with pytest.raises(Stopped):
        training.train()


def driver_report(name: str, *arguments: str, timeout: float = 300) -> dict:
    """Returns the last line, JSON, of a driver in tests/ that runs in a process of its own with 8 virtual devices."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, str(ROOT / "tests" / name), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
