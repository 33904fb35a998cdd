"""Rows of examples as tokens: what is prompt, what is trained."""

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
    """Returns the training examples of a row {prompt, response} or {messages}: the trained tokens are those that an assistant would sample.

    That is the response and its end, of `messages` under the chat template every assistant turn with its end, of other
    templates the last one. A row is one example; where the template writes an earlier turn otherwise later on (R1's leaves
    its thought out), each assistant turn is an example, as the model meets it. A `<think>` that the prompt holds is not trained.
    """
    messages = row.get("messages")
    if not messages or prompts.template(stage, data, tokenizer) != "chat":
        return [_item([row["prompt"]], [row["response"]], stage, data, tokenizer)]
    places = [place for place, turn in enumerate(messages) if turn["role"] == "assistant"]
    asked = [messages[:place] for place in places]
    said = [messages[place]["content"] for place in places]
    if _goes_on(messages, places, stage, data, tokenizer):
        return [_item(asked, said, stage, data, tokenizer)]
    return [_item([prompt], [response], stage, data, tokenizer) for prompt, response in zip(asked, said, strict=True)]


def _item(asked: Sequence[Any], said: Sequence[str], stage: str, data: DataConfig, tokenizer: Tokenizer) -> PackItem:
    """Returns one example of prompts, each of which goes on from the one before it, and their trained responses, each with its end."""
    last_id = tokenizer.end_of_turn_id if prompts.template(stage, data, tokenizer) == "chat" else tokenizer.eos_id
    tokens: list[int] = []
    mask: list[float] = []
    done = ""
    for number, (prompt, response) in enumerate(zip(asked, said, strict=True), 1):
        text, response = templates.split_turn(prompts.render(read_prompt(prompt), stage, data, tokenizer), response)
        new = tokenizer.encode(text[len(done) :]) if done else prompts.ids_of(text, stage, data, tokenizer)
        if number < len(asked):
            written = _written_turn(text, response, asked[number], tokenizer)
            done = text + written
            spoken = tokenizer.encode(written)
        else:
            spoken = tokenizer.encode_response(response, last_id)
        tokens += new + spoken
        mask += [0.0] * len(new) + [1.0] * len(spoken)
    return PackItem(np.asarray(tokens, np.int32), np.asarray(mask, np.float32))


def _written_turn(text: str, response: str, later: Sequence[dict], tokenizer: Tokenizer) -> str:
    """Returns an earlier response with the end that the template writes behind it, without the white space after that."""
    spoken = [place for place, turn in enumerate(later) if turn["role"] == "assistant"]
    whole = tokenizer.render_chat(list(later[: spoken[-1] + 1]), add_generation_prompt=False)
    end = whole[len(text) + len(response) :].rstrip()
    return response + end


def _goes_on(
    messages: Sequence[dict], places: Sequence[int], stage: str, data: DataConfig, tokenizer: Tokenizer
) -> bool:
    """Returns whether the prompt of the last turn holds every earlier prompt and response as they were when they were last."""
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
