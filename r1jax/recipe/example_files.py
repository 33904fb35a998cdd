"""Files of finished responses: read row by row, graded if the row's task can be, with remarks on what is missing."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from r1jax.data import files, turns
from r1jax.data.problems import SCENARIOS, Problem, is_countdown, read_prompt
from r1jax.recipe.drafts import NO_TASK, Counts, Draft, grade, tally
from r1jax.rewards import compose, plugins, references, rules
from r1jax.rewards.pool import RewardPool
from r1jax.schema import KINDS, DataConfig, RewardConfig

UNGRADED, WRONG, UNSCORABLE = "not graded", "wrong", "no verdict"


class ExampleFile:
    """The drafts of the rows of a file, read at each iteration and one at a time, so that none is held.

    A row has prompt and response, or messages that end in an assistant turn, and may have id, task, kind, language and
    the fields that its task's grader needs. `remarks` are lines on how the file was read, thoughts that are missing or
    not closed, and rows that nothing grades.
    """

    def __init__(self, path: str, data: DataConfig, reward: RewardConfig):
        """Reads the file once. Raises ValueError, with file and line, for a bad file or row."""
        self._rows = files.FileRows(path, data.columns)
        self._draft = functools.partial(draft, path=path, reward=reward, task=data.task)
        self._without_task, self._bad = 0, False
        faults = turns.thoughts(self._texts())
        if self._bad:
            for _ in self:  # the id that the error names may depend on all rows
                pass
        self.remarks = _remarks(path, self.count, self._rows.notes, faults, self._without_task)

    @property
    def count(self) -> int:
        """The number of rows."""
        return self._rows.count

    def __iter__(self) -> Iterator[Draft]:
        return map(self._draft, self._rows)

    def _texts(self) -> Iterator[str]:
        """Yields the responses of the rows that can be drafts."""
        for row in self._rows.survey():
            row.fields.setdefault("id", "")
            try:
                read_draft = self._draft(row)
            except ValueError:
                self._bad = True
                continue
            self._without_task += not read_draft.task
            yield read_draft.text


def draft(row: files.FileRow, path: str, reward: RewardConfig, task: str = "") -> Draft:
    """Returns the draft of a row; `task` is for rows that name none. Raises ValueError, with place, for a bad row."""
    fields, place = row.fields, f"{row.place} ({row.fields['id']})"
    response = fields.get("response")
    if response is None:
        raise ValueError(
            f"{row.place}: field 'response' is missing; it needs the assistant's answer, as text or messages"
        )
    if not response.strip():
        raise ValueError(f"{row.place}: field 'response' is empty, text is needed")
    task = fields.get("task") or task
    task = "countdown" if task == "math" and is_countdown(fields) else task
    gradable = task in compose.graders(reward) and task not in SCENARIOS and _has_reference(task, fields, reward)
    try:
        problem = Problem(
            id=fields["id"],
            task=task,
            prompt=read_prompt(fields["prompt"]),
            reference=references.read(task, fields, reward) if gradable else "",
            language=rules.canonical_language(fields["language"]) if fields.get("language") else "",
            source=fields.get("source", ""),
            kind=check_kind(fields.get("kind")),
            place=row.place,
        )
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return Draft(problem, response, {"teacher": path}, gradable, _conversation(fields, problem))


def check_kind(kind: Any) -> str:
    """Returns a row's kind, "" without one. Raises ValueError for one that is not in KINDS."""
    if not kind:
        return ""
    if kind not in KINDS:
        raise ValueError(f"field 'kind' is {kind!r}; the kinds are {', '.join(KINDS)}")
    return kind


def _has_reference(task: str, fields: dict, reward: RewardConfig) -> bool:
    """Returns whether a row has a field that its task's grader compares with."""
    if task in plugins.parse(reward.graders):
        return True
    return any(fields.get(name) not in (None, "") for name in references.NEEDS.get(task, references.ANY))


def _conversation(fields: dict, problem: Problem) -> tuple[dict, ...]:
    """Returns the row's messages if they end in the response and contain an earlier assistant turn, else ()."""
    spoken = fields.get("messages") or []
    earlier = [turn for turn in spoken[:-1] if turn["role"] == "assistant"]
    same = [(turn["role"], turn["content"]) for turn in spoken[:-1]] == list(problem.messages)
    return tuple(spoken) if earlier and same and spoken[-1]["content"] == fields["response"] else ()


def right(drafts: Sequence[Draft], pool: RewardPool, counts: Counts) -> list[Draft]:
    """Returns the drafts that their task's grader does not find wrong; the verdicts are counted by task."""
    scores = grade(drafts, pool)
    verdicts = [
        UNGRADED
        if score is None
        else UNSCORABLE
        if not score.scorable
        else ""
        if score.parts["accuracy"] == 1.0
        else WRONG
        for score in scores
    ]
    for name in (WRONG, UNGRADED, UNSCORABLE):
        tally(counts, name, (draft.task for draft, verdict in zip(drafts, verdicts, strict=True) if verdict == name))
    return [draft for draft, verdict in zip(drafts, verdicts, strict=True) if verdict != WRONG]


def _remarks(path: str, count: int, notes: Sequence[str], faults: Mapping[str, int], without_task: int) -> list[str]:
    lines = [f"{path}: {note}" for note in notes]
    if faults:
        listed = ", ".join(f"{cause}: {number}" for cause, number in faults.items())
        lines.append(
            f"{path}: {sum(faults.values())} of {count} responses lack exactly one closed <think>...</think> ({listed})"
        )
    if without_task:
        lines.append(
            f"{path}: {without_task} of {count} rows have {NO_TASK}: their responses are taken as they are; "
            "--config.data.task=TASK grades those with an answer"
        )
    return lines
