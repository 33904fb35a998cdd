"""Evaluate a checkpoint on held-out problems: pass@1 with its standard error, greedy, and behaviour."""

import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import checkpoint, hosts, remote, tree, urls
from r1jax.core.say import say
from r1jax.data import jsonl
from r1jax.data.problems import SCENARIOS
from r1jax.evals import benchmarks
from r1jax.evals.benchmarks import Measurement, Response, summarize
from r1jax.recipe import common, lineage, parts, problems, prompts, stage_report, template_check
from r1jax.recipe.parts import EvaluationParts
from r1jax.recipe.prompts import StagePrompts
from r1jax.report import html, table
from r1jax.rewards.compose import PART_NAMES, RULE_PARTS
from r1jax.rewards.pool import RewardPool
from r1jax.rl import rollout
from r1jax.rl.rollout import EncodedPrompt
from r1jax.sampler.build import build_sampler
from r1jax.sampler.sample import SamplingParams
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import Config, DataConfig, EvalConfig, SamplerConfig, parts_of, replace

COLUMNS = (
    "checkpoint",
    "problems",
    "pass@1",
    "pass@1_se",
    "greedy",
    "mean_tokens",
    "truncated",
    "unscorable",
    "reflective_per_response",
    "language_consistency",
)
GROUP_COLUMNS = ("problems", "pass@1", "pass@1_se", "greedy", "mean_tokens", "truncated", "unscorable")
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

# Config fields that name files a run was trained on: those of which it held out a share, and those it used whole.
DIVIDED = ("data.path", "data.general_path", "data.safety_path")
WHOLE = ("distill.examples", "coldstart.examples", "rejection.judged_prompts")


def run(config: Config, workdir: Path) -> dict:
    """Evaluates config.checkpoint (a stage's folder or a Hugging Face folder) and returns the figures.

    They are written to `workdir/evaluate/`, with the responses, the config, the digests of the inputs and a report.
    """
    if not config.checkpoint:
        raise ValueError(
            "evaluate: give the checkpoint with --config.checkpoint=DIR (a stage's folder or a Hugging Face folder)"
        )
    data = as_trained(config.checkpoint, config.data)
    config = replace(config, model=replace(config.model, checkpoint=config.checkpoint), data=data)
    resolved, tokenizer, mesh = common.prepare(config)
    stage_prompts = prompts.load_held_out(parts_of(parts.PromptParts, resolved), tokenizer)
    template_check.check(resolved.stage, resolved.data, resolved.reward, tokenizer, stage_prompts.held_out)
    started = time.monotonic()
    digest = common.checkpoint_digest(config.checkpoint)
    params = common.load_weights(resolved.model, mesh, config.checkpoint)
    if common.replaceable(config.checkpoint) and common.checkpoint_digest(config.checkpoint) != digest:
        raise ValueError(
            f"config.checkpoint={config.checkpoint}: a run wrote other weights there while they were read; run again, or "
            "when it has ended"
        )
    figures, responses = evaluate(
        parts_of(parts.EvaluationParts, resolved),
        tokenizer,
        mesh,
        stage_prompts.held_out,
        params,
        stage_prompts.source.reflective_words,
    )
    figures["data"] = stage_prompts.counts
    figures["seconds"] = round(time.monotonic() - started, 1)
    folder, name = Path(workdir) / config.stage, Path(config.checkpoint).name
    write_samples(folder / "samples.jsonl", responses)
    checkpoint.write_json(folder / "config.json", common.json_fields(resolved))
    made_from = {config.checkpoint: digest}
    made_from |= {**stage_prompts.source.inputs, **lineage.grader_digests(config.reward)}
    checkpoint.write_json(folder / common.INPUTS, {"inputs": made_from})
    checkpoint.write_json(folder / "figures.json", figures)
    print_figures([{"checkpoint": name, **figures}])
    say_left_out(resolved.evaluation, stage_prompts, int(figures["problems"]))
    write_report(resolved.stage, workdir, name, {name: figures, "seconds": figures["seconds"]})
    return figures


