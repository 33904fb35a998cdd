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
from r1jax.recipe.parts import PromptParts
from r1jax.rewards import golds, references, rules
from r1jax.rewards.score import RewardRequest
from r1jax.schema import DataConfig, replace

FIELDS = ("path", "eval_path", "general_path", "safety_path")  # of config.data: the files that problems are read from


def paths(listed: str) -> list[str]:
    """Returns the files of a field that may name several, separated by commas."""
    if not listed or Path(listed).exists():
        return [listed] if listed else []
    return [path.strip() for path in listed.split(",") if path.strip()]


def has_files(data: DataConfig) -> bool:
    """Returns whether problems are read from files."""
    return any(getattr(data, name) for name in FIELDS)


def has_problems(data: DataConfig) -> bool:
    """Returns whether there are any problems: in files, or those of the tiny world."""
    return has_files(data) or data.world == "tiny"


def digests(data: DataConfig) -> dict[str, str]:
    """Returns {file: digest of its content} of every file of problems. Raises ValueError for a missing one."""
    return file_digests([path for name in FIELDS for path in paths(getattr(data, name))])


def file_digests(listed: Sequence[str]) -> dict[str, str]:
    """Returns {file: digest of its content}; one process reads them. Raises ValueError for a missing one."""
    return hosts.decide(lambda: {path: files.digest(path) for path in listed}, name="the digests of files")


def source(settings: PromptParts) -> ProblemSource:
    """Returns the source of a stage's problems; files are read and checked row by row, and a summary is printed.

    Raises ValueError for a bad file or row (with file and line), when there is nothing to train or evaluate on, or no
    source at all.
    """
    if has_files(settings.data):
        from_files = FileProblems(settings)
        say(*from_files.notes)
        return from_files
    if settings.data.world == "tiny":
        return TinyWorld()
    stage = settings.stage
    raise ValueError(
        f"{stage}: config.data.path is empty, and {stage}:{settings.preset} has no problems of its own; "
        "give problems with --config.data.path=FILE.jsonl (rows with id, task, prompt and answer)"
    )


