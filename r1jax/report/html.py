"""One self-contained HTML page about a run: tables, curves, the split of the time, and a viewer of sampled traces."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from r1jax.core import files
from r1jax.report.phases import EVALUATION, PHASES, mfu_by_phase, seconds_by_phase

TEMPLATE = Path(__file__).resolve().parents[1] / "assets" / "report.html.j2"
SAMPLES_SHOWN = 200  # of each checkpoint at most, spread evenly
SAMPLES_BYTES = 2_400_000  # of all samples together; the rest of the page is well below 200 kB
TEXT_SHOWN = 12_000  # characters of one prompt or response
ABSENT = "–"
IN_TRAINING = ", in training"  # after a stage's name, in the list of what responses can be read
NO_TASK = "(none)"  # column of the rows without a task
SCENARIOS = ("general", "safety")  # tasks that are never among the held-out problems
BY_TASK = "_by_task"  # NAME_by_task holds the counts of NAME by task
MAIN_NOTE = (
    "pass@1 counts every response. The columns from arithmetic true to broken count only those that solve an equation in "
    "the asked format, so the final share can be above pass@1."
)
CHECKS_NOTE = (
    "How equations are solved. The last four columns count every response: the share right among those with 0, 1, 2 and 3 or "
    "more reflective words and, in brackets, how many of all those are."
)
LEFT, RIGHT, TOP, BOTTOM = 40.0, 272.0, 10.0, 136.0  # of a plot in the drawing's units


@dataclass(frozen=True)
class StageData:
    """The data of one stage that the page shows."""

    name: str  # of its result: r1_zero, dev1, ...
    rows: Sequence[Mapping]  # of metrics.jsonl
    split: Mapping[str, float]  # phase -> seconds or share of the measured time; {} where nothing was measured
    samples: Sequence[Mapping]  # as in samples.jsonl
    facts: Mapping[str, object] = field(default_factory=dict)  # "what was run": label -> value
    counts: Mapping[str, object] = field(default_factory=dict)  # how many passed each filter, by task where counted so
    tasks: Sequence[str] = ()  # tasks besides those named in the counts
    mfu: Mapping[str, float] = field(default_factory=dict)  # phase -> model FLOPs utilisation, where it was measured
    evaluations: Sequence[Mapping] = ()  # rows of evaluation.jsonl
    rollouts: Sequence[Mapping] = ()  # as in rollout_samples.jsonl


@dataclass(frozen=True)
class Column:
    """One column of a table: its heading, an explanation of it, and the text of a cell from a checkpoint's figures."""

    label: str
    meaning: str
    text: Callable[[Mapping], str]


