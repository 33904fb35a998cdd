"""The sum of the rule rewards for one sample."""

from r1jax.rewards import math_answer
from r1jax.rewards.rules import detect_language, format_score, language_consistency
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

PART_NAMES = ("accuracy", "format", "language")
TASKS = ("math", "linear", "general", "safety")
_TINY_WORLD_TASKS = ("linear", "general", "safety")


def check_task(request: RewardRequest) -> None:
    """Raises ValueError if nothing grades the request's task."""
    if request.task not in TASKS:
        raise ValueError(f"sample {request.id!r} has task {request.task!r}; known tasks: {', '.join(TASKS)}")


def score(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns the weighted sum of accuracy, format and language consistency, each in [0, 1], with its parts.

    Source: DeepSeek-R1, eq. 4 and 7. A truncated sample has accuracy 0 and format 0. An unreadable reference gives scorable False.
    May be slow on hostile input (see math_answer.grade). Raises ValueError for an unknown task.
    """
    check_task(request)
    return _compose(request, config, _rule_accuracy(request) or math_answer.grade(*_answer_arguments(request, config)))


def quick(request: RewardRequest, config: RewardConfig) -> Score | None:
    """Returns `score(request, config)` if it needs no math-verify, else None. Raises ValueError for an unknown task."""
    check_task(request)
    accuracy = _rule_accuracy(request) or math_answer.quick(*_answer_arguments(request, config))
    return None if accuracy is None else _compose(request, config, accuracy)


def failed(detail: str) -> Score:
    """Returns the unscorable Score of a sample that could not be graded."""
    return Score(0.0, dict.fromkeys(PART_NAMES, 0.0), False, detail)


def _answer_arguments(request: RewardRequest, config: RewardConfig) -> tuple[str, str, str]:
    return request.text, request.reference, config.extraction


def _rule_accuracy(request: RewardRequest) -> Score | None:
    """Returns the accuracy of samples that need no math-verify whatever they say; None for the others."""
    if request.truncated:
        return Score(0.0, {}, True, "truncated")
    if request.task == "linear":
        return _linear_accuracy(request)
    if request.task == "math":
        return None
    from r1jax.data import tasks

    rule = tasks.general_score if request.task == "general" else tasks.safety_score
    return Score(float(rule(request.prompt, request.text)), {}, True, f"{request.task} rule")


def _linear_accuracy(request: RewardRequest) -> Score:
    """The tiny world answers with one number in an answer tag, whatever `extraction` says."""
    gold = math_answer.parse_number(request.reference)
    if gold is None:
        return Score(0.0, {}, False, f"the reference {request.reference!r} is not a number")
    answer = math_answer.extract(request.text, "answer_tag")
    found = None if answer is None else math_answer.parse_number(answer)
    return Score(float(found == gold), {}, True, f"answer {answer!r}, reference {request.reference!r}")


def _compose(request: RewardRequest, config: RewardConfig, accuracy: Score) -> Score:
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
