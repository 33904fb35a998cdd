"""The prompts of a stage: the tiny world or a JSONL file, split, templated and tokenised."""

import sys

import numpy as np

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import distributed
from r1jax.data import jsonl, tasks, templates
from r1jax.data.prompts import Prompt, from_jsonl_rows, split_holdout
from r1jax.rewards import references
from r1jax.rewards.score import RewardRequest
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import Config


def is_tiny_world(config: Config) -> bool:
    """Returns whether the problems are the tiny world's: no file is given, and the model speaks its words."""
    return not config.data.path and config.model.vocab_size == len(tasks.vocabulary())


def load(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """Returns (training prompts, held-out prompts), having told how many references of a file can be graded.

    Raises ValueError for a bad file, an empty split or no file at all.
    """
    if is_tiny_world(config):
        return tasks.linear_prompts("train"), tasks.linear_prompts("test")
    if not config.data.path:
        raise ValueError(
            f"{config.stage}: config.data.path is empty, and a model of {config.model.vocab_size} tokens is none of the "
            "tiny world; give problems with --config.data.path=FILE.jsonl (rows with id, task, prompt and answer)"
        )
    rows = jsonl.read(config.data.path, required=("id", "prompt", "answer"))
    if config.data.max_rows:
        rows = rows[: config.data.max_rows]
    problems = from_jsonl_rows(rows)
    train, test = split_holdout(problems, config.data.holdout_fraction)
    if not train:
        raise ValueError(
            f"{config.data.path}: all {len(rows)} rows are held out; lower config.data.holdout_fraction="
            f"{config.data.holdout_fraction} or give more rows"
        )
    _report_references(problems, config)
    return train, test


def _report_references(problems: list[Prompt], config: Config) -> None:
    """Prints how many references can be graded, before anything is sampled."""
    if distributed.is_writer():
        requests = [RewardRequest(prompt.id, prompt.task, prompt.text, "", prompt.answer) for prompt in problems]
        print(f"{config.data.path}: {references.check(requests, config.reward).line()}", file=sys.stderr)


def load_scenarios(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """Returns (general prompts, safety prompts): rows of a JSONL file by task, or those of the tiny world.

    Raises ValueError when the file has none of either.
    """
    if not config.data.path:
        return tasks.general_prompts(), tasks.safety_prompts()
    rows = from_jsonl_rows(jsonl.read(config.data.path, required=("id", "prompt")))
    found = tuple([prompt for prompt in rows if prompt.task == task] for task in ("general", "safety"))
    if not all(found):
        raise ValueError(f"{config.data.path}: needs rows with task general and with task safety for config.scenarios")
    return found


def template(config: Config, tokenizer: Tokenizer) -> str:
    """Returns the template in force: as configured, else tiny for the tiny world, chat or r1_zero for the rest."""
    if config.data.template != "auto":
        return config.data.template
    if is_tiny_world(config):
        return "tiny"
    return "chat" if tokenizer.chat_template else "r1_zero"


def render(question: str, config: Config, tokenizer: Tokenizer) -> str:
    """Returns the prompt text of one question under the template in force."""
    kind, data = template(config, tokenizer), config.data
    return templates.render(question, kind, data.instruction, tokenizer.render_chat, data.think_prefill)


def encode(prompts: list[Prompt], config: Config, tokenizer: Tokenizer) -> list[EncodedPrompt]:
    """Returns the prompts as ids; those over config.sampler.max_prompt_tokens are left out, and said to be.

    Raises ValueError when none is left.
    """
    limit = config.sampler.max_prompt_tokens
    encoded, longest = [], 0
    for prompt in prompts:
        text = render(prompt.text, config, tokenizer)
        ids = tokenizer.encode(text)
        longest = max(longest, len(ids))
        if len(ids) <= limit:
            encoded.append(EncodedPrompt(prompt, np.asarray(ids, np.int32), templates.prefill(text)))
    if prompts and not encoded:
        raise ValueError(
            f"all {len(prompts)} prompts exceed config.sampler.max_prompt_tokens={limit} (longest {longest}); raise it"
        )
    if len(encoded) < len(prompts) and distributed.is_writer():
        print(
            f"{len(prompts) - len(encoded)} of {len(prompts)} prompts exceed {limit} tokens, left out", file=sys.stderr
        )
    return encoded
