"""The sum of the rule rewards for one sample."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from r1jax.data.tasks import LEXICON
from r1jax.rewards import plugins
from r1jax.rewards.answers import math_answer, tiny_world
from r1jax.rewards.rules import detect_language, format_score, language_consistency, repetition_penalty
from r1jax.rewards.sandbox.attack import open_sandbox
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

Grader = Callable[[RewardRequest, RewardConfig], Score]  # gives the accuracy part

# The reward terms, in the order of the columns of a rollout's terms. RewardConfig has a weight of each name.
RULE_PARTS = ("accuracy", "format", "language", "repetition")  # computed here
PART_NAMES = (*RULE_PARTS, "reward_model", "rule")  # the last two are computed in rl, where reward models score
GRADERS = {  # task -> module:function of its Grader, which is imported when first used
    "math": "r1jax.rewards.answers.math_answer:accuracy",
    "mcq": "r1jax.rewards.answers.choice:accuracy",
    "code": "r1jax.rewards.code.tests:accuracy",
    "bug_fix": "r1jax.rewards.code.bug_fix:accuracy",
    "reasoning_gym": "r1jax.rewards.answers.reasoning_gym:accuracy",
    "countdown": "r1jax.rewards.answers.countdown:accuracy",
    "code_io": "r1jax.rewards.code.io:accuracy",
    "linear": "r1jax.rewards.answers.tiny_world:linear",
    "general": "r1jax.rewards.answers.tiny_world:general",
    "safety": "r1jax.rewards.answers.tiny_world:safety",
}
# Tasks whose grader is quick on every response, so that it may run in the trainer.
IN_PROCESS = frozenset(("linear", "general", "safety", "mcq"))
SANDBOXED = frozenset(("code", "bug_fix"))  # tasks whose grader runs programs of the model
# Tasks whose grader compares the answer with the reference.
COMPARED = frozenset(("math", "mcq", "linear", "reasoning_gym", "countdown", "code_io"))
_PROBE = "<answer>\\boxed{1}</answer>"  # any answer, so that the comparison runs too


def graders(config: RewardConfig) -> Mapping[str, str]:
    """Returns {task: target} of all graders; those of config.graders replace built-in ones of the same task."""
    return {**GRADERS, **plugins.parse(config.graders)}


def check(config: RewardConfig, tasks: Iterable[str] = ()) -> None:
    """Raises ValueError when a grader of config.graders cannot be used, or one of `tasks` has no grader."""
    plugins.check(config.graders, GRADERS, config.override_graders)
    known = graders(config)
    for task in tasks:
        if task not in known:
            raise ValueError(
                f"task {task!r} has no grader; known tasks: {', '.join(known)}; add one with {plugins.FIELD}"
            )
        _require_sandbox(task, config)


def check_task(request: RewardRequest, config: RewardConfig) -> None:
    """Raises ValueError if the request's task has no grader, SandboxUnavailable if its programs cannot be isolated."""
    known = graders(config)
    if request.task not in known:
        raise ValueError(f"sample {request.id!r} has task {request.task!r}; known tasks: {', '.join(known)}")
    _require_sandbox(request.task, config)


def _require_sandbox(task: str, config: RewardConfig) -> None:
    """Raises SandboxUnavailable, once and not for every sample, where a task's programs cannot be isolated."""
    if task in SANDBOXED and graders(config)[task] == GRADERS[task]:
        open_sandbox(config.sandbox)


def score(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns the weighted sum of accuracy, format, language consistency (each in [0, 1]) and repetition.

    Source: DeepSeek-R1, eq. 4 and 7. A truncated sample has accuracy 0 and format 0. An unreadable reference gives
    scorable False. Grading can be slow on hostile input (see math_answer.grade). Raises ValueError for an unknown task,
    and TypeError or ValueError when a grader returns anything but a Score with a value in [0, 1].
    """
    check_task(request, config)
    if request.truncated:
        return compose(request, config, Score(0.0, {}, True, "truncated"))
    return compose(request, config, _checked(grader(request.task, config)(request, config), request.task))


def quick(request: RewardRequest, config: RewardConfig) -> Score | None:
    """Returns `score(request, config)` if it can be computed without a worker, else None.

    Raises ValueError for an unknown task.
    """
    check_task(request, config)
    if request.truncated:
        return score(request, config)
    if request.task in plugins.parse(config.graders):
        return None
    if request.task in IN_PROCESS:
        return score(request, config)
    if request.task != "math":
        return None
    accuracy = math_answer.quick(request.text, request.reference, config.extraction)
    return None if accuracy is None else compose(request, config, accuracy)


def grader(task: str, config: RewardConfig) -> Grader:
    """Returns the function that grades a task; the task must be a key of `graders(config)`."""
    return plugins.load(graders(config)[task])


def compares(task: str, config: RewardConfig) -> bool:
    """Returns whether a built-in grader grades the task by comparing answers with a reference."""
    return task in COMPARED and graders(config)[task] == GRADERS[task]


def probe(request: RewardRequest) -> RewardRequest:
    """Returns a request with the same reference and a harmless answer: it is scorable if the reference is usable."""
    return dataclasses.replace(request, response=_PROBE, prefill="", language="", truncated=False)


def undecided(request: RewardRequest, config: RewardConfig, reason: str) -> Score:
    """Returns the Score, with accuracy 0, of a request whose reference is usable and whose answer was not decided."""
    return compose(request, config, Score(0.0, {}, True, f"the answer was not decided: {reason}"))


def failed(detail: str) -> Score:
    """Returns the unscorable Score of a sample that could not be graded."""
    return Score(0.0, dict.fromkeys(RULE_PARTS, 0.0), False, detail)


def _checked(accuracy: Score, task: str) -> Score:
    """Returns a grader's result. Raises TypeError if it is no Score, ValueError for a value outside [0, 1] or NaN."""
    if not isinstance(accuracy, Score):
        raise TypeError(f"the grader of {task!r} returned {type(accuracy).__name__}, not a Score")
    if not (math.isfinite(accuracy.value) and 0 <= accuracy.value <= 1):
        raise ValueError(f"the grader of {task!r} returned the value {accuracy.value!r}, not one in [0, 1]")
    return accuracy


def compose(request: RewardRequest, config: RewardConfig, accuracy: Score) -> Score:
    """Returns what `score` returns, given the accuracy term."""
    lexicon = None
    if tiny_world.speaks(request):
        lexicon = LEXICON
    target = request.language or detect_language(request.prompt, lexicon)
    well_formed = 0.0 if request.truncated else format_score(request.text, config.extraction != "boxed")
    reward_terms = {
        "accuracy": float(accuracy.value),
        "format": well_formed,
        "language": language_consistency(request.text, target, lexicon),
        "repetition": repetition_penalty(request.response, config.repetition_ngram),
    }
    value = sum(getattr(config, name) * reward_terms[name] for name in RULE_PARTS)
    return Score(value, reward_terms, accuracy.scorable, accuracy.detail)
