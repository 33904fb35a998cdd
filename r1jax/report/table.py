"""Tables of results on the terminal."""

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

from rich.console import Console
from rich.table import Table
from rich.text import Text

_PLAIN_WIDTH = 200  # columns when the output is a file or a pipe


def cell(value: object) -> str:
    """Returns the text of a table cell: four significant digits for a fraction, "-" for None, whole numbers in full."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, Real):
        return str(value)
    if isinstance(value, Integral):
        return str(int(value))
    number = float(value)
    return f"{number:.0f}" if 10_000 <= abs(number) < math.inf else f"{number:.4g}"


def _numeric(rows: Sequence[Mapping], column: str) -> bool:
    values = [row.get(column) for row in rows]
    return all(value is None or (isinstance(value, Real) and not isinstance(value, bool)) for value in values)


def render(rows: Sequence[Mapping], columns: Sequence[str], title: str) -> None:
    """Prints the columns of the rows as a table; a missing value is "-", numbers are aligned to the right."""
    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        justify = "right" if _numeric(rows, column) else "left"
        table.add_column(Text(column), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row.get(column))) for column in columns))
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH).print(table)
