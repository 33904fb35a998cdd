r"""Parses mathematical notation, LaTeX or plain, into nodes: nested tuples whose first member is the kind.

Expressions: ("num", Fraction), ("sym", name), ("const", "pi" | "e" | "i" | "inf"), ("add", a, b, ...),
("mul", a, b, ...), ("neg", a), ("div", a, b), ("pow", a, b), ("root", index, a), ("fn", name, a, ...),
("app", name, a, ...), ("fact", a), ("deg", a), ("plusminus", sign, a), ("series", kind, letter, low, high, body),
("integral", letter, low, high, body).

Structures: ("tuple", opening, closing, items), ("set", items), ("such", letter, conditions), ("matrix", rows),
("cases", rows), ("union" | "meet" | "minus", a, b), ("field", name), ("unit", a, unit), ("ratio", items),
("based", digits, base), ("rel", first, (sign, side), ...), ("congruent", a, b, modulus), ("list", items, joints).

This parser was written because existing ones change meanings: math-verify's (latex2sympy2_extended) folds the case of
letters, reads a digit before a bracket as a mixed number and drops `\text{}`; sympy's `parse_latex` reads neither sets
nor intervals nor units.
"""

from fractions import Fraction

from r1jax.rewards.answers import units, words
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
    Unreadable,
)

Node = tuple
MAX_DEPTH = 40
_RELATIONS = {
    "=",
    "<",
    ">",
    "le",
    "ge",
    "ne",
    "in",
    "notin",
    "approx",
    "equiv",
    "to",
    "subset",
    "subseteq",
    "cong",
    "propto",
    "perp",
    "parallel",
}
_POSTFIX_STOPS = frozenset((",", ";", ")", "]", "}", r"\}", "|", "&", r"\\", "rangle", "rfloor", "rceil"))
_INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec", "csc": "arccsc", "sinh": "arsinh",
             "cosh": "arcosh", "tanh": "artanh"}  # fmt: skip
_ALIASES = {"arcsinh": "arsinh", "arccosh": "arcosh", "arctanh": "artanh", "lg": "log10", "sign": "sgn", "tr": "trace"}
_DECORATIONS = frozenset("vec hat overline tilde widetilde dot ddot mathring underbar check breve".split())
_FIGURES = {"angle": "∠", "triangle": "△", "measuredangle": "∠", "odot": "⊙", "Box": "□", "square": "□"}
_ENDS = frozenset(_POSTFIX_STOPS | _RELATIONS | {"cup", "cap", "setminus", ":"})
ONE, ZERO = ("num", Fraction(1)), ("num", Fraction(0))
EMPTY_SET = ("set", ())


def parse(tokens: list[Token], plain_units: bool = False) -> Node:
    """Returns the node of all tokens. With `plain_units` letters after a number may be units. Raises Unreadable."""
    parser = Parser(tokens, plain_units)
    node = parser.listed()
    if parser.place < len(tokens):
        raise Unreadable(f"unexpected {tokens[parser.place].text}")
    return node


def number(value: int | Fraction) -> Node:
    return ("num", Fraction(value))


