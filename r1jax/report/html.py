"""One self-contained HTML page about a run: the table, curves, the split of the time, and a viewer of sampled traces."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from r1jax.report.table import cell

TEMPLATE = Path(__file__).resolve().parents[1] / "assets" / "report.html.j2"
SAMPLES_SHOWN = 200  # of each checkpoint, spread evenly
COLUMNS = (
    ("checkpoint", "checkpoint"),
    ("pass@1", "pass@1"),
    ("pass@1_se", "± SE"),
    ("greedy", "greedy"),
    ("cons@16", "cons@16"),
    ("mean_tokens", "mean tokens"),
    ("reflective_per_response", "reflective words"),
    ("language_consistency", "language consistency"),
    ("arithmetic_true", "arithmetic true"),
    ("first_guess_accuracy", "first guess"),
    ("final_accuracy", "final"),
    ("fixed", "fixed"),
    ("broken", "broken"),
    ("compute", "compute (FLOP)"),
)
CHARTS = (
    ("share of responses", (("reward", "reward"), ("accuracy", "accuracy"))),
    ("tokens per response", (("length", "length"),)),
    ("reflective words per response", (("reflective_words", "reflective words"),)),
)
LEFT, RIGHT, TOP, BOTTOM = 44.0, 352.0, 28.0, 160.0  # of the plot in the drawing's units


@dataclass(frozen=True)
class StageData:
    """What the page shows of one stage: metrics rows (empty for SFT), the split of its time, sampled responses."""

    name: str
    rows: Sequence[Mapping]
    split: Mapping[str, float]
    samples: Sequence[Mapping]


def write(path: Path, title: str, subtitle: str, checkpoints: Sequence[Mapping], stages: Sequence[StageData]) -> None:
    """Writes the page under a temporary name and renames it. It makes no request of any kind, not even to its own folder."""
    environment = jinja2.Environment(autoescape=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    samples = {stage.name: [_sample(s) for s in _spread(stage.samples)] for stage in stages if stage.samples}
    page = template.render(
        title=title,
        subtitle=subtitle,
        columns=COLUMNS,
        rows=[{key: cell(_plain(row.get(key))) for key, _ in COLUMNS} for row in checkpoints],
        charts=[chart for stage in stages if stage.rows for chart in _charts(stage)],
        splits=[_split(stage) for stage in stages if stage.split],
        sampled=list(samples),
        samples_json=Markup(_safe_json(samples)),
    )
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _plain(value: object) -> object:
    return f"{value:.2e}" if isinstance(value, float) and abs(value) >= 1e6 else value


def _safe_json(value: object) -> str:
    """Returns JSON that can stand inside a script element whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028")


def _sample(sample: Mapping) -> dict:
    fields = {name: sample[name] for name in ("prompt", "answer", "text", "tokens", "truncated")}
    return fields | {"right": sample["parts"].get("accuracy", 0.0) == 1.0}


def _spread(samples: Sequence[Mapping]) -> list[Mapping]:
    step = max(len(samples) / SAMPLES_SHOWN, 1.0)
    return [
        samples[int(index * step)] for index in range(math.ceil(len(samples) / step)) if index * step < len(samples)
    ]


def _split(stage: StageData) -> dict:
    parts = [{"name": name, "percent": round(100 * share, 1)} for name, share in stage.split.items()]
    return {"name": stage.name, "parts": parts}


def _charts(stage: StageData) -> list[dict]:
    charts = []
    for label, series in CHARTS:
        lines = [
            (name, [(row["update"], row[key]) for row in stage.rows if key in row and math.isfinite(row[key])])
            for key, name in series
        ]
        lines = [(name, points) for name, points in lines if points]
        if lines:
            charts.append({"title": stage.name, "label": label, **_axes(lines)})
    return charts


def _axes(lines: list[tuple[str, list[tuple[float, float]]]]) -> dict:
    """Returns ticks and polylines of a drawing whose axes start at 0."""
    last = max(x for _, points in lines for x, _ in points)
    step = _nice(max(max(y for _, points in lines for _, y in points), 1e-9) / 4)
    top = step * math.ceil(max(y for _, points in lines for _, y in points) / step) or step

    def x_at(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * x / last, 1)

    def y_at(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * y / top, 1)

    across = _nice(last / 4)
    return {
        "y_ticks": [{"at": y_at(i * step), "text": f"{i * step:g}"} for i in range(round(top / step) + 1)],
        "x_ticks": [{"at": x_at(i * across), "text": f"{i * across:g}"} for i in range(int(last / across) + 1)],
        "lines": [
            {"name": name, "points": " ".join(f"{x_at(x)},{y_at(y)}" for x, y in points)} for name, points in lines
        ],
    }


def _nice(value: float) -> float:
    """Returns the least of 1, 2, 5 times a power of ten that is not below a positive value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))
