"""What every SFT stage does: collect examples once, fine-tune resumably, evaluate before and after."""

import collections
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import checkpoint, hosts, sharding, tree
from r1jax.core.say import say
from r1jax.data import jsonl
from r1jax.data.packing import pack as pack_rows
from r1jax.data.packing import rows_needed, spread
from r1jax.models import decoder
from r1jax.recipe import (
    common,
    compute,
    evaluate,
    lineage,
    parts,
    problems,
    prompts,
    stage_report,
    template_check,
    token_cache,
    train_eval,
    training,
)
from r1jax.recipe.parts import TrainingParts
from r1jax.recipe.token_cache import TokenCache
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import Config, PackConfig, SFTConfig, parts_of
from r1jax.train import epochs, sft, step
from r1jax.train.evaluations import Measure

EXAMPLES = common.EXAMPLES
COUNTS = "examples_counts.json"
TOO_LONG = "longer than pack.row_tokens"  # why an example is left out

# (config, tokenizer, mesh, training prompts, workdir) -> (rows {id, prompt, response, provenance}, counts by check). The
# counts are complete once the rows have been read.
Collect = Callable[[Config, Tokenizer, Mesh, list[EncodedPrompt], Path], tuple[Iterable[dict], dict[str, Any]]]


def run(
    config: Config, workdir: Path, sources: tuple[str, ...], collect: Collect, files: Mapping[str, str] | None = None
) -> dict:
    """Collects examples from the results of the stages `sources`, fine-tunes, evaluates and returns the figures.

    `files` are further inputs, {path: digest of its content}.
    """
    folder = common.StageFolder(config, workdir)
    folder.check()
    inputs = lineage.inputs(config, workdir) | dict(files or {})
    inputs |= {source: lineage.output_digest(lineage.require(source, config, workdir)) for source in sources}
    if (figures := evaluate.finished(folder, inputs)) is not None:
        return figures
    resolved, tokenizer, mesh = common.prepare(config, lineage.start_folder(config, workdir))
    stage_prompts = (
        prompts.load(parts_of(parts.PromptParts, resolved), tokenizer)
        if problems.has_problems(resolved.data) or config.stage != "distill"
        else None
    )
    train, held_out = (stage_prompts.training.all, stage_prompts.held_out) if stage_prompts else ([], [])
    template_check.check(resolved.stage, resolved.data, resolved.reward, tokenizer, train or held_out)
    measure = train_eval.measure_alone(parts_of(train_eval.TrainEvalParts, resolved), tokenizer, mesh, stage_prompts)
    started, path = time.monotonic(), folder.path / EXAMPLES
    folder.start(inputs)
    common.write_model(
        folder.path,
        resolved.model,
        resolved.data,
        tokenizer,
        prompts.template(resolved.stage, resolved.data, tokenizer),
    )
    if not hosts.decide(path.exists, name=str(path)):
        write_examples(path, *collect(resolved, tokenizer, mesh, train, Path(workdir)), config.stage)
    examples = token_cache.load(token_cache.RowReading(path, resolved.stage, resolved.data, tokenizer))
    fitting_examples = examples.only(fitting(examples.lengths, resolved.pack.row_tokens))
    start = functools.partial(lineage.start_weights, resolved, mesh, workdir)
    name, settings = lineage.result_name(config.stage), parts_of(parts.TrainingParts, resolved)
    with stage_report.while_working(folder.path, name, resolved.watch.report_every_s) as work:
        trained, loss = fine_tune(settings, resolved.sft, mesh, fitting_examples, start, folder, measure, work)
        work.updates = None
        tokens = int(fitting_examples.lengths.sum(dtype=np.int64)) * resolved.sft.epochs
        figures: dict[str, Any] = {
            "seconds": round(time.monotonic() - started, 1),
            "examples": len(fitting_examples),
            "tokens": tokens,
        }
        figures |= {"loss": loss, "left_out": {TOO_LONG: len(examples) - len(fitting_examples)}}
        figures["compute"] = compute.of_fine_tuning(tokens, resolved.network)
        figures |= train_eval.kept(resolved.train_eval, folder.path)
        if stage_prompts:
            figures["data"] = stage_prompts.counts
            settings, base = parts_of(parts.EvaluationParts, resolved), lineage.base(resolved, mesh, workdir)
            figures |= evaluate.before_and_after(
                settings, tokenizer, mesh, stage_prompts, base, trained, workdir, folder.path
            )
        checkpoint.write_json(folder.path / "figures.json", figures)
        digest = tree.digest(trained)
    evaluate.write_report(config.stage, workdir, name, figures)
    token_cache.remove(path)
    return folder.finish(figures, inputs, digest)


