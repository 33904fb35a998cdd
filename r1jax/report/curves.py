"""Training curves: a CSV of chosen columns, and a picture of reward, length and reflective words per update."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from r1jax.core import files


@dataclass(frozen=True)
class Panel:
    """One panel of the picture: its axis label, and the columns drawn in it as (column, name in the legend)."""

    label: str
    series: tuple[tuple[str, str], ...]


PANELS = (
    Panel("share of responses", (("reward", "reward"), ("accuracy", "accuracy"))),
    Panel("mean length (tokens)", (("length", "length"),)),
    Panel("reflective words\nper response", (("reflective_words", "reflective words"),)),
)


def write_csv(rows: Sequence[Mapping], path: Path, columns: Sequence[str]) -> None:
    """Writes columns of rows under a header line; missing values are empty fields, and floats read back the same."""
    with files.replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([row.get(column, "") for column in columns] for row in rows)


def _points(rows: Sequence[Mapping], column: str) -> tuple[list[int], list[float]]:
    """Returns (updates, values) of the rows in which a column has a finite value."""
    points = [
        (row["update"], row[column]) for row in rows if row.get(column) is not None and math.isfinite(row[column])
    ]
    return [update for update, _ in points], [value for _, value in points]


def plot(rows: Sequence[Mapping], path_png: Path, panels: Sequence[Panel] = PANELS) -> None:
    """Draws the panels, stacked over one axis of updates, into a PNG; columns that no row has are left out.

    Raises ValueError when no row has any of the columns.
    """
    from matplotlib.figure import Figure  # a second to import, and only the report needs it

    drawn = {column: _points(rows, column) for panel in panels for column, _ in panel.series}
    if not any(updates for updates, _ in drawn.values()):
        raise ValueError(f"plot: {len(rows)} rows without a value of {', '.join(drawn)}, needs at least one")
    figure = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        for column, name in panel.series:
            updates, values = drawn[column]
            if updates:
                axes.plot(updates, values, linewidth=1.2, marker="." if len(updates) < 3 else None, label=name)
        axes.set_ylabel(panel.label)
        axes.grid(alpha=0.3)
        if len(panel.series) > 1 and axes.lines:
            axes.legend(loc="best", frameon=False)
    all_axes[-1].set_xlabel("policy update")
    with files.replacing(path_png) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
