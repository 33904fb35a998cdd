r"""Splits normalised text into tokens: numerals, letters, words, commands and signs.

Letters side by side are a word (`cm`, `even`, anything in `\text{}`), the name of a function or constant (`sqrt`,
`pi`), or else a product of letters (`mgh`).
"""

import re
from fractions import Fraction
from typing import NamedTuple

from r1jax.rewards.answers import units, words

NUMBER, LETTER, UPRIGHT, WORD, COMMAND, SIGN = "number", "letter", "upright", "word", "command", "sign"
MAX_TOKENS = 600


class Unreadable(ValueError):
    """The text is not a formula that this package can read."""


class Token(NamedTuple):
    """One token of a formula."""

    kind: str
    text: str
    value: Fraction | None = None  # of a numeral
    spaced: bool = False  # white space comes before it
    upright: bool = False  # the letter or word was in \text{} or a similar command


GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar aleph".split()
)
_FUNCTION_NAMES = (
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth sech csch arsinh arcosh artanh arcsinh arccosh arctanh asin acos atan "
    "log ln lg exp sqrt cbrt gcd lcm max min det abs floor ceil sgn sign binom mod choose trace tr"
)
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
NAMES: dict[str, str] = {name: name for name in FUNCTIONS - {"tr", "mod"}} | {
    name: name for name in GREEK if len(name) > 2
}
NAMES |= {"pi": "pi", "oo": "infty", "inf": "infty", "infty": "infty", "infinity": "infty", "mod": "mod"}
NAMES |= {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "mu": "mu"}
_NAME_THEN_LETTERS = re.compile("(sqrt|sin|cos|tan|log|ln|exp|pi|theta|alpha|beta)([a-zA-Z]{1,2})")
_LETTERS_THEN_NAME = re.compile("([a-zA-Z]{1,2})(sqrt|sin|cos|tan|log|ln|pi|theta)")

_WORD_BEFORE = re.compile(r"[A-Za-z]{2,}\s+$")
_WORD_AFTER = re.compile(r"\s+[A-Za-z]{1,20}\b")
_NOUN_AFTER = re.compile(
    r"\s+(?!and\b|or\b|mod\b|cos\b|sin\b|tan\b|log\b|times\b|plus\b|minus\b)[A-Za-z]{3,}\b(?!\s*[=^_(])"
)
_SIGNED = re.compile(r"\d\s*[A-Za-z]\s*[+=-]|[A-Za-z]\s*[+=-]\s*\d")
_SPOKEN = re.compile(r"[^\W\d_]{3,}\s+[^\W\d_]|[^\W\d_]\s+[^\W\d_]{3,}")  # several words
_TEXT = re.compile(r"\\(?:text|mathrm|operatorname\*?|mathbf|mathbb|mathcal|mathscr|mathfrak)(?![A-Za-z])\s*")
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{\s*([A-Za-z]+)\*?\s*\}(?:\s*\{[clr|@ ]*\}|\s*\[[a-z]*\])?")
_REPEATING = re.compile(
    r"(\d*\.\d*)\s*(?:\\overline\s*(?:\{\s*(\d+)\s*\}|(\d))|\\dot\s*(?:\{\s*(\d)\s*\}|(\d))(?:(\d*)\s*\\dot\s*(?:\{\s*(\d)\s*\}|(\d)))?)"
)
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?![\d,]*\d)(?:\.\d+)?|[1-9]\d{0,2}(?: \d{3})+(?![\d/]| \d)(?:\.\d+)?")
_COMMA_DECIMAL = re.compile(r"\d+(?:\\decimalcomma \d+)+(?:\.\d+)?")
_DECIMAL = re.compile(r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?![\dA-Za-z]))?")
_LETTERS = re.compile("[A-Za-z]+(?:-[A-Za-z]+)*(?:'[a-z]+)?")
_HAN = re.compile("[\u3007\u4e00-\u9fff]+")
_OTHER_WORD = re.compile(r"[^\W\d_]+")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_TWO_SIGNS = re.compile(r"<=|>=|=>|=<|!=|==|->|\*\*|\\\\|\\[{}$%&#_]|''")
_SIGNS = {"<=": "le", ">=": "ge", "=<": "le", "!=": "ne", "==": "=", "->": "to", "=>": "to", "**": "^", r"\{": r"\{", r"\}": r"\}", r"\$": "$",
          r"\%": "%", r"\&": "&and", r"\#": "#", r"\_": "_"}  # fmt: skip


def tokenise(text: str, prose: bool = False) -> list[Token]:
    """Returns the tokens of normalised text. With `prose` single letters `a`, `A` and `I` are words.

    Raises Unreadable for braces that do not match, characters of no use, or more than MAX_TOKENS.
    """
    return _Scanner(text, prose).run()