class Parser:
    """Recursive descent: one method per level of precedence, from lists down to single symbols."""

    def __init__(self, tokens: list[Token], plain_units: bool):
        self.tokens, self.plain_units = tokens, plain_units
        self.place, self.depth, self.bars = 0, 0, 0
        self.bounding = False  # inside the upper bound of a sum, where `_` begins the lower one
        self.integrand = 0  # how many integrals are open, which end at dx

    def peek(self, ahead: int = 0) -> Token | None:
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else None

    def at(self, *texts: str, ahead: int = 0) -> bool:
        token = self.peek(ahead)
        return token is not None and token.kind in (SIGN, COMMAND) and token.text in texts

    def take(self) -> Token:
        token = self.peek()
        if token is None:
            raise Unreadable("it ends too early")
        self.place += 1
        return token

    def expect(self, text: str) -> None:
        if not self.at(text):
            raise Unreadable(f"{text} is missing")
        self.place += 1

    def nested(self, method, *arguments):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        try:
            return method(*arguments)
        finally:
            self.depth -= 1

    # Lists and relations

    def listed(self) -> Node:
        items, joints = [self.relation()], []
        while self.at(",", ";", "lor", "land") or self.at_joint():
            token = self.take()
            joints.append({",": ",", ";": ",", "lor": "or", "land": "and"}.get(token.text, token.text))
            if self.peek() is None:
                break
            if self.at_joint():  # 1, 2, and 3
                joints[-1] = self.take().text
            if self.at("ldots"):
                items.append(("sym", "..."))
                self.place += 1
                continue
            items.append(self.relation())
        return items[0] if len(items) == 1 else ("list", tuple(items), tuple(joints))

    def at_joint(self) -> bool:
        token = self.peek()
        return token is not None and token.kind == WORD and token.text in ("and", "or")

    def relation(self) -> Node:
        if self.at("approx", "="):  # there is no left side
            self.place += 1
        if self.at(*_RELATIONS):
            sign = self.take().text
            return ("rel", ("sym", "?"), (sign, self.ratio()))
        first, sides = self.ratio(), []
        while self.at(*_RELATIONS) or (self.at("neg") and self.at("=", ahead=1)):
            sign = self.take().text
            if sign == "neg":
                sign = self.take().text and "ne"
            sides.append((sign, self.ratio()))
        if sides and sides[0][0] in ("equiv", "cong") and self.at("pmod", "bmod", "mod", "("):
            return self.congruence(first, sides)
        return ("rel", first, *sides) if sides else first

    def congruence(self, first: Node, sides: list) -> Node:
        bracket = self.at("(")
        if bracket:
            self.place += 1
        if not self.at("pmod", "bmod", "mod"):
            raise Unreadable("modulus is missing")
        self.place += 1
        modulus = self.nested(self.argument)
        if bracket:
            self.expect(")")
        return ("congruent", first, sides[-1][1], modulus)

    def ratio(self) -> Node:
        items = [self.united()]
        while self.at(":"):
            self.place += 1
            items.append(self.united())
        return items[0] if len(items) == 1 else ("ratio", tuple(items))

    def united(self) -> Node:
        node = self.sum()
        while self.at("cup", "cap", "setminus"):
            kind = {"cup": "union", "cap": "meet", "setminus": "minus"}[self.take().text]
            node = (kind, node, self.sum())
        return node

    # Sums, products, powers

    def sum(self) -> Node:
        terms = [self.signed()]
        while self.at("+", "-", "pm", "mp"):
            sign = self.take().text
            while self.at("+", "-"):  # 3 + -2
                sign = sign if self.take().text == "+" else {"+": "-", "-": "+"}.get(sign, sign)
            term = self.product()
            terms.append(
                term
                if sign == "+"
                else ("neg", term)
                if sign == "-"
                else ("plusminus", 1 if sign == "pm" else -1, term)
            )
        node = terms[0] if len(terms) == 1 else ("add", *terms)
        return self.with_unit(node)

    def signed(self) -> Node:
        if self.at("+"):
            self.place += 1
            return self.nested(self.signed)
        if self.at("-"):
            self.place += 1
            return ("neg", self.nested(self.signed))
        if self.at("pm", "mp"):
            sign = 1 if self.take().text == "pm" else -1
            return ("plusminus", sign, self.product())
        return self.product()

    def with_unit(self, node: Node) -> Node:
        """Returns the node with the unit that follows it, if there is one."""
        if self.at("%") and self.percent_is_unit():
            self.place += 1
            return ("unit", node, units.unit({"percent": Fraction(1)}))
        scale = self.peek()
        if node[0] == "deg" and scale is not None and scale.text in ("C", "F") and _ends(self.tokens, self.place + 1):
            key = {"C": "celsius", "F": "fahrenheit"}[self.take().text]
            return ("unit", node[1], units.unit({key: Fraction(1)}))
        unit_and_end = read_unit(self.tokens, self.place, self.plain_units)
        if unit_and_end is None:
            return node
        unit, self.place = unit_and_end
        if node[0] == "deg" and len(unit) == 1 and unit[0][0] in ("C", "F"):
            return ("unit", node[1], units.unit({{"C": "celsius", "F": "fahrenheit"}[unit[0][0]]: Fraction(1)}))
        return ("unit", node, unit)

    def percent_is_unit(self) -> bool:
        after = self.peek(1)
        return after is None or after.text in _ENDS or after.kind == WORD

    def product(self) -> Node:
        node = self.power()
        while True:
            if self.at("*", "cdot", "times"):
                if read_unit(self.tokens, self.place, self.plain_units) is not None:
                    return node
                self.place += 1
                factor = self.nested(self.signed_factor)
                node = ("mul", node, factor)
            elif self.at("/"):
                self.place += 1
                node = ("div", node, self.nested(self.signed_factor))
            elif self.at("bmod", "mod"):
                self.place += 1
                node = ("fn", "mod", node, self.power())
            elif self.at("%") and not self.percent_is_unit():
                self.place += 1
                node = ("div", node, number(100))
            elif self.starts_factor() and not self.ends_integrand():
                if read_unit(self.tokens, self.place, self.plain_units) is not None:
                    return node
                previous, start = self.tokens[self.place - 1], self.place
                if self.tokens[start].kind == NUMBER and previous.kind == NUMBER:
                    node = self.mixed(node)
                    continue
                factor = self.power()
                node = self.joined(node, factor, self.tokens[start], previous)
            else:
                return node

    def signed_factor(self) -> Node:
        if self.at("-", "+"):
            negative = self.take().text == "-"
            factor = self.signed_factor()
            return ("neg", factor) if negative else factor
        return self.power()

    def mixed(self, whole: Node) -> Node:
        """Returns the mixed number `1 4/5`, given its whole part. Raises Unreadable for other numerals side by side."""
        top, slash, bottom = self.peek(), self.peek(1), self.peek(2)
        values = [token.value for token in (top, bottom) if token is not None and token.value is not None]
        fits = slash is not None and slash.text == "/" and whole[0] == "num" and len(values) == 2
        if not fits or not _is_mixed(whole[1], values[0], values[1]):
            raise Unreadable("two numerals side by side")
        self.place += 3
        return number(whole[1] + values[0] / values[1])

    def joined(self, node: Node, factor: Node, token: Token, previous: Token) -> Node:
        """Returns the product of neighbours, or the mixed number of a numeral and a fraction."""
        numeral = node if node[0] == "num" else node[-1] if node[0] == "mul" else node
        fraction = factor[0] == "div" and token.text == "frac"
        if fraction and numeral[0] == "num" and factor[1][0] == factor[2][0] == "num" and previous.kind == NUMBER:
            if _is_mixed(numeral[1], factor[1][1], factor[2][1]) and node is numeral:
                return number(numeral[1] + factor[1][1] / factor[2][1])
        if token.kind == NUMBER and node[0] == "sym":
            raise Unreadable("a numeral behind a letter")
        if node[0] in ("set", "matrix", "tuple") and factor[0] in ("set", "tuple"):
            raise Unreadable("two sets side by side")
        return ("mul", node, factor)

    def starts_factor(self) -> bool:
        token = self.peek()
        if token is None or token.kind == WORD:
            return False
        if token.kind in (NUMBER, LETTER, UPRIGHT):
            return True
        if token.text == "(" and self.at("mod", "pmod", "bmod", ahead=1):
            return False
        if token.kind == SIGN:
            return token.text in ("(", "[", "{", r"\{") or (token.text == "|" and self.bars == 0)
        return (
            token.text not in _RELATIONS | _POSTFIX_STOPS
            and not token.text.startswith("end ")
            and token.text
            not in (
                "cup cap setminus cdot times pm mp lor land over choose pmod bmod mod ldots circ neg to qquad".split()
            )
        )

    def ends_integrand(self) -> bool:
        token, after = self.peek(), self.peek(1)
        return bool(
            self.integrand
            and token is not None
            and token.kind in (LETTER, UPRIGHT)
            and token.text == "d"
            and after is not None
            and after.kind == LETTER
        )

    def power(self) -> Node:
        start = self.place
        node = self.primary()
        while True:
            if self.at("^"):
                node = self.raised(node)
            elif self.at("circ"):
                self.place += 1
                node = ("deg", node)
            elif self.at("!") and self.at("!", ahead=1):
                self.place += 2
                node = ("fn", "doublefactorial", node)
            elif self.at("!"):
                self.place += 1
                node = ("fact", node)
            elif self.at("_") and self.place > start:
                node = self.lowered(node, start)
            else:
                return node

    def raised(self, node: Node) -> Node:
        self.place += 1
        braced = self.at("{")
        inner = self.peek(1) if braced else self.peek()
        closes = not braced or self.at("}", ahead=2)
        if inner is not None and closes:
            end = 3 if braced else 1
            if inner.text == "circ":
                self.place += end
                return ("deg", node)
            if inner.kind == WORD and inner.text in ("st", "nd", "rd", "th"):
                self.place += end
                return node
            if inner.text in ("'", "*", "top", "perp", "+") and inner.kind in (SIGN, COMMAND):
                self.place += end
                return _marked(node, inner.text)
            after = self.peek(1)
            if inner.text == "-" and (braced or after is None or after.text in _ENDS):
                self.place += end
                return _marked(node, "-")
        exponent = self.nested(self.exponent)
        if node[0] == "sym" and node[1] in ("f", "g", "h") and exponent == ("neg", ONE) and self.at("("):
            return self.applied(f"{node[1]}^-1")
        return ("pow", node, exponent)

    def exponent(self) -> Node:
        if self.at("-", "+"):
            negative = self.take().text == "-"
            node = self.exponent()
            return ("neg", node) if negative else node
        return self.argument(whole=True)

    def lowered(self, node: Node, start: int) -> Node:
        """Returns a numeral with its base, which is a subscript after digits or a bracket."""
        digits = "".join(token.text for token in self.tokens[start : self.place]).strip("(){}")
        self.place += 1
        base = self.subscript_base()
        if base is None or not digits.isalnum():
            raise Unreadable("subscript")
        return ("based", digits.upper().lstrip("0") or "0", base)

    def subscript_base(self) -> int | None:
        braced = self.at("{")
        if braced:
            self.place += 1
        word = self.peek()
        if word is not None and word.text.lower() == "base":
            self.place += 1
        token = self.take()
        if braced:
            self.expect("}")
        if token.value is not None:
            return int(token.value)
        value = words.number([token.text.lower()]) if token.kind == WORD else None
        return None if value is None else int(value)

    # Symbols, brackets, commands

    def primary(self) -> Node:
        token = self.take()
        if token.kind == NUMBER:
            return ("num", token.value)
        if token.kind in (LETTER, UPRIGHT):
            return self.letter(token)
        if token.kind == COMMAND:
            return self.nested(self.command, token)
        if token.kind == SIGN and token.text in ("(", "[", "{", r"\{", "|"):
            return self.nested(self.bracket, token)
        raise Unreadable(f"unexpected {token.text}")

    def letter(self, token: Token) -> Node:
        if token.text == "e" and not self.at("_"):
            return ("const", "e")
        if token.text == "i" and not self.at("_"):
            return ("const", "i")
        name = self.named(token.text)
        if name.partition("_")[0].rstrip("'") in ("f", "g", "h"):
            if self.at("{") and self.at("(", ahead=1):
                return self.applied_in_braces(name)
            if self.at("(") and not self.tokens[self.place].spaced:
                return self.applied(name)
        return ("sym", name)

    def named(self, name: str) -> str:
        """Returns a letter's name with its subscript and primes, in this order."""
        primes = ""
        while self.at("'", "''"):
            primes += self.take().text
        if self.at("_") and not self.bounding:
            self.place += 1
            name += "_" + self.subscript()
        while self.at("'", "''"):
            primes += self.take().text
        return name + primes

    def subscript(self) -> str:
        token = self.take()
        if token.text != "{" or token.kind != SIGN:
            return token.text
        parts, depth = [], 1
        while True:
            token = self.take()
            depth += (token.text == "{") - (token.text == "}")
            if depth == 0:
                return "".join(parts)
            parts.append(token.text)

    def applied_in_braces(self, name: str) -> Node:
        self.place += 1
        node = self.applied(name)
        self.expect("}")
        return node

    def applied(self, name: str) -> Node:
        self.expect("(")
        arguments = self.nested(self.listed)
        self.expect(")")
        return ("app", name, *(arguments[1] if arguments[0] == "list" else (arguments,)))

    def bracket(self, token: Token) -> Node:
        opening = token.text
        if opening == "|":
            self.bars += 1
            inner = self.sum()
            self.bars -= 1
            self.expect("|")
            return ("fn", "det", inner) if inner[0] == "matrix" else ("fn", "abs", inner)
        if opening == "{":
            return self.braces()
        if opening == r"\{":
            return self.set_braces()
        bars, self.bars = self.bars, 0
        inner = self.listed()
        self.bars = bars
        if not self.at(")", "]"):
            raise Unreadable("a bracket is not closed")
        closing = self.take().text
        if inner[0] == "list":
            return ("tuple", opening, closing, inner[1])
        if opening == "(" and closing == ")":
            return inner
        if opening == "[" and closing == "]":
            return inner if inner[0] != "num" else ("tuple", opening, closing, (inner,))
        raise Unreadable("brackets do not match")

    def braces(self) -> Node:
        bars, self.bars = self.bars, 0
        if self.at("}"):
            raise Unreadable("empty braces")
        inner = self.listed()
        if self.at("over", "choose"):
            kind = self.take().text
            below = self.listed()
            inner = ("div", inner, below) if kind == "over" else ("fn", "binom", inner, below)
        self.bars = bars
        self.expect("}")
        return ("set", inner[1]) if inner[0] == "list" else inner

    def set_braces(self) -> Node:
        bars, self.bars = self.bars, 1
        if self.at(r"\}"):
            self.place += 1
            self.bars = bars
            return EMPTY_SET
        inner = self.united_list()
        if self.at("|", ":"):
            self.place += 1
            conditions = self.listed()
            inner = ("such", inner, conditions)
        self.bars = bars
        self.expect(r"\}")
        if inner[0] == "such":
            return inner
        return ("set", inner[1] if inner[0] == "list" else (inner,))

    def united_list(self) -> Node:
        items, joints = [self.set_member()], []
        while self.at(",", ";"):
            self.place += 1
            joints.append(",")
            if self.at("ldots"):
                self.place += 1
                items.append(("sym", "..."))
            else:
                items.append(self.set_member())
        return items[0] if len(items) == 1 else ("list", tuple(items), tuple(joints))

    def set_member(self) -> Node:
        first, sides = self.united(), []
        while self.at("=", "in"):
            sides.append((self.take().text, self.united()))
        return ("rel", first, *sides) if sides else first

    def argument(self, whole: bool = False) -> Node:
        """Returns the argument of a command: a group, a bracket or a symbol; one digit of a numeral unless `whole`."""
        token = self.peek()
        if token is None:
            raise Unreadable("an argument is missing")
        if token.kind == NUMBER and not whole and len(token.text) > 1 and token.text.isdigit():
            first, rest = token.text[0], token.text[1:]
            self.tokens[self.place : self.place + 1] = [
                Token(NUMBER, first, Fraction(first), token.spaced),
                Token(NUMBER, rest, Fraction(rest)),
            ]
        if self.at("-"):
            self.place += 1
            return ("neg", self.argument(whole))
        return self.primary()

    def command(self, token: Token) -> Node:
        name = _ALIASES.get(token.text, token.text)
        if name == "pi":
            return ("const", "pi")
        if name == "infty":
            return ("const", "inf")
        if name in GREEK:
            return ("sym", self.named(name))
        if name == "frac":
            top = self.argument()
            return ("div", top, self.argument())
        if name in ("sqrt", "cbrt"):
            return self.root(name)
        if name in ("binom", "choose"):
            top = self.argument()
            return ("fn", "binom", top, self.argument())
        if name in FUNCTIONS or name in ("arsinh", "arcosh", "artanh", "log10"):
            return self.function(name)
        if name in _DECORATIONS:
            return self.decorated(name)
        if name in _FIGURES:
            return ("sym", self.named(_FIGURES[name] + self.letters()))
        if name.startswith("basis "):
            return ("sym", f"basis {name[6:]}")
        if name.startswith("bb"):
            return self.field(name[2:])
        if name == "emptyset":
            return EMPTY_SET
        if name.startswith("begin "):
            return self.environment(name[6:])
        if name in ("sum", "prod"):
            return self.series(name)
        if name == "int":
            return self.integral()
        if name in ("langle", "lfloor", "lceil"):
            return self.fenced(name)
        raise Unreadable(f"unknown command {name}")

    def field(self, name: str) -> Node:
        if self.at("^", "_"):
            sign = self.take().text
            return ("field", f"{name}{sign}{self.subscript()}")
        return ("field", name)

    def letters(self) -> str:
        name = ""
        while (
            (token := self.peek()) is not None
            and token.kind in (LETTER, UPRIGHT, WORD)
            and (token.kind != WORD or token.text.isupper())
        ):
            name += self.take().text
        return name

    def root(self, name: str) -> Node:
        index = number(3 if name == "cbrt" else 2)
        if self.at("["):
            self.place += 1
            index = self.sum()
            self.expect("]")
        return ("root", index, self.argument(whole=True))

    def function(self, name: str) -> Node:
        base = exponent = None
        for _ in range(2):
            if self.at("_") and base is None:
                self.place += 1
                base = self.argument(whole=True)
            elif self.at("^") and exponent is None:
                self.place += 1
                exponent = self.exponent()
        if exponent == ("neg", ONE) and name in _INVERSES:
            name, exponent = _INVERSES[name], None
        arguments = self.function_arguments(name)
        if name == "log" and base is not None:
            arguments = (*arguments, base)
        node = ("deg", arguments[0][1]) if name == "deg" else ("fn", name, *arguments)
        if name == "exp":
            node = ("pow", ("const", "e"), arguments[0])
        return node if exponent is None else ("pow", node, exponent)

    def function_arguments(self, name: str) -> tuple[Node, ...]:
        if self.at("(", "["):
            closing = {"(": ")", "[": "]"}[self.take().text]
            bars, self.bars = self.bars, 0
            inner = self.nested(self.listed)
            self.bars = bars
            self.expect(closing)
            return inner[1] if inner[0] == "list" else (inner,)
        if self.at(r"\{", "{") and name in ("max", "min", "gcd", "lcm", "det"):
            inner = self.primary()
            return inner[1] if inner[0] == "set" else (inner,)
        if self.at("-"):
            self.place += 1
            return (("neg", self.nested(self.function_arguments, name)[0]),)
        node = self.nested(self.power)
        while self.starts_factor() and not self.starts_function() and not self.ends_integrand():
            if read_unit(self.tokens, self.place, self.plain_units) is not None:
                break
            if self.at("(") and self.place and self.tokens[self.place].spaced:
                break
            previous, token = self.tokens[self.place - 1], self.tokens[self.place]
            if token.kind == NUMBER and previous.kind == NUMBER:
                raise Unreadable("two numerals side by side")
            factor = self.nested(self.power)
            node = self.joined(node, factor, token, previous)
        if self.at("/") and self.peek(1) is not None and name not in ("ln", "log") and node[0] in ("const", "num"):
            self.place += 1  # sin pi/4
            node = ("div", node, self.nested(self.power))
        return (node,)

    def starts_function(self) -> bool:
        token = self.peek()
        return token is not None and token.kind == COMMAND and token.text in FUNCTIONS

    def decorated(self, name: str) -> Node:
        if self.at("{"):
            self.place += 1
            text = ""
            while not self.at("}"):
                text += self.take().text
            self.place += 1
        else:
            text = self.take().text
        if name in ("vec", "hat", "overline") and text in ("i", "j", "k"):
            return ("sym", f"basis {text}")
        if name == "vec" and len(text) == 1:
            return ("sym", self.named(text))
        return ("sym", self.named(f"{name} {text}"))

    def fenced(self, name: str) -> Node:
        closing = {"langle": "rangle", "lfloor": "rfloor", "lceil": "rceil"}[name]
        bars, self.bars = self.bars, 0
        inner = self.listed()
        self.bars = bars
        self.expect(closing)
        if name == "langle":
            return ("tuple", "(", ")", inner[1] if inner[0] == "list" else (inner,))
        return ("fn", {"lfloor": "floor", "lceil": "ceil"}[name], inner)

    def environment(self, name: str) -> Node:
        rows, row = [], []
        while not self.at(f"end {name}"):
            if self.at("&"):
                self.place += 1
                continue
            if self.at(r"\\"):
                self.place += 1
                if row:
                    rows.append(tuple(row))
                row = []
                continue
            row.append(self.cell())
        self.place += 1
        if row:
            rows.append(tuple(row))
        if not rows:
            raise Unreadable("an empty table")
        if name == "vmatrix":
            return ("fn", "det", ("matrix", tuple(rows)))
        if name in ("cases", "aligned", "align", "gathered", "split"):
            return ("cases", tuple(rows))
        if name in ("pmatrix", "bmatrix", "matrix", "array", "Bmatrix", "smallmatrix"):
            if len({len(row) for row in rows}) != 1:
                raise Unreadable("rows of a matrix differ in length")
            return ("matrix", tuple(rows))
        raise Unreadable(f"unknown environment {name}")

    def cell(self) -> Node:
        while (
            (token := self.peek()) is not None
            and token.kind == WORD
            and token.text.lower() in ("if", "when", "for", "otherwise", "and")
        ):
            self.place += 1
            if token.text.lower() == "otherwise":
                return ("sym", "otherwise")
        node = self.relation()
        if self.at(",", ";"):
            self.place += 1
        return node

    def bounds(self) -> tuple[Node | None, Node | None]:
        low = high = None
        for _ in range(2):
            if self.at("_"):
                self.place += 1
                if self.at("{"):
                    self.place += 1
                    low = self.listed()
                    self.expect("}")
                else:
                    low = self.argument()
            elif self.at("^"):
                self.place += 1
                self.bounding = True
                high = self.exponent()
                self.bounding = False
        return low, high

    def series(self, kind: str) -> Node:
        low, high = self.bounds()
        if low is None or high is None or low[0] != "rel" or low[1][0] not in ("sym", "const") or low[2][0] != "=":
            raise Unreadable("bounds of a sum")
        body = self.nested(self.product)
        return ("series", kind, low[1], low[2][1], high, body)

    def integral(self) -> Node:
        low, high = self.bounds()
        if low is None or high is None:
            raise Unreadable("an integral without bounds")
        self.integrand += 1
        body = ONE if self.ends_integrand() else self.nested(self.sum)
        self.integrand -= 1
        if self.peek() is None or self.take().text != "d":
            raise Unreadable("an integral without its variable")
        return ("integral", ("sym", self.take().text), low, high, body)


