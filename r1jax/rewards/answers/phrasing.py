"""Interprets the words around a formula: conjunctions of answers, remarks, conditions, nouns, changes of a number."""

import dataclasses
from fractions import Fraction

from r1jax.rewards.answers import formula, units, words
from r1jax.rewards.answers.tokens import (
    COMMAND,
    LETTER,
    NUMBER,
    SIGN,
    UPRIGHT,
    WORD,
    Token,
)
from r1jax.rewards.answers.values import (
    Quantity,
    RealSet,
    Several,
    Text,
    Value,
)

IS = frozenset("is are equals equal was be becomes gives as 是 为 等于".split())
DENIALS = words.HEDGES | words.NEGATIONS
_CURRENCY = frozenset(units.CURRENCY_SIGNS)
_ORDERS = frozenset(("<", ">", "le", "ge", "ne"))
REMARKS = frozenset(
    (
        "no other values",
        "no others",
        "no other",
        "nothing else",
        "only",
        "no other solutions",
        "no other value",
        "no more",
    )
)
PARTITIVES = frozenset(
    "half third quarter thirds quarters square cube root reciprocal inverse multiple multiples divisor divisors factor factors power powers negative opposite "
    "double triple most part percent any none one out number digits logarithm factorial complement outside instead because multiples list".split()
)
BEFORE = frozenset("after before next previous following preceding every any since until twice".split())


def key_of(tokens: list[Token]) -> str:
    """Returns tokens as one normalised text: without case, articles, and marks that end or join."""
    kept = [token for token in _without_marks(tokens) if token.text not in tuple('.,;?"`{}')]
    kept = [token for token in kept if token.kind != WORD or token.text.lower() not in words.ARTICLES]
    return " ".join(token.text if token.kind == LETTER else token.text.casefold() for token in kept)


def _without_marks(tokens: list[Token]) -> list[Token]:
    """Returns the tokens without exclamation marks after words, and without brackets around all of them."""
    kept = [
        token for place, token in enumerate(tokens) if token.text != "!" or place == 0 or tokens[place - 1].kind != WORD
    ]
    if len(kept) > 2 and kept[0].text == "(" and kept[-1].text == ")" and 0 not in depths_of(kept)[1:-1]:
        return kept[1:-1]
    return kept


def depths_of(tokens: list[Token]) -> list[int]:
    """Returns the bracket depth of each token; a bracket itself is outside."""
    depth, depths = 0, []
    for token in tokens:
        opens = token.text in ("(", "[", "{", r"\{", "langle") or token.text.startswith("begin ")
        closes = token.text in (")", "]", "}", r"\}", "rangle") or token.text.startswith("end ")
        depth -= closes
        depths.append(depth)
        depth += opens
    return depths


def joint_of(token: Token) -> str:
    """Returns the sign or word that joins two answers: `,`, `and`, `or`; "" for another token."""
    if token.kind == WORD:
        return words.JOINTS.get(token.text.lower(), "")
    return (
        {",": ",", ";": ";", "lor": "or", "land": "and", "&and": "and"}.get(token.text, "")
        if token.kind != NUMBER
        else ""
    )


def groups_of(tokens: list[Token], joint: str) -> list[list[Token]]:
    """Splits tokens at the joints of one kind that are outside brackets."""
    groups: list[list[Token]] = [[]]
    for token, depth in zip(tokens, depths_of(tokens), strict=True):
        if depth == 0 and joint_of(token) == joint:
            groups.append([])
        else:
            groups[-1].append(token)
    return [group for group in groups if group]


def split_answers(tokens: list[Token]) -> tuple[list[list[Token]], list[str]]:
    """Returns (the answers side by side, the joints between them)."""
    segments, joints = [[]], []
    for token, depth in zip(tokens, depths_of(tokens), strict=True):
        if depth == 0 and (joint := joint_of(token)):
            if segments[-1]:
                segments.append([])
                joints.append(joint)
            elif joints:
                joints[-1] = joint
        else:
            segments[-1].append(token)
    if not segments[-1]:
        segments.pop()
        joints = joints[: len(segments) - 1]
    return segments, joints


def trimmed(tokens: list[Token]) -> list[Token]:
    start, end = 0, len(tokens)
    while start < end and tokens[start].text in (".", ",", ";", ":", "=", "approx", '"', "to"):
        if tokens[start].kind == WORD:
            break
        start += 1
    while end > start and tokens[end - 1].text in (".", ",", ";", ":", '"', "?"):
        end -= 1
    return tokens[start:end]


