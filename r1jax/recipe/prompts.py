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
from r1jax.recipe.parts import AskingParts, PromptParts
from r1jax.rl.rollout import EncodedPrompt, Mixture
from r1jax.schema import DataConfig

# Stages that train a base model by RL alone: they use R1-Zero's template, whatever template the tokenizer ships.
FROM_BASE = ("r1_zero", "student_rl", "ppo_baseline")


@dataclass(frozen=True)
class StagePrompts:
    """The prompts of a stage: those to train on, those to evaluate, and the source that they come from."""

    source: ProblemSource
    training: Mixture
    held_out: list[EncodedPrompt]
    counts: dict  # rows read, by task, repeated, and prompts left out by cause: for the figures


def load(settings: PromptParts, tokenizer: Tokenizer) -> StagePrompts:
    """Returns the prompts of a stage that trains on problems.

    Raises ValueError for a bad file, an empty split, a window that is too short, or no source of problems.
    """
    source = _source(settings, tokenizer)
    problem_lists, weights = source.training()
    training = Mixture([encode(problems, settings, tokenizer) for problems in problem_lists], weights)
    held_out = encode(source.held_out(), settings, tokenizer)
    all_problems = [*(problem for problems in problem_lists for problem in problems), *source.held_out()]
    left_out = {"too_long": _left_out_by_task(all_problems, [*training.all, *held_out])}
    return StagePrompts(source, training, held_out, {**source.counts, "left_out": left_out})


def load_held_out(settings: PromptParts, tokenizer: Tokenizer) -> StagePrompts:
    """Returns the held-out prompts for an evaluation, without training prompts."""
    source = _source(settings, tokenizer)
    held_out = encode(source.held_out(), settings, tokenizer)
    left_out = {"too_long": _left_out_by_task(source.held_out(), held_out)}
    return StagePrompts(source, Mixture([]), held_out, {**source.counts, "left_out": left_out})


def _left_out_by_task(problems: Sequence[Problem], kept: Sequence[EncodedPrompt]) -> dict[str, int]:
    """Returns {task: number of its problems that were not kept}."""
    return dict(Counter(problem.task for problem in problems) - Counter(prompt.problem.task for prompt in kept))


def _source(settings: PromptParts, tokenizer: Tokenizer) -> ProblemSource:
    source = problems.source(settings)
    if isinstance(source, TinyWorld):
        source.check_words(tokenizer.encode, tokenizer.source)
    return source


def template(stage: str, data: DataConfig, tokenizer: Tokenizer) -> str:
    """Returns the template in force.

    If config.data.template is auto: the tiny world's own there, r1_zero for RL on a base model, else chat if the
    tokenizer has a chat template, else r1_zero.
    """
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
    """Returns the ids of a rendered prompt with one bos token: the chat template's, else the tokenizer's."""
    return tokenizer.encode(text) if template(stage, data, tokenizer) == "chat" else tokenizer.encode_prompt(text)


def encode(problems: Sequence[Problem], settings: AskingParts, tokenizer: Tokenizer) -> list[EncodedPrompt]:
    """Returns the prompts as ids; prints how many exceed config.sampler.max_prompt_tokens and leaves them out.

    Raises ValueError when none is left, when a larger share than config.data.max_left_out is left out, and when a
    prompt with a full response exceeds the positions of the model.
    """
    stage, data = settings.stage, settings.data
    limit, max_new_tokens = settings.sampler.max_prompt_tokens, settings.sampler.max_new_tokens
    positions = settings.network.model.max_position_embeddings
    encoded, longest = [], 0
    for problem in problems:
        text = render(problem.prompt, stage, data, tokenizer)
        ids = ids_of(text, stage, data, tokenizer)
        longest = max(longest, len(ids))
        if len(ids) <= limit:
            encoded.append(EncodedPrompt(problem, np.asarray(ids, np.int32), templates.prefill(text)))
    dropped = len(problems) - len(encoded)
    if problems and not encoded:
        raise ValueError(
            f"all {len(problems)} prompts exceed config.sampler.max_prompt_tokens={limit} (longest {longest}); raise it"
        )
    if dropped > data.max_left_out * len(problems):
        raise ValueError(
            f"{dropped} of {len(problems)} prompts exceed config.sampler.max_prompt_tokens={limit} (longest "
            f"{longest}); raise it, or raise config.data.max_left_out={data.max_left_out} to go on without them"
        )
    if dropped:
        say(f"{dropped} of {len(problems)} prompts exceed {limit} tokens, left out")
    kept = max((len(prompt.ids) for prompt in encoded), default=0)
    if kept + max_new_tokens > positions:
        raise ValueError(
            f"a prompt of {kept} tokens and config.sampler.max_new_tokens={max_new_tokens} exceed the model's "
            f"max_position_embeddings={positions}; lower config.sampler.max_new_tokens or "
            "config.sampler.max_prompt_tokens"
        )
    return encoded
