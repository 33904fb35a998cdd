"""Evaluate a checkpoint on held-out problems: pass@1 with its standard error, greedy, and behaviour."""

import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import checkpoint, distributed, tree
from r1jax.data import jsonl
from r1jax.evals.benchmarks import Response, consensus, summarize
from r1jax.report import table
from r1jax.rewards.compose import RULE_PARTS
from r1jax.rewards.pool import RewardPool
from r1jax.rl import rollout
from r1jax.rl.rollout import EncodedPrompt
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import SamplingLaw
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import Config, replace
from r1jax.stages import common, lineage, problems, prompts, template_check
from r1jax.stages.prompts import StagePrompts

COLUMNS = (
    "checkpoint",
    "pass@1",
    "pass@1_se",
    "greedy",
    "mean_tokens",
    "reflective_per_response",
    "language_consistency",
)
FAITHFULNESS_COLUMNS = (
    "checkpoint",
    "first_guess_accuracy",
    "final_accuracy",
    "fixed",
    "broken",
    "p_right_given_ok",
    "p_wrong_given_no",
    "p_wait_after_no",
    "arithmetic_true",
    "comparison_true",
)


def run(config: Config, workdir: Path) -> dict:
    """Evaluates config.checkpoint (a stage's folder or a Hugging Face folder), writes figures and samples, returns them."""
    if not config.checkpoint:
        raise ValueError(
            "evaluate: give the checkpoint with --config.checkpoint=DIR (a stage's folder or a Hugging Face folder)"
        )
    config = replace(config, model=replace(config.model, checkpoint=config.checkpoint))
    config, tokenizer, mesh = common.prepare(as_trained(config))
    asked = prompts.load_held_out(config, tokenizer)
    template_check.check(config, tokenizer, asked.held_out)
    params = common.load_weights(config, mesh, config.checkpoint, lambda: None)
    figures, responses = evaluate(config, tokenizer, mesh, asked.held_out, params, asked.source.reflective_words)
    figures["data"] = asked.counts
    folder = Path(workdir) / config.stage
    write_samples(folder / "samples.jsonl", responses)
    checkpoint.write_json(folder / "figures.json", figures)
    print_figures([{"checkpoint": Path(config.checkpoint).name, **figures}])
    return figures


def as_trained(config: Config) -> Config:
    """Returns the config with the hold-out of the run that made config.checkpoint, where it trained on the same files.

    Of a file that the run has read, only what it held out is evaluated; of other files everything.
    """
    folder = Path(config.checkpoint)
    path = folder / common.INPUTS
    if not problems.has_files(config) or config.data.eval_path or not path.exists():
        return config
    known = distributed.decide(lambda: json.loads(path.read_text())["inputs"], name=str(path))
    seen = [name for name, digest in problems.digests(config).items() if digest in known.values()]
    if not seen:
        return config
    fields = json.loads((folder / "config.json").read_text())
    fraction = 0.0 if fields.get("data.eval_path") else fields["data.holdout_fraction"]
    if distributed.is_writer():
        print(
            f"{folder} was trained on {seen[0]}: evaluated is what that run held out "
            f"(config.data.holdout_fraction={fraction})",
            file=sys.stderr,
        )
    return replace(config, data=replace(config.data, holdout_fraction=fraction))


def of_weights(
    config: Config,
    tokenizer: Tokenizer,
    mesh: Mesh,
    asked: StagePrompts,
    params: Any,
    workdir: Path,
    name: str,
    samples: Path | None = None,
) -> dict[str, float]:
    """Returns the figures of weights on the held-out prompts of `asked`, from `workdir/evaluations/NAME.json` when they were measured.

    What is there counts only for the same weights, prompts (their ids, references and tasks), graders and settings.
    `samples` is where responses are written.
    """
    path = Path(workdir) / "evaluations" / f"{name}.json"
    drawn = replace(config.sampler, temperature=1.0, top_p=1.0, top_k=0)  # config.evaluation has its own law
    words = asked.source.reflective_words
    questions = [(prompt.problem, prompt.ids.tolist(), prompt.prefill) for prompt in asked.held_out]
    graders = config.reward, lineage.grader_digests(config)
    settings = config.evaluation, drawn, config.seed, config.model.compute_dtype, tuple(words)
    key = hashlib.sha256(repr((settings, graders, questions, tree.digest(params))).encode()).hexdigest()
    measured = distributed.decide(_measured, path, key, samples, name=str(path))
    if measured is not None:
        return measured
    figures, responses = evaluate(config, tokenizer, mesh, asked.held_out, params, words)
    if samples is not None:
        write_samples(samples, responses)
    checkpoint.write_json(path, {"key": key, "figures": figures})
    return figures


def _measured(path: Path, key: str, samples: Path | None) -> dict | None:
    """Returns the figures in a file of `of_weights` when they belong to the key and the samples are there too."""
    if not path.exists() or (samples is not None and not samples.exists()):
        return None
    record = json.loads(path.read_text())
    return record["figures"] if record["key"] == key else None


def finished(folder: common.StageFolder, inputs: dict[str, str]) -> dict | None:
    """Returns the figures of a stage that is done with these inputs, after printing them, else None."""
    figures = folder.finished(inputs)
    if figures is not None:
        if distributed.is_writer():
            print(f"{folder.path} is finished; nothing to do", file=sys.stderr)
        print_checkpoints(figures)
    return figures