def number(value: object, decimals: int) -> str:
    """Returns a number with `decimals` decimals, in powers of ten from a million on; ABSENT if it is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ABSENT
    return f"{value:.2e}".replace("e+", "e") if abs(value) >= 1e6 else f"{value:.{decimals}f}"


def _plain(key: str, label: str, meaning: str, decimals: int = 3) -> Column:
    return Column(label, meaning, lambda row: number(row.get(key), decimals))


def _pass_at_1(row: Mapping) -> str:
    error = number(row.get("pass@1_se"), 3)
    return number(row.get("pass@1"), 3) + ("" if error == ABSENT else f" ± {error}")


def _guesses(row: Mapping) -> str:
    return f"{number(row.get('first_guess_accuracy'), 3)} → {number(row.get('final_accuracy'), 3)}"


def _rechecks(count: int) -> Column:
    def text(row: Mapping) -> str:
        share = number(100 * row.get(f"share_at_{count}_rechecks", math.nan), 0)
        return number(row.get(f"accuracy_at_{count}_rechecks"), 2) + ("" if share == ABSENT else f" ({share}%)")

    meaning = "share right of the responses with so many reflective words, and how many of all responses those are"
    return Column(f"{count}{'+' * (count == 3)} rechecks", meaning, text)


NAME = Column("checkpoint", "the result of a stage", lambda row: str(row["checkpoint"]))
FIXED = _plain("fixed", "fixed", "share whose first guess is wrong and whose answer is right")
BROKEN = _plain("broken", "broken", "share whose first guess is right and whose answer is wrong", 4)
ARITHMETIC = _plain("arithmetic_true", "arithmetic true", "share of the written products and sums that hold")
PROBLEMS = _plain("problems", "problems", "held-out problems that the figures are of", 0)
SCORES = (
    Column(
        "pass@1\u00a0±\u00a0SE",
        "share of sampled responses that are right; standard error clustered by problem",
        _pass_at_1,
    ),
    _plain("greedy", "greedy", "share of problems answered right without sampling"),
)
LENGTHS = (
    _plain("mean_tokens", "mean tokens", "tokens per sampled response", 1),
    _plain("truncated", "truncated", "share of the responses that the length limit cut off; they count as wrong"),
    _plain(
        "unscorable", "unscorable", "share of the responses that could not be graded; they are left out of the scores"
    ),
)
BEHAVIOUR = (
    _plain("reflective_per_response", "reflective words", "wait, attends, check and the like, per response", 2),
    _plain(
        "language_consistency",
        "language consistency",
        "share of the thinking's words that are in the problem's language",
    ),
    ARITHMETIC,
    Column("first guess →\u00a0final", "share right at the first guess, and in the answer", _guesses),
    FIXED,
    BROKEN,
    _plain("compute", "compute (FLOP)", "floating-point operations of the stage, counted from its tokens", 0),
)
GROUPS = {"tasks": "task", "sources": "source"}  # in figures: those of the problems of each
_SAMPLED = re.compile(r"(pass|cons)@([0-9]+)")
FAITHFULNESS_COLUMNS = (
    NAME,
    _plain("formatted", "well formed", "share of responses in the asked format; the next six columns are about these"),
    _plain("p_right_given_ok", "right if “ok”", "share of the guesses it accepts that solve the equation"),
    _plain("p_wrong_given_no", "wrong if “no”", "share of the guesses it rejects that do not solve the equation"),
    _plain("p_wait_after_no", "retries after “no”", "share of the rejections that a wait follows"),
    ARITHMETIC,
    _plain("comparison_true", "comparisons true", "share of the written comparisons that hold"),
    _plain("copied_true", "copied true", "share of the problem's numbers that are copied without a fault"),
    *(_rechecks(count) for count in range(4)),
)
REWARD_MODEL_COLUMNS = (
    Column("reward model", "the stage that made it", lambda row: str(row["model"])),
    Column(
        "examples",
        "held-out pairs or labelled responses",
        lambda row: number(row.get("pairs", row.get("responses")), 0),
    ),
    Column(
        "accuracy (95% interval)",
        "share of pairs whose chosen response scores higher, or of responses on the right side of 0",
        lambda row: (
            f"{number(row.get('accuracy'), 3)} ({number(row.get('accuracy_low'), 3)} to "
            f"{number(row.get('accuracy_high'), 3)})"
        ),
    ),
    _plain("auc", "AUC", "chance that a safe response scores above an unsafe one"),
    _plain("ece", "calibration error", "mean gap between the chance it gives and the share that is right"),
    _plain("length_correlation", "correlation with length", "of score and tokens of what is judged"),
)
MEASURES = (  # column of metrics.jsonl, heading, unit
    ("reward", "Reward", "mean per response"),
    ("accuracy", "Accuracy", "share of responses"),
    ("length", "Length", "tokens per response"),
    ("reflective_words", "Reflective words", "per response"),
)
HELD_OUT = ("pass@1", "Held-out pass@1", "evaluated between updates")  # of evaluation.jsonl, as MEASURES
LOSSES = (("loss", "Loss", "of an update"),)  # of stages that learn from examples
POINTS = 600  # of one curve at most


def sampled_figures(rows: Sequence[Mapping]) -> list[str]:
    """Returns the names of every pass@k and cons@k that a row has, by rising k; pass@1 has a separate column."""
    figures = {
        (match[1] == "cons", int(match[2])) for row in rows for name in row if (match := _SAMPLED.fullmatch(name))
    }
    return [f"{'cons' if voted else 'pass'}@{k}" for voted, k in sorted(figures - {(False, 1)})]


def columns(rows: Sequence[Mapping]) -> list[Column]:
    """Returns the columns of scores and lengths that the rows have."""
    meanings = {
        "pass": "chance that one of {k} sampled responses to a problem is right, estimated without bias",
        "cons": "share of the voting problems whose commonest of {k} sampled answers is right",
    }
    names = sampled_figures(rows)
    more = [_plain(name, name, meanings[name[:4]].format(k=name[5:])) for name in names]
    return [PROBLEMS, *SCORES, *more, *LENGTHS]


def collect(workdir: Path, results: Mapping[str, str]) -> list[StageData]:
    """Returns the data of the stages that have a folder in `workdir`; results: stage -> name of its result.

    Raises ValueError, naming file and line, for a damaged row other than a last one that was cut off.
    """
    return [_stage(Path(workdir) / stage, name) for stage, name in results.items() if (Path(workdir) / stage).is_dir()]


def write_run(path: Path, summary: Mapping, stages: Sequence[StageData], subtitle: str = "", reload_s: int = 0) -> None:
    """Writes the page about a graph or one stage from {"checkpoints": {name: figures}, "wall_s": seconds}.

    With a `subtitle` the seconds are not needed; `reload_s` as in `write`.
    """
    title = "The R1 recipe" if len(stages) > 1 else f"Run of {stages[0].name}" if stages else "Run"
    checkpoints = [{"checkpoint": name, **figures} for name, figures in summary["checkpoints"].items()]
    models = [{"model": name, **figures} for name, figures in summary.get("reward_models", {}).items()]
    if not subtitle:
        count = f"{len(checkpoints)} checkpoint{'s' * (len(checkpoints) != 1)}, " if checkpoints else ""
        subtitle = f"{count}{summary['wall_s']:.0f} s for the stages run last"
    write(path, title, subtitle, checkpoints, stages, models, reload_s)


def write(
    path: Path,
    title: str,
    subtitle: str,
    checkpoints: Sequence[Mapping],
    stages: Sequence[StageData],
    models: Sequence[Mapping] = (),
    reload_s: int = 0,
) -> None:
    """Writes the page, whole or not at all. It makes no request of any kind, not even to its own folder.

    With `reload_s` above 0 a browser loads it again after so many seconds, and shows the same response at the same place.

    checkpoints: figures with the key "checkpoint"; they are listed in the order of `stages`, others before them.
    models: held-out figures of reward models with the key "model".
    """
    order = {stage.name: place for place, stage in enumerate(stages)}
    checkpoints = sorted(checkpoints, key=lambda row: order.get(row["checkpoint"], -1))
    samples = embedded(stages)
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    text = page.render(
        title=title,
        subtitle=subtitle,
        facts=_facts(stages),
        tables=_tables(checkpoints, models),
        measured=_measured(checkpoints),
        reload_s=reload_s,
        charts=_charts((*MEASURES, HELD_OUT), [stage for stage in stages if _trained_by_rl(stage)]),
        losses=_charts((*LOSSES, HELD_OUT), [stage for stage in stages if not _trained_by_rl(stage)]),
        splits=_splits(stages),
        counted=_counted(stages),
        notes=[(row["checkpoint"], note) for row in checkpoints for note in row.get("notes", ())],
        sampled=list(samples),
        samples_json=Markup(_safe_json(samples)),
    )
    files.write_bytes(path, text.encode("utf-8", "replace"))  # a lone surrogate of a sampled text has no UTF-8


def embedded(stages: Sequence[StageData]) -> dict[str, dict]:
    """Returns {name: {"drawn": responses there were, "shown": some of them}} within SAMPLES_BYTES.

    Those of an evaluation are spread evenly, those of rollouts are the newest, newest first.
    """
    shown = SAMPLES_SHOWN
    while True:
        samples = {}
        for stage in stages:
            newest = sorted(stage.rollouts, key=lambda row: -row["update"])
            for name, all_rows, rows in (
                (stage.name, stage.samples, _spread(stage.samples, shown)),
                (f"{stage.name}{IN_TRAINING}", newest, newest[:shown]),
            ):
                if rows:
                    samples[name] = {"drawn": len(all_rows), "shown": [_sample(row) for row in rows]}
        if shown == 1 or len(_safe_json(samples).encode("utf-8", "replace")) <= SAMPLES_BYTES:
            return samples
        shown = max(shown * 3 // 4, 1)


def _stage(folder: Path, name: str) -> StageData:
    timing = files.read_jsonl(folder / "timing.jsonl")
    split = seconds_by_phase(timing)
    config, figures = _object(folder / "config.json"), _object(folder / "figures.json")
    facts = {"stage": folder.name} | {key: config.get(key, ABSENT) for key in ("preset", "seed")}
    facts |= {key: figures.get(key, ABSENT) for key in ("updates", "examples")}
    facts["seconds"] = number(figures.get("seconds"), 0)
    examples = _object(folder / "examples_counts.json")  # {check: {task: count}}
    tasks = [task for part in (figures, *figures.values()) for task in _members(part, "tasks")]
    tasks += [task for check in examples for task in _members(examples, check)]
    return StageData(
        name=name,
        rows=files.read_jsonl(folder / "metrics.jsonl"),
        split=split if sum(split.values()) else {},
        samples=files.read_jsonl(folder / "samples.jsonl"),
        rollouts=files.read_jsonl(folder / "rollout_samples.jsonl"),
        facts=facts,
        counts={"problems": figures.get("data", {}), "examples": examples},
        tasks=[*SCENARIOS, *tasks],
        mfu=mfu_by_phase(timing),
        evaluations=files.read_jsonl(folder / "evaluation.jsonl"),
    )


def _members(record: object, name: str) -> list[str]:
    """Returns the names in a member of a record, [] where there is no such mapping."""
    inner = record.get(name) if isinstance(record, Mapping) else None
    return list(inner) if isinstance(inner, Mapping) else []


def _object(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _facts(stages: Sequence[StageData]) -> dict:
    labels = list(dict.fromkeys(label for stage in stages for label in stage.facts))
    rows = [[stage.name, *(str(stage.facts.get(label, ABSENT)) for label in labels)] for stage in stages if stage.facts]
    return {"labels": ["makes", *labels], "rows": rows}


def _tables(checkpoints: Sequence[Mapping], models: Sequence[Mapping] = ()) -> list[dict]:
    """Returns the main table, those by task and source where there are several, and those about the written checks and
    reward models where there are any."""
    checked = [row for row in checkpoints if "arithmetic_true" in row]
    tables = []
    if checkpoints:
        main = (NAME, *columns(checkpoints), *BEHAVIOUR)
        tables.append(("Checkpoints on held-out problems", main, checkpoints, MAIN_NOTE))
    for name, label in GROUPS.items():
        if any(len(row.get(name, {})) > 1 for row in checkpoints):
            rows = [
                {**figures, "checkpoint": row["checkpoint"], label: group}
                for row in checkpoints
                for group, figures in row.get(name, {}).items()
            ]
            by = Column(label, f"the {label} of the problems", lambda row, label=label: str(row[label]))
            tables.append(
                (f"By {label}", (NAME, by, *columns(rows)), rows, f"The same, of the problems of each {label}.")
            )
    if checked:
        tables.append(("Are the checks real?", FAITHFULNESS_COLUMNS, checked, CHECKS_NOTE))
    if models:
        tables.append(("Reward models on held-out prompts", REWARD_MODEL_COLUMNS, models, ""))
    return [
        {"title": title, "columns": cs, "rows": [[column.text(row) for column in cs] for row in rows], "note": note}
        for title, cs, rows, note in tables
    ]


def _counted(stages: Sequence[StageData]) -> list[dict]:
    """Returns per stage its counts as a table: a row for each filter, a column for each task and one for all."""
    tables = []
    for stage in stages:
        known = {*_tasks(stage.counts), *stage.tasks}
        rows = [row for name, counts in stage.counts.items() for row in _count_rows(counts, (), known)]
        labels = sorted({task for _, by_task, _ in rows for task in by_task})
        if rows:
            cells = [
                [name, *(_count(by_task.get(task)) for task in labels), _count(total)] for name, by_task, total in rows
            ]
            tables.append(
                {"name": stage.name, "labels": [*(label or NO_TASK for label in labels), "all"], "rows": cells}
            )
    return tables


def _tasks(counts: object) -> Iterator[str]:
    """Yields the task names in counts: those of their members `..._by_task`."""
    if isinstance(counts, Mapping):
        for name, value in counts.items():
            if str(name).endswith(BY_TASK) and isinstance(value, Mapping):
                yield from map(str, value)
            else:
                yield from _tasks(value)


def _count_rows(counts: object, path: tuple[str, ...], tasks: set[str]) -> Iterator[tuple[str, dict, Any]]:
    """Yields (name of a filter, {task: count}, count of all) of nested counts, in their order.

    `NAME_by_task` holds the counts by task of the row NAME. A mapping whose names are tasks is the row of its path; any
    other mapping holds rows. Values that are not numbers are left out.
    """
    if not isinstance(counts, Mapping):
        if isinstance(counts, int | float) and not isinstance(counts, bool):
            yield " / ".join(path), {}, counts
        return
    if path and counts and set(map(str, counts)) <= tasks:
        yield " / ".join(path), dict(counts), sum(counts.values())
        return
    for name, value in counts.items():
        label = str(name).replace("_", " ")
        if str(name).endswith(BY_TASK) and isinstance(value, Mapping):
            if (total := str(name).removesuffix(BY_TASK)) not in counts:
                yield " / ".join((*path, total.replace("_", " "))), dict(value), sum(value.values())
        elif (by_task := counts.get(f"{name}{BY_TASK}")) is not None:
            yield " / ".join((*path, label)), dict(by_task), value
        else:
            yield from _count_rows(value, (*path, label), tasks)


def _count(value: float | None) -> str:
    return number(value, 0 if isinstance(value, int) or float(value or 0).is_integer() else 2)


def _measured(checkpoints: Sequence[Mapping]) -> str:
    """Returns the sentence on how many problems and samples were measured, "" where checkpoints differ or lack them."""
    counts = {(number(row.get("problems"), 0), number(row.get("samples"), 0)) for row in checkpoints}
    problems, samples = counts.pop() if len(counts) == 1 else (ABSENT, ABSENT)
    return "" if ABSENT in (problems, samples) else f"{problems} problems, {samples} sampled responses per checkpoint. "


def _safe_json(value: object) -> str:
    """Returns JSON that is safe inside a script element, whatever text it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "&<>\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _sample(sample: Mapping) -> dict:
    parts = sample["parts"]
    scores = {
        name: round(value, 3)
        for name in ("format", "language")
        if (value := parts.get(name)) is not None and math.isfinite(value)
    }
    texts = {name: _cut(str(sample[name])) for name in ("prompt", "answer", "text")}
    flags = {"tokens": sample["tokens"], "truncated": bool(sample["truncated"])}
    verdict = "right" if parts.get("accuracy") == 1.0 else "wrong" if "accuracy" in parts else "not graded"
    verdict = verdict if sample.get("scorable", True) else "not scorable"
    of_rollout = {name: sample[name] for name in ("update", "reward", "advantage") if sample.get(name) is not None}
    return {"id": str(sample.get("problem_id", ""))} | texts | flags | scores | of_rollout | {"verdict": verdict}


