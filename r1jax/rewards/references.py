"""Checks rows before a run: whether each has the fields that its grader needs, and which references can be graded."""

import contextlib
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from r1jax.data import dialects, problems
from r1jax.rewards import compose, plugins
from r1jax.rewards.answers import choice
from r1jax.rewards.code import bug_fix
from r1jax.rewards.code import rows as code_rows
from r1jax.rewards.code import tests as code_tests
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.sandbox.run import SandboxUnavailable
from r1jax.rewards.score import RewardRequest
from r1jax.schema import RewardConfig

# Task -> the fields of a row that may hold its reference; one of them is needed. Rows of other tasks need none: a model
# or a plug-in grader grades them.
NEEDS = {
    "math": ("answer", "reference"),
    "mcq": ("answer", "reference"),
    "linear": ("answer", "reference"),
    "reasoning_gym": ("answer", "reference"),
    "code_io": ("answer", "reference"),
    "countdown": ("answer", "reference", "meta"),
    "code": ("tests", "answer", "reference"),
    "bug_fix": ("answer", "reference", "tests"),
}
ANY = ("answer", "reference", "tests")  # fields that rows of other tasks may hold
IDS_SHOWN = 5
MIN_GOLDS = 20  # multiple-choice rows below which the shares of letters are not checked
UNEVEN = 2.0  # how many times its fair share a letter may be the gold
_SANDBOXES = 4  # sandboxes that try tests at the same time


def read(task: str, fields: Mapping[str, Any], config: RewardConfig) -> str:
    """Returns a row's reference as text: the first field of NEEDS that it has; "" if its grader needs none.

    Raises ValueError for a task without a grader, a row without the field that its grader needs, and tests or a
    repository that the grader cannot use.
    """
    known = compose.graders(config)
    if task not in known:
        raise ValueError(f"task {task!r} has no grader; known tasks: {', '.join(known)}; add one with {plugins.FIELD}")
    built_in = known[task] == compose.GRADERS.get(task)
    wanted = NEEDS.get(task, ()) if built_in else ()
    puzzle = problems.is_countdown(fields)
    names = [name for name in wanted or ANY if fields.get(name) is not None and (name != "meta" or puzzle)]
    if not names:
        if wanted:
            raise ValueError(f"task {task} needs the field {wanted[0]!r}; {dialects.what_it_has(wanted[0], fields)}")
        return ""
    if wanted and isinstance(fields[names[0]], str) and not fields[names[0]].strip():
        raise ValueError(f"field {names[0]!r} is empty, task {task} needs it")
    if "meta" in wanted and names[0] != "meta" and puzzle:
        names = ["meta"]
    value = fields[names[0]]
    if names[0] == "meta":
        value = {name: value[name] for name in ("numbers", "target")}
    reference = json.dumps(value, ensure_ascii=False, sort_keys=True) if names[0] == "tests" else _as_text(value)
    if built_in:
        _check_usable(task, reference, fields.get("prompt"))
    return reference


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, Mapping) else problems.as_text(value)


def _check_usable(task: str, reference: str, prompt: Any) -> None:
    """Raises ValueError for tests, or a repository, against which no program could be run."""
    if task == "code":
        try:
            code_rows.read_tests(reference, prompt if isinstance(prompt, str) else "")
        except code_rows.MalformedTests as error:
            raise ValueError(f"field 'tests' cannot be used: {error}") from None
    if task == "bug_fix":
        bug_fix.read_reference(reference)


@dataclass(frozen=True)
class ReferenceReport:
    """Which references of compose.COMPARED tasks and tests of programs cannot be graded."""

    checked: int
    unscorable: dict[str, str]  # id -> reason
    warnings: tuple[str, ...] = ()  # lines about references that can be graded but reward something else

    @property
    def rate(self) -> float:
        """The share that can be graded; 1 without any."""
        return 1.0 - len(self.unscorable) / self.checked if self.checked else 1.0

    def line(self) -> str:
        """Returns the report in one line, with the first unscorable ids."""
        text = f"references: {self.checked - len(self.unscorable)} of {self.checked} can be graded ({self.rate:.2%})"
        if not self.unscorable:
            return text
        shown = ", ".join(list(self.unscorable)[:IDS_SHOWN])
        more = f" and {len(self.unscorable) - IDS_SHOWN} more" if len(self.unscorable) > IDS_SHOWN else ""
        return (
            f"{text}; unscorable, left out of every statistic: {shown}{more} ({next(iter(self.unscorable.values()))})"
        )


def check(requests: Sequence[RewardRequest], config: RewardConfig) -> ReferenceReport:
    """Returns the report of the requests' references. Responses are not read.

    Tasks that are not compared with a reference (compose.compares) are not counted. A reference that the grader cannot
    read within the deadlines of `config` counts as unscorable.
    """
    graders = compose.graders(config)
    built_in = [request for request in requests if graders.get(request.task) == compose.GRADERS.get(request.task, "")]
    chosen = [request for request in requests if compose.compares(request.task, config)]
    probes = [compose.probe(request) for request in chosen]
    with RewardPool(dataclasses.replace(config, workers=0)) as pool:  # numbers and words need no worker
        scores = pool.score(probes)
    unscorable = {request.id: score.detail for request, score in zip(chosen, scores, strict=True) if not score.scorable}
    programs = [request for request in built_in if request.task == "code"]
    unscorable |= unusable_tests(programs, config)
    uneven = uneven_letters([request for request in built_in if request.task == "mcq"])
    return ReferenceReport(len(chosen) + len(programs), unscorable, tuple(uneven))


def unusable_tests(requests: Sequence[RewardRequest], config: RewardConfig) -> dict[str, str]:
    """Returns {id: reason} of the rows whose tests cannot run, or would pass every program.

    Where programs cannot be isolated, no sample will be graded either, and tests that would have to be run are skipped.
    """

    def reason(request: RewardRequest) -> str:
        with contextlib.suppress(SandboxUnavailable):
            try:
                return code_tests.checks_nothing(request.reference, request.prompt, config)
            except code_rows.MalformedTests as error:
                return str(error)
        return ""

    with ThreadPoolExecutor(_SANDBOXES) as pool:
        reasons = list(pool.map(reason, requests))
    return {request.id: why for request, why in zip(requests, reasons, strict=True) if why}


def uneven_letters(requests: Sequence[RewardRequest]) -> list[str]:
    """Returns a line for each letter that is the gold far more often than its share: always answering it would pay."""
    golds: Counter[str] = Counter()
    shares: Counter[str] = Counter()
    read = [choice.read_options(request.prompt) for request in requests]
    letters = [choice.gold_letter(request.reference, options) for request, options in zip(requests, read, strict=True)]
    seen = {letter for letter in letters if letter}
    for letter, options in zip(letters, read, strict=True):
        if letter:
            golds[letter] += 1
            shares.update(dict.fromkeys(options or seen, 1 / len(options or seen)))
    if golds.total() < MIN_GOLDS:
        return []
    return [
        f"multiple choice: {count} of {golds.total()} golds are {letter}, whose share would be {shares[letter]:.0f}: always saying "
        f"{letter} is paid; shuffle the options"
        for letter, count in sorted(golds.items())
        if count > UNEVEN * shares[letter] and count > shares[letter] + 3 * math.sqrt(shares[letter])
    ]
