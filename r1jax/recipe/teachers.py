"""Models whose responses become examples; each has its own shape, tokenizer and template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.data.hashing import hash64
from r1jax.data.problems import Message, Problem
from r1jax.data.prompts import keyed_permutation
from r1jax.evals.benchmarks import Response
from r1jax.recipe import common, lineage, prompts, traces
from r1jax.recipe.parts import SamplingParts
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import ColdStartConfig, RewardConfig, replace

# Instructions that ask an untrained model for long thoughts; the wording is ours.
DIRECT = (
    "Think at length before you answer. Take the question apart, work it out step by step, and when a step is doubtful "
    "say so and try another way. Look back at your result: check it by a second way or put it into the question, and "
    "correct what is wrong. Write all of that between <think> and </think>. {answer}"
)
LIKE_THESE = (
    "Answer the last question as the ones before it are answered: long thoughts between <think> and </think>. {answer}"
)
ANSWER = {
    "boxed": "After it write the solution in short, with the final answer in \\boxed{}.",
    "answer_tag": "After it write only the final answer, or the whole program, between <answer> and </answer>.",
}
# Worked examples for few-shot prompting if the user gives none: question, thoughts, solution, final answer.
WORKED = (
    (
        "A shop sells pens in packs of 6 and packs of 10. Lea buys 5 packs and has 38 pens. How many packs of 10 did "
        "she buy?",
        "I call the packs of 10 t, so she has 5 - t packs of 6.\n\nThe pens are 10 t + 6 (5 - t) = 4 t + 30. That "
        "must be 38, so 4 t = 8 and t = 2.\n\nWait, does that fit? 2 packs of 10 are 20 pens, 3 packs of 6 are 18, "
        "together 38. And 2 + 3 = 5 packs. It fits.",
        "With t packs of 10 she has 10 t + 6 (5 - t) = 38 pens, so t = 2.",
        "2",
    ),
    (
        "What is the remainder when 7 to the power 20 is divided by 5?",
        "I look at the powers of 7 modulo 5. 7 is 2 modulo 5, so I need 2 to the power 20.\n\n2, 4, 3, 1: after four "
        "steps it repeats. 20 is a multiple of 4, so I am at the end of a round, which is 1.\n\nLet me check it "
        "another way: 7 to the power 2 is 49, which is -1 modulo 5. Then 7 to the power 20 is (-1) to the power 10, "
        "which is 1. Both ways agree.",
        "Since 7^4 leaves the remainder 1 and 20 is a multiple of 4, so does 7^20.",
        "1",
    ),
)
MOST_EXAMPLES = 4  # of a file that are put before a question
NEXT_TURN = "\n\nUser:"  # here a base model continues with a question of its own


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model that is prompted for examples."""

    settings: SamplingParts  # the stage's, with the model's own shape and template
    tokenizer: Tokenizer
    params: Any
    name: str


def load(settings: SamplingParts, mesh: Mesh, folder: str | Path, stage: str = "") -> Teacher:
    """Returns the model of a stage's folder or a Hugging Face folder, with the template that it was trained with.

    A stage's folder records its template; for one without that record it is the template of `stage` ("" is that of
    `settings`), for a Hugging Face folder its chat template, else R1-Zero's.
    """
    network, data = settings.network, replace(settings.data, template="auto")
    shape = replace(network.model, checkpoint=str(folder))
    model, data, tokenizer = common.read_folder(folder, shape, data)
    compute, tokenizer = common.fit_to_tokenizer(network.compute, model, tokenizer, settings.sampler.stop_ids)
    network = replace(network, model=replace(model, checkpoint=str(folder)), compute=compute)
    if data.template == "auto":
        asking = settings.stage if common.is_hugging_face(folder) or not stage else stage
        data = replace(data, template=prompts.template(asking, data, tokenizer))
    params = common.load_weights(network.model, mesh, str(folder))
    return Teacher(replace(settings, network=network, data=data), tokenizer, params, Path(folder).name)


