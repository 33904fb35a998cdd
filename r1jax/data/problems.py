"""Problems, whatever their source: a question, its task, and the reference that the grader of that task needs."""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from r1jax.data.hashing import hash64

SCENARIOS = ("general", "safety")  # tasks of problems that are not reasoning: they enter where a stage asks for them

# (task, fields of a row) -> the reference for its grader. Raises ValueError, without the place, if it cannot be used.
ReadReference = Callable[[str, Mapping[str, Any]], str]


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Problem:
    """One problem.

    `prompt` is the question as text, or the turns of a conversation that the assistant is to continue.
    """

    id: str
    task: str
    prompt: str | tuple[Message, ...]
    reference: str = ""  # what the grader compares with (for code the tests as JSON), "" if it needs nothing
    language: str = ""  # of the chain of thought: en, zh or fr; "" is the prompt's own
    source: str = ""
    kind: str = ""  # topic of the row: one of schema.KINDS, "" if unknown
    place: str = field(default="", compare=False)  # FILE, line N: how an error names it

    @property
    def text(self) -> str:
        """The question as one text: of a conversation the user's turns, one paragraph each."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(turn.content for turn in self.prompt if turn.role == "user")

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as a conversation: text is one turn of the user."""
        return (Message("user", self.prompt),) if isinstance(self.prompt, str) else self.prompt


class ProblemSource(Protocol):
    """Where the problems of a stage come from: the tiny world or files."""

    template: str  # the prompt template that belongs to it, "" for the model's own
    reflective_words: tuple[str, ...]  # words whose use is counted as reflection
    lexicon: Mapping[str, str]  # word -> language, {} where the script of the letters decides
    inputs: Mapping[str, str]  # {file: digest of its content}; {} without files
    counts: Mapping[str, Any]  # how many problems were read, for the figures of a stage

    def training(self) -> tuple[list[list[Problem]], tuple[float, ...]]:
        """Returns (reasoning problems to train on by part, weights of the parts), by default one part of weight 1."""
        ...

    def held_out(self) -> list[Problem]:
        """Returns the reasoning problems that are evaluated and never trained on."""
        ...

    def general(self) -> list[Problem]:
        """Returns the problems of task general to train on."""
        ...

    def safety(self) -> list[Problem]:
        """Returns the problems of task safety to train on."""
        ...


def from_row(fields: Mapping[str, Any], place: str, reference: ReadReference, task: str = "") -> Problem:
    """Returns the problem of a row: id, prompt, optional task, language, source and kind, and what its grader needs.

    `task` is that of rows that name none. Raises ValueError, beginning with `place`, for a missing or ill-typed field,
    an empty prompt, a row without a task, and whatever `reference` refuses.
    """
    name = fields.get("id")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{place}: field 'id' is {name!r}, text is needed")
    labels = {key: fields.get(key) or "" for key in ("task", "language", "source", "kind")}
    for key, label in labels.items():
        if not isinstance(label, str):
            raise ValueError(f"{place} ({name}): field {key!r} is {label!r}, text is needed")
    labels["task"] = labels["task"] or task
    if labels["task"] == "math" and is_countdown(fields):
        labels["task"] = "countdown"
    if not labels["task"]:
        raise ValueError(
            f"{place} ({name}): field 'task' is missing; name the grader of the row (such as math, mcq or code), or "
            "that of all rows without one with --config.data.task=TASK"
        )
    try:
        return Problem(
            id=name,
            task=labels["task"],
            prompt=read_prompt(fields.get("prompt")),
            reference=reference(labels["task"], fields),
            language=labels["language"],
            source=labels["source"],
            kind=labels["kind"],
            place=place,
        )
    except ValueError as error:
        raise ValueError(f"{place} ({name}): {error}") from None


def read_prompt(prompt: Any) -> str | tuple[Message, ...]:
    """Returns a prompt: text as it is, a list of {role, content} as turns.

    ValueError for anything else and for an empty one.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError("field 'prompt' is empty, a question is needed")
        return prompt
    if not isinstance(prompt, Sequence) or not prompt:
        raise ValueError(f"field 'prompt' is {prompt!r}, text or a list of messages is needed")
    turns = []
    for turn in prompt:
        if isinstance(turn, Mapping):
            turn = (turn.get("role"), turn.get("content"))
        if len(turn) != 2 or not all(isinstance(part, str) for part in turn):
            raise ValueError(f"field 'prompt': the message {turn!r} needs 'role' and 'content', both text")
        turns.append(Message(*turn))
    if turns[-1].role == "assistant" or not any(turn.role == "user" and turn.content.strip() for turn in turns):
        raise ValueError(
            "field 'prompt': its messages must hold a question and end with a turn that is not the assistant's"
        )
    return tuple(turns)


def is_countdown(fields: Mapping[str, Any]) -> bool:
    """Returns whether a row of task math asks for an expression: its `meta` holds the numbers and the target."""
    meta = fields.get("meta")
    return isinstance(meta, Mapping) and {"numbers", "target"} <= meta.keys()


def as_text(value: Any) -> str:
    """Returns an answer as text: numbers as they are written, lists and objects as JSON. ValueError without one."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"field 'answer' is {value!r}, text or a number is needed")
    return str(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False, sort_keys=True)


_SPACE = re.compile(r"\s+")


def question_key(problem: Problem) -> str:
    """Returns the normalised text that the user asks: problems that share it are the same question, whatever their ids
    and system prompts."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", problem.text)).strip().casefold()


def split_holdout(problems: Iterable[Problem], fraction: float) -> tuple[list[Problem], list[Problem]]:
    """Returns (train, test): about `fraction` of the questions are test, picked by the hash of their normalised text.

    Equal questions are on one side; order is kept; a larger fraction keeps every test problem of a smaller one. Raises
    ValueError when the fraction is not in [0, 1].
    """
    return split_by(problems, question_key, fraction)


def split_by(rows: Iterable, key: Callable[[Any], str], fraction: float) -> tuple[list, list]:
    """Returns (train, test) of rows as `split_holdout` does, by the hash of `key(row)`."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"config.data.holdout_fraction={fraction} must be in [0, 1]")
    train, test = [], []
    for row in rows:
        (test if hash64("holdout", key(row)) < fraction * 2**64 else train).append(row)
    return train, test


def repeated(problems: Iterable[Problem]) -> int:
    """Returns how many problems repeat the question of an earlier one."""
    questions = [question_key(problem) for problem in problems]
    return len(questions) - len(set(questions))


def refuse_repeated_ids(problems: Iterable[Problem]) -> None:
    """Raises ValueError, naming both places, when two problems share an id."""
    seen: dict[str, Problem] = {}
    for problem in problems:
        first = seen.setdefault(problem.id, problem)
        if first is not problem:
            raise ValueError(f"{problem.place}: id {problem.id!r} is also the id of {first.place}, it needs its own")
