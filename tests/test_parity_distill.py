"""Must-show: a student trained from a file, exported, answers the same through transformers' own generate."""

import functools
import json

import numpy as np
import pytest
from parity import torch, transformers

from r1jax import config as configs
from r1jax import launch
from r1jax.checkpoints import hf
from r1jax.data import jsonl, tasks
from r1jax.recipe import common, evaluate, parts, prompts
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import SamplingParams
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import parts_of

PROBLEMS = 32  # held-out problems compared; the figures of the run are over these


def example(problem: tasks.Linear) -> dict:
    """Returns a row that misses by one, notices and corrects: thinking that a student can copy."""
    a, b, c, x = problem.a, problem.b, problem.c, problem.x
    near = x - 1 if x > 1 else x + 1
    first = f"{a} * {near} = {a * near} + {b} = {a * near + b} {'<' if near < x else '>'} {c} no wait"
    thought = f"{first if a * near + b <= tasks.MAX_NUMBER else ''} {a} * {x} = {a * x} + {b} = {c} = {c} ok"
    return {"prompt": problem.text("en"), "response": f"<think> {thought.strip()} </think> <answer> {x} </answer>"}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Returns (working folder, exported folder, figures of the evaluation of the export)."""
    folder = tmp_path_factory.mktemp("distill")
    train, _ = tasks.linear_problems()
    jsonl.write(folder / "rows.jsonl", [example(problem) for problem in train[::8]])
    few = ("evaluation.samples_per_problem=1", f"evaluation.max_problems={PROBLEMS}", f"sampler.slots={PROBLEMS}")
    tune = ("sft.epochs=2", "sft.examples_per_update=48", f"distill.examples={folder}/rows.jsonl")
    runs = [f"--workdir={folder}/runs"]
    settings = [f"--config.{field}" for field in (*few, *tune)]
    assert launch.main(["--config=distill", *settings, *runs]) == 0
    source, target = folder / "runs" / "distill", folder / "student"
    assert launch.main(["--config=export_hf", f"--config.checkpoint={source}", f"--config.output={target}", *runs]) == 0
    given = [f"--config.checkpoint={target}", *(f"--config.{field}" for field in few), *runs]
    assert launch.main(["--config=evaluate:tiny_dense", *given, f"--json={folder / 'figures.json'}"]) == 0
    return folder, target, json.loads((folder / "figures.json").read_text())


@pytest.fixture(scope="module")
def ours(student):
    """Returns our own greedy responses to the held-out problems, graded."""
    _, target, _ = student
    config = configs.load("evaluate:tiny_dense", [("model.checkpoint", str(target)), ("sampler.slots", str(PROBLEMS))])
    config, words, mesh = common.prepare(config)
    asked = prompts.encode(
        [prompt.problem for prompt in prompts.load(parts_of(parts.PromptParts, config), words).held_out[:PROBLEMS]],
        parts_of(parts.AskingParts, config),
        words,
    )
    sampler = RolloutSampler(Engine(config.network, config.sampler, mesh, (words.eos_id,), words))
    params = hf.load(target, config.model, mesh, np.float32)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=config.sampler.max_new_tokens, stop_ids=(words.eos_id,))
    with RewardPool(config.reward) as pool:
        ask = functools.partial(evaluate.respond, config.seed, config.stage, words, sampler, pool)
        return ask(asked, params, sampling, 1, "greedy"), asked, config


@pytest.fixture(scope="module")
def theirs(student, ours):
    """Returns what transformers' own model, tokenizer and generate make of the same prompts."""
    _, target, _ = student
    _, asked, config = ours
    model = transformers.AutoModelForCausalLM.from_pretrained(target).eval()
    words = transformers.AutoTokenizer.from_pretrained(target)
    assert isinstance(model, transformers.LlamaForCausalLM)
    chats = [[{"role": "user", "content": prompt.problem.text}] for prompt in asked]
    texts = words.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    batch = words(texts, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left")
    for row, mask, prompt in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), asked, strict=True):
        assert row[len(row) - sum(mask) :] == prompt.ids.tolist()
    longest = config.sampler.max_new_tokens
    with torch.no_grad():
        out = model.generate(**batch, do_sample=False, temperature=None, top_p=None, max_new_tokens=longest)
    ended = [text.split("<eos>") for text in words.batch_decode(out[:, batch.input_ids.shape[1] :])]
    return [(parts[0].strip(), len(parts) == 1) for parts in ended]  # the text, and whether the length ended it


def test_transformers_generates_the_texts_of_our_own_greedy_evaluation(ours, theirs):
    responses, _, _ = ours
    assert [(response.text, response.truncated) for response in responses] == theirs
    assert len({response.text for response in responses}) > PROBLEMS // 2


def test_the_same_grader_gives_both_the_accuracy_of_the_evaluation(student, ours, theirs):
    responses, asked, config = ours
    requests = [
        RewardRequest(p.problem.id, p.problem.task, p.problem.text, text, p.problem.reference, truncated=cut)
        for p, (text, cut) in zip(asked, theirs, strict=True)
    ]
    with RewardPool(config.reward) as pool:
        accuracy = np.mean([score.parts["accuracy"] for score in pool.score(requests)])
    _, _, figures = student
    assert accuracy == np.mean([response.parts["accuracy"] for response in responses]) == figures["greedy"]
    print(f"greedy accuracy on {PROBLEMS} held-out problems: {accuracy:.3f}")


def test_the_stage_and_its_export_have_the_same_figures_and_the_student_has_learned(student):
    folder, _, figures = student
    stage = json.loads((folder / "runs" / "distill" / "DONE").read_text())["figures"]
    shared = ("pass@1", "greedy", "mean_tokens", "format")
    assert {name: figures[name] for name in shared} == {name: stage["student_distilled"][name] for name in shared}
    assert stage["student_distilled"]["format"] > stage["base"]["format"]