def say_left_out(evaluation: EvalConfig, stage_prompts: StagePrompts, measured: int) -> None:
    """Prints how many rows of the files were evaluated, and why the others were not."""
    counts, most = stage_prompts.counts, evaluation.max_problems
    if not hosts.is_writer():
        return
    total = counts.get("rows", len(stage_prompts.held_out))
    reasons = {
        "are not held out": counts.get("training", 0),
        f"are of task {' or '.join(SCENARIOS)}": sum(counts.get("rows_by_task", {}).get(task, 0) for task in SCENARIOS),
        "are too long": sum(counts["left_out"]["too_long"].values()),
        f"are behind the first config.evaluation.max_problems={most}": len(stage_prompts.held_out) - measured,
    }
    reasons["ask what another row of config.data.eval_path asks"] = total - measured - sum(reasons.values())
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count > 0)
    print(f"figures of {measured} of {total} problems" + (f": {listed}" if listed else ""))


def as_trained(checkpoint_folder: str, data: DataConfig) -> DataConfig:
    """Returns the data with the hold-out of the runs that made a checkpoint, if they trained on these files.

    Of files that these runs read, even if changed since, only the held-out rows are evaluated; of other files all rows.
    Raises ValueError when only some files of config.data.path were trained on, and when nothing was held out.
    """
    if not problems.has_files(data) or data.eval_path:
        return data
    trained = hosts.decide(_trained_on, Path(checkpoint_folder), name=f"what {checkpoint_folder} was trained on")
    digests = problems.digests(data)
    keys = {path: {digests[path], _place(path)} & trained.keys() for path in digests}
    trained_paths = [path for path in digests if keys[path]]
    if not trained_paths:
        return data
    if len(trained_paths) < len(digests):
        new_path = next(path for path in digests if path not in trained_paths)
        raise ValueError(
            f"evaluate: {checkpoint_folder} was trained on {trained_paths[0]} and not on {new_path}; evaluate one at a "
            "time, so that of the first only what was held out counts"
        )
    fraction = min(trained[key] for path in trained_paths for key in keys[path])
    if not fraction:
        raise ValueError(
            f"evaluate: {checkpoint_folder} was trained on every row of {trained_paths[0]}; give other problems, or "
            f"evaluate these nonetheless with --config.data.eval_path={trained_paths[0]}"
        )
    changed = ", which has changed since" if digests[trained_paths[0]] not in trained else ""
    say(
        f"{checkpoint_folder} was trained on {trained_paths[0]}{changed}: evaluated is what that run held out "
        f"(config.data.holdout_fraction={fraction}); --config.data.eval_path evaluates every row"
    )
    return replace(data, holdout_fraction=fraction)


def _trained_on(folder: Path) -> dict[str, float]:
    """Returns {digest, path or URL of a file: share held out of it} of files that a stage and earlier ones trained on."""
    held_out_shares: dict[str, float] = {}
    waiting, visited = [str(folder)], set()
    while waiting:
        folder = common.run_folder(remote.records(waiting.pop()))
        if not urls.is_url(remote.shown(str(folder))):
            folder = folder.resolve()
        inputs, fields = folder / common.INPUTS, folder / "config.json"
        if folder in visited or not (inputs.exists() and fields.exists()):
            continue
        visited.add(folder)
        digests, config = json.loads(inputs.read_text())["inputs"], json.loads(fields.read_text())
        fraction = 0.0 if config.get("data.eval_path") else config.get("data.holdout_fraction", 0.0)
        shares = dict.fromkeys(DIVIDED, fraction) | dict.fromkeys(WHOLE, 0.0)
        if "people" not in config.get("coldstart.sources", ()):
            del shares["coldstart.examples"]  # they are worked examples in a prompt, if they are used at all
        rows: set[str] = set()  # files, which are no stages
        for name in (*DIVIDED, *WHOLE):
            rows.update(problems.paths(config.get(name, "")))
        for name, share in shares.items():
            for path in problems.paths(config.get(name, "")):
                for key in (digests[path], _place(path)) if path in digests else ():
                    held_out_shares[key] = min(share, held_out_shares.get(key, 1.0))
        workdir = config.get("inputs") or remote.beside(folder)
        for name in filter(None, digests.keys() - rows):
            waiting += [name] if urls.is_url(name) else [f"{workdir}/{name}", name]
    return held_out_shares


