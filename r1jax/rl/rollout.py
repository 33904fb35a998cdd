"""From prompts to a scored rollout, and from a scored rollout to packed mini-batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r1jax.core import distributed, rng
from r1jax.data.hashing import hash64
from r1jax.data.packing import PackedBatch, PackItem, pack_batch
from r1jax.data.prompts import Prompt, PromptStream, keyed_permutation
from r1jax.rewards.compose import PART_NAMES
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.rl import schedules
from r1jax.rl.journal import Rollout
from r1jax.rl.logprobs import ROUTED
from r1jax.rl.losses import token_weights
from r1jax.sampler.sample import RolloutRequest, RolloutSample, SamplingLaw
from r1jax.schema import Config


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt with the ids the model sees; `prefill` is the part of the assistant's turn that they already hold."""

    prompt: Prompt
    ids: np.ndarray
    prefill: str = ""


class PromptPhases:
    """The prompts of a run by draw: one set, and from an update on a mixture. A pure function of the draw."""

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        later: tuple[int, Sequence[Sequence[EncodedPrompt]], Sequence[float]] | None,
        config: Config,
    ):
        self._streams = [PromptStream([[p.prompt for p in prompts]], seed=config.seed, stage=config.stage)]
        self._by_id = {p.prompt.id: p for p in prompts}
        self._boundary = math.inf
        if later is not None:
            update, sources, weights = later
            start = schedules.first_start_at_or_after(update, config.grpo.updates_per_rollout)
            self._boundary = start * config.grpo.prompts_per_update
            lists = [[p.prompt for p in source] for source in sources]
            self._streams.append(PromptStream(lists, weights, seed=config.seed, stage=f"{config.stage}/later"))
            self._by_id |= {p.prompt.id: p for source in sources for p in source}

    def __getitem__(self, draw: int) -> EncodedPrompt:
        if draw < self._boundary:
            return self._by_id[self._streams[0][draw].id]
        return self._by_id[self._streams[1][draw - self._boundary].id]


def requests_for(
    prompts: Sequence[EncodedPrompt],
    draws: Sequence[int],
    samples: int,
    law: SamplingLaw,
    seed: int,
    stage: str,
    purpose: str,
) -> list[RolloutRequest]:
    """Returns one request a prompt, each with the keys of its `samples` samples."""
    repeated, indices = np.repeat(np.asarray(draws), samples), np.tile(np.arange(samples), len(draws))
    keys = rng.sample_keys(seed, stage, repeated, indices, purpose).reshape(len(draws), samples, 2)
    return [
        RolloutRequest(int(draw), prompt.ids, keys[i], law)
        for i, (draw, prompt) in enumerate(zip(draws, prompts, strict=True))
    ]


def grade(
    samples: Sequence[RolloutSample], prompts: Sequence[EncodedPrompt], texts: Sequence[str], pool: RewardPool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (parts float32 [N, P] in the order of PART_NAMES, scorable bool [N]) of samples and their prompts.

    With several processes each grades the samples of its own prompts, draw % processes, and all get all scores.
    """
    processes, own = distributed.process_count(), distributed.process_index()
    mine = [i for i, sample in enumerate(samples) if sample.request_id % processes == own]
    parts, scorable = _grade([(samples[i], prompts[i], texts[i]) for i in mine], pool)
    if processes == 1:
        return parts, scorable
    name, deadline_s = "the scores of a rollout", pool.batch_deadline_s + distributed.DEADLINE_S
    found = distributed.gather([mine, parts, scorable], name, deadline_s)
    if found is not None:
        parts, scorable = np.zeros((len(samples), len(PART_NAMES)), np.float32), np.zeros(len(samples), bool)
        for places, some_parts, some_scorable in found:
            parts[places], scorable[places] = some_parts, some_scorable
    return tuple(distributed.broadcast([parts, scorable], name, deadline_s))


def _grade(
    graded: Sequence[tuple[RolloutSample, EncodedPrompt, str]], pool: RewardPool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `grade`'s result for (sample, prompt, text) of this process."""
    requests = [
        RewardRequest(
            id=f"{p.prompt.id}/{sample.request_id}/{sample.sample_index}",
            task=p.prompt.task,
            prompt=p.prompt.text,
            response=text,
            reference=p.prompt.answer,
            prefill=p.prefill,
            language=p.prompt.language,
            truncated=sample.truncated,
        )
        for sample, p, text in graded
    ]
    scores = pool.score(requests)
    parts = np.asarray([[score.parts.get(name, 0.0) for name in PART_NAMES] for score in scores], np.float32)
    return parts.reshape(len(scores), len(PART_NAMES)), np.asarray([score.scorable for score in scores], bool)


def mini_batches(rollout: Rollout, start: int, config: Config) -> list[np.ndarray]:
    """Returns the sample numbers of each update: a keyed shuffle of all samples, cut into equal parts.

    Outputs, not questions, are shuffled (one group may be spread over several updates), so advantages come first.
    """
    size = config.grpo.prompts_per_update * config.grpo.group_size
    order = keyed_permutation(len(rollout), hash64(config.stage, config.seed, "shuffle", start))
    return [order[i : i + size] for i in range(0, len(rollout), size)]


def pack_mini_batch(
    rollout: Rollout, chosen: np.ndarray, advantages: np.ndarray, config: Config, max_new_tokens: int
) -> PackedBatch:
    """Returns the chosen samples packed, with advantage, behaviour log-prob and aggregation weight of every token.

    With grpo.routing_replay also the experts each token was sent to. Raises ValueError when a sample has no such record.
    """
    samples = [rollout.samples[i] for i in chosen]
    masked = [config.grpo.truncated == "mask" and sample.truncated for sample in samples]
    weights = token_weights([len(sample.token_ids) for sample in samples], config.grpo, max_new_tokens)
    items = []
    for index, sample, weight, drop in zip(chosen, samples, weights, masked, strict=True):
        prompt, length = len(sample.prompt_ids), len(sample.token_ids)
        mask = np.zeros(prompt + length, np.float32)
        mask[prompt:] = 0.0 if drop or not rollout.scorable[index] else 1.0
        behaviour = np.zeros(prompt + length, np.float32)
        behaviour[prompt:] = sample.behaviour_logps
        values = dict(
            advantage=np.full(prompt + length, advantages[index], np.float32),
            behaviour_logp=behaviour,
            weight=np.full(prompt + length, weight, np.float32),
        )
        inputs = {ROUTED: _record(sample)} if config.grpo.routing_replay else {}
        items.append(PackItem(np.concatenate([sample.prompt_ids, sample.token_ids]), mask, values, inputs))
    rows = micro_batches(config) * config.pack.rows_per_micro_batch
    return pack_batch(items, config.pack.row_tokens, rows)


def _record(sample: RolloutSample) -> np.ndarray:
    if sample.routed_experts is None:
        raise ValueError(
            f"grpo.routing_replay=true: sample {sample.request_id}/{sample.sample_index} was journalled without the "
            "experts of its tokens; finish its rollout with grpo.routing_replay=false"
        )
    return sample.routed_experts


def micro_batches(config: Config) -> int:
    """Returns how many micro-batches hold a mini-batch in the worst case, when no two samples share a row."""
    size = config.grpo.prompts_per_update * config.grpo.group_size
    return -(-size // config.pack.rows_per_micro_batch)