def _is_mixed(whole: Fraction, top: Fraction, bottom: Fraction) -> bool:
    return whole.denominator == top.denominator == bottom.denominator == 1 and 0 < top < bottom


def _marked(node: Node, mark: str) -> Node:
    if node[0] == "sym":
        return ("sym", f"{node[1]}^{mark}")
    if mark == "'":
        raise Unreadable("prime")
    return ("pow", node, ("sym", mark))


def read_unit(tokens: list[Token], place: int, plain: bool = False) -> tuple[units.Unit, int] | None:
    """Returns (unit, index after it) if a unit of measure begins at a place and an answer or member ends after it.

    The first letter of a unit must be upright or part of a word, unless `plain`.
    """
    if place < len(tokens) and tokens[place].text == "frac" and tokens[place].kind == COMMAND:
        return _fraction_of_units(tokens, place)
    powers: dict[str, Fraction] = {}
    start, sign, opened = place, 1, False
    while place < len(tokens):
        token = tokens[place]
        if powers and token.text in ("cdot", "*", "times") and token.kind in (SIGN, COMMAND):
            place += 1
        elif token.text == "per" or (powers and token.text == "/"):
            sign, place = -1, place + 1
            opened = place < len(tokens) and tokens[place].text == "("
            place += opened
        factor = _factor(tokens, place, plain or bool(powers))
        if factor is None:
            break
        key, power, place = factor
        powers[key] = powers.get(key, Fraction(0)) + sign * power
    if opened and place < len(tokens) and tokens[place].text == ")":
        place += 1
    if (
        not powers
        or not _ends(tokens, place)
        or (place - 1 > start and tokens[place - 1].text in ("/", "cdot", "*", "per"))
    ):
        return None
    return units.unit(powers), place


