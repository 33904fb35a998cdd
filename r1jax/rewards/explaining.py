"""How a response was graded, step by step: the extracted text, its notation, type and value, and the deciding rule."""

import json
from dataclasses import asdict, dataclass

from r1jax.rewards import compose
from r1jax.rewards.answers import math_answer, showing
from r1jax.rewards.answers.values import Value
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

_WIDTH = 13  # characters of a label


@dataclass(frozen=True)
class Side:
    """How the answer or the reference was read; "" and None where there is none."""

    text: str
    span: tuple[int, int] | None  # first character and end of the text in the response; None if it is not in there
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
    """A request's verdict ("right", "wrong" or "unscorable"), the grader's detail, and the steps if it reports any."""

    id: str
    task: str
    extraction: str
    verdict: str
    detail: str
    steps: Steps | None

    def lines(self) -> list[str]:
        """Returns the explanation as lines of text."""
        lines = [f"{self.id} (task {self.task}, extraction {self.extraction}): {self.verdict}"]
        if self.steps is None:
            return [*lines, _line("detail", self.detail)]
        for name, side in (("answer", self.steps.answer), ("reference", self.steps.reference)):
            place = f"   (characters {side.span[0]} to {side.span[1]})" if side.span else ""
            lines += [f"  {name}", _line("span", side.text + place)]
            lines += [_line("normal form", side.notation), _line("type", side.type), _line("value", side.value)]
        return [*lines, "  decided by", _line("rule", self.steps.rule)]

    def figures(self) -> dict:
        """Returns the fields as plain values."""
        return asdict(self)


def explain(requests: list[RewardRequest], config: RewardConfig) -> list[Explained]:
    """Returns how each request is graded, in order. Verdicts are those of a RewardPool with the deadlines of `config`.

    Raises ValueError if a request's task has no grader.
    """
    mathematical = [
        request for request in requests if compose.graders(config).get(request.task) == compose.GRADERS["math"]
    ]
    with RewardPool(config) as pool:
        scores = pool.score(requests)
    with RewardPool(config, score_function=_steps_in_score) as pool:
        steps_of = dict(zip(map(id, mathematical), pool.score(mathematical), strict=True)) if mathematical else {}
    return [
        Explained(
            id=request.id,
            task=request.task,
            extraction=config.extraction,
            verdict=_verdict(score),
            detail=score.detail,
            steps=_steps(steps_of.get(id(request))),
        )
        for request, score in zip(requests, scores, strict=True)
    ]


def steps(request: RewardRequest, config: RewardConfig) -> Steps:
    """Returns how a mathematical answer is read and compared."""
    explanation = math_answer.explain(request.text, request.reference, config.extraction)
    answer = _side(explanation.answer or "", explanation.answer_notation, explanation.answer_value, request.text)
    return Steps(
        answer,
        _side(explanation.reference, explanation.reference_notation, explanation.reference_value),
        explanation.rule,
    )


def _steps_in_score(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns a Score whose detail is the steps as JSON, because a worker can only send a Score."""
    return Score(0.0, {}, True, json.dumps(asdict(steps(request, config))))


def _steps(score: Score | None) -> Steps | None:
    if score is None or not score.scorable:
        return None
    fields = json.loads(score.detail)
    sides = [
        Side(**fields[name] | {"span": fields[name]["span"] and tuple(fields[name]["span"])})
        for name in ("answer", "reference")
    ]
    return Steps(*sides, fields["rule"])


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
