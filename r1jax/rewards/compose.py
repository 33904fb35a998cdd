"""The sum of the rule rewards for one sample."""

import functools
import importlib
from collections.abc import Callable

from r1jax.rewards import math_answer
from r1jax.rewards.rules import detect_language, format_score, language_consistency
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

Grader = Callable[[RewardRequest, RewardConfig], Score]  # gives the accuracy part

PART_NAMES = ("accuracy", "format", "language")
GRADERS = {  # task -> module:function, a Grader that is imported when first used
    "math": "r1jax.rewards.math_answer:accuracy",
    "mcq": "r1jax.rewards.choice:accuracy",
    "linear": "r1jax.rewards.tiny_world:linear",
    "general": "r1jax.rewards.tiny_world:general",
    "safety": "r1jax.rewards.tiny_world:safety",
}
_TINY_WORLD_TASKS = frozenset(("linear", "general", "safety"))
IN_PROCESS = _TINY_WORLD_TASKS | {
    "mcq"
}  # tasks whose grader is quick whatever a sample says, and may run in the trainer


def check_task(request: RewardRequest) -> None:
    """Raises ValueError if nothing grades the request's task."""
    if request.task not in GRADERS:
        raise ValueError(f"sample {request.id!r} has task {request.task!r}; known tasks: {', '.join(GRADERS)}")


def score(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns the weighted sum of accuracy, format and language consistency, each in [0, 1], with its parts.

    Source: DeepSeek-R1, eq. 4 and 7. A truncated sample has accuracy 0 and format 0. An unreadable reference gives scorable False.
    May be slow on hostile input (see math_answer.grade). Raises ValueError for an unknown task.
    """
    check_task(request)
    accuracy = _truncated() if request.truncated else grader(request.task)(request, config)
    return compose(request, config, accuracy)


def quick(request: RewardRequest, config: RewardConfig) -> Score | None:
    """Returns `score(request, config)` if that needs no worker, else None. Raises ValueError for an unknown task."""
    check_task(request)
    if request.truncated or request.task in IN_PROCESS:
        return score(request, config)
    if request.task != "math":
        return None
    accuracy = math_answer.quick(request.text, request.reference, config.extraction)
    return None if accuracy is None else compose(request, config, accuracy)


@functools.cache
def grader(task: str) -> Grader:
    """Returns the function that grades a task of GRADERS."""
    module, function = GRADERS[task].split(":")
    return getattr(importlib.import_module(module), function)


def failed(detail: str) -> Score:
    """Returns the unscorable Score of a sample that could not be graded."""
    return Score(0.0, dict.fromkeys(PART_NAMES, 0.0), False, detail)


def _truncated() -> Score:
    return Score(0.0, {}, True, "truncated")


def compose(request: RewardRequest, config: RewardConfig, accuracy: Score) -> Score:
    """Returns the Score of a request whose accuracy part is known; as `score` otherwise."""
    lexicon = None
    if request.task in _TINY_WORLD_TASKS:
        from r1jax.data.tasks import LEXICON as lexicon
    target = request.language or detect_language(request.prompt, lexicon)
    well_formed = 0.0 if request.truncated else format_score(request.text, config.extraction != "boxed")
    parts = {
        "accuracy": accuracy.value,
        "format": well_formed,
        "language": language_consistency(request.text, target, lexicon),
    }
    value = sum(getattr(config, name) * parts[name] for name in PART_NAMES)
    return Score(value, parts, accuracy.scorable, accuracy.detail)
