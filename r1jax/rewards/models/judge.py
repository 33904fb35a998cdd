"""A language model as a judge: is a response right, given a reference, and which of two replies is better?

The judge runs in the project's own sampler. Sampling is keyed by the seed and by the judged texts, so that a verdict
does not depend on order, batch, slot or restarts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from r1jax.data import templates
from r1jax.data.hashing import hash64
from r1jax.rewards.models import verdicts
from r1jax.rewards.score import RewardRequest, Score
from r1jax.sampler.build import sampling_params
from r1jax.sampler.sample import RolloutRequest
from r1jax.sampler.scheduler import RolloutSampler


class JudgeTokenizer(Protocol):
    """The methods of checkpoints.tokenizer.Tokenizer that a judge uses."""

    stop_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...

    def escape_special_tokens(self, text: str) -> str: ...

    def render_chat(self, messages: list[dict[str, str]]) -> str: ...


@dataclass(frozen=True)
class Request:
    """One prompt for the model, and a 64-bit key for each reply to sample."""

    text: str
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Two replies to one request; the text after their thinking is compared."""

    id: str
    prompt: str
    first: str
    second: str


@dataclass(frozen=True)
class Judgement:
    """One verdict on a pair."""

    swapped: bool  # the second reply was shown first
    margin: int | None  # of the first reply over the second, -2 to 2; None if the judge's reply has no readable verdict
    detail: str


@dataclass
class Counts:
    """How many verdicts were requested, and how many could be parsed."""

    asked: int = 0
    readable: int = 0

    @property
    def parse_rate(self) -> float:
        return self.readable / max(self.asked, 1)


class Judge:
    """Samples verdicts from a model. A prompt that is too long for the sampler gives None and no error."""

    def __init__(self, sampler: RolloutSampler, params: Any, tokenizer: JudgeTokenizer, template: str, seed: int = 0):
        """`params` are laid out for the engine (Engine.load_params); `template` is chat or plain (data.templates)."""
        self._sampler, self._params, self._tokenizer = sampler, params, tokenizer
        self._template, self._seed = template, seed
        self._sampling = sampling_params(sampler.engine.sampler, tokenizer.stop_ids)
        self.counts = Counts()

    def escape_special_tokens(self, text: str) -> str:
        """Returns an untrusted text without special tokens of this model (Tokenizer.escape_special_tokens)."""
        return self._tokenizer.escape_special_tokens(text)

    def replies(self, requests: Sequence[Request]) -> list[list[str | None]]:
        """Returns the whole turns for each request, one per key; None where the prompt or the turn is too long."""
        turns: list[list[str | None]] = [[None] * len(request.keys) for request in requests]
        asked, opened, engine = [], {}, self._sampler.engine
        # A whole reply must fit behind the prompt.
        window = engine.network.model.max_position_embeddings - engine.sampler.max_new_tokens
        longest = min(engine.sampler.max_prompt_tokens, window)
        for index, request in enumerate(requests):
            text = templates.render(request.text, self._template, chat=self._tokenizer.render_chat)
            ids = np.asarray(self._tokenizer.encode(text), np.int32)
            if request.keys and 0 < len(ids) <= longest:
                keys = np.asarray([divmod(key, 1 << 32) for key in request.keys], np.uint32)
                asked.append(RolloutRequest(index, ids, keys, self._sampling))
                opened[index] = templates.prefill(text)
        for sample in self._sampler.stream(asked, self._params) if asked else ():
            if not sample.truncated:
                turn = opened[sample.request_id] + self._tokenizer.decode(sample.token_ids)
                turns[sample.request_id][sample.sample_index] = turn
        return turns

    def accuracy(self, requests: Sequence[RewardRequest]) -> list[Score]:
        """Returns a Score for each response: 1 if the judge finds it equal to its reference, else 0.

        A response without a readable verdict is unscorable. The text after the thinking is judged; if there is none, or
        the response is truncated, the value is 0 without asking the judge.
        """
        scores: dict[int, Score] = {}
        for place, request in enumerate(requests):
            if not request.reference.strip():
                scores[place] = Score(0.0, {}, False, "the reference is empty")
            elif request.truncated or not templates.summary(request.text):
                scores[place] = Score(0.0, {}, True, "truncated" if request.truncated else "no answer found")
        open_places = [place for place in range(len(requests)) if place not in scores]
        materials = [self._materials(requests[place]) for place in open_places]
        replies = self.replies(
            [
                Request(verdicts.correctness_prompt(*texts, self._seed), (hash64("correctness", self._seed, *texts),))
                for texts in materials
            ]
        )
        for place, texts, (reply,) in zip(open_places, materials, replies, strict=True):
            value, detail = self._count(reply, verdicts.read_correctness, texts)
            scores[place] = Score(float(value or 0), {}, value is not None, f"judge: {detail}")
        return [scores[place] for place in range(len(requests))]

    def compare(self, pairs: Sequence[Pair], judgements: int = 4) -> list[list[Judgement]]:
        """Returns `judgements` verdicts on each pair, sampled independently, each with A and B in a random order.

        Source: DeepSeek-R1, supplement B.2 (4 judgements a pair, order random each time).
        """
        asked, places = [], []
        for index, pair in enumerate(pairs):
            texts = tuple(
                map(
                    self._tokenizer.escape_special_tokens,
                    (pair.prompt, *map(templates.summary, (pair.first, pair.second))),
                )
            )
            orders = [bool(hash64("order", self._seed, pair.id, *texts, n) & 1) for n in range(judgements)]
            for swapped in (False, True):
                numbers = [n for n in range(judgements) if orders[n] is swapped]
                prompt, first, second = texts if not swapped else (texts[0], texts[2], texts[1])
                keys = tuple(hash64("comparison", self._seed, pair.id, *texts, n) for n in numbers)
                asked.append(Request(verdicts.comparison_prompt(prompt, first, second, self._seed), keys))
                places.append((index, swapped, numbers, texts))
        judged: list[dict[int, Judgement]] = [{} for _ in pairs]
        for (index, swapped, numbers, texts), replies in zip(places, self.replies(asked), strict=True):
            for number, reply in zip(numbers, replies, strict=True):
                margin, detail = self._count(reply, verdicts.read_comparison, texts)
                if margin is not None and swapped:
                    margin = -margin
                judged[index][number] = Judgement(swapped, margin, detail)
        return [[by_number[number] for number in range(judgements)] for by_number in judged]

    def _materials(self, request: RewardRequest) -> tuple[str, str, str]:
        escaped = self._tokenizer.escape_special_tokens
        return escaped(request.prompt), escaped(request.reference), escaped(templates.summary(request.text))

    def _count(self, reply: str | None, read, materials: Sequence[str]) -> verdicts.ParsedVerdict:
        """Returns the verdict of a reply and counts it."""
        missing = verdicts.ParsedVerdict(None, "the prompt or the reply is longer than the judge's sampler allows")
        verdict = missing if reply is None else read(reply, materials)
        self.counts.asked += 1
        self.counts.readable += verdict.value is not None
        return verdict
