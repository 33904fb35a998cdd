"""From prompts to a scored rollout, and from a scored rollout to packed mini-batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from r1jax.core import hosts, rng, sharding
from r1jax.data.hashing import hash64
from r1jax.data.packing import PREFIXES, PackedBatch, PackItem, pack, pack_batch, share_prompts, spread
from r1jax.data.problems import Problem
from r1jax.data.prompts import PromptStream, keyed_permutation
from r1jax.rewards.compose import PART_NAMES
from r1jax.rewards.pool import Grading, RewardPool
from r1jax.rewards.score import RewardRequest, Score
from r1jax.rl import losses, schedules
from r1jax.rl.advantages import group_advantages
from r1jax.rl.journal import Rollout
from r1jax.rl.logprobs import ROUTED
from r1jax.rl.settings import RunSettings
from r1jax.sampler.sample import RolloutRequest, RolloutSample, SamplingParams
from r1jax.schema import replace


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt with the ids the model sees; `prefill` is the part of the assistant's turn that they already hold."""

    problem: Problem
    ids: np.ndarray
    prefill: str = ""


@dataclass(frozen=True, eq=False)
class Advantages:
    """Advantages and masks of a rollout, one entry per sample in group order."""

    advantages: np.ndarray | list[np.ndarray]  # float32 [N]; or a sample's own array, one for each of its tokens
    rewards: np.ndarray  # float32 [N], the weighted sums, length penalty included, without a KL term
    trained: np.ndarray  # bool [N]: its tokens are in the loss
    in_mean: np.ndarray  # bool [N]: the means of the loss count it
    has_signal: np.ndarray  # bool [groups]: whether rewards differ
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)  # further float32 values of every token, by name


@dataclass(frozen=True, eq=False)
class Mixture:
    """Prompts in parts, drawn by the parts' weights."""

    parts: Sequence[Sequence[EncodedPrompt]]
    weights: Sequence[float] = (1.0,)

    @property
    def all(self) -> list[EncodedPrompt]:
        return [prompt for part in self.parts for prompt in part]

    def stream(self, seed: int, stage: str) -> PromptStream:
        """Returns the stream of its problems."""
        lists = [[prompt.problem for prompt in part] for part in self.parts]
        return PromptStream(lists, self.weights, seed=seed, stage=stage)


class PromptPhases:
    """The prompts of a run: one mixture, and from an update on another. A pure function of draw and rollout."""

    def __init__(
        self,
        prompts: Mixture | Sequence[EncodedPrompt],
        later: tuple[int, Sequence[Sequence[EncodedPrompt]], Sequence[float]] | None,
        config: RunSettings,
    ):
        first = prompts if isinstance(prompts, Mixture) else Mixture([prompts])
        self._streams = [first.stream(config.seed, config.stage)]
        self._by_id = {p.problem.id: p for p in first.all}
        self._boundary, self._later = 0, math.inf
        if later is not None:
            update, sources, weights = later
            start = schedules.first_start_at_or_after(update, config.grpo.updates_per_rollout)
            self._boundary, self._later = start * config.grpo.prompts_per_update, start
            mixture = Mixture(sources, weights)
            self._streams.append(mixture.stream(config.seed, f"{config.stage}/later"))
            self._by_id |= {p.problem.id: p for p in mixture.all}

    @property
    def all(self) -> list[EncodedPrompt]:
        return list(self._by_id.values())

    def prompt(self, draw: int, start: int) -> EncodedPrompt:
        """Returns the prompt with the number `draw` in the rollout that starts at an update."""
        if start < self._later:
            return self._by_id[self._streams[0][draw].id]
        return self._by_id[self._streams[1][draw - self._boundary].id]


