r"""Finds LaTeX's `\boxed{...}`."""

import re

_OPENING = re.compile(r"\\(?:boxed|fbox)\s*\{")
_EVENT = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def last_box(text: str) -> str | None:
    r"""Returns the content of the last complete `\boxed{...}`, braces balanced; None without one.

    One pass over the braces, so that unbalanced text of any length costs linear time.
    """
    if not _OPENING.search(text):
        return None
    stack: list[int] = []  # start of a box's content, or -1 for another brace
    best, span = -1, (0, 0)
    for event in _EVENT.finditer(text):
        token = event[0]
        if token == "}":
            start = stack.pop() if stack else -1
            if start > best:
                best, span = start, (start, event.start())
        elif token == "{" or len(token) > 2:
            stack.append(event.end() if len(token) > 2 else -1)
    return text[span[0] : span[1]].strip() or None if best >= 0 else None