class FileProblems:
    """The problems of files: reasoning rows, split into training and held-out ones, and the rows of scenarios."""

    template: str = ""
    reflective_words: tuple[str, ...] = ()
    lexicon: Mapping[str, str] = {}

    def __init__(self, settings: PromptParts):
        self._settings, self._data = settings, settings.data
        self.notes: list[str] = []
        self.inputs: Mapping[str, str] = digests(settings.data)
        listed = {name: paths(getattr(self._data, name)) for name in FIELDS}
        tasks = {"general_path": "general", "safety_path": "safety"}
        read = {
            (name, path): self._read(path, tasks.get(name) or self._data.task)
            for name in FIELDS
            for path in listed[name]
        }
        read = _distinct_ids(read)
        self._evaluated = [p for (name, _), rows in read.items() if name == "eval_path" for p in rows]
        self._check_scenarios(self._evaluated)
        self._held_out: list[Problem] = list(self._evaluated)
        self._parts: list[list[Problem]] = []
        self._scenarios: dict[str, list[Problem]] = {task: [] for task in SCENARIOS}
        for (name, path), rows in read.items():
            if name != "eval_path":
                self._divide(path, rows)
        self._weights = self._weigh(listed["path"])
        self.counts: Mapping[str, Any] = self._count(read)
        self._report([problem for rows in read.values() for problem in rows])

    def training(self) -> tuple[list[list[Problem]], tuple[float, ...]]:
        """Returns (lists of problems, their weights): one list of all files, or with config.data.weights a list each.

        Raises ValueError when all rows are held out.
        """
        sources = [source for source in self._parts if source]
        if not sources:
            raise ValueError(
                f"{self._data.path}: no row is left to train on ({len(self._held_out)} reasoning rows are held out); "
                f"lower config.data.holdout_fraction={self._data.holdout_fraction} or give more rows"
            )
        if self._data.weights:
            kept = [(source, weight) for source, weight in zip(self._parts, self._weights, strict=True) if source]
            return [source for source, _ in kept], tuple(weight for _, weight in kept)
        return [[problem for source in sources for problem in source]], (1.0,)

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
        reference = lambda task, fields: references.read(task, fields, self._settings.reward)  # noqa: E731
        problems = [_with_language(from_row(row.fields, row.place, reference, task)) for row in table.rows]
        refuse_repeated_ids(problems)
        return problems

    def _check_scenarios(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            if problem.task in SCENARIOS:
                raise ValueError(
                    f"{problem.place} ({problem.id}): task {problem.task} has no answer to evaluate; "
                    "config.data.eval_path takes reasoning rows"
                )

    def _divide(self, path: str, rows: list[Problem]) -> None:
        """Divides a file's rows into training, held-out and scenario rows; no evaluated question is trained on."""
        evaluated = {question_key(problem) for problem in self._evaluated}
        kept = [problem for problem in rows if not evaluated or question_key(problem) not in evaluated]
        if len(kept) < len(rows):
            self.notes.append(f"{path}: {len(rows) - len(kept)} rows ask what config.data.eval_path asks, left out")
        train, test = split_holdout(kept, 0.0 if self._evaluated else self._data.holdout_fraction)
        self._parts.append([problem for problem in train if problem.task not in SCENARIOS])
        for task, scenario in self._scenarios.items():
            scenario += [problem for problem in train if problem.task == task]
        self._held_out += [problem for problem in test if problem.task not in SCENARIOS]

    def _weigh(self, listed: list[str]) -> tuple[float, ...]:
        """Returns the weight of each file. Raises ValueError unless there is one for each file of config.data.path."""
        weights = self._data.weights
        if weights and len(weights) != len(listed):
            raise ValueError(
                f"config.data.weights={weights} are {len(weights)}, config.data.path names {len(listed)} files; give "
                "one each"
            )
        return (*weights, *(0.0 for _ in self._parts[len(weights) :])) if weights else ()

    def _count(self, read: dict) -> dict[str, int | dict[str, int]]:
        """Returns the numbers of rows read, for the figures of the stage."""
        problems = [problem for rows in read.values() for problem in rows]
        return {
            "rows": len(problems),
            "rows_by_task": dict(Counter(problem.task for problem in problems)),
            "repeated_prompts": repeated(problems),
            "training": sum(map(len, self._parts)),
            "training_by_task": dict(Counter(problem.task for source in self._parts for problem in source)),
            "held_out": len(self._held_out),
            "held_out_by_task": dict(Counter(problem.task for problem in self._held_out)),
        } | {task: len(scenario) for task, scenario in self._scenarios.items() if scenario}

    def _report(self, problems: Sequence[Problem]) -> None:
        """Adds notes on how many references can be graded, how many questions repeat, and how the rows are divided."""
        requests = [RewardRequest(p.id, p.task, p.text, "", p.reference) for p in problems]
        name = ", ".join(self.inputs)
        reference_check = references.check(requests, self._settings.reward)
        decided = hosts.decide(lambda: reference_check.unscorable, name="which tests can be used")
        _refuse_tests([problem for problem in problems if problem.task == "code"], decided)
        if reference_check.checked:
            self.notes.append(f"{name}: {reference_check.line()}")
            gold_check = golds.check(requests, reference_check.unscorable, self._settings.reward)
            self.notes += [f"{name}: {line}" for line in gold_check.lines()]
        self.notes += [f"{name}: {line}" for line in reference_check.warnings]
        if repeats := self.counts["repeated_prompts"]:
            self.notes.append(
                f"{name}: {len(problems) - repeats} of {len(problems)} prompts are new, {repeats} repeat an earlier "
                "one (all rows of a question are trained on, or all are held out)"
            )
        tasks = ", ".join(f"{task} {count}" for task, count in self.counts["rows_by_task"].items())
        scenarios = "".join(f", {task} {self.counts[task]}" for task in SCENARIOS if task in self.counts)
        self.notes.append(
            f"{name}: {len(problems)} rows ({tasks}): {self.counts['training']} to train on{scenarios}, "
            f"{self.counts['held_out']} held out"
        )
        stage = self._settings.stage
        if scenarios and stage_table.reads(stage, "scenarios") and self._settings.scenarios.from_update < 0:
            self.notes.append(
                f"{name}: the rows of task general and safety are not drawn: config.scenarios.from_update=-1; set it "
                "to the update from which they are"
            )


def _refuse_tests(programs: Sequence[Problem], unscorable: Mapping[str, str]) -> None:
    """Raises ValueError, with the place and every id, for code rows whose tests cannot be used."""
    bad = [problem for problem in programs if problem.id in unscorable]
    if bad:
        others = f" (so are those of {', '.join(problem.id for problem in bad[1:])})" if bad[1:] else ""
        raise ValueError(
            f"{bad[0].place} ({bad[0].id}): field 'tests' cannot be used: {unscorable[bad[0].id]}; leave the row "
            f"out{others}"
        )


def _with_language(problem: Problem) -> Problem:
    """Returns the problem with its language in the language reward's name; ValueError for an unknown language."""
    if not problem.language:
        return problem
    try:
        return replace(problem, language=rules.canonical_language(problem.language))
    except ValueError as error:
        raise ValueError(f"{problem.place} ({problem.id}): field 'language': {error}") from None


def _distinct_ids(read: dict[tuple[str, str], list[Problem]]) -> dict[tuple[str, str], list[Problem]]:
    """Returns the problems by field and file; an id that several files share is prefixed with field and file."""
    uses = Counter(problem.id for problems in read.values() for problem in problems)
    if not any(count > 1 for count in uses.values()):
        return read
    return {
        (name, path): [replace(p, id=f"{name}/{Path(path).stem}/{p.id}") if uses[p.id] > 1 else p for p in problems]
        for (name, path), problems in read.items()
    }
