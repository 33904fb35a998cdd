"""Turns rows of examples into tokens with a mask of the trained ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.data import templates
from r1jax.data.packing import PackItem
from r1jax.data.problems import read_prompt
from r1jax.recipe import prompts
from r1jax.schema import DataConfig


def items_of(row: dict, stage: str, data: DataConfig, tokenizer: Tokenizer) -> list[PackItem]:
    """Returns the training examples of a row {prompt, response} or {messages}; trained are the tokens that a model
    samples.

    These are the response and its end; for `messages` under the chat template every assistant turn with its end, under
    other templates the last turn. A row is one example. But if the template renders an earlier turn differently once
    later turns follow (R1's leaves out its thought), each assistant turn is an example of its own, rendered as the
    model sees it when it answers. A `<think>` in the prompt is not trained.
    """
    messages = row.get("messages")
    if not messages or prompts.template(stage, data, tokenizer) != "chat":
        return [_item([row["prompt"]], [row["response"]], stage, data, tokenizer)]
    places = [place for place, turn in enumerate(messages) if turn["role"] == "assistant"]
    turn_prompts = [messages[:place] for place in places]
    responses = [messages[place]["content"] for place in places]
    if _goes_on(messages, places, stage, data, tokenizer):
        return [_item(turn_prompts, responses, stage, data, tokenizer)]
    return [
        _item([prompt], [response], stage, data, tokenizer)
        for prompt, response in zip(turn_prompts, responses, strict=True)
    ]


def _item(
    turn_prompts: Sequence[Any], responses: Sequence[str], stage: str, data: DataConfig, tokenizer: Tokenizer
) -> PackItem:
    """Returns one example of successive turns: prompts, each continuing the one before, and their trained responses."""
    last_id = tokenizer.end_of_turn_id if prompts.template(stage, data, tokenizer) == "chat" else tokenizer.eos_id
    tokens: list[int] = []
    mask: list[float] = []
    written = ""
    for number, (prompt, response) in enumerate(zip(turn_prompts, responses, strict=True), 1):
        text, response = templates.split_turn(prompts.render(read_prompt(prompt), stage, data, tokenizer), response)
        prompt_ids = tokenizer.encode(text[len(written) :]) if written else prompts.ids_of(text, stage, data, tokenizer)
        if number < len(turn_prompts):
            turn = _written_turn(text, response, turn_prompts[number], tokenizer)
            written = text + turn
            response_ids = tokenizer.encode(turn)
        else:
            response_ids = tokenizer.encode_response(response, last_id)
        tokens += prompt_ids + response_ids
        mask += [0.0] * len(prompt_ids) + [1.0] * len(response_ids)
    return PackItem(np.asarray(tokens, np.int32), np.asarray(mask, np.float32))


def _written_turn(text: str, response: str, later: Sequence[dict], tokenizer: Tokenizer) -> str:
    """Returns an earlier response with the end that the template writes after it, without white space after that."""
    spoken = [place for place, turn in enumerate(later) if turn["role"] == "assistant"]
    whole = tokenizer.render_chat(list(later[: spoken[-1] + 1]), add_generation_prompt=False)
    end = whole[len(text) + len(response) :].rstrip()
    return response + end


def _goes_on(
    messages: Sequence[dict], places: Sequence[int], stage: str, data: DataConfig, tokenizer: Tokenizer
) -> bool:
    """Returns whether the last turn's prompt contains every earlier prompt and response unchanged."""
    if len(places) < 2:
        return True
    whole = prompts.render(read_prompt(messages[: places[-1]]), stage, data, tokenizer)
    for place in places[:-1]:
        before = prompts.render(read_prompt(messages[:place]), stage, data, tokenizer)
        text, response = templates.split_turn(before, messages[place]["content"])
        after = tokenizer.render_chat(list(messages[: place + 1]), add_generation_prompt=False)
        if not (after.startswith(text + response) and whole.startswith(after)):
            return False
    return True
