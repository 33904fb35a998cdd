"""Distillation: a dense student is fine-tuned on a teacher's examples; hard targets, no RL (P2 B.4.3)."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import hosts
from r1jax.core.say import say
from r1jax.data import jsonl
from r1jax.recipe import common, example_files, fine_tuning, lineage, problems
from r1jax.recipe.drafts import Counts, Draft, counts_line, tally
from r1jax.recipe.progress import Progress
from r1jax.rewards.pool import RewardPool
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import Config, DistillConfig, RewardConfig

SOURCE = "stage3_rejection_sft"
BLOCK_ROWS = 1024  # of a file that are graded together


def run(config: Config, workdir: Path) -> dict:
    """Fine-tunes the student's base on examples of config.distill.examples or of stage 3 and evaluates.

    Raises ValueError, before anything is written, when the base or the examples are missing or unreadable.
    """
    path = config.distill.examples
    if config.data.world != "tiny":
        source = Path(config.inputs or workdir) / SOURCE
        _check_inputs(f"{config.stage}:{config.preset}", config.model.checkpoint, path, source)
    if not path:
        return fine_tuning.run(config, workdir, (SOURCE,), collect)
    folder = common.StageFolder(config, workdir).path
    source = None  # of the examples, once they are there
    if not hosts.decide(_has_examples, folder, name=f"the examples in {folder}"):
        source = example_files.ExampleFile(path, config.data, config.reward)

    def graded(*arguments) -> tuple[Iterator[dict], Counts]:
        rows = source or example_files.ExampleFile(path, config.data, config.reward)
        say(*rows.remarks)
        return of_file(rows, rows.count, config.stage, config.reward, config.distill)

    return fine_tuning.run(config, workdir, (), graded, problems.file_digests([path]))


def _has_examples(folder: Path) -> bool:
    return any((folder / name).exists() for name in (common.EXAMPLES, common.DONE))


def collect(
    config: Config, tokenizer: Tokenizer, mesh: Mesh, train: list[EncodedPrompt], workdir: Path
) -> tuple[Iterator[dict], Counts]:
    """Returns stage 3's examples unchanged, and their number by task once they have been read."""
    path, counts = lineage.require(SOURCE, config, workdir) / fine_tuning.EXAMPLES, {"kept": {}}

    def rows() -> Iterator[dict]:
        for _, row in jsonl.numbered(path):
            tally(counts, "kept", [row.get("task", "")])
            yield row

    return rows(), counts


def of_file(
    drafts: Iterable[Draft], count: int, stage: str, reward: RewardConfig, distill: DistillConfig
) -> tuple[Iterator[dict], Counts]:
    """Returns (rows of a file of `count` drafts, counts by task once they have been read), a block at a time.

    With distill.grade the rows graded as wrong are left out.
    """
    counts: Counts = {}

    def rows() -> Iterator[dict]:
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(RewardPool(reward)) if distill.grade else None
            progress = stack.enter_context(Progress(f"{stage} rows", count)) if count > BLOCK_ROWS else None
            done, started, left = 0, time.monotonic(), iter(drafts)
            while block := list(islice(left, BLOCK_ROWS)):
                done += len(block)
                tally(counts, "rows", (draft.task for draft in block))
                if pool is not None:
                    block = example_files.right(block, pool, counts)
                tally(counts, "kept", (draft.task for draft in block))
                yield from (draft.row() for draft in block)
                if progress is not None:
                    progress.update(done, **{"rows/s": done / (time.monotonic() - started)})
        say(counts_line(stage, counts))

    return rows(), counts


def _check_inputs(student: str, checkpoint: str, examples: str, source: Path) -> None:
    """Raises ValueError when a student lacks its weights or its examples: a file, or those of stage 3 in `source`."""
    if not checkpoint:
        raise ValueError(
            f"{student} ships no base model; give the student's starting weights with "
            "--config.model.checkpoint=DIR (a Hugging Face folder)"
        )
    if not examples and not (source / common.DONE).exists():
        raise ValueError(
            f"{student}: {source} is missing or unfinished; give the examples with "
            "--config.distill.examples=FILE.jsonl (rows with prompt and response)"
        )
