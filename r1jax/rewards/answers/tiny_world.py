"""Grades the tiny world: equations by their number, prompts without a checkable answer by rules."""

from r1jax.data import tasks
from r1jax.rewards.answers import math_answer
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import RewardConfig

NO_RULE = "no rule grades this prompt: a reward model or a grader of config.reward.graders does"


def speaks(request: RewardRequest) -> bool:
    """Returns whether a request belongs to the tiny world, where each word has one language."""
    return request.task == "linear" or request.source == tasks.SOURCE


def linear(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns 1 if the number in the last answer tag is the reference; `config.extraction` is not used."""
    gold = math_answer.parse_number(request.reference)
    if gold is None:
        return Score(0.0, {}, False, f"the reference {request.reference!r} is not a number")
    answer = math_answer.extract(request.text, "answer_tag")
    number = None if answer is None else math_answer.parse_number(answer)
    return Score(float(number == gold), {}, True, f"answer {answer!r}, reference {request.reference!r}")


def general(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns the preference rule's score (tasks.general_score); 0 for other prompts, which no rule grades."""
    if not speaks(request):
        return Score(0.0, {}, True, NO_RULE)
    return Score(float(tasks.general_score(request.prompt, request.text)), {}, True, "general rule")


def safety(request: RewardRequest, config: RewardConfig) -> Score:
    """Returns the safety rule's score (tasks.safety_score); 0 for other prompts, which no rule grades."""
    if not speaks(request):
        return Score(0.0, {}, True, NO_RULE)
    return Score(float(tasks.safety_score(request.prompt, request.text)), {}, True, "safety rule")