class _Scanner:
    def __init__(self, text: str, prose: bool, inside: str = "", depth: int = 0):
        self.text, self.prose, self.inside = text, prose, inside  # inside: the text is in \text{} or \operatorname{}
        self.place, self.depth, self.tokens = 0, depth, []
        self.opened: list[int] = []  # for each open bracket, whether commas in it separate members

    def run(self) -> list[Token]:
        text, end = self.text, len(self.text)
        while self.place < end:
            character = text[self.place]
            if character.isspace():
                self.place += 1
                continue
            if character == "\\":
                self._backslash()
            elif character.isdigit() or (character == "." and text[self.place + 1 : self.place + 2].isdigit()):
                self._numeral()
            elif character.isalpha():
                self._letters()
            else:
                self._sign()
            if len(self.tokens) > MAX_TOKENS:
                raise Unreadable("too long")
        return self.tokens

    def _add(self, kind: str, text: str, length: int, value: Fraction | None = None, upright: bool = False) -> None:
        spaced = self.place > 0 and self.text[self.place - 1].isspace()
        self.tokens.append(Token(kind, text, value, spaced, upright or bool(self.inside)))
        self.place += length

    def _backslash(self) -> None:
        text, place = self.text, self.place
        if environment := _ENVIRONMENT.match(text, place):
            self.depth += 1 if environment[1] == "begin" else -1
            self._add(COMMAND, f"{environment[1]} {environment[2]}", len(environment[0]))
        elif (style := _TEXT.match(text, place)) is not None:
            self._styled(style)
        elif name := _COMMAND.match(text, place):
            self._add(COMMAND, name[1], len(name[0]))
        elif sign := _TWO_SIGNS.match(text, place):
            self.depth += {r"\{": 1, r"\}": -1}.get(sign[0], 0)
            self._add(SIGN, _SIGNS.get(sign[0], sign[0]), len(sign[0]))
        elif text[place : place + 2] == "\\|":
            self._add(SIGN, "|", 2)
        else:
            self.place += 1  # a backslash before another character is ignored

    def _styled(self, style: re.Match) -> None:
        r"""Reads `\text{...}` or a similar command: its words, or the letter or set that it styles."""
        start = style.end()
        content, end = _group(self.text, start)
        command = style[0].strip()
        spaced_before = self.place
        if command == r"\mathbb":
            self._add(COMMAND, f"bb{content.strip()}", end - spaced_before)
            return
        if command == r"\mathbf" and content.strip() in tuple("ijk"):
            self._add(COMMAND, f"basis {content.strip()}", end - spaced_before)
            return
        if command in (r"\mathbf", r"\mathrm") and _SIGNED.search(content):  # a formula in bold
            self.tokens += _Scanner(content, self.prose, self.inside, self.depth).run()
            self.place = end
            return
        prose = self.prose or bool(_SPOKEN.search(content))
        inner = _Scanner(content, prose, "operator" if "operator" in command else "text", self.depth).run()
        spaced = (spaced_before > 0 and self.text[spaced_before - 1].isspace()) or content[:1].isspace()
        if inner:
            inner[0] = inner[0]._replace(spaced=spaced)
        self.tokens += inner
        self.place = end

    def _numeral(self) -> None:
        text, place = self.text, self.place
        if repeating := _REPEATING.match(text, place):
            self._add(NUMBER, repeating[0], len(repeating[0]), _repeating(repeating))
        elif self.depth == 0 and (grouped := _GROUPED.match(text, place)):
            self._add(NUMBER, grouped[0], len(grouped[0]), Fraction(re.sub("[, ]", "", grouped[0])))
        elif comma := _COMMA_DECIMAL.match(text, place):
            parts = comma[0].split(r"\decimalcomma ")
            thousands = (
                all(len(part.split(".")[0]) == 3 for part in parts[1:]) and len(parts[0]) < 4 and parts[0] != "0"
            )
            text = ("" if thousands else ".").join(parts)
            if text.count(".") > 1:
                raise Unreadable("separators")
            self._add(NUMBER, comma[0], len(comma[0]), Fraction(text))
        else:
            plain = _DECIMAL.match(text, place)
            if plain is None or len(plain[0]) > 400:
                raise Unreadable("numeral")
            self._add(NUMBER, plain[0], len(plain[0]), Fraction(plain[0]))

    def _letters(self) -> None:
        text, place = self.text, self.place
        if han := _HAN.match(text, place):
            self._add(WORD, han[0], len(han[0]))
            return
        word = _OTHER_WORD.match(text, place)
        assert word is not None  # it begins with a letter
        whole = _HAN.split(word[0], maxsplit=1)[0]
        if not whole.isascii():
            self._add(WORD, whole, len(whole))
            return
        letters = _LETTERS.match(text, place)
        assert letters is not None
        run = letters[0]
        if "-" in run or "'" in run:
            parts = run.replace("'", "-").split("-")
            if not self._is_phrase(run, parts):
                run = parts[0]
        self._run(run)

    def _is_phrase(self, run: str, parts: list[str]) -> bool:
        """Returns whether hyphens join words and are not minus signs, and an apostrophe is not a prime."""
        if "'" in run:
            return len(parts[0]) > 1
        return max(map(len, parts)) > 2 and not any(part in FUNCTIONS for part in parts)

    def _run(self, run: str) -> None:
        if len(run) == 1:
            kind = UPRIGHT if self.inside else LETTER
            if (self.prose and (run in "aAI" or self._between_words())) or (
                run in "aA" and _NOUN_AFTER.match(self.text, self.place + 1)
            ):
                kind = WORD
            self._add(kind, run, 1)
        elif run in ("min", "sec") and (self.inside == "text" or (self.tokens and self.tokens[-1].kind == NUMBER)):
            self._add(WORD, run, len(run))
        elif run in NAMES or run.lower() in ("infinity", "pi", "theta", "sqrt"):
            self._add(COMMAND, NAMES.get(run) or NAMES[run.lower()], len(run))
        elif self.inside or self._is_word(run):
            for part in run.split("-"):
                self._add(WORD, part, len(part))
                self.place += self.text[self.place : self.place + 1] == "-"
        elif match := _NAME_THEN_LETTERS.fullmatch(run):
            self._add(COMMAND, match[1], len(match[1]))
            self._spell(match[2])
        elif match := _LETTERS_THEN_NAME.fullmatch(run):
            self._spell(match[1])
            self._add(COMMAND, match[2], len(match[2]))
        else:
            self._spell(run)

    def _between_words(self) -> bool:
        """Returns whether the current letter is between two words."""
        before, after = self.text[: self.place], self.text[self.place + 1 :]
        return bool(_WORD_BEFORE.search(before[-20:]) and _WORD_AFTER.match(after))

    def _spell(self, letters: str) -> None:
        for letter in letters:
            self._add(LETTER, letter, 1)

    def _is_word(self, run: str) -> bool:
        plain = run.lower()
        if len(run) >= 4:
            return not _NAME_THEN_LETTERS.fullmatch(run) and (
                any(vowel in plain for vowel in "aeiouy") or plain in units.NAMES or run in units.NAMES or self.prose
            )
        if self.prose or plain in ("and", "or"):
            return True
        if run in units.PLAIN and self._measures(run):
            return True
        return (
            self._stands_alone(run)
            and plain in words.SHORT_WORDS
            or plain in words.NUMBER_WORDS
            or plain in ("st", "nd", "rd", "th")
        )

    def _measures(self, run: str) -> bool:
        """Returns whether letters that name a unit are at a place for one: after a number and not before a factor."""
        after = self.text[self.place + len(run) :].lstrip()
        last = self.tokens[-1] if self.tokens else None
        behind = last is not None and (last.kind == NUMBER or last.text in ("}", ")", "/") or last.kind == WORD)
        touching = self.text[self.place + len(run) :][:1] == "("
        factor = touching or after[:1] in ("+", "-", "\\", "*", "_") or after[:1].isalnum()
        return behind and not factor and not (after[:1] == "^" and run not in units.NAMES)

    def _stands_alone(self, run: str) -> bool:
        """Returns whether letters are a short word and not factors: not in braces, beside a sign, or of mixed case."""
        text, end = self.text, self.place + len(run)
        before, after = text[: self.place].rstrip(), text[end:].lstrip()
        touching = self.place > 0 and (text[self.place - 1].isdigit() or text[self.place - 1] in "})")
        mixed = run not in (run.lower(), run.upper(), run.capitalize())
        in_braces = before.count("{") - before.count("}") > before.count(r"\{") - before.count(r"\}")
        return not (touching or mixed or in_braces or before[-1:] in tuple("+*/^=<>") or after[:1] in tuple("+*/^_=<>"))

    def _sign(self) -> None:
        text, place = self.text, self.place
        if sign := _TWO_SIGNS.match(text, place):
            self._add(SIGN, _SIGNS.get(sign[0], sign[0]), len(sign[0]))
            return
        character = text[place]
        if character in "([{":
            last = self.tokens[-1] if self.tokens else None
            argument = last is not None and (last.kind == COMMAND or last.text in ("}", "^", "_"))
            self.opened.append(0 if character == "{" and argument else 1)
            self.depth += self.opened[-1]
        elif character in ")]}" and self.opened:
            self.depth -= self.opened.pop()
        self._add(SIGN, character, 1)


def _group(text: str, start: int) -> tuple[str, int]:
    """Returns (content, end) of the group in braces that begins at `start`, or of the one character there."""
    if text[start : start + 1] != "{":
        return text[start : start + 1], min(len(text), start + 1)
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "\\":
            continue
        if text[place] == "{" and text[place - 1] != "\\":
            depth += 1
        elif text[place] == "}" and text[place - 1] != "\\":
            depth -= 1
            if depth == 0:
                return text[start + 1 : place], place + 1
    raise Unreadable("unbalanced")


def _repeating(match: re.Match) -> Fraction:
    """Returns the value of 0.1\\overline{6} or 0.\\dot{1}4\\dot{2}."""
    head = match[1]
    if match[2] or match[3]:
        period = match[2] or match[3]
    else:
        period = (match[4] or match[5]) + ((match[6] or "") + (match[7] or match[8]) if match[7] or match[8] else "")
    fixed = head.partition(".")[2]
    value = Fraction(head + "0") if head[-1] == "." else Fraction(head)
    return value + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