def without_opening(tokens: list[Token]) -> list[Token]:
    """Returns the tokens without leading words such as "therefore"."""
    start = 0
    while start < len(tokens) - 1 and (
        tokens[start].text.lower() in words.OPENINGS or (start and tokens[start].text == ",")
    ):
        start += 1
    return tokens[start:]


def without_currency(tokens: list[Token]) -> tuple[list[Token], units.Unit]:
    signs = {token.text for token in tokens if token.text in _CURRENCY and token.kind == SIGN}
    rest = [token for token in tokens if not (token.text in _CURRENCY and token.kind == SIGN)]
    return rest, units.unit({units.CURRENCY_SIGNS[signs.pop()]: Fraction(1)}) if len(signs) == 1 else ()


def with_currency(value: Value, currency: units.Unit) -> Value:
    if not currency or not isinstance(value, Quantity):
        return value
    return dataclasses.replace(value, unit=units.unit(dict(value.unit) | dict(currency)))


def is_logic(tokens: list[Token]) -> bool:
    """Returns whether tokens are only letters and logical signs."""
    return all(token.kind == LETTER or token.text in ("lor", "land", "neg", "to", "(", ")") for token in tokens)


def without_stops(tokens: list[Token]) -> list[Token]:
    """Returns the tokens without the full stops of abbreviations: `sq. units`."""
    last = len(tokens) - 1
    return [
        token
        for place, token in enumerate(tokens)
        if not (
            token.text == "."
            and not token.spaced
            and 0 < place < last
            and tokens[place - 1].kind == WORD
            and len(tokens[place - 1].text) < 4
        )
    ]


def with_ratio(tokens: list[Token]) -> list[Token]:
    """Reads `3 to 4` as 3:4."""
    if len(tokens) == 3 and tokens[1].text == "to" and tokens[0].kind == tokens[2].kind == NUMBER:
        return [tokens[0], Token(SIGN, ":"), tokens[2]]
    return tokens


def without_ordinals(tokens: list[Token]) -> list[Token]:
    """Returns the tokens without st, nd, rd or th after the one numeral; before a noun they stay."""
    if len([token for token in tokens if token.kind == WORD]) > 1:
        return tokens
    return [
        token
        for place, token in enumerate(tokens)
        if not (
            token.kind == WORD
            and token.text.lower() in ("st", "nd", "rd", "th")
            and place
            and tokens[place - 1].kind == NUMBER
        )
    ]


def without_remarks(tokens: list[Token]) -> list[Token]:
    """Returns the tokens without brackets at the end that hold a remark; one with a condition becomes `, condition`."""
    while len(tokens) > 2 and tokens[-1].text == ")":
        depths = depths_of(tokens)
        opening = [place for place, token in enumerate(tokens) if token.text in ("(", "[") and depths[place] == 0]
        start = opening[-1] if opening else 0
        inside = tokens[start + 1 : -1]
        if not inside:
            return tokens
        has_words = any(token.kind == WORD and units.named(token.text) is None for token in inside)
        relation = any(token.text in ("ne", "<", ">", "le", "ge", "in") and token.kind != WORD for token in inside)
        if relation and not has_words and start and opening and not any(token.text == "=" for token in inside):
            comma = Token(SIGN, ",")
            return [*tokens[:start], comma, *inside]  # a condition, handled like one after a comma
        name = start > 0 and tokens[start - 1].kind in (LETTER, UPRIGHT) and not tokens[start].spaced and not has_words
        modulus = any(token.text in ("mod", "bmod", "pmod") for token in inside)
        has_words = has_words or sum(token.kind == WORD for token in inside) > 1
        doubted = any(token.text.lower() in words.DOUBTS for token in inside if token.kind == WORD)
        counted = len(inside) > 1 and inside[0].kind == NUMBER and inside[1].kind == WORD
        about = inside[0].kind in (LETTER, UPRIGHT) and inside[0].text in [token.text for token in tokens[:start]]
        doubted = doubted or not (counted or about or inside[0].text.lower() in words.REMARK_OPENINGS)
        if start == 0 or not (has_words or relation) or name or modulus or doubted:
            return tokens
        tokens = trimmed(tokens[:start])
    return tokens