def prompted(settings: SamplingParts, folder: str, tokenizer: Tokenizer, mesh: Mesh, base: lineage.Base) -> Teacher:
    """Returns the model of a folder, or the stage's base for "", for prompting in its chat template or as text."""
    teacher = load(settings, mesh, folder) if folder else Teacher(settings, tokenizer, base.load(), base.name)
    template = "chat" if teacher.tokenizer.chat_template else "plain"
    data = replace(teacher.settings.data, template=template, instruction="", think_prefill=False)
    return replace(teacher, settings=replace(teacher.settings, data=data))


def sampled(
    teacher: Teacher, mesh: Mesh, train: Sequence[EncodedPrompt], count: int, samples: int, temperature: float
) -> list[Response]:
    """Returns `samples` graded responses of a teacher, in its template, to each of `count` training problems."""
    settings, tokenizer = teacher.settings, teacher.tokenizer
    encoded = prompts.encode([prompt.problem for prompt in train], settings, tokenizer)
    return traces.sample(settings, tokenizer, mesh, encoded, teacher.params, count, samples, temperature)


def answered(
    teacher: Teacher,
    coldstart: ColdStartConfig,
    mesh: Mesh,
    train: Sequence[EncodedPrompt],
    source: str,
    examples: Sequence[tuple[str, str]],
) -> list[Response]:
    """Returns graded responses to training problems, prompted with an instruction and worked examples (question, turn).

    Each response keeps the row's problem. Text that a model without chat turns writes after its answer is cut off.
    """
    settings = replace(teacher.settings, stage=f"{teacher.settings.stage}/{source}")
    order = keyed_permutation(len(train), hash64(settings.stage, settings.seed, "prompts"))[: coldstart.prompts]
    problems = {train[place].problem.id: train[place].problem for place in order}
    chat = settings.data.template == "chat"
    form = ANSWER["boxed" if settings.reward.extraction == "boxed" else "answer_tag"]
    instruction = (LIKE_THESE if examples else DIRECT).replace("{answer}", form)
    requests = [
        replace(problem, prompt=_request(problem, instruction, examples, chat)) for problem in problems.values()
    ]
    encoded = prompts.encode(requests, settings, teacher.tokenizer)
    sampled = traces.sample(
        settings,
        teacher.tokenizer,
        mesh,
        encoded,
        teacher.params,
        len(encoded),
        coldstart.samples_per_prompt,
        temperature=1.0,
    )
    responses = [replace(response, problem=problems[response.problem.id]) for response in sampled]
    return responses if chat else _cut(responses, settings.reward)


def worked_examples(extraction: str) -> list[tuple[str, str]]:
    """Returns (question, whole turn) of the built-in worked examples, with the answer in the form of `extraction`."""
    examples = []
    for question, thoughts, solution, answer in WORKED:
        end = (
            f"{solution} The answer is \\boxed{{{answer}}}."
            if extraction == "boxed"
            else f"<answer> {answer} </answer>"
        )
        examples.append((question, f"<think>\n{thoughts}\n</think>\n{end}"))
    return examples


def _request(
    problem: Problem, instruction: str, examples: Sequence[tuple[str, str]], chat: bool
) -> str | tuple[Message, ...]:
    """Returns instruction, examples and question: turns of a chat, or one text that ends where the answer begins."""
    turns = [Message(role, text) for pair in examples for role, text in zip(("user", "assistant"), pair, strict=True)]
    turns += problem.messages
    first = next(index for index, turn in enumerate(turns) if turn.role == "user")
    turns[first] = Message("user", f"{instruction}\n\n{turns[first].content}")
    if chat:
        system = [turn for turn in turns if turn.role == "system"]
        return tuple(system + [turn for turn in turns if turn.role != "system"])
    return "\n\n".join([*(f"{turn.role.capitalize()}: {turn.content}" for turn in turns), "Assistant:"])


def _cut(responses: list[Response], reward: RewardConfig) -> list[Response]:
    """Returns the responses cut before a next question that the model wrote itself; shortened ones are graded again."""
    cut = [(response, response.text.partition(NEXT_TURN)) for response in responses]
    longer = [(response, text) for response, (text, mark, _) in cut if mark]
    scores = iter(traces.regrade(longer, reward) if longer else [])
    complete = []
    for response, (text, mark, _) in cut:
        if mark:
            score = next(scores)
            response = replace(response, text=text, truncated=False, parts=score.parts, scorable=score.scorable)
        complete.append(response)
    return complete
