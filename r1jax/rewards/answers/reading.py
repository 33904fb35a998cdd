"""Reads one answer or reference as a typed value (values.py)."""

import dataclasses
import functools
import re
from fractions import Fraction

from r1jax.rewards.answers import formula, notation, units, words
from r1jax.rewards.answers.classification import Part, agree, classified, joined
from r1jax.rewards.answers.evaluation import letters
from r1jax.rewards.answers.formula import Node
from r1jax.rewards.answers.naming import is_sum, name_of
from r1jax.rewards.answers.phrasing import (
    BEFORE,
    DENIALS,
    IS,
    PARTITIVES,
    REMARKS,
    balanced,
    depths_of,
    groups_of,
    harmless_tail,
    is_logic,
    key_of,
    number_of_words,
    phrase_value,
    says_nothing,
    singular,
    split_answers,
    trimmed,
    with_currency,
    with_ratio,
    without_condition,
    without_currency,
    without_opening,
    without_ordinals,
    without_remarks,
    without_stops,
)
from r1jax.rewards.answers.tokens import (
    COMMAND,
    FUNCTIONS,
    LETTER,
    NAMES,
    NUMBER,
    UPRIGHT,
    WORD,
    Token,
    Unreadable,
    tokenise,
)
from r1jax.rewards.answers.values import (
    Named,
    Quantity,
    Several,
    Text,
    Value,
)
from r1jax.rewards.answers.written import TEXT_BRACES, whole_form

MAX_CHARACTERS = 1000
MAX_PLAIN_WORDS = 2  # words of a reference that is a text; more are prose
MAX_TEXT_WORDS = 10  # words of a reference inside \text{}
MAX_HAN = 8
_PLAIN = re.compile(r"-?\d{1,300}(?:\.\d{1,300})?", re.ASCII)
_BRACED = re.compile(r"\{((?:(?!\\over|\\choose)[^{}])*)\}")
_GROUPED = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_OUTWARD = re.compile(r"\]([^,\[\]]+),([^,\[\]]+)\[")  # ]0, 1[
_COMMAND_OR_BRACES = re.compile(r"\\(?:begin|end)\s*\{[A-Za-z]+\*?\}|\\[A-Za-z]+")
_LONG_WORD = re.compile(r"[^\W\d_]{3,}")
_SIGNS_OF_FORMULA = re.compile(r"[\\^_{}=<>+*]")
_EQUALITIES = frozenset(("=", "approx", "equiv", "cong"))