def _cut(text: str) -> str:
    left_out = len(text) - TEXT_SHOWN
    return text if left_out <= 0 else f"{text[:TEXT_SHOWN]} […{left_out} characters left out]"


def _spread(samples: Sequence[Mapping], count: int) -> list[Mapping]:
    """Returns `count` samples at even distances (all of a shorter list)."""
    count = min(count, len(samples))
    return [samples[place * len(samples) // count] for place in range(count)]


def _splits(stages: Sequence[StageData]) -> list[dict]:
    """Returns per stage the percentage of each phase, in the order of PHASES, and the MFU of those that have one."""
    splits, phases = [], PHASES
    if any(EVALUATION in stage.split for stage in stages):
        phases = (*PHASES, EVALUATION)
    for stage in stages:
        if total := sum(stage.split.values()):
            percent = [round(100 * stage.split.get(phase, 0.0) / total, 1) for phase in phases]
            mfu = ", ".join(f"{phase} {100 * share:.1f}%" for phase, share in stage.mfu.items())
            splits.append({"name": stage.name, "parts": list(zip(phases, percent, strict=True)), "mfu": mfu})
    return splits


def _points(stage: StageData, key: str) -> list[tuple[float, float]]:
    """Returns (update, value) of the rows that have a value, at most POINTS of them, at even distances from the last."""
    rows = stage.evaluations if key == HELD_OUT[0] else stage.rows
    points = [(row["update"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    return points[:: -max(-(-len(points) // POINTS), 1)][::-1]


def _trained_by_rl(stage: StageData) -> bool:
    return any("reward" in row for row in stage.rows)


def _charts(measures: Sequence[tuple[str, str, str]], stages: Sequence[StageData]) -> list[dict]:
    """Returns a row of drawings per stage that has any; a measure has the same axis in all stages, so that they compare."""
    drawn = {(stage.name, key): _points(stage, key) for stage in stages for key, _, _ in measures}
    axes = {}
    for key, _, _ in measures:
        values = [y for stage in stages for _, y in drawn[stage.name, key]]
        axes[key] = _axis(min([0.0, *values]), max([0.0, *values]))
    rows = []
    for stage in stages:
        drawings = [
            {"title": title, "unit": unit, **_drawing(drawn[stage.name, key], axes[key])}
            for key, title, unit in measures
            if drawn[stage.name, key]
        ]
        if drawings:
            rows.append({"name": stage.name, "drawings": drawings})
    return rows


def _axis(low: float, high: float) -> list[float]:
    """Returns evenly spaced ticks that enclose the two values."""
    step = _nice((high - low) / 4 or 0.25)
    return [step * place for place in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _drawing(points: list[tuple[float, float]], ticks: list[float]) -> dict:
    """Returns the ticks and the line of one drawing, in its units; updates start at 0."""
    last = max(points[-1][0], 1)
    low, high = ticks[0], ticks[-1] if len(ticks) > 1 else ticks[0] + 1

    def x_at(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * x / last, 1)

    def y_at(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low), 1)

    across = max(_nice(last / 4), 1)
    return {
        "y_ticks": [{"at": y_at(tick), "text": f"{tick:.6g}"} for tick in ticks],
        "x_ticks": [{"at": x_at(i * across), "text": f"{i * across:g}"} for i in range(int(last / across) + 1)],
        "points": [(x_at(x), y_at(y)) for x, y in points],
        "first": number(points[0][1], 2),
        "last": number(points[-1][1], 2),
    }


def _nice(value: float) -> float:
    """Returns the least of 1, 2, 5 times a power of ten that is not below a positive value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))
