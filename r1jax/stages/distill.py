"""Distillation: a smaller dense student is fine-tuned on stage 3's examples; hard targets, no RL (P2 B.4.3)."""

from collections import Counter
from pathlib import Path

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.data import jsonl
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import Config
from r1jax.stages import fine_tuning, lineage

SOURCE = "stage3_rejection_sft"


def run(config: Config, workdir: Path) -> dict:
    """Fine-tunes the student's base on the teacher's examples and evaluates."""
    return fine_tuning.run(config, workdir, (SOURCE,), collect)


def collect(
    config: Config, tokenizer: Tokenizer, mesh: Mesh, train: list[EncodedPrompt], workdir: Path
) -> tuple[list[dict], Counter]:
    """Returns stage 3's examples as they are, and their number."""
    rows = jsonl.read(lineage.require(SOURCE, config, workdir) / fine_tuning.EXAMPLES, required=("prompt", "response"))
    return rows, Counter(kept=len(rows))
