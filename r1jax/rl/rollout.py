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
    """A prompt with the ids the model sees; `prefill` is the part of the assistant's turn that they already contain."""

    problem: Problem
    ids: np.ndarray
    prefill: str = ""


@dataclass(frozen=True, eq=False)
class Advantages:
    """Advantages and masks of a rollout, one entry per sample in group order."""

    advantages: np.ndarray | list[np.ndarray]  # float32 [N]; or for each sample an array with one value a token
    rewards: np.ndarray  # float32 [N], the weighted sums, length penalty included, without a KL term
    trained: np.ndarray  # bool [N]: whether its tokens are in the loss
    in_mean: np.ndarray  # bool [N]: whether the means of the loss count it
    has_signal: np.ndarray  # bool [groups]: whether the rewards of the group differ
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)  # further float32 values of every token, by name


@dataclass(frozen=True, eq=False)
class Mixture:
    """Prompts of several sources, drawn in proportion to the sources' weights."""

    sources: Sequence[Sequence[EncodedPrompt]]
    weights: Sequence[float] = (1.0,)

    @property
    def all(self) -> list[EncodedPrompt]:
        return [prompt for source in self.sources for prompt in source]

    def stream(self, seed: int, stage: str) -> PromptStream:
        """Returns the stream of its problems."""
        lists = [[prompt.problem for prompt in source] for source in self.sources]
        return PromptStream(lists, self.weights, seed=seed, stage=stage)


class PromptPhases:
    """The prompts of a run: one mixture, from some update on another. A pure function of prompt index and rollout."""

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
            first_update = schedules.first_start_at_or_after(update, config.grpo.updates_per_rollout)
            self._boundary, self._later = first_update * config.grpo.prompts_per_update, first_update
            mixture = Mixture(sources, weights)
            self._streams.append(mixture.stream(config.seed, f"{config.stage}/later"))
            self._by_id |= {p.problem.id: p for p in mixture.all}

    @property
    def all(self) -> list[EncodedPrompt]:
        return list(self._by_id.values())

    def prompt(self, prompt_index: int, first_update: int) -> EncodedPrompt:
        """Returns the prompt with an index in the rollout that starts at an update."""
        if first_update < self._later:
            return self._by_id[self._streams[0][prompt_index].id]
        return self._by_id[self._streams[1][prompt_index - self._boundary].id]


def requests_for(
    prompts: Sequence[EncodedPrompt],
    prompt_indices: Sequence[int],
    samples: int,
    sampling: SamplingParams,
    seed: int,
    stage: str,
    purpose: str,
) -> list[RolloutRequest]:
    """Returns one request a prompt, each with the keys of its `samples` samples."""
    repeated, indices = np.repeat(np.asarray(prompt_indices), samples), np.tile(np.arange(samples), len(prompt_indices))
    keys = rng.sample_keys(seed, stage, repeated, indices, purpose).reshape(len(prompt_indices), samples, 2)
    return [
        RolloutRequest(int(prompt_index), prompt.ids, keys[i], sampling)
        for i, (prompt_index, prompt) in enumerate(zip(prompt_indices, prompts, strict=True))
    ]


