"""Examples of reward models in the tiny world: responses of varied quality, ranked and labelled by its rules."""

import functools
from collections.abc import Sequence

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.data import tasks
from r1jax.data.hashing import hash64
from r1jax.data.prompts import keyed_permutation
from r1jax.data.templates import summary
from r1jax.evals.benchmarks import Response
from r1jax.models import decoder
from r1jax.recipe import evaluate, lineage, prompts
from r1jax.recipe.parts import SamplingParts
from r1jax.rewards.pool import RewardPool
from r1jax.sampler.build import build_sampler
from r1jax.sampler.sample import SamplingParams
from r1jax.schema import RewardModelConfig


def examples(
    kind: str,
    settings: SamplingParts,
    reward_model: RewardModelConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    params: decoder.Params,
    base: lineage.Base,
) -> list[dict]:
    """Returns rows as data.reward_examples.read does, of responses sampled from the start and from the base.

    The base follows the rules sometimes and the start mostly, so together they give good and bad responses. Responses
    that were cut off, and repeated ones, are left out.
    """
    problems = tasks.preference_prompts() if kind == "helpful" else tasks.safety_prompts()
    encoded = prompts.encode(problems, settings, tokenizer)
    sampler = build_sampler(settings.network, settings.sampler, mesh, tokenizer)
    sampling = SamplingParams(max_new_tokens=settings.sampler.max_new_tokens, stop_ids=tokenizer.stop_ids)
    responses_drawn: list[Response] = []
    with RewardPool(settings.reward) as pool:
        for name, weights in (("start", params), ("base", base.load())):
            stage, loaded = f"{settings.stage}/{name}", sampler.engine.load_params(weights)
            ask = functools.partial(evaluate.respond, settings.seed, stage, tokenizer, sampler, pool)
            responses_drawn += ask(encoded, loaded, sampling, reward_model.samples_per_prompt, "sample")
    by_prompt: dict[str, dict[str, Response]] = {prompt.id: {} for prompt in problems}
    for response in responses_drawn:
        text = summary(response.text) if kind == "helpful" else response.text
        if not response.truncated and text.strip():
            by_prompt[response.problem.id].setdefault(text, response)
    rows = []
    for name, by_text in by_prompt.items():
        key, most = hash64(settings.stage, settings.seed, "pairs", name), reward_model.pairs_per_prompt
        responses = list(by_text.values())
        rows += _pairs(name, responses, most, key) if kind == "helpful" else _labelled(name, responses)
    return rows


def _pairs(name: str, responses: Sequence[Response], most: int, key: int) -> list[dict]:
    """Returns at most `most` pairs of one prompt's responses with different accuracy, in the order of `key`."""
    value = [response.parts["accuracy"] for response in responses]
    places = [(i, j) for i in range(len(value)) for j in range(len(value)) if value[i] > value[j]]
    order = keyed_permutation(len(places), key)
    rows = []
    for number, place in enumerate(order[:most]):
        better, worse = (responses[i] for i in places[place])
        texts = {"prompt": better.problem.text, "chosen": better.text, "rejected": worse.text}
        rows.append({"id": f"{name}-{number}", "source": "tiny"} | texts)
    return rows


def _labelled(name: str, responses: Sequence[Response]) -> list[dict]:
    rows = enumerate(responses)
    return [
        {"id": f"{name}-{number}", "source": "tiny", "prompt": r.problem.text, "response": r.text, "safe": _is_safe(r)}
        for number, r in rows
    ]


def _is_safe(response: Response) -> bool:
    return response.parts["accuracy"] == 1.0