def _place(path: str) -> str:
    """Returns by what a file is known in every run: its URL, else its whole path."""
    place = remote.shown(path)
    return place if urls.is_url(place) else str(Path(path).resolve())


def of_weights(
    settings: EvaluationParts,
    tokenizer: Tokenizer,
    mesh: Mesh,
    stage_prompts: StagePrompts,
    params: Any,
    workdir: Path,
    name: str,
    samples: Path | None = None,
) -> dict[str, Any]:
    """Returns the figures of weights on the held-out prompts; if they were measured before, from
    `workdir/evaluations/NAME.json`.

    Stored figures count only for the same weights, prompts, graders and settings (`measurement_key`). `samples` is the
    path that responses are written to.
    """
    path = Path(workdir) / "evaluations" / f"{name}.json"
    key = measurement_key(settings, tokenizer, stage_prompts, params)
    measured = hosts.decide(_measured, path, key, samples, name=str(path))
    if measured is not None:
        return measured
    figures, responses = evaluate(
        settings, tokenizer, mesh, stage_prompts.held_out, params, stage_prompts.source.reflective_words
    )
    if samples is not None:
        write_samples(samples, responses)
    checkpoint.write_json(path, {"key": key, "figures": figures})
    return figures


def measurement_key(settings: EvaluationParts, tokenizer: Tokenizer, stage_prompts: StagePrompts, params: Any) -> str:
    """Returns a digest of everything that determines a checkpoint's figures.

    These are the problems (text, reference, task, language, source) and their ids under the template, the weights and
    their shape, the tokenizer, the sampling parameters, the graders' settings without the reward's weights, and the
    source of the user's own graders.
    """
    questions = [
        (replace(prompt.problem, place=""), prompt.ids.tolist(), prompt.prefill) for prompt in stage_prompts.held_out
    ]
    sampler = replace(settings.sampler, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens_schedule=())
    shape = {name: value for name, value in vars(settings.network.model).items() if name != "checkpoint"}
    weightless = replace(settings.reward, **dict.fromkeys(PART_NAMES, 0.0), workers=0, cache_entries=0)
    asked_with = (
        settings.evaluation,
        sampler,
        evaluation_params(settings.sampler, settings.evaluation, tokenizer),
        settings.seed,
        tuple(stage_prompts.source.reflective_words),
    )
    dtype = settings.network.compute.compute_dtype
    sampling_inputs = asked_with, shape, dtype, _tokenizer_digest(tokenizer), tree.digest(params)
    return hashlib.sha256(
        repr((sampling_inputs, weightless, lineage.grader_digests(settings.reward), questions)).encode()
    ).hexdigest()


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Returns a digest of a tokenizer's files, as it saves them, and of its stop ids; its folder does not count."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        files = [path for path in sorted(Path(folder).iterdir()) if path.name != common.GENERATION]
        digests = [(path.name, common.file_digest(str(path))) for path in files]
    return hashlib.sha256(repr((digests, sorted(tokenizer.stop_ids))).encode()).hexdigest()


def _measured(path: Path, key: str, samples: Path | None) -> dict | None:
    """Returns the figures in a file of `of_weights` if they have this key and the samples exist too, else None."""
    if not path.exists() or (samples is not None and not samples.exists()):
        return None
    record = json.loads(path.read_text())
    return record["figures"] if record["key"] == key else None


def finished(folder: common.StageFolder, inputs: dict[str, str]) -> dict | None:
    """Prints and returns the figures of a stage that is finished with these inputs; None if it is not."""
    figures = folder.finished(inputs)
    if figures is not None:
        say(f"{folder.path} is finished; nothing to do")
        print_checkpoints(figures)
    return figures


