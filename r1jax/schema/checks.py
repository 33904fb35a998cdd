"""The checks of a config as a table: each class lists its checks, which run in order when it is made or changed."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

Schedule = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Check:
    """One line of the table: a field, the condition that must hold, and the error's text after `Class.field=value`."""

    field: str  # dotted: a field of a part
    holds: Callable[[Any], bool]  # called with the config; with `each`, with one entry of the field
    message: str | Callable[[Any], str]  # {c.field} is replaced by a field of the config
    each: bool = False  # the field is a tuple whose entries are checked, and named in the error, one by one

    def __call__(self, config: Any) -> None:
        """Raises ValueError, in one line, where the condition does not hold."""
        value = operator.attrgetter(self.field)(config)
        for entry in value if self.each else [value]:
            if not self.holds(entry if self.each else config):
                raise ValueError(self._line(config, entry))

    def _line(self, config: Any, value: Any) -> str:
        text = self.message.format(c=config) if isinstance(self.message, str) else self.message(config)
        shown = str(value).lower() if isinstance(value, bool) else value
        return f"{type(config).__name__}.{self.field}={shown}{'' if text.startswith(':') else ' '}{text}"


class Checked:
    """Base of the config classes: runs the class's table of checks, in order."""

    checks: ClassVar[tuple[Check, ...]] = ()

    def __post_init__(self) -> None:
        for check in self.checks:
            check(self)


def at_least(least: int, *fields: str) -> tuple[Check, ...]:
    """Returns checks that each field is `least` or more."""
    message = "must be 0 or more" if least == 0 else f"must be at least {least}"
    return tuple(Check(name, lambda c, name=name: getattr(c, name) >= least, message) for name in fields)


def above(bound: float, *fields: str) -> tuple[Check, ...]:
    """Returns checks that fields are larger than a number."""
    return tuple(
        Check(name, lambda c, name=name: getattr(c, name) > bound, f"must be above {bound}") for name in fields
    )


def share(message: str, *fields: str) -> tuple[Check, ...]:
    """Returns checks that fields are between 0 and 1, both allowed; the message names the interval."""
    return tuple(Check(name, lambda c, name=name: 0 <= getattr(c, name) <= 1, message) for name in fields)


def rising(field: str) -> Check:
    """Returns a check that the updates of a schedule rise and none is negative."""

    def holds(config: Any) -> bool:
        starts = [start for start, _ in getattr(config, field)]
        return starts == sorted(set(starts)) and min(starts, default=0) >= 0

    return Check(field, holds, ": needs (update, value) pairs with rising updates")