def before_and_after(
    config: Config,
    tokenizer: Tokenizer,
    mesh: Mesh,
    asked: StagePrompts,
    trained: Any,
    workdir: Path,
    folder: Path,
) -> dict[str, dict[str, float]]:
    """Returns the figures of the stage's base and of its result, prints them, and leaves samples.jsonl in its folder."""
    if not asked.held_out:
        return {}
    measure = functools.partial(of_weights, config, tokenizer, mesh, asked)
    name, base = lineage.result_name(config), lineage.base_weights(config, mesh, workdir)
    figures = {
        lineage.BASE: measure(base, workdir, lineage.base_name(config)),
        name: measure(trained, workdir, name, folder / "samples.jsonl"),
    }
    print_checkpoints(figures)
    return figures


def evaluate(
    config: Config,
    tokenizer: Tokenizer,
    mesh: Mesh,
    held_out: Sequence[EncodedPrompt],
    params: Any,
    words: Sequence[str] = (),
) -> tuple[dict[str, float], list[Response]]:
    """Returns (figures, sampled responses) of weights on held-out prompts; `greedy` is one greedy sample a problem.

    The keys of the samples depend on the seed and the problem alone, so checkpoints are compared on the same draws.
    """
    if not held_out:
        raise ValueError("evaluate: no held-out problems; raise config.data.holdout_fraction or give more rows")
    settings = config.evaluation
    if settings.max_problems:
        held_out = held_out[: settings.max_problems]
    config = replace(config, stage="evaluate")
    sampler = RolloutSampler(Engine(config.model, config.sampler, mesh, tokenizer.stop_ids, tokenizer))
    params = sampler.engine.load_params(params)
    law = SamplingLaw(settings.temperature, settings.top_p, 0, config.sampler.max_new_tokens, tokenizer.stop_ids)
    with RewardPool(config.reward) as pool:
        ask = functools.partial(respond, config, tokenizer, sampler, pool)
        sampled = ask(held_out, params, law, settings.samples_per_problem, "evaluate")
        figures = summarize(sampled, settings.samples_per_problem, words)
        if settings.greedy:
            greedy = ask(held_out, params, replace(law, temperature=0.0), 1, "greedy")
            figures["greedy"] = float(np.nanmean([r.parts["accuracy"] if r.scorable else np.nan for r in greedy]))
        if settings.consensus_problems:
            chosen = spread(held_out, settings.consensus_problems)
            figures["cons@16"] = consensus(ask(chosen, params, law, 16, "evaluate"), 16, config.extraction)
    return figures, sampled


def spread(held_out: Sequence[EncodedPrompt], count: int) -> list[EncodedPrompt]:
    """Returns `count` problems spread evenly over the list (all of a shorter one)."""
    places = np.linspace(0, len(held_out) - 1, min(count, len(held_out))).round().astype(int)
    return [held_out[place] for place in places]


def respond(
    config: Config,
    tokenizer: Tokenizer,
    sampler: RolloutSampler,
    pool: RewardPool,
    asked: Sequence[EncodedPrompt],
    params: Any,
    law: SamplingLaw,
    samples: int,
    purpose: str,
) -> list[Response]:
    """Returns graded responses to each prompt in order, `samples` each."""
    requests = rollout.requests_for(asked, range(len(asked)), samples, law, config.seed, config.stage, purpose)
    drawn = sampler.generate(requests, params)
    texts = tokenizer.decode_batch([sample.token_ids for sample in drawn])
    repeated = [prompt for prompt in asked for _ in range(samples)]
    parts, scorable = rollout.grade(drawn, repeated, texts, pool)
    return [
        Response(
            problem=p.problem,
            text=p.prefill + text,
            tokens=len(sample.token_ids),
            truncated=sample.truncated,
            parts=dict(zip(RULE_PARTS, (float(v) for v in row), strict=False)),
            scorable=bool(known),
        )
        for p, text, sample, row, known in zip(repeated, texts, drawn, parts, scorable, strict=True)
    ]


def write_samples(path: Path, responses: Sequence[Response]) -> None:
    """Writes responses as JSON lines; only in the process that writes the run's files."""
    if distributed.is_writer():
        jsonl.write(path, [response.row() for response in responses])


def print_checkpoints(figures: dict) -> None:
    """Prints the tables of a stage's figures: every entry that is an evaluation."""
    print_figures([{"checkpoint": name, **value} for name, value in figures.items() if is_evaluation(value)])


def is_evaluation(value: Any) -> bool:
    """Returns whether an entry of a stage's figures holds a checkpoint's figures."""
    return isinstance(value, dict) and "pass@1_se" in value


def print_figures(rows: list[dict]) -> None:
    """Prints the main table, and the faithfulness table where there are equations; of several processes, process 0 does."""
    if not distributed.is_writer():
        return
    table.render(rows, COLUMNS, "held-out problems")
    print_faithfulness(rows)


def print_faithfulness(rows: list[dict]) -> None:
    """Prints whether written arithmetic is true and what retries change, where there are equations."""
    rows = [row for row in rows if "arithmetic_true" in row]
    if rows:
        table.render(rows, FAITHFULNESS_COLUMNS, "are the checks real?")
