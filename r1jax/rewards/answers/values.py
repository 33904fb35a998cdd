"""The types of answers. A value holds nodes (formula.py) and is compared by type (comparison.py)."""

from dataclasses import dataclass

from r1jax.rewards.answers.evaluation import letters
from r1jax.rewards.answers.formula import Node
from r1jax.rewards.answers.units import Unit


@dataclass(frozen=True)
class Quantity:
    """A number or an expression, with its unit of measure and the counted nouns, if it has them."""

    node: Node
    unit: Unit = ()
    nouns: frozenset[str] = frozenset()

    @property
    def type(self) -> str:
        return "expression" if letters(self.node) else "number"


@dataclass(frozen=True)
class Several:
    """Several values: a `list` written bare, a `set` in braces, or a `tuple` between `opening` and `closing`."""

    kind: str
    members: tuple["Value", ...]
    opening: str = ""
    closing: str = ""

    @property
    def type(self) -> str:
        interval = self.kind == "tuple" and len(self.members) == 2 and (self.opening, self.closing) != ("(", ")")
        return "interval" if interval else {"list": "set"}.get(self.kind, self.kind)


@dataclass(frozen=True)
class RealSet:
    """A set of real numbers: a node of intervals, their unions and differences, or relations of one letter."""

    node: Node
    letter: str = ""

    type = "interval"


@dataclass(frozen=True)
class Relation:
    """Equations and inequalities: a first side, and (sign, side) of the others."""

    first: Node
    sides: tuple[tuple[str, Node], ...]

    type = "relation"


@dataclass(frozen=True)
class Named:
    """A value with its name: `x = 5`, `f(x) = x + 1`, `P(A) = 1/2`. `parameters` are letters of the name."""

    name: str
    value: "Value"
    equation: Node | None
    parameters: tuple[str, ...] = ()

    type = "named value"


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Node, ...], ...]

    type = "matrix"


@dataclass(frozen=True)
class Pieces:
    """A function by cases: a row is (value, condition)."""

    rows: tuple[tuple["Value", "Value"], ...]

    type = "cases"


@dataclass(frozen=True)
class Congruence:
    first: Node
    second: Node
    modulus: Node

    type = "relation"


@dataclass(frozen=True)
class Based:
    """Digits with a stated base, such as `52_8`."""

    digits: str
    base: int

    type = "number"


@dataclass(frozen=True)
class Clock:
    minutes: int
    half: str = ""  # "am" or "pm"

    type = "time"


@dataclass(frozen=True)
class Date:
    year: int
    month: int
    day: int

    type = "date"


@dataclass(frozen=True)
class Ratio:
    parts: tuple[Node, ...]

    type = "ratio"


@dataclass(frozen=True)
class Text:
    """A text; `words` is its normalised spelling, with the signs and numerals between the words."""

    words: str

    type = "text"


@dataclass(frozen=True)
class Choice:
    letter: str

    type = "choice"


Value = (
    Quantity
    | Several
    | RealSet
    | Relation
    | Named
    | Matrix
    | Pieces
    | Congruence
    | Based
    | Clock
    | Date
    | Ratio
    | Text
    | Choice
)