@functools.lru_cache(maxsize=4096)  # the samples of a group often have the same answer
def read(text: str, reference: bool = False, plain_units: bool = False) -> Value:
    """Returns the value of an answer, or of a `reference`, which may hold nothing but the value and its unit.

    With `plain_units` letters after a number, as in `3 m`, may be a unit instead of factors. Raises Unreadable for a
    text that is neither a formula nor short.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"it has {len(text)} characters, more than {MAX_CHARACTERS}")
    if _PLAIN.fullmatch(text):
        return Quantity(formula.number(Fraction(text)))
    text = notation.without_wrapping(notation.normalise(text))
    while (inner := _BRACED.fullmatch(text)) and (inner[1].count(",") == 0 or _GROUPED.fullmatch(inner[1].strip())):
        text = notation.without_wrapping(inner[1])
    if outward := _OUTWARD.fullmatch(text):
        text = f"({outward[1]},{outward[2]})"
    if (whole := whole_form(text)) is not None:
        return whole
    try:
        return _Reader(reference, plain_units).read(_tokens(text))
    except RecursionError:
        raise Unreadable("too deep") from None


def words_behind_is(text: str) -> Text | None:
    """Returns the words after the last "is" of a sentence, "The graph is an ellipse"; None without such a sentence."""
    try:
        tokens = trimmed(_tokens(notation.without_wrapping(notation.normalise(text))))
    except Unreadable:
        return None
    places = [place for place, token in enumerate(tokens) if token.kind == WORD and token.text.lower() in IS]
    if not places or not _introduces(tokens[: places[-1]]):
        return None
    try:
        return _Reader(False).text(tokens[places[-1] + 1 :])
    except Unreadable:
        return None


def words_of(text: str) -> Text | None:
    """Returns a text as words, even if it is also a formula; None if it cannot be read at all."""
    try:
        return _Reader(False).text(
            without_remarks(trimmed(_tokens(notation.without_wrapping(notation.normalise(text)))))
        )
    except Unreadable:
        return None


_NOT_BEFORE_IS = (
    DENIALS
    | words.NUMBER_WORDS
    | frozenset("bound bounds upper lower twice double half another if would guess less more almost".split())
) - {
    "point",
    "second",
    "third",
    "fourth",
    "score",
    "pair",
    "quarter",
}


def _introduces(tokens: list[Token]) -> bool:
    """Returns whether the words before "is" only introduce what follows, without changing or denying it."""
    spoken = [token.text.lower() for token in tokens if token.kind == WORD]
    depths = depths_of(tokens)
    numerals = any(token.kind == NUMBER and depth == 0 for token, depth in zip(tokens, depths, strict=True))
    return not any(word in _NOT_BEFORE_IS for word in spoken) and (bool(spoken) or not numerals)


def _tokens(text: str) -> list[Token]:
    """Returns the tokens of a text; text outside `$...$` is prose if it has letters."""
    pieces = list(notation.FORMULA.finditer(text))
    outside = notation.FORMULA.sub(" ", text)
    if not pieces and _is_prose(text):
        return tokenise(text, prose=True)
    if not pieces or not re.search(r"[^\W\d_]", outside):
        return tokenise(notation.FORMULA.sub(lambda match: f" {_content(match)} ", text))
    if outside.strip().startswith("\\") and not re.search(r"(?<!\\)\b[^\W\d_]{2,}", outside):
        return tokenise(notation.FORMULA.sub(lambda match: f" {_content(match)} ", text))
    tokens, end = [], 0
    try:
        for piece in pieces:
            tokens += tokenise(text[end : piece.start()], prose=True)
            tokens += tokenise(_content(piece))
            end = piece.end()
        return tokens + tokenise(text[end:], prose=True)
    except Unreadable:
        return tokenise(notation.FORMULA.sub(lambda match: f" {_content(match)} ", text), prose=True)


def _is_prose(text: str) -> bool:
    """Returns whether a text without marked formulas has several words that are neither functions nor units."""
    plain = _COMMAND_OR_BRACES.sub(" ", TEXT_BRACES.sub(" ", text))
    plain_words = [
        word
        for word in _LONG_WORD.findall(plain)
        if word.lower() not in NAMES and word.lower() not in FUNCTIONS and word not in units.NAMES
    ]
    return len(plain_words) > 1 or (
        len(plain_words) == 1
        and len(plain.split()) > 2
        and len(plain_words[0]) > 3
        and not _SIGNS_OF_FORMULA.search(plain)
    )


def _content(match: re.Match) -> str:
    return next(group for group in match.groups() if group is not None)


class _Reader:
    def __init__(self, reference: bool, plain_units: bool = False):
        self.reference, self.plain_units = reference, plain_units

    def read(self, tokens: list[Token]) -> Value:
        tokens = trimmed(tokens if self.reference else without_opening(tokens))
        tokens, currency = without_currency(tokens)
        if not tokens:
            raise Unreadable("it is empty")
        if (phrase := words.PHRASES.get(key_of(tokens))) and all(token.kind != NUMBER for token in tokens):
            if (value := phrase_value(phrase)) is not None:
                return value
        if any(token.text in ("lor", "land") and token.kind == COMMAND for token in tokens) and is_logic(tokens):
            return self.text(tokens)
        tokens = without_remarks(without_ordinals(with_ratio(without_stops(tokens))))
        cut = without_condition(tokens)
        if cut is not tokens:
            return self.read(cut)
        try:
            value = self.parts(tokens)
        except Unreadable:
            value = None
        if value is None and not self.reference:
            value = self.behind_is(tokens)
        if value is None:
            return self.text(tokens)
        return with_currency(value, currency)

    def text(self, tokens: list[Token]) -> Text:
        """Returns the tokens as words; raises Unreadable for a reference that is prose."""
        plain = [token for token in tokens if token.kind == WORD and not token.upright]
        upright = [token for token in tokens if token.kind == WORD and token.upright]
        han = sum(len(token.text) for token in plain if "\u4e00" <= token.text[0] <= "\u9fff")
        if self.reference and (len(plain) > MAX_PLAIN_WORDS or len(upright) > MAX_TEXT_WORDS or han > MAX_HAN):
            raise Unreadable("it is prose, not an answer")
        if not balanced(tokens):
            raise Unreadable("brackets do not match")
        key = key_of(tokens)
        if not key or (
            self.reference and not any(token.kind in (WORD, LETTER, UPRIGHT, NUMBER, COMMAND) for token in tokens)
        ):
            raise Unreadable("it says nothing")
        return Text(key)

    def behind_is(self, tokens: list[Token]) -> Value | None:
        """Returns the value after the last "is" of a sentence, or None."""
        places = [place for place, token in enumerate(tokens) if token.kind == WORD and token.text.lower() in IS]
        if not places or not _introduces(tokens[: places[-1]]):
            return None
        rest = trimmed(tokens[places[-1] + 1 :])
        if not rest:
            return None
        if (phrase := words.PHRASES.get(key_of(rest))) and (value := phrase_value(phrase)) is not None:
            return value
        try:
            return self.parts(rest)
        except Unreadable:
            return None

    def parts(self, tokens: list[Token]) -> Value | None:
        """Returns the value of one answer or of several side by side; None if there are other words."""
        value = number_of_words(tokens)
        if value is not None:
            return value
        segments, joints = split_answers(tokens)
        if ";" in joints and "," in joints:
            groups = [self.parts(group) for group in groups_of(tokens, ";")]
            values = [group for group in groups if group is not None]
            return Several("list", tuple(map(_point, values))) if len(values) == len(groups) else None
        if "or" in joints and "," in joints and (systems := self.systems(tokens)) is not None:
            return systems
        parts = []
        for place, segment in enumerate(segments):
            part = self.segment(segment)
            if (
                part is None
                and parts
                and not self.reference
                and (key_of(segment) in REMARKS or (joints[place - 1] in (",", ";") and says_nothing(segment)))
            ):
                continue  # a remark
            if part is None:
                return None
            parts.append(part)
        if not parts:
            return None
        return parts[0].value if len(parts) == 1 else joined(parts, joints)

    def systems(self, tokens: list[Token]) -> Value | None:
        """Returns the points of `x = 1, y = 2 or x = 2, y = 1`; None for anything else."""
        values = [self.parts(group) for group in groups_of(tokens, "or")]
        named = [
            value
            for value in values
            if isinstance(value, Several)
            and value.kind == "list"
            and all(isinstance(member, Named) for member in value.members)
        ]
        return Several("list", tuple(map(_point, named))) if len(named) == len(values) else None

    def segment(self, tokens: list[Token]) -> Part | None:
        """Returns one answer, else None: a formula, with its unit or noun, among words that do not change it."""
        tokens = trimmed(tokens)
        if not tokens:
            return None
        if (value := number_of_words(tokens)) is not None:
            return Part(value)
        if (phrase := words.PHRASES.get(key_of(tokens))) and (value := phrase_value(phrase)) is not None:
            return Part(value)
        if (named := self.named(tokens)) is not None:
            return named
        start = next((place for place, token in enumerate(tokens) if token.kind != WORD), None)
        if start is None:
            return None
        lead = [token.text.lower() for token in tokens[:start]]
        negative = bool(lead) and words.SIGNS.get(lead[-1]) == -1
        if lead and lead[-1] in words.SIGNS:
            lead.pop()
        if not self._harmless_lead(lead):
            return None
        core = tokens[start:]
        if lead and not negative and (named := self.named(core)) is not None:
            return named
        if core[0].text == "approx":
            core = core[1:]
        node, behind = _parsed(core, self.plain_units)
        tail = [token for token in core[behind:] if token.text not in (".", ":", ";", ",")]
        if node[0] == "unit" and tail and tail[0].kind == NUMBER:
            node, tail = _compound(node, tail)
        if any(token.kind not in (WORD,) and not (token.kind == LETTER and token.text in "aAI") for token in tail):
            return None
        nouns = [token.text.lower() for token in tail]
        if not harmless_tail(nouns) or (self.reference and len(nouns) > 4):
            return None
        if negative:
            node = ("neg", node) if node[0] != "unit" else ("unit", ("neg", node[1]), node[2])
        value = classified(node)
        if nouns and isinstance(value, Quantity):
            value = dataclasses.replace(value, nouns=frozenset(singular(noun) for noun in nouns))
        elif nouns and self.reference:
            return None
        return Part(value, node)

    def _harmless_lead(self, lead: list[str]) -> bool:
        rest = [word for word in lead if word not in words.APPROXIMATELY]
        if not rest:
            return True
        if self.reference:
            return False
        if rest[-1] in words.LABELS or rest[-1] in ("of",) and len(rest) > 1 and rest[-2] in PARTITIVES:
            return False
        return not any(words.changes(word) or word in words.NUMBER_WORDS or word in BEFORE for word in rest)

    def chain_agrees(self, tokens: list[Token], signs: list[int]) -> bool:
        """Returns whether the sides of a chain `x = 2 + 3 = 5` that are numbers agree."""
        sides = []
        for start, end in zip(signs, [*signs[1:], len(tokens)], strict=True):
            try:
                sides.append(formula.parse(list(tokens[start + 1 : end])))
            except Unreadable:
                continue
        return agree([side for side in sides if not letters(side)])

    def named(self, tokens: list[Token]) -> Part | None:
        """Returns the named value of `name = value`, None for other tokens."""
        depths = depths_of(tokens)
        places = [
            place
            for place, token in enumerate(tokens)
            if depths[place] == 0 and token.text in _EQUALITIES and token.kind != NUMBER
        ]
        if not places or places[0] == 0:
            return None
        left = tokens[: places[0]]
        named = name_of(left)
        swapped = False
        right = tokens[places[0] + 1 :]
        if (
            named is None
            and len(places) == 1
            and (named := name_of(right, letters_only=True)) is not None
            and len(right) < 6
        ):
            if name_of(left, letters_only=True) is None:
                right, swapped = left, True
            else:
                named = None
        if named is None:
            return None
        if tokens[places[0]].text in ("equiv", "cong") and any(
            token.text in ("pmod", "mod", "bmod") for token in tokens
        ):
            return None
        name, parameters = named
        chain = [place for place in places if tokens[place].text == "="]
        if len(places) > 1 and not self.chain_agrees(tokens, places):
            return None
        if not swapped and chain:
            exact_end = next((place for place in places if place > chain[-1]), len(tokens))
            right = tokens[chain[-1] + 1 : exact_end]
        if any(
            depth == 0 and token.text in ("<", ">", "le", "ge", "ne")
            for token, depth in zip(tokens, depths, strict=True)
        ):
            return None
        part = self.segment(right)
        if part is None:
            return None
        try:
            equation = ("rel", formula.parse(list(left)), ("=", formula.parse(list(tokens[places[0] + 1 :]))))
            if equation[1][0] == "rel" or equation[2][1][0] == "rel":
                equation = None
        except Unreadable:
            equation = None
        if is_sum(left) and not (isinstance(part.value, Quantity) and part.value.type == "number"):
            return None
        return Part(Named(name, part.value, equation, parameters))


def _point(value: Value) -> Value:
    """Returns one item of a list, `p = 5, q = 2` or `5, 2`, as the tuple of its values."""
    if isinstance(value, Several) and value.kind == "list":
        members = tuple(member.value if isinstance(member, Named) else member for member in value.members)
        return Several("tuple", members, "(", ")")
    return value


def _compound(node: Node, rest: list[Token]) -> tuple[Node, list[Token]]:
    """Returns (the sum of amounts such as 5 feet 6 inches, in the first unit; the tokens after it)."""
    amount, behind = _parsed(rest, False)
    scale = units.ratio(amount[2], node[2]) if amount[0] == "unit" else None
    if scale is None:
        return node, rest
    return ("unit", ("add", node[1], ("mul", formula.number(scale), amount[1])), node[2]), rest[behind:]


def _parsed(tokens: list[Token], plain_units: bool) -> tuple[Node, int]:
    """Returns (node, index after it) of the formula at the beginning of the tokens."""
    parser = formula.Parser(list(tokens), plain_units)
    node = parser.relation()
    added = len(parser.tokens) - len(tokens)  # numerals that were split into digits
    return node, parser.place - added