def _ends(tokens: list[Token], place: int) -> bool:
    if place >= len(tokens):
        return True
    token = tokens[place]
    return (
        token.kind in (WORD, NUMBER)
        or token.text in _ENDS
        or token.text in ("lor", "land", "(", ".", "+", "-")
        or token.text.startswith("end ")
    )


def _factor(tokens: list[Token], place: int, plain: bool) -> tuple[str, Fraction, int] | None:
    """Returns (key, power, index after it) of one unit with its power."""
    power = Fraction(1)
    if place + 1 < len(tokens) and tokens[place].text.lower() in units.POWER_WORDS:
        power, place = Fraction(units.POWER_WORDS[tokens[place].text.lower()]), place + 1
    if place >= len(tokens):
        return None
    token = tokens[place]
    if token.text == "^" and place + 2 < len(tokens) and tokens[place + 1].text == "circ":
        place, token = place + 1, tokens[place + 1]
    if token.text == "circ" and place + 1 < len(tokens) and tokens[place + 1].text in ("C", "F"):
        return {"C": "celsius", "F": "fahrenheit"}[tokens[place + 1].text], power, place + 2
    after = tokens[place + 1].text.lower() if place + 1 < len(tokens) else ""
    if token.text.lower() in ("degree", "degrees") and after in ("celsius", "fahrenheit"):
        return after, power, place + 2
    braced = token.text == "{" and place + 2 < len(tokens) and tokens[place + 2].text == "}"
    if braced:
        token = tokens[place + 1]
    prefix = ""
    if (
        token.kind == COMMAND
        and token.text == "mu"
        and place + 1 < len(tokens)
        and tokens[place + 1].kind in (UPRIGHT, WORD)
    ):
        prefix, place = "u", place + 1
        token = tokens[place]
    allowed = (
        token.kind in (WORD, UPRIGHT)
        or (token.kind == LETTER and plain)
        or (token.kind == COMMAND and token.text == "Omega")
    )
    key = units.named(prefix + token.text) if allowed else None
    if key is None and token.kind == WORD and token.text[:2] in units.HAN_POWERS:
        key, power = units.named(token.text[2:]), Fraction(units.HAN_POWERS[token.text[:2]])
    if key is None:
        return None
    place += 3 if braced else 1
    if place < len(tokens) and tokens[place].text == "^":
        power_and_end = _unit_power(tokens, place + 1)
        if power_and_end is None:
            return None
        power, place = power * power_and_end[0], power_and_end[1]
    elif place < len(tokens) and tokens[place].text.lower() in units.POWERED_WORDS:
        power, place = Fraction(units.POWERED_WORDS[tokens[place].text.lower()]), place + 1
    return key, power, place


