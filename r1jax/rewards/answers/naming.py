"""Decides whether the left side of an equals sign is the name of a value: `x`, `f(2)`, `P(A|B)`, `Area`."""

from r1jax.rewards.answers import words
from r1jax.rewards.answers.phrasing import DENIALS, IS, depths_of
from r1jax.rewards.answers.tokens import (
    COMMAND,
    FUNCTIONS,
    GREEK,
    LETTER,
    NUMBER,
    SIGN,
    UPRIGHT,
    WORD,
    Token,
)

_APPLIED_LETTERS = frozenset("fghFGHPEpquvsTVSACN")


_NAMING = frozenset("Pr angle triangle measuredangle overline vec hat lim max min det int sum prod".split())


def name_of(tokens: list[Token], letters_only: bool = False) -> tuple[str, tuple[str, ...]] | None:
    """Returns (name, its parameters) if tokens are the name of a value, else None: x, I_max, f(2), dy/dx, AB, Area."""
    tokens = [token for token in tokens if token.text not in ("\\",)]
    if not tokens:
        return None
    texts = [token.text for token in tokens]
    joined = "".join(texts)
    first = tokens[0]
    base_end = _base_end(tokens)
    if base_end == len(tokens) and first.kind != WORD:
        return joined.replace("{", "").replace("}", ""), ()
    if letters_only:
        return None
    if (
        base_end
        and base_end < len(tokens)
        and texts[base_end] == "("
        and texts[-1] == ")"
        and depths_of(tokens)[base_end + 1 : -1].count(0) == 0
    ):
        inside = tokens[base_end + 1 : -1]
        if _may_apply(first, base_end, inside):
            parameters = tuple(token.text for token in inside if token.text != ",")
            alone = all(token.kind == LETTER or token.text == "," for token in inside)
            return joined, parameters if alone else ()
    if any(token.kind == WORD for token in tokens):
        if any(token.text.lower() in IS for token in tokens if token.kind == WORD):
            return None
        plain = all(
            token.kind in (WORD, LETTER, UPRIGHT, NUMBER)
            or token.text in ("triangle", "angle", "{", "}", "_", "(", ")")
            for token in tokens
        )
        spoken = [token.text.lower() for token in tokens if token.kind == WORD]
        harmless = not any(
            word
            in words.CHANGING
            - {"maximum", "minimum", "max", "min", "sum", "product", "difference", "remainder", "ratio", "and"}
            for word in spoken
        )
        denied = any(word in DENIALS for word in spoken)
        return (" ".join(spoken), ()) if plain and harmless and not denied and first.kind != NUMBER else None
    if all(token.kind in (LETTER, UPRIGHT) and token.text.isupper() for token in tokens):
        return joined, ()
    if texts[0] == "frac" and (
        texts[1:3] == ["{", "d"] or all(t.kind == COMMAND or t.text in ("{", "}") or t.text.isupper() for t in tokens)
    ):
        return joined, ()
    if (
        ":" in texts
        and all(t.kind in (LETTER, UPRIGHT, NUMBER) or t.text in (":", "_", "{", "}", "triangle") for t in tokens)
        and first.kind != NUMBER
    ):
        return joined, ()
    if first.kind == COMMAND and first.text in _NAMING and (first.text != "Pr" or texts[-1] == ")"):
        return joined, ()
    if (
        first.kind == COMMAND
        and first.text in FUNCTIONS
        and not any(token.kind == NUMBER or token.text in ("+", "-") for token in tokens)
    ):
        return joined, ()
    if texts[0] == "sigma" and texts[1:] == ["^", "2"]:
        return joined, ()
    if "circ" in texts and "^" not in texts and texts[-1] == ")":
        return joined, ()
    if first.text == "m" and len(tokens) > 1 and texts[1] in ("angle", "measuredangle"):
        return joined[1:], ()
    if texts[0] == texts[-1] == "|" and all(token.kind in (LETTER, UPRIGHT, SIGN, COMMAND) for token in tokens):
        size = "vec" in texts or any(text.isupper() or text in ("z", "w") for text in texts)
        return (joined, ()) if size else None
    if is_sum(tokens) or _is_sum_of_names(tokens):
        return joined, ()
    if texts[0] == "[" and texts[-1] == "]" and len(tokens) > 4 and all(text.isupper() for text in texts[1:-1]):
        return joined, ()
    if base_end and texts[base_end : base_end + 1] == ["["] and texts[-1] == "]":
        return joined, ()
    return None


def _may_apply(first: Token, base_end: int, inside: list[Token]) -> bool:
    """Returns whether a letter before a bracket is the name of a function and not a factor."""
    if first.kind == WORD or base_end > 1 or first.text in _APPLIED_LETTERS:
        return True
    return (
        all(token.kind in (LETTER, NUMBER) or token.text in (",", "-") for token in inside)
        and not any(token.text in ("+", "*", "^") for token in inside)
        and first.text not in ("x", "n", "e", "i")
    )


def _is_sum_of_names(tokens: list[Token]) -> bool:
    """Returns whether tokens are a sum of names with subscripts or arguments: x_1 + x_2, f(1) - f(2)."""
    terms: list[list[Token]] = [[]]
    for token, depth in zip(tokens, depths_of(tokens), strict=True):
        if depth == 0 and token.text in ("+", "-"):
            terms.append([])
        else:
            terms[-1].append(token)
    if len(terms) < 2:
        return False
    named = [bool(term) and term[0].kind == LETTER and len(term) > 1 and name_of(term) is not None for term in terms]
    return all(named)


def is_sum(tokens: list[Token]) -> bool:
    """Returns whether tokens are a sum or product of letters, which can be the name of a value: m + n."""
    several = sum(token.kind == LETTER for token in tokens) > 1
    return several and all(
        (token.kind == LETTER and token.text not in "ei") or token.text in ("+", "-") for token in tokens
    )


def _base_end(tokens: list[Token]) -> int:
    """Returns the index after the first letter with its primes, subscript and power of -1; 0 if there is no letter."""
    first = tokens[0]
    if not (first.kind in (LETTER, UPRIGHT) or (first.kind == COMMAND and first.text in GREEK) or first.kind == WORD):
        return 0
    place = 1
    while place < len(tokens):
        text = tokens[place].text
        if text in ("'", "''"):
            place += 1
        elif text == "_" and place + 1 < len(tokens):
            place += 1
            if tokens[place].text == "{":
                while place < len(tokens) and tokens[place].text != "}":
                    place += 1
            place += 1
        elif (
            text == "^"
            and [token.text for token in tokens[place + 1 : place + 5]] == ["{", "-", "1", "}"]
            and place + 5 < len(tokens)
        ):
            place += 5
        else:
            break
    return place
