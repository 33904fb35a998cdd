r"""Finds LaTeX's `\boxed{...}`, with and without braces."""

import re
from typing import NamedTuple

_OPENING = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_EVENT = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])\s*(?!\{)(-?(?:\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z]))|\\[A-Za-z]+(?:\s*\{[^{}]*\}){0,2})"
)
# Text between boxes that together are one answer.
_BETWEEN = re.compile(
    r"(?:[\s$,;.&]|\\[,;: ()\[\]]|\\(?:text|quad|qquad|mathrm)(?![A-Za-z])|\{\s*(?:,|and|or)?\s*\}|and\b|or\b|和|或|、|，|；)*(?:[A-Za-z](?:_\{?\w{1,3}\}?)?\s*=\s*)?\$?\s*"
)


class Box(NamedTuple):
    """A box: where it begins and ends in the text, and its content."""

    start: int
    end: int
    content: str


def boxes(text: str) -> list[Box]:
    """Returns the complete boxes that are not empty and not inside another one, in order; braces must balance.

    One pass over the braces, so that unbalanced text of any length costs linear time.
    """
    if not _OPENING.search(text):
        return []
    stack: list[tuple[int, int]] = []  # (start, start of content) of a box, or (-1, -1) of another brace
    candidates = [Box(match.start(), match.end(), match[1]) for match in _BARE.finditer(text)]
    for event in _EVENT.finditer(text):
        token = event[0]
        if token == "}":
            start, content = stack.pop() if stack else (-1, -1)
            if start >= 0 and (inside := text[content : event.start()].strip()):
                candidates.append(Box(start, event.end(), inside))
        elif token == "{" or len(token) > 2:
            stack.append((event.start(), event.end()) if len(token) > 2 else (-1, -1))
    candidates.sort(key=lambda box: (box.start, -box.end))
    outermost: list[Box] = []
    for box in candidates:
        if not outermost or box.start >= outermost[-1].end:
            outermost.append(box)
    return outermost


def last_box(text: str) -> str | None:
    r"""Returns the content of the last complete `\boxed{...}`, of nested ones the inner; None without one.

    Empty boxes do not count.
    """
    content = None
    while complete := boxes(text):
        content = text = complete[-1].content
    return content


def last_boxes(text: str) -> str | None:
    r"""Returns the content of the last box; None without one.

    Of boxes side by side (`\boxed{2}, \boxed{7}`) it returns all contents, joined by commas, equal ones once.
    """
    complete = boxes(text)
    if not complete:
        return None
    group = [complete[-1]]
    for box in reversed(complete[:-1]):
        between = text[box.end : group[0].start]
        if len(between) > 40 or not _BETWEEN.fullmatch(between):
            break
        group.insert(0, box)
    contents = list(dict.fromkeys(box.content for box in group))
    return ", ".join(contents)
