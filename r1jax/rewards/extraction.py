"""Finds the final answer in a response and in a reference."""

import re

from r1jax.data import templates
from r1jax.data.boxes import last_box
from r1jax.rewards.number import LAST_NUMBER

EXTRACTIONS = ("auto", "boxed", "answer_tag", "whole")
# The marks of a block, behind white space, the mark of a list's item and those of a quotation.
_FENCE = re.compile(
    r"^([ \t]*(?:>[ \t]*)*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?)(`{3,}(?=[^\n`]*$)|~{3,})([^\n]*)$", re.MULTILINE
)
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore)[\s,]+)?(?:(?:the|my)\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:answer|option|choice)\b(?:\s+(?:is|would\s+be)\b)?\s*[:=]?\s*(?:(?:option|choice)\b\s*)?",
    re.IGNORECASE,
)


def extract(response: str, extraction: str) -> str | None:
    r"""Returns the answer's text in an assistant turn, or None if there is none.

    Only what follows the last `</think>` is read; a `<think>` that never closes leaves no answer.
    `answer_tag`: the last `<answer>...</answer>`, and a box inside it if there is one. `boxed`: the last complete
    `\boxed{...}`, braces balanced. `whole`: all of it. `auto`: the answer tag, else the box, else the last number.
    Raises ValueError for another `extraction`.
    """
    if extraction not in EXTRACTIONS:
        raise ValueError(f"extract: extraction={extraction!r} must be one of {', '.join(EXTRACTIONS)}")
    text = templates.summary(response)
    if extraction == "whole":
        return text or None
    if extraction == "boxed":
        return last_box(text)
    tagged = _last_answer_tag(text)
    if extraction == "answer_tag" or tagged is not None:
        return tagged
    boxed = last_box(text)
    return boxed if boxed is not None else _last_number(text)


def reference_answer(reference: str) -> str:
    r"""Returns the final answer of a reference: after GSM8K's last `####`, or the last `\boxed{}`, or all of it."""
    text = reference.rsplit("####", 1)[-1].strip() if "####" in reference else reference.strip()
    boxed = last_box(text)
    text = text if boxed is None else boxed
    return without_dollars(text)


def _last_number(text: str) -> str | None:
    last = None
    for match in LAST_NUMBER.finditer(text):
        last = match[0]
    return None if last is None else last.strip().rstrip(".")


def _last_answer_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start < 0:
        return None
    content = text[start + len("<answer>") : end].strip()
    boxed = last_box(content)
    return (content if boxed is None else boxed) or None


def fences(text: str, flush: bool = False) -> tuple[list[tuple[str, str]], bool]:
    """Returns ([(what stands behind the opening marks, content)] of fenced blocks, whether the last one never closes).

    A block ends at marks like its own, or more of them, with nothing behind and not indented by four columns more. Its content loses the indent of
    the opening marks, and the marks of a quotation around it. With `flush` marks count at the start of a line alone.
    """
    blocks, opened = [], None
    for fence in _FENCE.finditer(text):
        if flush and fence[1]:
            continue
        if opened is None:
            opened = fence
        elif fence[2].startswith(opened[2]) and not fence[3].strip() and _closes(fence[1], opened[1]):
            content = text[opened.end() + 1 : fence.start()]
            blocks.append((opened[3].strip(), _outdented(content, opened[1]) if opened[1] else content))
            opened = None
    return blocks, opened is not None


def _closes(before: str, opened: str) -> bool:
    """Returns whether what stands before the marks at a block's end may stand there: no mark of an item, no far indent."""
    return not before.strip(" \t>") and _width(before) < _width(opened) + 4


def _width(before: str) -> int:
    return len(before.expandtabs(4))


def _outdented(content: str, before: str) -> str:
    """Returns the lines of a block without what stands before its opening marks: quotation marks, and as much white space at most."""
    quotes = before.count(">")
    width = _width(before.rpartition(">")[2].removeprefix(" ") if quotes else before)
    lines = []
    for line in content.split("\n"):
        for _ in range(quotes):
            line = line.lstrip(" \t").removeprefix(">").removeprefix(" ") if line.lstrip(" \t")[:1] == ">" else line
        indent = len(line) - len(line.lstrip(" \t"))
        spaces = line[:indent].expandtabs(4)
        lines.append((spaces[width:] + line[indent:]) if width and indent else line)
    return "\n".join(lines)


def without_lead(answer: str) -> str:
    """Returns an answer without "the answer is", "Answer:", "option" and the like before it."""
    lead = _LEAD.match(answer)
    return answer[lead.end() :] if lead and lead.end() < len(answer) else answer


def without_dollars(text: str) -> str:
    """Returns a text without the one pair of dollar signs around all of it."""
    whole = len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]
    return text[1:-1].strip() if whole else text


def final_answer(response: str, extraction: str) -> str | None:
    """Returns what `extract` finds, except that for `auto` an answer without tag and box is all of the text after the thought."""
    if extraction != "auto":
        return extract(response, extraction)
    return extract(response, "answer_tag") or extract(response, "boxed") or extract(response, "whole")