def _unit_power(tokens: list[Token], place: int) -> tuple[Fraction, int] | None:
    braced = place < len(tokens) and tokens[place].text == "{"
    place += braced
    sign = 1
    if place < len(tokens) and tokens[place].text in ("-", "+"):
        sign, place = (-1 if tokens[place].text == "-" else 1), place + 1
    value = tokens[place].value if place < len(tokens) else None
    if value is None:
        return None
    place += 1
    if braced and (place >= len(tokens) or tokens[place].text != "}"):
        return None
    return sign * value, place + braced


def _fraction_of_units(tokens: list[Token], place: int) -> tuple[units.Unit, int] | None:
    r"""Returns (unit, index after it) of a fraction of units, `\frac{\text{m}}{\text{s}^2}`; None for another one."""
    place += 1
    powers: dict[str, Fraction] = {}
    for sign in (1, -1):
        if place >= len(tokens) or tokens[place].text != "{":
            return None
        end = next(
            (at for at in range(place, len(tokens)) if tokens[at].text == "}" and _closes(tokens, place, at)), None
        )
        if end is None:
            return None
        unit_and_end = read_unit(tokens[place + 1 : end], 0)
        if unit_and_end is None or unit_and_end[1] != end - place - 1:
            return None
        for key, power in unit_and_end[0]:
            powers[key] = powers.get(key, Fraction(0)) + sign * power
        place = end + 1
    return (units.unit(powers), place) if _ends(tokens, place) else None


def _closes(tokens: list[Token], start: int, end: int) -> bool:
    depth = 0
    for token in tokens[start : end + 1]:
        depth += (token.text == "{") - (token.text == "}")
    return depth == 0