def without_condition(tokens: list[Token]) -> list[Token]:
    """Returns the tokens before the first word that begins a condition or a reason; all of them for alternatives."""
    depths = depths_of(tokens)
    for place, token in enumerate(tokens):
        if place == 0 or depths[place] or token.kind != WORD or token.text not in words.CONDITIONS:
            continue
        if all(other.kind == WORD for other in tokens[:place]):
            continue
        rest = [other.text.lower() for other in tokens[place:] if other.kind == WORD]
        if any(other.text == "in" and other.kind == COMMAND for other in tokens[:place]) and any(
            other.text in _ORDERS and other.kind != WORD for other in tokens[place:]
        ):
            return tokens
        relations = [
            any(other.text in _ORDERS and other.kind != WORD for other in part)
            for part in (tokens[:place], tokens[place:])
        ]
        if rest.count(token.text) > 1 or words.DOUBTS & set(rest) or all(relations):
            return tokens
        if (
            words.ALTERNATIVES & set(rest)
            or rest.count("if") > 1
            or rest.count("for") > 1
            and rest.count("and") + rest.count("or")
        ):
            return tokens
        before = trimmed(tokens[:place])
        while before and before[-1].kind == WORD and joint_of(before[-1]):
            before = before[:-1]
        return before or tokens
    return tokens


def number_of_words(tokens: list[Token]) -> Quantity | None:
    """Returns the number of words and numerals together, such as "minus 5", "1.5 million" or 3万, else None."""
    if not any(token.kind == WORD for token in tokens):
        return None
    spoken = []
    for place, token in enumerate(tokens):
        if token.value is not None:
            decimal = str(token.value) if token.value.denominator == 1 else token.text
            spoken.append(decimal.replace(",", ""))
        elif token.kind == WORD:
            spoken.append(token.text.lower())
        elif token.text == "-" and place == 0:
            spoken.append("minus")
        elif token.text == "-":
            continue
        elif token.kind == LETTER and token.text == "a":
            spoken.append("a")
        else:
            return None
    while spoken and spoken[0] in words.APPROXIMATELY:
        spoken = spoken[1:]
    value = words.number(spoken)
    if value is None:
        value = words.han_number("".join(spoken).replace("minus", "")) if len(spoken) < 4 else None
        if value is not None and spoken[0] == "minus":
            value = -value
    if value is not None:
        return Quantity(formula.number(value))
    for end in (len(spoken) - 1, len(spoken) - 2):  # two million dollars; one numeral with a unit is a formula
        behind = formula.read_unit(tokens, end + (len(tokens) - len(spoken))) if end > 0 else None
        if behind is None or behind[1] != len(tokens) or (end == 1 and spoken[0].isdigit()):
            continue
        if (value := words.number(spoken[:end])) is not None:
            return Quantity(formula.number(value), behind[0])
    return None


def phrase_value(phrase: str) -> Value | None:
    if phrase == words.EMPTY:
        return Several("set", ())
    if phrase == words.REALS:
        return RealSet(("field", "R"))
    if phrase == "infinity":
        return Quantity(("const", "inf"))
    if phrase == "-infinity":
        return Quantity(("neg", ("const", "inf")))
    return Text(phrase)


def says_nothing(tokens: list[Token]) -> bool:
    """Returns whether a segment is only words that neither change, deny nor doubt the answer before them."""
    spoken = [token.text.lower() for token in tokens]
    known = (words.CHANGING | words.NUMBER_WORDS | DENIALS) - {"point"}
    several = len(tokens) > 1 or spoken[0].endswith("ly")
    return several and all(token.kind == WORD for token in tokens) and not any(word in known for word in spoken)


def harmless_tail(nouns: list[str]) -> bool:
    if nouns in (["times"], ["in", "all"], ["or", "so"], ["all", "together"], ["altogether"]):
        return True
    if any(len(word) < 3 and word.isascii() and word not in words.SHORT_WORDS for word in nouns):
        return False
    return not any(
        (words.changes(word) and word not in ("all", "any", "some", "every")) or word in words.NUMBER_WORDS - {"point"}
        for word in nouns
    )


def singular(noun: str) -> str:
    return noun[:-1] if len(noun) > 3 and noun.endswith("s") and not noun.endswith("ss") else noun


def balanced(tokens: list[Token]) -> bool:
    depth = 0
    for token in tokens:
        depth += token.text in ("{", r"\{") or token.text.startswith("begin ")
        depth -= token.text in ("}", r"\}") or token.text.startswith("end ")
        if depth < 0:
            return False
    return depth == 0
