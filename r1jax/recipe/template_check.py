"""The start-up check: a right answer written by hand is graded in the same way as samples, and must be rewarded.

A template that opens the thought, a tokenizer that loses a tag, or an answer in another place than the grader looks in
would make a reward 0 for every sample of a long run, without any error.
"""

from collections.abc import Sequence

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.data import templates
from r1jax.data.problems import Problem
from r1jax.recipe import prompts
from r1jax.rewards import compose, plugins
from r1jax.rewards.score import RewardRequest, Score
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import DataConfig, RewardConfig

# A problem of each checkable task, with a thought about it and its answer.
PROBLEMS = {
    "math": (Problem("start-up check", "math", "What is 3 + 4?", "7", "en"), "3 and 4 more make 7"),
    "linear": (Problem("start-up check", "linear", "solve 2 x + 3 = 7 :", "2", "en"), "2 * 2 = 4 + 3 = 7 = 7 ok"),
}
MOST_SHOWN = 200  # characters of a text in the error line


def check(
    stage: str, data: DataConfig, reward: RewardConfig, tokenizer: Tokenizer, training_prompts: Sequence[EncodedPrompt]
) -> None:
    """Raises ValueError when a right, well-formed answer to one of the prompts' tasks earns no accuracy or format
    reward.

    Terms of weight 0 in config.reward are not checked, nor are tasks with a grader of config.reward.graders, which may
    want another answer. Also raises ValueError when a grader cannot be used, or nothing grades a task.
    """
    compose.check(reward, dict.fromkeys(prompt.problem.task for prompt in training_prompts))
    custom_graders = plugins.parse(reward.graders)
    terms = [name for name in ("accuracy", "format") if getattr(reward, name)]
    for task in PROBLEMS:
        if task not in custom_graders and any(prompt.problem.task == task for prompt in training_prompts):
            _check_task(stage, data, reward, tokenizer, task, terms)


def _check_task(
    stage: str, data: DataConfig, reward: RewardConfig, tokenizer: Tokenizer, task: str, terms: list[str]
) -> None:
    prompt, thought = PROBLEMS[task]
    text = prompts.render(prompt.prompt, stage, data, tokenizer)
    if prompt.text not in text:
        raise ValueError(
            f"{_fields(stage, data, reward, tokenizer)}: the template leaves the question out, it gives {_shown(text)}"
        )
    opening = text.rpartition(prompt.text)[2]
    answer = _answer(prompt.reference, task, reward.extraction)
    response = _rest_of_turn(opening, f"{thought}\n</think>\n{answer}", answer)
    score, graded = _score(reward, tokenizer, prompt, templates.prefill(text), response)
    for name in terms:
        if not score.parts[name]:
            raise ValueError(
                f"{_fields(stage, data, reward, tokenizer)}: a right answer gets {name} 0 ({score.detail}); after the "
                f"question the prompt reads {_shown(opening)}, the graded turn is {_shown(graded)}; change one of the "
                f"three, or set config.reward.{name}=0 if it is not wanted"
            )


def _answer(value: str, task: str, extraction: str) -> str:
    """Returns the answer in the form that the grader looks for."""
    if task == "linear" or extraction in ("auto", "answer_tag"):
        return f"<answer> {value} </answer>"
    return f"The answer is \\boxed{{{value}}}." if extraction == "boxed" else value


def _rest_of_turn(opening: str, after_think: str, answer: str) -> str:
    """Returns the rest of the assistant's turn, after the part that is in the prompt."""
    before, opened, inside = opening.rpartition("<think>")
    if not opened:
        return f"{templates.THINK}{after_think}"
    return answer if "</think>" in inside else after_think


def _score(
    reward: RewardConfig, tokenizer: Tokenizer, prompt: Problem, prefill: str, response: str
) -> tuple[Score, str]:
    """Returns (score of the response after encoding and decoding it, the assistant turn that was graded)."""
    decoded = tokenizer.decode([*tokenizer.encode(response), tokenizer.eos_id])
    request = RewardRequest(
        prompt.id, prompt.task, prompt.text, decoded, prompt.reference, prefill=prefill, language=prompt.language
    )
    return compose.score(request, reward), request.text


def _fields(stage: str, data: DataConfig, reward: RewardConfig, tokenizer: Tokenizer) -> str:
    """Returns the settings that the check depends on, as they are written on the command line."""
    prefilled, extraction = str(data.think_prefill).lower(), reward.extraction
    kind = prompts.template(stage, data, tokenizer)
    return (
        f"{stage}: start-up check of config.data.template={kind}, config.data.think_prefill={prefilled}, "
        f"config.reward.extraction={extraction}"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= MOST_SHOWN else f"...{text[-MOST_SHOWN:]}")