def before_and_after(
    settings: EvaluationParts,
    tokenizer: Tokenizer,
    mesh: Mesh,
    stage_prompts: StagePrompts,
    base: lineage.Base,
    trained: Any,
    workdir: Path,
    folder: Path,
) -> dict[str, dict[str, float]]:
    """Returns and prints the figures of the stage's base and of its result; writes samples.jsonl into its folder."""
    if not stage_prompts.held_out:
        return {}
    measure = functools.partial(of_weights, settings, tokenizer, mesh, stage_prompts)
    name = lineage.result_name(settings.stage)
    figures = {
        lineage.BASE: measure(base.load(), workdir, base.name),
        name: measure(trained, workdir, name, folder / "samples.jsonl"),
    }
    print_checkpoints(figures)
    return figures


def evaluation_params(sampler: SamplerConfig, evaluation: EvalConfig, tokenizer: Tokenizer) -> SamplingParams:
    """Returns the sampling parameters of an evaluation: temperature and top_p are those of config.evaluation."""
    longest = sampler.max_new_tokens
    return SamplingParams(evaluation.temperature, evaluation.top_p, max_new_tokens=longest, stop_ids=tokenizer.stop_ids)


def evaluate(
    settings: EvaluationParts,
    tokenizer: Tokenizer,
    mesh: Mesh,
    held_out: Sequence[EncodedPrompt],
    params: Any,
    words: Sequence[str] = (),
) -> tuple[dict[str, Any], list[Response]]:
    """Returns (figures, sampled responses) of weights on held-out prompts; `greedy` is one greedy sample a problem.

    The random keys of the samples depend only on the seed and the problem, so that checkpoints are compared fairly.
    """
    if not held_out:
        raise ValueError("evaluate: no held-out problems; raise config.data.holdout_fraction or give more rows")
    sampler = build_sampler(settings.network, settings.sampler, mesh, tokenizer)
    params = sampler.engine.load_params(params)
    with RewardPool(settings.reward) as pool:
        return measure(settings, tokenizer, held_out, sampler, params, pool, words)


def measure(
    settings: EvaluationParts,
    tokenizer: Tokenizer,
    held_out: Sequence[EncodedPrompt],
    sampler: RolloutSampler,
    params: Any,
    pool: RewardPool,
    words: Sequence[str] = (),
    on_prompt: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], list[Response]]:
    """Returns the same of `params` in the form that `sampler` takes; `on_prompt` is called when one is answered."""
    evaluation = settings.evaluation
    if evaluation.max_problems:
        held_out = held_out[: evaluation.max_problems]
    sampling, size = evaluation_params(settings.sampler, evaluation, tokenizer), evaluation.samples_per_problem
    k = evaluation.consensus_samples
    ask = functools.partial(respond, settings.seed, "evaluate", tokenizer, sampler, pool)
    sampled, greedy = ask(held_out, params, sampling, size, "evaluate", on_prompt), []
    if evaluation.greedy:
        greedy = ask(held_out, params, replace(sampling, temperature=0.0), 1, "greedy", on_prompt)
    voting: list[Response] = []
    if evaluation.consensus_problems and k <= size:  # pass@1's samples have the same parameters
        starts = [size * place for place in spread(len(held_out), evaluation.consensus_problems)]
        voting = [response for start in starts for response in sampled[start : start + k]]
    elif evaluation.consensus_problems:
        chosen = [held_out[place] for place in spread(len(held_out), evaluation.consensus_problems)]
        voting = ask(chosen, params, sampling, k, "evaluate", on_prompt)
    verdicts = hosts.decide(benchmarks.vote, voting, k, settings.reward, name="the votes of cons@k")
    return summarize(Measurement(sampled, greedy, verdicts), evaluation, words), sampled


def spread(total: int, count: int) -> list[int]:
    """Returns `count` indices spread evenly over range(total), or all if there are fewer."""
    return [int(place) for place in np.linspace(0, total - 1, min(count, total)).round()]


