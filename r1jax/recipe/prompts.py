"""From problems to prompts: the template in force, the ids a model sees, and which prompts are too long."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core.say import say
from r1jax.data import templates
from r1jax.data.problems import Message, Problem, ProblemSource
from r1jax.data.tasks import TinyWorld
from r1jax.recipe import problems
from r1jax.rl.rollout import EncodedPrompt, Mixture
from r1jax.schema import Config, DataConfig, ModelConfig, SamplerConfig

# Stages that train a base model by RL alone: they ask it as R1-Zero was asked, whatever template its tokenizer ships.
FROM_BASE = ("r1_zero", "student_rl", "ppo_baseline")


@dataclass(frozen=True)
class StagePrompts:
    """What a stage asks: the prompts to train on, those to evaluate, and the source they come from."""

    source: ProblemSource
    training: Mixture
    held_out: list[EncodedPrompt]
    counts: dict  # rows read, by task, repeated, and prompts left out by cause: for the figures


def load(config: Config, tokenizer: Tokenizer) -> StagePrompts:
    """Returns the prompts of a stage that trains on problems.

    Raises ValueError for a bad file, an empty split, a window that is too short, or no source of problems.
    """
    source = _source(config, tokenizer)
    parts, weights = source.training()
    training = Mixture(
        [encode(part, config.stage, config.model, config.data, config.sampler, tokenizer) for part in parts], weights
    )
    held_out = encode(source.held_out(), config.stage, config.model, config.data, config.sampler, tokenizer)
    asked = [*(problem for part in parts for problem in part), *source.held_out()]
    left_out = {"too_long": _fewer(asked, [*training.all, *held_out])}
    return StagePrompts(source, training, held_out, {**source.counts, "left_out": left_out})


def load_held_out(config: Config, tokenizer: Tokenizer) -> StagePrompts:
    """Returns the prompts of an evaluation, which trains on none."""
    source = _source(config, tokenizer)
    held_out = encode(source.held_out(), config.stage, config.model, config.data, config.sampler, tokenizer)
    left_out = {"too_long": _fewer(source.held_out(), held_out)}
    return StagePrompts(source, Mixture([]), held_out, {**source.counts, "left_out": left_out})


def _fewer(asked: Sequence[Problem], kept: Sequence[EncodedPrompt]) -> dict[str, int]:
    """Returns {task: how many of its problems were not kept}."""
    return dict(Counter(problem.task for problem in asked) - Counter(prompt.problem.task for prompt in kept))


def _source(config: Config, tokenizer: Tokenizer) -> ProblemSource:
    source = problems.source(config)
    if isinstance(source, TinyWorld):
        source.check_words(tokenizer.encode, tokenizer.source)
    return source


def template(stage: str, data: DataConfig, tokenizer: Tokenizer) -> str:
    """Returns the template in force: as configured, else the tiny world's own, R1-Zero's for RL on a base, chat or r1_zero."""
    if data.template != "auto":
        return data.template
    if data.world == "tiny" and not problems.has_files(data):
        return "tiny"
    if stage in FROM_BASE:
        return "r1_zero"
    return "chat" if tokenizer.chat_template else "r1_zero"


def render(prompt: str | Sequence[Message], stage: str, data: DataConfig, tokenizer: Tokenizer) -> str:
    """Returns the prompt text of a question, or of a conversation, under the template in force."""
    kind = template(stage, data, tokenizer)
    return templates.render(prompt, kind, data.instruction, tokenizer.render_chat, data.think_prefill)


def ids_of(text: str, stage: str, data: DataConfig, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of a rendered prompt: a chat template writes its own bos token, other prompts get the tokenizer's, once."""
    return tokenizer.encode(text) if template(stage, data, tokenizer) == "chat" else tokenizer.encode_prompt(text)


def encode(
    asked: Sequence[Problem],
    stage: str,
    model: ModelConfig,
    data: DataConfig,
    sampler: SamplerConfig,
    tokenizer: Tokenizer,
) -> list[EncodedPrompt]:
    """Returns the prompts as ids; those over config.sampler.max_prompt_tokens are left out, and said to be.

    Raises ValueError when none is left or more than config.data.max_left_out of them are, and when a prompt and a full
    response exceed the positions of the model.
    """
    limit, new = sampler.max_prompt_tokens, sampler.max_new_tokens
    encoded, longest = [], 0
    for problem in asked:
        text = render(problem.prompt, stage, data, tokenizer)
        ids = ids_of(text, stage, data, tokenizer)
        longest = max(longest, len(ids))
        if len(ids) <= limit:
            encoded.append(EncodedPrompt(problem, np.asarray(ids, np.int32), templates.prefill(text)))
    dropped = len(asked) - len(encoded)
    if asked and not encoded:
        raise ValueError(
            f"all {len(asked)} prompts exceed config.sampler.max_prompt_tokens={limit} (longest {longest}); raise it"
        )
    if dropped > data.max_left_out * len(asked):
        raise ValueError(
            f"{dropped} of {len(asked)} prompts exceed config.sampler.max_prompt_tokens={limit} (longest {longest}); raise "
            f"it, or raise config.data.max_left_out={data.max_left_out} to go on without them"
        )
    if dropped:
        say(f"{dropped} of {len(asked)} prompts exceed {limit} tokens, left out")
    kept = max((len(prompt.ids) for prompt in encoded), default=0)
    if kept + new > model.max_position_embeddings:
        raise ValueError(
            f"a prompt of {kept} tokens and config.sampler.max_new_tokens={new} exceed the model's "
            f"max_position_embeddings={model.max_position_embeddings}; lower config.sampler.max_new_tokens or "
            "config.sampler.max_prompt_tokens"
        )
    return encoded
