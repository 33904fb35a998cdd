"""Turns of a conversation as rows of data hold them, and the thoughts of assistant turns."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping

ROLES = {  # name of a speaker in a row: role
    **{name: "user" for name in ("user", "human", "prompter")},
    **{name: "assistant" for name in ("assistant", "gpt", "chatgpt", "bot", "model")},
    **{name: name for name in ("system", "developer", "tool")},
}
REASONING = (  # fields that hold the thought of a response
    *("reasoning_content", "reasoning", "thinking", "thinking_content", "thought", "thoughts", "think"),
    *("reasoning_trace", "reasoning_text", "thinking_trajectory", "chain_of_thought", "cot"),
)
_TAG = re.compile(r"</?think>")
ONE_THOUGHT = ["<think>", "</think>"]


def read(value: object, name: str) -> tuple[list[dict], list[str]]:
    """Returns (turns {role, content}, remarks) of a field.

    The field is a list of {role, content} or ShareGPT's {from, value}, or that list as JSON text. A thought in a
    separate field of a turn is merged into its content. Raises ValueError, which names the field, for anything that is
    not a conversation in text.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {name!r} is {_kind_of(value)}, a list of messages with role and content is needed")
    turns, remarks = [], []
    for number, message in enumerate(value, 1):
        where = f"field {name!r}, message {number}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is {_kind_of(message)}, an object with role and content is needed")
        turn, turn_remarks = _turn(message, where)
        turns.append(turn)
        remarks += turn_remarks
    return turns, list(dict.fromkeys(remarks))


def is_written(text: str) -> bool:
    """Returns whether a text is a conversation written as JSON: a list of messages and nothing else."""
    if not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, Mapping) and {"content", "value"} & turn.keys() and {"role", "from"} & turn.keys()
            for turn in value
        )
    )


def with_thought(response: str, row: Mapping) -> tuple[str, list[str]]:
    """Returns (the response, preceded by the thought that the row holds in a separate field, if any; remarks)."""
    for name in REASONING:
        thought = row.get(name)
        if isinstance(thought, str) and thought.strip():
            if _TAG.search(response):
                return response, [f"{name} is not read: the response has its own <think>"]
            return f"<think>\n{thought.strip()}\n</think>\n\n{response.lstrip()}", [
                f"{name} merged into the response as <think>...</think>"
            ]
    return response, []


def split_last(turns: list[dict]) -> tuple[str | list[dict], str | None]:
    """Returns (the turns before a final assistant turn, as text if they are one user turn; that final turn or None)."""
    answered = turns[-1]["role"] == "assistant"
    return one_text(turns[:-1] if answered else turns), turns[-1]["content"] if answered else None


def one_text(turns: list[dict]) -> str | list[dict]:
    """Returns the text of a single user turn; otherwise the turns."""
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else turns


def thoughts(responses: Iterable[str]) -> dict[str, int]:
    """Returns how many responses lack exactly one closed `<think>...</think>`, by cause; {} when all have one."""
    return dict(Counter(cause for cause in map(_fault_of_thought, responses) if cause))


def _fault_of_thought(response: str) -> str:
    tags = _TAG.findall(response)
    if tags == ONE_THOUGHT:
        return ""
    if not tags:
        return "no thought"
    if tags == ONE_THOUGHT[1:]:
        return "a thought that is never opened"
    return "a thought that is never closed" if tags[-1] == "<think>" else "several thoughts"


def _turn(message: Mapping, where: str) -> tuple[dict, list[str]]:
    speaker = message.get("role") or message.get("from")
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"{where}: role {speaker!r} is none of {', '.join(ROLES)}")
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            raise ValueError(f"{where}: {name!r} is not read; leave the row out or write the call into the content")
    if message.get("weight") == 0:
        raise ValueError(f"{where}: 'weight' 0 is not read, every assistant turn is trained; leave the row out")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    thought = any(isinstance(message.get(name), str) for name in REASONING)
    if content is None and role == "assistant" and thought:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{where}: the content is {_kind_of(content)}, a string is needed")
    content, remarks = with_thought(content, message) if role == "assistant" else (content, [])
    return {"role": role, "content": content}, remarks


def _kind_of(value: object) -> str:
    return "empty" if value in ("", [], None) else type(value).__name__