def respond(
    seed: int,
    stage: str,
    tokenizer: Tokenizer,
    sampler: RolloutSampler,
    pool: rollout.Graders,
    encoded_prompts: Sequence[EncodedPrompt],
    params: Any,
    sampling: SamplingParams,
    samples: int,
    purpose: str,
    on_prompt: Callable[[], None] = lambda: None,
) -> list[Response]:
    """Returns `samples` graded responses to each prompt, in order; `on_prompt` is called when one is answered."""
    requests = rollout.requests_for(
        encoded_prompts, range(len(encoded_prompts)), samples, sampling, seed, stage, purpose
    )
    sampled = sampler.generate(requests, params, on_request=lambda samples: on_prompt())
    texts = tokenizer.decode_batch([sample.token_ids for sample in sampled])
    repeated = [prompt for prompt in encoded_prompts for _ in range(samples)]
    reward_terms, scorable = rollout.grade(sampled, repeated, texts, pool)
    return [
        Response(
            problem=p.problem,
            text=p.prefill + text,
            tokens=len(sample.token_ids),
            truncated=sample.truncated,
            parts=dict(zip(RULE_PARTS, (float(v) for v in row), strict=False)),
            scorable=bool(known),
        )
        for p, text, sample, row, known in zip(repeated, texts, sampled, reward_terms, scorable, strict=True)
    ]


def write_samples(path: Path, responses: Sequence[Response]) -> None:
    """Writes responses as JSON lines; only in the process that writes the run's files."""
    if hosts.is_writer():
        jsonl.write(path, [response.row() for response in responses])


def print_checkpoints(figures: dict) -> None:
    """Prints the tables of a stage's figures, for every entry that is an evaluation."""
    print_figures([{"checkpoint": name, **value} for name, value in figures.items() if is_evaluation(value)])


def is_evaluation(value: Any) -> bool:
    """Returns whether an entry of a stage's figures is an evaluation of a checkpoint."""
    return isinstance(value, dict) and "pass@1_se" in value


def write_report(stage: str, workdir: Path, name: str, figures: dict) -> None:
    """Writes report.html of a stage with evaluations, whose result is called `name`, into its folder."""
    measured = {key: value for key, value in figures.items() if is_evaluation(value)}
    stage_report.write_final(Path(workdir) / stage, name, {"checkpoints": measured, "wall_s": figures["seconds"]})


def print_figures(rows: list[dict]) -> None:
    """Prints the main table, tables by task and source if there are several, notes on what figures leave out, and the
    faithfulness table if there are equations (process 0 only)."""
    if not hosts.is_writer():
        return
    table.render(rows, columns(rows, COLUMNS), "held-out problems")
    print_groups(rows)
    print_faithfulness(rows)


def columns(rows: Sequence[dict], usual: Sequence[str]) -> tuple[str, ...]:
    """Returns the usual columns with, after `greedy`, every pass@k and cons@k that a row has."""
    sampled = html.sampled_figures(rows)
    place = usual.index("greedy") + 1
    return (*usual[:place], *sampled, *usual[place:])


def print_groups(rows: Sequence[dict]) -> None:
    """Prints the figures by task and by source if there are several, and notes on what figures leave out."""
    for field, label in html.GROUPS.items():
        if any(len(row.get(field, {})) > 1 for row in rows):
            shown = [
                {"checkpoint": row["checkpoint"], label: name, **figures}
                for row in rows
                for name, figures in row.get(field, {}).items()
            ]
            table.render(shown, ("checkpoint", label, *columns(shown, GROUP_COLUMNS)), f"held-out problems by {label}")
    for row in rows:
        for note in row.get("notes", ()):
            print(f"{row['checkpoint']}: {note}")


def print_faithfulness(rows: list[dict]) -> None:
    """Prints, for problems with equations, whether written arithmetic is true and what retries change."""
    rows = [row for row in rows if "arithmetic_true" in row]
    if rows:
        table.render(rows, FAITHFULNESS_COLUMNS, "are the checks real?")