class Grader:
    """Grades the samples of a rollout prompt by prompt, while others are still drawn.

    With several processes each grades the prompts with index % processes = its own number, and all get all scores.
    """

    def __init__(self, prompts: Mapping[int, EncodedPrompt], pool: RewardPool, decode: Callable[[list], list[str]]):
        """`prompts` by index, which is a sample's request_id; `decode` turns lists of token ids into texts."""
        self._prompts, self._pool, self._decode = prompts, pool, decode
        self._gradings: dict[int, Grading] = {}  # by prompt index

    def add(self, samples: Sequence[RolloutSample]) -> None:
        """Begins to grade all samples of one prompt."""
        prompt_index = samples[0].request_id
        if prompt_index % hosts.process_count() == hosts.process_index():
            texts, prompt = self._decode([sample.token_ids for sample in samples]), self._prompts[prompt_index]
            self._gradings[prompt_index] = self._pool.begin(
                [_request(*one, prompt) for one in zip(samples, texts, strict=True)]
            )

    def scores(self, samples: Sequence[RolloutSample]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (reward terms float32 [N, P] in the order of PART_NAMES, scorable bool [N]), in group order."""
        own_indices = [index for index, sample in enumerate(samples) if sample.request_id in self._gradings]
        prompt_indices = dict.fromkeys(samples[index].request_id for index in own_indices)
        scores = self._pool.finish([self._gradings[prompt_index] for prompt_index in prompt_indices])
        return gather_scores(own_indices, scores, len(samples), self._pool)


class Graders(Protocol):
    """What scores responses: a pool of graders (rewards.pool.RewardPool), or a judge in place of one.

    `together` is whether all processes of a run score every response together, as a model over their devices does.
    """

    together: bool

    @property
    def batch_deadline_s(self) -> float: ...

    def score(self, requests: Sequence[RewardRequest]) -> list[Score]: ...


def grade(
    samples: Sequence[RolloutSample], prompts: Sequence[EncodedPrompt], texts: Sequence[str], pool: Graders
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (reward terms float32 [N, P] in the order of PART_NAMES, scorable bool [N]) of samples and their prompts.

    With several processes each grades the prompts with index % processes = its own number, or where the pool scores
    `together` every prompt, and all get all scores.
    """
    processes, process = (1, 0) if pool.together else (hosts.process_count(), hosts.process_index())
    own_indices = [i for i, sample in enumerate(samples) if sample.request_id % processes == process]
    scores = pool.score([_request(samples[i], texts[i], prompts[i]) for i in own_indices])
    return gather_scores(own_indices, scores, len(samples), pool)


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


def gather_scores(
    own_indices: list[int], scores: list[Score], total: int, pool: Graders
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (reward terms, scorable) of all samples; this process has scored those with `own_indices`."""
    reward_terms = np.asarray([[score.parts.get(name, 0.0) for name in PART_NAMES] for score in scores], np.float32)
    reward_terms = reward_terms.reshape(len(scores), len(PART_NAMES))
    scorable = np.asarray([score.scorable for score in scores], bool)
    if hosts.process_count() == 1 or pool.together:
        return reward_terms, scorable
    name, deadline_s = "the scores of a rollout", pool.batch_deadline_s + hosts.DEADLINE_S
    gathered = hosts.gather([own_indices, reward_terms, scorable], name, deadline_s)
    if gathered is not None:
        reward_terms, scorable = np.zeros((total, len(PART_NAMES)), np.float32), np.zeros(total, bool)
        for indices, process_terms, process_scorable in gathered:
            reward_terms[indices], scorable[indices] = process_terms, process_scorable
    return tuple(hosts.broadcast([reward_terms, scorable], name, deadline_s))


def mini_batches(rollout: Rollout, first_update: int, config: RunSettings) -> list[np.ndarray]:
    """Returns the sample numbers of each update: a keyed shuffle of all samples, cut into equal parts.

    Outputs, not questions, are shuffled (one group may be spread over several updates), so advantages are computed
    first.
    """
    size = config.grpo.prompts_per_update * config.grpo.group_size
    order = keyed_permutation(len(rollout), hash64(config.stage, config.seed, "shuffle", first_update))
    return [order[i : i + size] for i in range(0, len(rollout), size)]


def compute_advantages(rollout: Rollout, config: RunSettings, max_new_tokens: int, kl_coef: float = 0.0) -> Advantages:
    """Returns rewards, advantages over whole groups, and which samples are trained on and counted in means.

    With grpo.kl_placement=reward, kl_coef * the sum of log(policy / reference) over a sample's tokens is subtracted
    from its reward before advantages are computed; the returned rewards and has_signal are without it.
    """
    grpo = config.grpo
    truncated = np.asarray([sample.truncated for sample in rollout.samples], bool)
    weights = np.asarray([getattr(config.reward, name) for name in PART_NAMES], np.float32)
    used = np.flatnonzero(weights)  # terms of weight 0 must not change the rounding of the sums
    terms, weights = rollout.reward_terms[:, used], weights[used]
    if grpo.overlong_buffer_fraction:
        lengths = [len(sample.token_ids) for sample in rollout.samples]
        penalty = losses.overlong_penalty(lengths, grpo, max_new_tokens)
        terms, weights = np.concatenate([terms, penalty[:, None]], axis=1), np.append(weights, np.float32(1))
    scorable = rollout.scorable & ~truncated if grpo.truncated == "drop" else rollout.scorable
    kind = "mean" if grpo.advantage == "gae" else grpo.advantage  # a critic's advantages replace them
    options = dict(kind=kind, ddof=grpo.advantage_ddof, guard=grpo.advantage_guard, singleton=grpo.singleton)
    results = group_advantages(terms, weights, scorable, grpo.group_size, grpo.advantage_epsilon, **options)
    advantages, rewards, has_signal = (np.asarray(array) for array in results)
    if kl_coef and grpo.kl_placement == "reward" and grpo.advantage != "gae":
        kl = np.asarray([row.sum() for row in token_kl(rollout)], np.float32)
        terms, weights = np.concatenate([terms, -kl[:, None]], axis=1), np.append(weights, np.float32(kl_coef))
        with_kl = group_advantages(terms, weights, scorable, grpo.group_size, grpo.advantage_epsilon, **options)
        advantages = np.asarray(with_kl[0])
    trained = rollout.scorable if grpo.truncated == "keep" else rollout.scorable & ~truncated
    if grpo.denominator == "signal":
        trained = trained & np.repeat(has_signal, grpo.group_size)
    in_mean = np.ones(len(rollout), bool) if grpo.denominator == "all" else trained
    return Advantages(advantages, rewards, trained, in_mean, has_signal)


def token_kl(rollout: Rollout) -> list[np.ndarray]:
    """Returns log(policy / reference) of every token of each sample, the k1 estimate of their KL divergence in nats."""
    pairs = zip(rollout.samples, rollout.values["reference_logp"], strict=True)
    return [sample.behaviour_logps - reference for sample, reference in pairs]


def signals(rollout: Rollout, config: RunSettings) -> np.ndarray:
    """Returns whether the rewards of each group differ, bool [groups]; a length penalty does not count."""
    plain = replace(config, grpo=replace(config.grpo, overlong_buffer_fraction=0.0, singleton="zero"))
    return compute_advantages(rollout, plain, config.sampler.max_new_tokens).has_signal


def keep_groups(rollouts: Sequence[Rollout], number: int, config: RunSettings) -> Rollout:
    """Returns `number` groups of several rollouts as one: first those with a signal, then tied ones, in order of draw.

    Source: DAPO, section 3.2 (arXiv 2503.14476), here with a bound on the prompts drawn.
    """
    size = config.grpo.group_size
    has_signal = np.concatenate([signals(rollout, config) for rollout in rollouts])
    kept = np.sort(np.argsort(~has_signal, kind="stable")[:number])
    chosen = (kept[:, None] * size + np.arange(size)).reshape(-1)
    samples = [sample for rollout in rollouts for sample in rollout.samples]
    terms, left_out = np.concatenate([rollout.reward_terms for rollout in rollouts]), np.ones(len(samples), bool)
    left_out[chosen] = False
    return Rollout(
        [samples[i] for i in chosen],
        terms[chosen],
        np.concatenate([rollout.scorable for rollout in rollouts])[chosen],
        sum(rollout.draws for rollout in rollouts),
        dropped_terms=terms[left_out],
        dropped_tokens=sum(len(samples[i].token_ids) for i in np.flatnonzero(left_out)),
    )


def pack_mini_batch(
    rollout: Rollout, chosen: np.ndarray, advantages: Advantages, config: RunSettings, max_new_tokens: int
) -> PackedBatch:
    """Returns the chosen samples packed, with the per-token values that the loss reads.

    With grpo.routing_replay also the experts of each token; raises ValueError when a sample has no record of them.
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
    """Returns a sample for packing: its tokens, mask, values (numbers or arrays) of its response, and its experts."""

    def on_response(value) -> np.ndarray:
        row = np.zeros(len(sample.prompt_ids) + len(sample.token_ids), np.float32)
        row[len(sample.prompt_ids) :] = value
        return row

    tokens, inputs = np.concatenate([sample.prompt_ids, sample.token_ids]), {ROUTED: _experts(sample)} if routed else {}
    return PackItem(tokens, on_response(trained), {name: on_response(value) for name, value in values.items()}, inputs)


def _experts(sample: RolloutSample) -> np.ndarray:
    if sample.routed_experts is None:
        raise ValueError(
            f"grpo.routing_replay=true: sample {sample.request_id}/{sample.sample_index} was journalled without the "
            "experts of its tokens; finish its rollout with grpo.routing_replay=false"
        )
    return sample.routed_experts


def micro_batches(config: RunSettings) -> int:
    """Returns how many micro-batches a mini-batch needs in the worst case, when no two samples share a row."""
    size = config.grpo.prompts_per_update * config.grpo.group_size
    return -(-size // config.pack.rows_per_micro_batch)
