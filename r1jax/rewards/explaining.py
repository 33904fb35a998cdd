"""How one response was graded, step by step: what was found, in one notation, its type and value, and the rule that decided."""

import json
from dataclasses import asdict, dataclass

from r1jax.rewards import compose
from r1jax.rewards.answers import math_answer, showing
from r1jax.rewards.answers.values import Value
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

_WIDTH = 13  # of a label


@dataclass(frozen=True)
class Side:
    """What was read of the answer or of the reference; "" and None where there is none."""

    text: str
    span: tuple[int, int] | None  # where the text stands in the response, in characters; None if not as it is
    notation: str
    type: str
    value: str


@dataclass(frozen=True)
class Steps:
    """How a mathematical answer and its reference were read, and the rule that decided."""

    answer: Side
    reference: Side
    rule: str


@dataclass(frozen=True)
class Explained:
    """A request's verdict ("right", "wrong" or "unscorable"), the grader's own words, and the steps where its grader has some."""

    id: str
    task: str
    extraction: str
    verdict: str
    detail: str
    steps: Steps | None

    def lines(self) -> list[str]:
        """Returns the explanation as lines of text."""
        found = [f"{self.id} (task {self.task}, extraction {self.extraction}): {self.verdict}"]
        if self.steps is None:
            return [*found, _line("detail", self.detail)]
        for name, side in (("answer", self.steps.answer), ("reference", self.steps.reference)):
            place = f"   (characters {side.span[0]} to {side.span[1]})" if side.span else ""
            found += [f"  {name}", _line("span", side.text + place)]
            found += [_line("normal form", side.notation), _line("type", side.type), _line("value", side.value)]
        return [*found, "  decided by", _line("rule", self.steps.rule)]

    def figures(self) -> dict:
        """Returns the fields as plain values."""
        return asdict(self)


def explain(requests: list[RewardRequest], config: RewardConfig) -> list[Explained]:
    """Returns how each request is graded, in order, its verdict being the pool's, under the deadlines of `config`.

    Raises ValueError if nothing grades a request's task.
    """
    own = [request for request in requests if compose.graders(config).get(request.task) == compose.GRADERS["math"]]
    with RewardPool(config) as pool:
        scores = pool.score(requests)
    with RewardPool(config, score_function=_told) as pool:
        told = dict(zip(map(id, own), pool.score(own), strict=True)) if own else {}
    return [
        Explained(
            id=request.id,
            task=request.task,
            extraction=config.extraction,
            verdict=_verdict(score),
            detail=score.detail,
            steps=_steps(told.get(id(request))),
        )
        for request, score in zip(requests, scores, strict=True)
    ]


def steps(request: RewardRequest, config: RewardConfig) -> Steps:
    """Returns how a mathematical answer is read and compared."""
    found = math_answer.explain(request.text, request.reference, config.extraction)
    answer = _side(found.answer or "", found.answer_notation, found.answer_value, request.text)
    return Steps(answer, _side(found.reference, found.reference_notation, found.reference_value), found.rule)


def _told(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns a Score whose detail is the steps as JSON: what a worker can send."""
    return Score(0.0, {}, True, json.dumps(asdict(steps(request, config))))


def _steps(score: Score | None) -> Steps | None:
    if score is None or not score.scorable:
        return None
    found = json.loads(score.detail)
    sides = [
        Side(**found[name] | {"span": found[name]["span"] and tuple(found[name]["span"])})
        for name in ("answer", "reference")
    ]
    return Steps(*sides, found["rule"])


def _side(text: str, notation: str, value: Value | None, response: str = "") -> Side:
    start = response.rfind(text) if text else -1
    span = (start, start + len(text)) if start >= 0 else None
    return Side(text, span, notation, value.type if value else "", showing.show(value) if value else "")


def _verdict(score: Score) -> str:
    if not score.scorable:
        return "unscorable"
    return "right" if score.parts["accuracy"] == 1.0 else "wrong"


def _line(label: str, text: str) -> str:
    return f"    {label:{_WIDTH}}{text or '-'}".replace("\n", " ")
