"""Where a stage's problems come from: the files that config.data names, or the tiny world."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1jax import stage_table
from r1jax.core import hosts
from r1jax.core.say import say
from r1jax.data import files
from r1jax.data.problems import (
    SCENARIOS,
    Problem,
    ProblemSource,
    from_row,
    question_key,
    refuse_repeated_ids,
    repeated,
    split_holdout,
)
from r1jax.data.tasks import TinyWorld
from r1jax.rewards import golds, references, rules
from r1jax.rewards.score import RewardRequest
from r1jax.schema import Config, DataConfig, replace

FIELDS = ("path", "eval_path", "general_path", "safety_path")  # of config.data: the files that problems are read from


def paths(listed: str) -> list[str]:
    """Returns the files of a field that may name several, parted by commas."""
    if not listed or Path(listed).exists():
        return [listed] if listed else []
    return [path.strip() for path in listed.split(",") if path.strip()]


def has_files(data: DataConfig) -> bool:
    """Returns whether problems are read from files."""
    return any(getattr(data, name) for name in FIELDS)


def given(data: DataConfig) -> bool:
    """Returns whether there are problems at all: in files, or those of the tiny world."""
    return has_files(data) or data.world == "tiny"


def digests(data: DataConfig) -> dict[str, str]:
    """Returns {file: digest of its content} of every file of problems; {} without one. Raises ValueError for a missing one."""
    found = [path for name in FIELDS for path in paths(getattr(data, name))]
    return hosts.decide(lambda: {path: files.digest(path) for path in found}, name="the digests of the data")


def source(config: Config) -> ProblemSource:
    """Returns the source of a stage's problems, its files read and checked row by row, and what they hold said.

    Raises ValueError for a bad file or row (with file and line), nothing to train or evaluate on, or no source at all.
    """
    if has_files(config.data):
        found = FileProblems(config)
        say(*found.notes)
        return found
    if config.data.world == "tiny":
        return TinyWorld()
    raise ValueError(
        f"{config.stage}: config.data.path is empty, and {config.stage}:{config.preset} has no problems of its own; give "
        "problems with --config.data.path=FILE.jsonl (rows with id, task, prompt and answer)"
    )


class FileProblems:
    """The problems of files: reasoning rows split into what is trained on and what is held out, scenarios apart."""

    template: str = ""
    reflective_words: tuple[str, ...] = ()
    lexicon: Mapping[str, str] = {}

    def __init__(self, config: Config):
        self._config, self._data = config, config.data
        self.notes: list[str] = []
        self.inputs: Mapping[str, str] = digests(config.data)
        listed = {name: paths(getattr(self._data, name)) for name in FIELDS}
        tasks = {"general_path": "general", "safety_path": "safety"}
        read = {
            (name, path): self._read(path, tasks.get(name) or self._data.task)
            for name in FIELDS
            for path in listed[name]
        }
        read = _distinct_ids(read)
        self._evaluated = [p for (name, _), found in read.items() if name == "eval_path" for p in found]
        self._check_scenarios(self._evaluated)
        self._held_out: list[Problem] = list(self._evaluated)
        self._parts: list[list[Problem]] = []
        self._scenarios: dict[str, list[Problem]] = {task: [] for task in SCENARIOS}
        for (name, path), found in read.items():
            if name != "eval_path":
                self._divide(path, found)
        self._weights = self._weigh(listed["path"])
        self.counts: Mapping[str, Any] = self._count(read)
        self._report([problem for found in read.values() for problem in found])

    def training(self) -> tuple[list[list[Problem]], tuple[float, ...]]:
        """Returns (parts, weights): one part of all files, or a part each where config.data.weights says how they mix.

        Raises ValueError when all rows are held out.
        """
        parts = [part for part in self._parts if part]
        if not parts:
            raise ValueError(
                f"{self._data.path}: no row is left to train on ({len(self._held_out)} reasoning rows are held out); lower "
                f"config.data.holdout_fraction={self._data.holdout_fraction} or give more rows"
            )
        if self._data.weights:
            kept = [(part, weight) for part, weight in zip(self._parts, self._weights, strict=True) if part]
            return [part for part, _ in kept], tuple(weight for _, weight in kept)
        return [[problem for part in parts for problem in part]], (1.0,)

    def held_out(self) -> list[Problem]:
        """Returns every reasoning row of config.data.eval_path, else the held-out ones of config.data.path."""
        return self._held_out

    def general(self) -> list[Problem]:
        """Returns the rows of task general that are trained on."""
        return self._scenarios["general"]

    def safety(self) -> list[Problem]:
        """Returns the rows of task safety that are trained on."""
        return self._scenarios["safety"]

    def _read(self, path: str, task: str) -> list[Problem]:
        """Returns the problems of one file, each checked by its task's grader."""
        table = files.read(path, self._data.columns, self._data.max_rows)
        self.notes += [f"{path}: {note}" for note in table.notes]
        reference = lambda task, fields: references.read(task, fields, self._config.reward)  # noqa: E731
        found = [_with_language(from_row(row.fields, row.place, reference, task)) for row in table.rows]
        refuse_repeated_ids(found)
        return found

    def _check_scenarios(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            if problem.task in SCENARIOS:
                raise ValueError(
                    f"{problem.place} ({problem.id}): task {problem.task} has no answer to evaluate; config.data.eval_path "
                    "takes reasoning rows"
                )

    def _divide(self, path: str, found: list[Problem]) -> None:
        """Puts the rows of one file where they belong; questions that are evaluated are trained on nowhere."""
        asked = {question_key(problem) for problem in self._evaluated}
        kept = [problem for problem in found if not asked or question_key(problem) not in asked]
        if len(kept) < len(found):
            self.notes.append(f"{path}: {len(found) - len(kept)} rows ask what config.data.eval_path asks, left out")
        train, test = split_holdout(kept, 0.0 if self._evaluated else self._data.holdout_fraction)
        self._parts.append([problem for problem in train if problem.task not in SCENARIOS])
        for task, own in self._scenarios.items():
            own += [problem for problem in train if problem.task == task]
        self._held_out += [problem for problem in test if problem.task not in SCENARIOS]

    def _weigh(self, listed: list[str]) -> tuple[float, ...]:
        """Returns the weight of each part. Raises ValueError unless there is one for each file of config.data.path."""
        weights = self._data.weights
        if weights and len(weights) != len(listed):
            raise ValueError(
                f"config.data.weights={weights} are {len(weights)}, config.data.path names {len(listed)} files; give one each"
            )
        return (*weights, *(0.0 for _ in self._parts[len(weights) :])) if weights else ()

    def _count(self, read: dict) -> dict[str, int | dict[str, int]]:
        """Returns what was read, for the figures of the stage."""
        every = [problem for found in read.values() for problem in found]
        return {
            "rows": len(every),
            "rows_by_task": dict(Counter(problem.task for problem in every)),
            "repeated_prompts": repeated(every),
            "training": sum(map(len, self._parts)),
            "training_by_task": dict(Counter(problem.task for part in self._parts for problem in part)),
            "held_out": len(self._held_out),
            "held_out_by_task": dict(Counter(problem.task for problem in self._held_out)),
        } | {task: len(own) for task, own in self._scenarios.items() if own}

    def _report(self, every: Sequence[Problem]) -> None:
        """Says how many references can be graded, how many questions repeat, and how the rows are divided."""
        requests = [RewardRequest(p.id, p.task, p.text, "", p.reference) for p in every]
        name = ", ".join(self.inputs)
        checked = references.check(requests, self._config.reward)
        decided = hosts.decide(lambda: checked.unscorable, name="which tests can be used")
        _refuse_tests([problem for problem in every if problem.task == "code"], decided)
        if checked.checked:
            self.notes.append(f"{name}: {checked.line()}")
            tried = golds.check(requests, checked.unscorable, self._config.reward)
            self.notes += [f"{name}: {line}" for line in tried.lines()]
        self.notes += [f"{name}: {line}" for line in checked.warnings]
        if again := self.counts["repeated_prompts"]:
            self.notes.append(
                f"{name}: {len(every) - again} of {len(every)} prompts are new, {again} repeat an earlier one (all rows of a "
                "question are trained on, or all are held out)"
            )
        tasks = ", ".join(f"{task} {count}" for task, count in self.counts["rows_by_task"].items())
        scenarios = "".join(f", {task} {self.counts[task]}" for task in SCENARIOS if task in self.counts)
        self.notes.append(
            f"{name}: {len(every)} rows ({tasks}): {self.counts['training']} to train on{scenarios}, "
            f"{self.counts['held_out']} held out"
        )
        stage = self._config.stage
        if scenarios and stage_table.reads(stage, "scenarios") and self._config.scenarios.from_update < 0:
            self.notes.append(
                f"{name}: the rows of task general and safety are not drawn: config.scenarios.from_update=-1; set it to the "
                "update from which they are"
            )


def _refuse_tests(programs: Sequence[Problem], unscorable: Mapping[str, str]) -> None:
    """Raises ValueError, with the place and every id, for rows of programs whose tests every program would pass."""
    bad = [problem for problem in programs if problem.id in unscorable]
    if bad:
        others = f" (so are those of {', '.join(problem.id for problem in bad[1:])})" if bad[1:] else ""
        raise ValueError(
            f"{bad[0].place} ({bad[0].id}): field 'tests' cannot be used: {unscorable[bad[0].id]}; leave the row out{others}"
        )


def _with_language(problem: Problem) -> Problem:
    """Returns the problem with its language as the language reward names it. Raises ValueError for one that it does not know."""
    if not problem.language:
        return problem
    try:
        return replace(problem, language=rules.canonical_language(problem.language))
    except ValueError as error:
        raise ValueError(f"{problem.place} ({problem.id}): field 'language': {error}") from None


def _distinct_ids(read: dict[tuple[str, str], list[Problem]]) -> dict[tuple[str, str], list[Problem]]:
    """Returns the problems by field and file, those of files that share an id named after their file too."""
    counted = Counter(problem.id for found in read.values() for problem in found)
    if not any(count > 1 for count in counted.values()):
        return read
    return {
        (name, path): [replace(p, id=f"{name}/{Path(path).stem}/{p.id}") if counted[p.id] > 1 else p for p in found]
        for (name, path), found in read.items()
    }
