"""Stage 1, cold start: R1-Zero's good traces, rewritten and checked again, teach the base to reason readably (SFT)."""

import sys
import time
from collections import Counter
from pathlib import Path

from r1jax import config as configs
from r1jax.core import checkpoint
from r1jax.core.metrics import MetricsLog
from r1jax.data import jsonl, rewrite
from r1jax.data.hashing import hash64
from r1jax.data.prompts import keyed_permutation
from r1jax.evals.behaviour import repetition_rate
from r1jax.evals.benchmarks import Response
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.rl.rollout import EncodedPrompt
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import SamplingLaw
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import Config, replace
from r1jax.stages import common, evaluate, prompts, r1_zero
from r1jax.stages.progress import Progress
from r1jax.train import sft, step, supervised

MAX_REPETITION = 0.2  # share of repeated four-word runs above which a trace counts as a loop
EXAMPLES = "examples.jsonl"


def run(config: Config, workdir: Path) -> dict:
    """Builds the examples (and R1-Zero first, at the tiny presets), fine-tunes the base on them and evaluates."""
    folder = common.StageFolder(config, workdir)
    if (figures := folder.finished()) is not None:
        print(f"{folder.path} is finished; nothing to do", file=sys.stderr)
        evaluate.print_figures([{"checkpoint": name, **figures[name]} for name in ("base", "dev1")])
        return figures
    resolved, tokenizer, mesh = common.prepare(config)
    teacher = teacher_folder(resolved, workdir)
    folder.start()
    train, held_out = (prompts.encode(split, resolved, tokenizer) for split in prompts.load(resolved))
    started = time.monotonic()
    path = folder.path / EXAMPLES
    if not path.exists():
        rows, counts = collect(resolved, tokenizer, mesh, train, teacher)
        if not rows:
            raise ValueError(
                f"{folder.path}: no trace of {teacher} passed the checks ({dict(counts)}); train R1-Zero longer"
            )
        jsonl.write(path, rows)
        checkpoint.write_json(folder.path / "examples_counts.json", counts)
    rows = jsonl.read(path, required=("prompt", "response"))
    params = r1_zero.start_weights(resolved, mesh, workdir)
    trained, loss = fine_tune(resolved, tokenizer, mesh, rows, params, folder)
    figures = {"seconds": round(time.monotonic() - started, 1), "examples": len(rows), "loss": loss}
    before, _ = evaluate.evaluate(resolved, tokenizer, mesh, held_out, r1_zero.start_weights(resolved, mesh, workdir))
    after, responses = evaluate.evaluate(resolved, tokenizer, mesh, held_out, trained)
    evaluate.write_samples(folder.path / "samples.jsonl", responses)
    figures |= {"base": before, "dev1": after}
    evaluate.print_figures([{"checkpoint": name, **figures[name]} for name in ("base", "dev1")])
    checkpoint.write_json(folder.path / "figures.json", figures)
    return folder.finish(figures, {"traces": str(teacher)})


def teacher_folder(config: Config, workdir: Path) -> Path:
    """Returns the folder of the R1-Zero run whose traces are used: config.coldstart.teacher, else workdir/r1_zero.

    At the presets of the tiny world a missing one is trained first; elsewhere ValueError names the command that makes it.
    """
    if config.coldstart.teacher:
        return Path(config.coldstart.teacher)
    folder = Path(workdir) / "r1_zero"
    if (folder / common.DONE).exists():
        return folder
    if config.data.path:
        raise ValueError(
            f"{folder} is missing; make it with: python -m r1jax.launch --config=r1_zero:{config.preset} "
            f"--config.data.path={config.data.path} --workdir={workdir}, or name one with --config.coldstart.teacher=DIR"
        )
    zero = replace(configs.load(f"r1_zero:{config.preset}"), seed=config.seed, rebuild_base=config.rebuild_base)
    r1_zero.run(zero, workdir)
    return folder


