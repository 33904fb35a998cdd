"""Finds on the host, token by token, where a response first contains a text that ends it.

The result depends only on the tokens, not on how many of them arrive at a time.
"""

from collections.abc import Callable, Iterable, Sequence

# In characters: more than can change at the start of a text that is decoded from the middle of a character or of a
# word.
MARGIN = 8


class StopStrings:
    """Follows one response and finds the token at which its text first contains one of `texts`.

    Only the last tokens are decoded: enough to hold the longest text and MARGIN characters more.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], texts: Sequence[str]):
        self._decode, self._texts = decode, texts
        self._needed = max(map(len, texts)) + MARGIN
        self._ids: list[int] = []

    def count(self, token_ids: Iterable[int]) -> int | None:
        """Takes the next tokens and returns how many of them complete a stop text, None where none is complete."""
        for number, token in enumerate(token_ids, 1):
            self._ids.append(int(token))
            text = self._decode(self._ids)
            if any(stop in text for stop in self._texts):
                return number
            if len(text) > 4 * self._needed:
                later = self._ids[len(self._ids) // 2 :]
                if len(self._decode(later)) >= self._needed:
                    self._ids = later
        return None