def requests_for(
    prompts: Sequence[EncodedPrompt],
    draws: Sequence[int],
    samples: int,
    sampling: SamplingParams,
    seed: int,
    stage: str,
    purpose: str,
) -> list[RolloutRequest]:
    """Returns one request a prompt, each with the keys of its `samples` samples."""
    repeated, indices = np.repeat(np.asarray(draws), samples), np.tile(np.arange(samples), len(draws))
    keys = rng.sample_keys(seed, stage, repeated, indices, purpose).reshape(len(draws), samples, 2)
    return [
        RolloutRequest(int(draw), prompt.ids, keys[i], sampling)
        for i, (draw, prompt) in enumerate(zip(draws, prompts, strict=True))
    ]


class Grader:
    """Grades the samples of a rollout prompt by prompt, while others are still drawn.

    With several processes each grades the samples of its own prompts, draw % processes, and all get all scores.
    """

    def __init__(self, prompts: Mapping[int, EncodedPrompt], pool: RewardPool, decode: Callable[[list], list[str]]):
        """`prompts` by draw, which is a sample's request_id; `decode` turns lists of token ids into texts."""
        self._prompts, self._pool, self._decode = prompts, pool, decode
        self._gradings: dict[int, Grading] = {}  # by draw

    def add(self, samples: Sequence[RolloutSample]) -> None:
        """Begins to grade all samples of one prompt."""
        draw = samples[0].request_id
        if draw % hosts.process_count() == hosts.process_index():
            texts, prompt = self._decode([sample.token_ids for sample in samples]), self._prompts[draw]
            self._gradings[draw] = self._pool.begin(
                [_request(*one, prompt) for one in zip(samples, texts, strict=True)]
            )

    def scores(self, samples: Sequence[RolloutSample]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (parts float32 [N, P] in the order of PART_NAMES, scorable bool [N]) of all samples of the prompts
        added, in group order."""
        mine = [index for index, sample in enumerate(samples) if sample.request_id in self._gradings]
        draws = dict.fromkeys(samples[index].request_id for index in mine)
        found = self._pool.finish([self._gradings[draw] for draw in draws])
        return _everywhere(mine, found, len(samples), self._pool)


class Graders(Protocol):
    """What scores responses: a pool of graders (rewards.pool.RewardPool), or a judge in place of one."""

    @property
    def batch_deadline_s(self) -> float: ...

    def score(self, requests: Sequence[RewardRequest]) -> list[Score]: ...


def grade(
    samples: Sequence[RolloutSample], prompts: Sequence[EncodedPrompt], texts: Sequence[str], pool: Graders
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (parts float32 [N, P] in the order of PART_NAMES, scorable bool [N]) of samples and their prompts.

    With several processes each grades the samples of its own prompts, draw % processes, and all get all scores.
    """
    processes, own = hosts.process_count(), hosts.process_index()
    mine = [i for i, sample in enumerate(samples) if sample.request_id % processes == own]
    found = pool.score([_request(samples[i], texts[i], prompts[i]) for i in mine])
    return _everywhere(mine, found, len(samples), pool)


def _request(sample: RolloutSample, text: str, prompt: EncodedPrompt) -> RewardRequest:
    return RewardRequest(
        id=f"{prompt.problem.id}/{sample.request_id}/{sample.sample_index}",
        task=prompt.problem.task,
        prompt=prompt.problem.text,
        response=text,
        reference=prompt.problem.reference,
        prefill=prompt.prefill,
        language=prompt.problem.language,
        truncated=sample.truncated,
        source=prompt.problem.source,
    )


def _everywhere(mine: list[int], scores: list[Score], total: int, pool: Graders) -> tuple[np.ndarray, np.ndarray]:
    """Returns (parts, scorable) of all samples, this process having scored those with the numbers `mine`."""
    parts = np.asarray([[score.parts.get(name, 0.0) for name in PART_NAMES] for score in scores], np.float32)
    parts = parts.reshape(len(scores), len(PART_NAMES))
    scorable = np.asarray([score.scorable for score in scores], bool)
    if hosts.process_count() == 1:
        return parts, scorable
    name, deadline_s = "the scores of a rollout", pool.batch_deadline_s + hosts.DEADLINE_S
    found = hosts.gather([mine, parts, scorable], name, deadline_s)
    if found is not None:
        parts, scorable = np.zeros((total, len(PART_NAMES)), np.float32), np.zeros(total, bool)
        for places, some_parts, some_scorable in found:
            parts[places], scorable[places] = some_parts, some_scorable
    return tuple(hosts.broadcast([parts, scorable], name, deadline_s))


def mini_batches(rollout: Rollout, start: int, config: RunSettings) -> list[np.ndarray]:
    """Returns the sample numbers of each update: a keyed shuffle of all samples, cut into equal parts.

    Outputs, not questions, are shuffled (one group may be spread over several updates), so advantages come first.
    """
    size = config.grpo.prompts_per_update * config.grpo.group_size
    order = keyed_permutation(len(rollout), hash64(config.stage, config.seed, "shuffle", start))
    return [order[i : i + size] for i in range(0, len(rollout), size)]


def compute_advantages(rollout: Rollout, config: RunSettings, max_new_tokens: int, kl_coef: float = 0.0) -> Advantages:
    """Returns rewards, advantages over whole groups, and which samples are trained on and counted.

    Where a KL term stands in the reward, kl_coef * sum of log(policy / reference) over its tokens is taken off a sample's
    before its advantage; rewards and signal are without it.
    """
    grpo = config.grpo
    truncated = np.asarray([sample.truncated for sample in rollout.samples], bool)
    weights = np.asarray([getattr(config.reward, name) for name in PART_NAMES], np.float32)
    used = np.flatnonzero(weights)  # parts that a run leaves out are not in the rounding of its sums either
    parts, weights = rollout.parts[:, used], weights[used]
    if grpo.overlong_buffer_fraction:
        lengths = [len(sample.token_ids) for sample in rollout.samples]
        penalty = losses.overlong_penalty(lengths, grpo, max_new_tokens)
        parts, weights = np.concatenate([parts, penalty[:, None]], axis=1), np.append(weights, np.float32(1))
    scorable = rollout.scorable & ~truncated if grpo.truncated == "drop" else rollout.scorable
    kind = "mean" if grpo.advantage == "gae" else grpo.advantage  # those of a critic are not of groups
    options = dict(kind=kind, ddof=grpo.advantage_ddof, guard=grpo.advantage_guard, singleton=grpo.singleton)
    found = group_advantages(parts, weights, scorable, grpo.group_size, grpo.advantage_epsilon, **options)
    advantages, rewards, signal = (np.asarray(array) for array in found)
    if kl_coef and grpo.kl_placement == "reward" and grpo.advantage != "gae":
        kl = np.asarray([row.sum() for row in token_kl(rollout)], np.float32)
        parts, weights = np.concatenate([parts, -kl[:, None]], axis=1), np.append(weights, np.float32(kl_coef))
        less = group_advantages(parts, weights, scorable, grpo.group_size, grpo.advantage_epsilon, **options)
        advantages = np.asarray(less[0])
    trained = rollout.scorable if grpo.truncated == "keep" else rollout.scorable & ~truncated
    if grpo.denominator == "signal":
        trained = trained & np.repeat(signal, grpo.group_size)
    counted = np.ones(len(rollout), bool) if grpo.denominator == "all" else trained
    return Advantages(advantages, rewards, trained, counted, signal)


def token_kl(rollout: Rollout) -> list[np.ndarray]:
    """Returns log(policy / reference) of every token of each sample, the k1 estimate of their KL divergence in nats."""
    pairs = zip(rollout.samples, rollout.values["reference_logp"], strict=True)
    return [sample.behaviour_logps - reference for sample, reference in pairs]


def signals(rollout: Rollout, config: RunSettings) -> np.ndarray:
    """Returns whether the rewards of each group differ, bool [groups]; a length penalty does not count."""
    plain = replace(config, grpo=replace(config.grpo, overlong_buffer_fraction=0.0, singleton="zero"))
    return compute_advantages(rollout, plain, config.sampler.max_new_tokens).has_signal


def keep_groups(parts: Sequence[Rollout], wanted: int, config: RunSettings) -> Rollout:
    """Returns `wanted` groups of several rollouts as one: those with a signal, then tied ones, each in order of draw.

    Source: DAPO, section 3.2 (arXiv 2503.14476), here with a bound on what is drawn.
    """
    size = config.grpo.group_size
    signal = np.concatenate([signals(part, config) for part in parts])
    kept = np.sort(np.argsort(~signal, kind="stable")[:wanted])
    chosen = (kept[:, None] * size + np.arange(size)).reshape(-1)
    samples = [sample for part in parts for sample in part.samples]
    every, left = np.concatenate([part.parts for part in parts]), np.ones(len(samples), bool)
    left[chosen] = False
    return Rollout(
        [samples[i] for i in chosen],
        every[chosen],
        np.concatenate([part.scorable for part in parts])[chosen],
        sum(part.draws for part in parts),
        dropped_parts=every[left],
        dropped_tokens=sum(len(samples[i].token_ids) for i in np.flatnonzero(left)),
    )


def pack_mini_batch(
    rollout: Rollout, chosen: np.ndarray, advantages: Advantages, config: RunSettings, max_new_tokens: int
) -> PackedBatch:
    """Returns the chosen samples packed, with the values of every response token that the loss takes.

    With grpo.routing_replay also the experts each token was sent to. Raises ValueError when a sample has no such record.
    """
    samples = [rollout.samples[i] for i in chosen]
    size, lengths = config.pack, [len(sample.token_ids) for sample in samples]
    weights = losses.token_weights(lengths, config.grpo, max_new_tokens, advantages.in_mean[chosen])
    items, rows = [], None
    for index, sample, weight in zip(chosen, samples, weights, strict=True):
        values = {"advantage": advantages.advantages[index], "behaviour_logp": sample.behaviour_logps, "weight": weight}
        values |= {name: arrays[index] for name, arrays in (rollout.values | advantages.values).items()}
        items.append(_item(sample, float(advantages.trained[index]), values, config.grpo.routing_replay))
    if size.shared_prompts:
        items, rows = share_prompts(items, [len(sample.prompt_ids) for sample in samples], size.row_tokens)
    sizes = [len(item.tokens) for item in items]
    shards = sharding.row_shards(size.rows_per_micro_batch, config.mesh)
    rows = spread(rows or pack(sizes, size.row_tokens), sizes, size.rows_per_micro_batch, shards)
    batch = pack_batch(items, size.row_tokens, micro_batches(config) * size.rows_per_micro_batch, rows)
    if size.shared_prompts:
        batch.inputs.setdefault(PREFIXES, np.zeros_like(batch.segments))
    return batch


def _item(sample: RolloutSample, trained: float, values: dict, routed: bool) -> PackItem:
    """Returns a sample with the mask and the values (numbers or arrays) of its response, and the experts it was sent to."""

    def after(value) -> np.ndarray:
        row = np.zeros(len(sample.prompt_ids) + len(sample.token_ids), np.float32)
        row[len(sample.prompt_ids) :] = value
        return row

    tokens, inputs = np.concatenate([sample.prompt_ids, sample.token_ids]), {ROUTED: _record(sample)} if routed else {}
    return PackItem(tokens, after(trained), {name: after(value) for name, value in values.items()}, inputs)


def _record(sample: RolloutSample) -> np.ndarray:
    if sample.routed_experts is None:
        raise ValueError(
            f"grpo.routing_replay=true: sample {sample.request_id}/{sample.sample_index} was journalled without the "
            "experts of its tokens; finish its rollout with grpo.routing_replay=false"
        )
    return sample.routed_experts


def micro_batches(config: RunSettings) -> int:
    """Returns how many micro-batches hold a mini-batch in the worst case, when no two samples share a row."""
    size = config.grpo.prompts_per_update * config.grpo.group_size
    return -(-size // config.pack.rows_per_micro_batch)
