"""Renders a question as the text that a model sees, which may already hold the beginning of the assistant's turn."""

import re
from collections.abc import Callable, Sequence

from r1jax.data.problems import Message

# Asks of a base model what the paper's Table 1 asks, in our words, and nothing about how to reason.
R1_ZERO = (
    "Below, a User talks with an Assistant. The User puts a question and the Assistant solves it: it first works out the "
    "reasoning in its mind and only then gives the User the answer. The reasoning stands between <think> and </think>, the "
    "answer between <answer> and </answer>, like this: <think> reasoning </think> <answer> answer </answer>.\n"
    "User: {question}\nAssistant:"
)
THINK = "<think>\n"  # how R1's chat format opens the assistant's turn
_OPENED = re.compile(r"<think>\s*\Z")


def render(
    prompt: str | Sequence[Message],
    template: str,
    instruction: str = "",
    chat: Callable[[list[dict]], str] | None = None,
    think_prefill: bool = False,
) -> str:
    """Returns the prompt text of a question, or of a conversation, under a template: tiny, plain, r1_zero or chat.

    `chat` renders a list of messages with the tokenizer's own template; the others write a conversation as one question
    (see `flat`). `instruction` is put before the last question. With `think_prefill` the text ends in `<think>\\n`,
    once, whether or not the template itself ends so. Raises ValueError for an unknown template.
    """
    turns = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    if instruction:
        last = max(index for index, turn in enumerate(turns) if turn.role == "user")
        turns[last] = Message("user", f"{instruction}\n{turns[last].content}")
    if template in ("tiny", "plain"):
        text = flat(turns)
    elif template == "r1_zero":
        text = R1_ZERO.replace("{question}", flat(turns))
    elif template == "chat":
        assert chat is not None
        text = chat([{"role": turn.role, "content": turn.content} for turn in turns])
    else:
        raise ValueError(f"no template named {template!r}; known: tiny, plain, r1_zero, chat")
    if not think_prefill:
        return text
    opened = prefill(text)
    return text if opened.endswith("\n") else text + ("\n" if opened else THINK)


def flat(turns: Sequence[Message]) -> str:
    """Returns a conversation as one question, for templates that have a single turn.

    A single user turn is returned as it is. A system text comes first; in a longer exchange each turn is preceded by
    its role.
    """
    system = [turn.content for turn in turns if turn.role == "system"]
    rest = [turn for turn in turns if turn.role != "system"]
    spoken = [rest[0].content] if len(rest) == 1 else [f"{turn.role.capitalize()}: {turn.content}" for turn in rest]
    return "\n\n".join([*system, *spoken])


def prefill(text: str) -> str:
    """Returns the `<think>` with the white space after it that ends a prompt, or "" where none does."""
    match = _OPENED.search(text)
    return match[0] if match else ""


def split_turn(text: str, turn: str) -> tuple[str, str]:
    """Returns (prompt, response) that together read as the prompt `text` and then the whole assistant turn `turn`.

    Where the prompt has opened the thinking, the turn's own `<think>` is left out; a turn without one gets the prompt
    without its opening.
    """
    opened = prefill(text)
    if not opened:
        return text, turn
    if turn.startswith(opened):
        return text, turn[len(opened) :]
    if turn.lstrip().startswith("<think>"):
        return text, turn.lstrip().removeprefix("<think>").lstrip()
    return text.removesuffix(opened), turn


def summary(turn: str) -> str:
    """Returns the text after the last `</think>` of an assistant turn, stripped; "" where a thought is not closed."""
    close = turn.rfind("</think>")
    if turn.rfind("<think>") > close:
        return ""
    return turn[close + len("</think>") :].strip() if close >= 0 else turn.strip()