def collect(config: Config, tokenizer, mesh, train: list[EncodedPrompt], teacher: Path) -> tuple[list[dict], Counter]:
    """Returns (examples with their provenance, how many traces each check let through) (P2 B.3.2)."""
    settings = config.coldstart
    order = keyed_permutation(len(train), hash64(config.stage, config.seed, "prompts"))[: settings.prompts]
    asked = [train[i] for i in order]
    params = common.load_weights(config, mesh, str(teacher), lambda: None)
    sampler = RolloutSampler(Engine(config.model, config.sampler, mesh, (tokenizer.eos_id,), tokenizer))
    law = SamplingLaw(1.0, 1.0, 0, config.sampler.max_new_tokens, (tokenizer.eos_id,))
    with RewardPool(config.reward) as pool:
        drawn = evaluate.respond(
            config, tokenizer, sampler, pool, asked, params, law, settings.samples_per_prompt, "sample"
        )
        counts = Counter(sampled=len(drawn))
        good = [(i, r) for i, r in enumerate(drawn) if _passes(r, settings.min_language_consistency, counts)]
        rewritten = [(i, r, text) for i, r in good if (text := _rewritten(r, asked, i, settings, counts)) is not None]
        requests = [
            RewardRequest(r.problem_id, "linear" if not config.data.path else "math", r.prompt, text, r.answer)
            for _, r, text in rewritten
        ]
        scores = pool.score(requests)
    rows: list[dict] = []
    used: Counter = Counter()
    for (index, response, text), score in zip(rewritten, scores, strict=True):
        if score.parts.get("accuracy") != 1.0 or score.parts.get("format") != 1.0 or not score.scorable:
            continue
        counts["right again"] += 1
        if used[response.problem_id] >= settings.max_examples_per_prompt or len(rows) >= settings.max_examples:
            continue
        used[response.problem_id] += 1
        source = {"teacher": str(teacher), "sample": index % settings.samples_per_prompt, "trace": response.text}
        rows.append({"id": response.problem_id, "prompt": response.prompt, "response": text, "provenance": source})
    counts["kept"] = len(rows)
    return rows, counts


def _passes(response: Response, consistency: float, counts: Counter) -> bool:
    """Returns whether a trace is right, well formed, of one language and no loop; counts how far it came."""
    checks = {
        "right": response.parts["accuracy"] == 1.0 and response.scorable,
        "well formed": response.parts["format"] == 1.0,
        "one language": response.parts["language"] >= consistency,
        "no loop": repetition_rate(response.text, 8) <= MAX_REPETITION,
    }
    for name, passed in checks.items():
        if not passed:
            return False
        counts[name] += 1
    return True


def _rewritten(response: Response, asked: list[EncodedPrompt], index: int, settings, counts: Counter) -> str | None:
    """Returns the rewritten trace, or None when the rewrite refuses it. Text of real models is kept, only trimmed."""
    prompt = asked[index // settings.samples_per_prompt].prompt
    if prompt.task != "linear":
        text = response.text.strip()
    else:
        text = rewrite.tidy(response.prompt, response.text, prompt.language)
        if text is None or not rewrite.is_sound(response.prompt, text):
            return None
    counts["rewritten"] += 1
    return text


def fine_tune(config: Config, tokenizer, mesh, rows: list[dict], params, folder: common.StageFolder):
    """Returns (weights, last loss) after the configured epochs over the examples."""
    items = []
    for row in rows:
        prompt = prompts.render_ids(row["prompt"], config, tokenizer)
        items.append(sft.example(prompt, [*tokenizer.encode(row["response"]), tokenizer.eos_id]))
    size = min(config.sft.examples_per_update, len(items))
    per_epoch = len(items) // size
    updates = per_epoch * config.sft.epochs
    trainer = step.Trainer(config.model, config.optimizer, mesh, sft.make_loss(config.model), updates)
    micro_batches = -(-size // config.pack.rows_per_micro_batch)

    def batch_at(update: int):
        epoch, index = divmod(update, per_epoch)
        order = keyed_permutation(len(items), hash64(config.stage, config.seed, "shuffle", epoch))
        chosen = order[index * size : (index + 1) * size]
        return sft.make_batch([items[i] for i in chosen], config.pack, micro_batches)

    store, log = folder.checkpoints(), MetricsLog(folder.path)
    with Progress(config.stage, updates) as progress:
        result = supervised.fit(
            trainer,
            params,
            batch_at,
            updates,
            store,
            log,
            config.checkpointing.every_updates,
            lambda update, loss: progress.update(update, loss=loss),
            log_every=1,
        )
    store.close()
    log.close()
    return result