def write_examples(path: Path, rows: Iterable[dict], counts: Mapping[str, Any], stage: str) -> None:
    """Writes the rows as they come, and the counts beside them. Raises ValueError, and writes nothing, without a row.

    Of several processes, which may make the rows together, process 0 writes.
    """

    def counted() -> Iterator[dict]:
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            raise ValueError(
                f"{stage}: no example passed the checks ({dict(counts)}); train the stage before longer, give easier "
                "problems, or rows written by people (coldstart.sources)"
            )
        checkpoint.write_json(path.with_name(COUNTS), counts)  # now complete, and there before the file has its name

    if hosts.is_writer():
        jsonl.write(path, counted())
    else:
        collections.deque(counted(), maxlen=0)
    hosts.barrier(str(path))


def fitting(lengths: np.ndarray, limit: int) -> np.ndarray:
    """Returns the places of the examples of at most `limit` tokens and prints how many are left out.

    Raises ValueError when none is left.
    """
    kept = np.flatnonzero(lengths <= limit)
    count, longest = len(lengths), lengths.max(initial=0)
    if not len(kept):
        raise ValueError(f"all {count} examples exceed config.pack.row_tokens={limit} (longest {longest}); raise it")
    if len(kept) < count:
        say(f"{count - len(kept)} of {count} examples exceed {limit} tokens (longest {longest}), left out")
    return kept


def fine_tune(
    settings: TrainingParts,
    tuning: SFTConfig,
    mesh: Mesh,
    examples: TokenCache,
    start: Callable[[], decoder.Params],
    folder: common.StageFolder,
    measure: Measure | None = None,
    work: stage_report.StageWork | None = None,
):
    """Returns (weights, last loss) after the configured epochs, from the weights of `start` or the newest checkpoint.

    Every epoch trains on every example. `measure` is what evaluations between updates do, None without them; `work` is
    what the stage's page shows.
    """
    pack, loss = settings.pack, sft.make_loss(settings.network, settings.pack.trained_chunk)
    chosen, micro_batches = plan_updates(examples.lengths, tuning, pack, settings.stage, settings.seed)
    trainer = step.Trainer(settings.network, settings.optimizer, mesh, loss, len(chosen))
    shards = sharding.row_shards(pack.rows_per_micro_batch, settings.mesh)
    local = sharding.local_rows(pack.rows_per_micro_batch, mesh)

    def batch_at(update: int):
        return read_batch(examples.only(chosen[update]), pack, micro_batches, shards, local)

    name = lineage.result_name(settings.stage)
    return training.fit(folder, trainer, start, batch_at, len(chosen), name, measure=measure, work=work)


def plan_updates(
    lengths: np.ndarray, tuning: SFTConfig, pack: PackConfig, stage: str, seed: int
) -> tuple[list[np.ndarray], int]:
    """Returns (places of the examples of each update, micro-batches of the fullest update) by lengths alone."""
    chosen = epochs.examples_of_updates(len(lengths), tuning.epochs, tuning.examples_per_update, stage, seed)
    most_rows = max(rows_needed(lengths[places].tolist(), pack.row_tokens) for places in chosen)
    return chosen, -(-most_rows // pack.rows_per_micro_batch)


def read_batch(
    examples: TokenCache, pack: PackConfig, micro_batches: int, shards: int, local: np.ndarray
) -> tuple[dict, int, np.float32]:
    """Returns the result of `sft.make_batch`, reading the examples of local rows alone; the others' tokens are 0.

    `local` says which rows of a micro-batch this process needs, [rows_per_micro_batch] bool.
    """
    lengths = examples.lengths.tolist()
    rows = spread(pack_rows(lengths, pack.row_tokens), lengths, pack.rows_per_micro_batch, shards)
    needed = {place for number, row in enumerate(rows) if local[number % len(local)] for place in row}
    items = [examples[place] if place in needed else examples.outline(place) for place in range(len(examples))]
    return sft.make_batch(items, pack, micro_batches, rows)
