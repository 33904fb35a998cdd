"""Examples in the making: whose response to which problem, and how many of each task every check lets through."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from r1jax.data.problems import Problem, read_prompt
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import REASONING, RewardConfig

Counts = dict[str, Any]  # check -> {task: how many it let through}, or a figure of its own
NO_TASK = "no task"


@dataclass(frozen=True)
class Draft:
    """One response that may become an example. `provenance` tells where it comes from and what was done to it."""

    problem: Problem
    text: str  # the assistant's whole turn
    provenance: dict
    gradable: bool = True  # its task's grader can tell right from wrong
    turns: tuple[dict, ...] = ()  # the whole conversation where every assistant turn of it is trained

    @property
    def task(self) -> str:
        return self.problem.task

    def request(self) -> RewardRequest:
        """Returns what its task's grader reads."""
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
        """Returns it as JSON, from which `from_record` makes it again."""
        problem = asdict(self.problem) | {"prompt": self.row()["prompt"]}
        return {"problem": problem} | {name: value for name, value in vars(self).items() if name != "problem"}


def from_record(record: dict) -> Draft:
    """Returns the draft of a `record`."""
    problem = record["problem"]
    fields: dict[str, Any] = record | {"turns": tuple(record["turns"])}
    fields["problem"] = Problem(**problem | {"prompt": read_prompt(problem["prompt"])})
    return Draft(**fields)


def tally(counts: Counts, name: str, tasks: Iterable[str]) -> None:
    """Adds one for each task given to counts[name], which is there afterwards even without any."""
    found = Counter(counts.get(name, {}))
    found.update(task or NO_TASK for task in tasks)
    counts[name] = dict(found)


def counts_line(stage: str, counts: Counts) -> str:
    """Returns the counts in one line: each check's number, by task where there are several."""
    told = []
    for name, found in counts.items():
        by_task = isinstance(found, dict)
        parts = ", ".join(f"{task} {count}" for task, count in found.items()) if by_task and len(found) > 1 else ""
        number = sum(found.values()) if by_task else found
        told.append(f"{name} {number} ({parts})" if parts else f"{name} {number}")
    return f"{stage}: examples: {'; '.join(told)}"


def grade(drafts: Sequence[Draft], reward: RewardConfig) -> list[Score | None]:
    """Returns the score of each draft by its own task's grader, None where that cannot tell right from wrong."""
    chosen = [draft for draft in drafts if draft.gradable]
    if not chosen:
        return [None] * len(drafts)
    with RewardPool(reward) as pool:
        scores = iter(pool.score([draft.request() for draft in chosen]))
    return [next(scores) if draft.gradable else None for draft in drafts]
