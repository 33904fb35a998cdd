"""Where a text that ends a response is complete: found on the host, one token after the other.

The answer depends on the tokens alone, not on how many of them come at a time.
"""

from collections.abc import Callable, Iterable, Sequence

MARGIN = 8  # characters: more than a cut in the middle of a character, or before a space, can change of a text


class StopStrings:
    """Follows one response and tells at which token its text first contains one of `texts`.

    Only the last tokens are decoded, at least as many as hold the longest text and MARGIN characters more.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], texts: Sequence[str]):
        self._decode, self._texts = decode, texts
        self._needed = max(map(len, texts)) + MARGIN
        self._ids: list[int] = []

    def count(self, token_ids: Iterable[int]) -> int | None:
        """Takes the next tokens and returns how many of them there are up to the end of a stop text; None without one."""
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
