"""Distillation: a dense student is fine-tuned on a teacher's examples; hard targets, no RL (P2 B.4.3)."""

from collections import Counter
from pathlib import Path

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.data import jsonl
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import Config
from r1jax.stages import common, fine_tuning, lineage

SOURCE = "stage3_rejection_sft"


def run(config: Config, workdir: Path) -> dict:
    """Fine-tunes the student's base on examples of config.distill.examples or of stage 3 and evaluates.

    Raises ValueError, before anything is written, when the base or the examples are not given or not readable.
    """
    _check_inputs(config, workdir)
    if not config.distill.examples:
        return fine_tuning.run(config, workdir, (SOURCE,), collect)
    rows, digest = read_examples(config.distill.examples)
    counted = rows, Counter(kept=len(rows))
    return fine_tuning.run(config, workdir, (), lambda *given: counted, {config.distill.examples: digest})


def collect(
    config: Config, tokenizer: Tokenizer, mesh: Mesh, train: list[EncodedPrompt], workdir: Path
) -> tuple[list[dict], Counter]:
    """Returns stage 3's examples as they are, and their number."""
    rows = jsonl.read(lineage.require(SOURCE, config, workdir) / fine_tuning.EXAMPLES, required=("prompt", "response"))
    return rows, Counter(kept=len(rows))


def read_examples(path: str) -> tuple[list[dict], str]:
    """Returns (rows {id, prompt, response, provenance}, sha256 of the file). A row without id gets its number.

    Raises ValueError, naming file and line, for a bad file or row.
    """
    rows = []
    for number, row in enumerate(jsonl.read(path, required=("prompt", "response")), 1):
        for name in ("prompt", "response"):
            if not row[name].strip():
                raise ValueError(f"{path}, row {number}: {name!r} is empty, needs text")
        kept = {"id": str(row.get("id") or f"row-{number}"), "prompt": row["prompt"], "response": row["response"]}
        rows.append(kept | {"provenance": {"teacher": path}})
    return rows, common.file_digest(path)


def _check_inputs(config: Config, workdir: Path) -> None:
    """Raises ValueError when a student that is none of the tiny world lacks its weights or its examples."""
    if config.data.world == "tiny":
        return
    if not config.model.checkpoint:
        raise ValueError(
            f"{config.stage}:{config.preset} ships no base model; give the student's starting weights with "
            "--config.model.checkpoint=DIR (a Hugging Face folder)"
        )
    source = Path(config.inputs or workdir) / SOURCE
    if not config.distill.examples and not (source / common.DONE).exists():
        raise ValueError(
            f"{config.stage}:{config.preset}: {source} is missing or unfinished; give the examples with "
            "--config.distill.examples=FILE.jsonl (rows with prompt and response)"
        )
