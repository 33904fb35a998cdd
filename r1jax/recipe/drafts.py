"""Drafts of examples: a response to a problem with its provenance, and counts of how many pass each check."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from r1jax.core import hosts
from r1jax.data.problems import Problem, read_prompt
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import REASONING

Counts = dict[str, Any]  # check -> {task: how many passed}, or a figure of its own
NO_TASK = "no task"


@dataclass(frozen=True)
class Draft:
    """One response that may become an example. `provenance` records its source and its edits."""

    problem: Problem
    text: str  # the assistant's whole turn
    provenance: dict
    gradable: bool = True  # whether its task's grader can decide if it is right
    turns: tuple[dict, ...] = ()  # the whole conversation, if every assistant turn of it is trained

    @property
    def task(self) -> str:
        return self.problem.task

    def request(self) -> RewardRequest:
        """Returns the request that its task's grader reads."""
        p = self.problem
        return RewardRequest(p.id, p.task, p.text, self.text, p.reference, language=p.language, source=p.source)

    def row(self) -> dict:
        """Returns the row of examples.jsonl."""
        p = self.problem
        prompt = p.prompt if isinstance(p.prompt, str) else [turn._asdict() for turn in p.prompt]
        row = {"id": p.id, "prompt": prompt, "response": self.text}
        if self.turns:
            row["messages"] = [*self.turns[:-1], {"role": "assistant", "content": self.text}]
        if p.task:
            row["task"] = p.task
        if kind := p.kind or (REASONING if self.gradable else ""):
            row["kind"] = kind
        return row | {"provenance": self.provenance}

    def record(self) -> dict:
        """Returns the draft as JSON; `from_record` is the inverse."""
        problem = asdict(self.problem) | {"prompt": self.row()["prompt"]}
        return {"problem": problem} | {name: value for name, value in vars(self).items() if name != "problem"}


def from_record(record: dict) -> Draft:
    """Returns the draft of a `record`."""
    problem = record["problem"]
    fields: dict[str, Any] = record | {"turns": tuple(record["turns"])}
    fields["problem"] = Problem(**problem | {"prompt": read_prompt(problem["prompt"])})
    return Draft(**fields)


def tally(counts: Counts, name: str, tasks: Iterable[str]) -> None:
    """Adds one to counts[name] for each of the tasks; counts[name] exists afterwards even without any."""
    by_task = Counter(counts.get(name, {}))
    by_task.update(task or NO_TASK for task in tasks)
    counts[name] = dict(by_task)


def counts_line(stage: str, counts: Counts) -> str:
    """Returns the counts in one line: each check's number, by task if there are several."""
    entries = []
    for name, count_or_tasks in counts.items():
        is_by_task = isinstance(count_or_tasks, dict)
        listed = (
            ", ".join(f"{task} {count}" for task, count in count_or_tasks.items())
            if is_by_task and len(count_or_tasks) > 1
            else ""
        )
        number = sum(count_or_tasks.values()) if is_by_task else count_or_tasks
        entries.append(f"{name} {number} ({listed})" if listed else f"{name} {number}")
    return f"{stage}: examples: {'; '.join(entries)}"


def grade(drafts: Sequence[Draft], pool: RewardPool) -> list[Score | None]:
    """Returns the score of each draft by its own task's grader, None for drafts that are not gradable."""
    scores = iter(scored([draft.request() for draft in drafts if draft.gradable], pool))
    return [next(scores) if draft.gradable else None for draft in drafts]


def scored(requests: Sequence[RewardRequest], pool: RewardPool) -> list[Score]:
    """Returns the score of each request, in order; of several processes each grades its share."""
    scores = pool.score(hosts.share(requests))
    deadline_s = pool.batch_deadline_s + hosts.DEADLINE_S
    records = hosts.join_shares([asdict(score) for score in scores], "the scores of examples", deadline_s)
    return [Score(**record) for record in records]
