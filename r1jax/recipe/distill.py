"""Distillation: a dense student is fine-tuned on a teacher's examples; hard targets, no RL (P2 B.4.3)."""

from pathlib import Path

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core.say import say
from r1jax.data import files, jsonl
from r1jax.recipe import common, example_files, fine_tuning, lineage
from r1jax.recipe.drafts import Counts, Draft, counts_line, tally
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import Config, DistillConfig, RewardConfig

SOURCE = "stage3_rejection_sft"


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
    drafts, notes = example_files.read(path, config.data, config.reward)

    def graded(*arguments) -> tuple[list[dict], Counts]:
        say(*example_files.remarks(path, drafts, notes))
        return of_file(drafts, config.stage, config.reward, config.distill)

    return fine_tuning.run(config, workdir, (), graded, {path: files.digest(path)})


def collect(
    config: Config, tokenizer: Tokenizer, mesh: Mesh, train: list[EncodedPrompt], workdir: Path
) -> tuple[list[dict], Counts]:
    """Returns stage 3's examples unchanged, and their number by task."""
    rows = jsonl.read(lineage.require(SOURCE, config, workdir) / fine_tuning.EXAMPLES)
    counts: Counts = {}
    tally(counts, "kept", (row.get("task", "") for row in rows))
    return rows, counts


def of_file(drafts: list[Draft], stage: str, reward: RewardConfig, distill: DistillConfig) -> tuple[list[dict], Counts]:
    """Returns (rows of a file, counts by task); with distill.grade the rows graded as wrong are left out."""
    counts: Counts = {}
    tally(counts, "rows", (draft.task for draft in drafts))
    if distill.grade:
        drafts = example_files.right(drafts, reward, counts)
    tally(counts, "kept", (draft.task for draft in drafts))
    say(counts_line(stage, counts))
    return [draft.row() for draft in drafts], counts


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
