"""Turns a scored rollout into the batches of its updates: values per token, packing in a thread, reference scores."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from r1jax.data.packing import PREFIXES, PackedBatch, unpack
from r1jax.models import decoder, flops
from r1jax.rl.journal import Rollout
from r1jax.rl.logprobs import ROUTED, Scorer
from r1jax.rl.objective import Batch, Objective
from r1jax.rl.recorder import Recorder
from r1jax.rl.rollout import Advantages, micro_batches, mini_batches, pack_mini_batch
from r1jax.rl.settings import RunSettings
from r1jax.rl.state import RunState
from r1jax.train import step


def batch_shapes(config: RunSettings, fields: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape [M, R, T] and dtype of each array of every batch; `fields` are an objective's."""
    model, shapes = config.network.model, step.batch_shapes(config.pack, micro_batches(config), fields)
    tokens = shapes["tokens"]
    if config.pack.shared_prompts:
        shapes[PREFIXES] = tokens
    if config.grpo.routing_replay:
        replayed = (*tokens.shape, model.num_moe_layers, model.num_experts_per_tok)
        shapes[ROUTED] = jax.ShapeDtypeStruct(replayed, np.int16)
    return shapes


def blank_arrays(config: RunSettings, fields: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch without tokens, in the shapes of every batch."""
    shapes = batch_shapes(config, fields)
    return {name: np.full(s.shape, -1 if name == ROUTED else 0, s.dtype) for name, s in shapes.items()}


def with_values(run: RunState, objective: Objective, recorder: Recorder, rollout: Rollout) -> Rollout:
    """Adds the trainer's per-token values that the objective needs, as they are before the rollout's first update.

    These are old and reference log-probs and a critic's values. Returns the same object when it has them all.
    """
    scorers, first_update = objective.scorers(run), run.cursor.rollout_start
    if set(scorers) <= set(rollout.values):
        return rollout
    config = run.settings
    longest = config.sampler.max_new_tokens
    zeros, included = np.zeros(len(rollout), np.float32), np.ones(len(rollout), bool)
    blank = Advantages(zeros, zeros, included, included, included)
    values = {name: [np.empty(0)] * len(rollout) for name in scorers}
    for chosen in mini_batches(rollout, first_update, config):
        packed = pack_mini_batch(rollout, chosen, blank, config, longest)
        for name, (scorer, weights) in scorers.items():
            scores = _score(config, recorder, scorer, weights, packed)
            rows = unpack(scores.reshape(packed.tokens.shape), packed)[: len(chosen)]  # prefixes come last
            for index, row in zip(chosen, rows, strict=True):
                values[name][index] = row[-len(rollout.samples[index].token_ids) :]
    return dataclasses.replace(rollout, values=values)


def batches(
    run: RunState, objective: Objective, recorder: Recorder, rollout: Rollout, advantages: Advantages
) -> Iterator[Batch]:
    """Yields the batches of the updates of a rollout that are still to be made, scored under the reference.

    The next one is packed in a thread while the device updates on this one.
    """
    config, first_update = run.settings, run.cursor.rollout_start
    longest = config.sampler.max_new_tokens
    chosen = mini_batches(rollout, first_update, config)[run.cursor.update - first_update :]
    pack = lambda number: pack_mini_batch(rollout, chosen[number], advantages, config, longest)  # noqa: E731
    with ThreadPoolExecutor(1, thread_name_prefix="pack") as worker:
        following = worker.submit(pack, 0)
        for number in range(len(chosen)):
            packed, last = following.result(), number + 1 == len(chosen)
            if not last:
                following = worker.submit(pack, number + 1)
            yield _scored(run, objective, recorder, packed, last)


def _scored(run: RunState, objective: Objective, recorder: Recorder, packed: PackedBatch, last: bool) -> Batch:
    recorder.phase("pack")
    config = run.settings
    fields = tuple(name for name in objective.fields if name in packed.values)
    arrays = step.batch_arrays(packed, config.pack, micro_batches(config), fields)
    if "reference_logp" in objective.fields and "reference_logp" not in packed.values:
        arrays["reference_logp"] = _score(config, recorder, run.scorer, run.reference, packed)
    num_filled = step.filled_micro_batches(packed, config.pack)
    return Batch(arrays, num_filled, last, _mismatch_without_replay(run, arrays, num_filled))


def _score(
    config: RunSettings, recorder: Recorder, scorer: Scorer, weights: decoder.Params | None, packed: PackedBatch
) -> np.ndarray:
    """Returns the scorer's values of a packed mini-batch under `weights`, float32 [M, R, T]."""

    def score() -> np.ndarray:
        arrays = step.batch_arrays(packed, config.pack, micro_batches(config), ())
        filled = step.filled_micro_batches(packed, config.pack)
        recorder.timer.add(reference_flops=flops.forward(scorer.network, step.work(arrays)).total)
        return scorer(weights, arrays, filled, config.sampler.temperature or 1.0)

    return recorder.timed("reference", score)


def _mismatch_without_replay(run: RunState, arrays: dict, num_filled: int) -> dict[str, float]:
    """Returns the mismatch of sampler and trainer when live routers choose the experts; {} unless a check is due."""
    grpo, first_update = run.config.grpo, run.cursor.rollout_start
    every = grpo.replay_check_every
    if not every or first_update // grpo.updates_per_rollout % every or run.cursor.update != first_update:
        return {}
    live = arrays | {ROUTED: np.full_like(arrays[ROUTED], -1)}
    logp = run.scorer(run.frozen_policy(), live, num_filled, run.config.sampler.temperature or 1.0)
    difference = np.abs(logp - arrays["behaviour_logp"])[arrays["loss_mask"] > 0]
    mean = float(np.mean(difference, dtype=np.float64)) if len(difference) else 0.0
    return {"mean_logprob_difference_without_replay": mean}
