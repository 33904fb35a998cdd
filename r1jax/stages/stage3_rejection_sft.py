"""Stage 3: rejection sampling from the reasoning model, mixed with general data, teaches the base again (SFT)."""

import re
from collections import Counter
from pathlib import Path

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.data import corpus, jsonl
from r1jax.data.hashing import hash64
from r1jax.evals.benchmarks import Response
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import Config, RejectionConfig
from r1jax.stages import common, fine_tuning, lineage, problems, traces, wider_pool

TEACHER = "stage2_reasoning_rl"


def run(config: Config, workdir: Path) -> dict:
    """Samples Dev2, keeps what passes, mixes general data in, fine-tunes the base (not Dev2) and evaluates."""
    return fine_tuning.run(config, workdir, (TEACHER,), collect, wider_pool.inputs(config))


def collect(
    config: Config, tokenizer: Tokenizer, mesh: Mesh, train: list[EncodedPrompt], workdir: Path
) -> tuple[list[dict], Counter]:
    """Returns (examples with their provenance, how many traces each check let through) (P2 B.3.3)."""
    settings, counts = config.rejection, Counter()
    teacher = lineage.require(TEACHER, config, workdir)
    params = common.load_weights(config, mesh, str(teacher), lambda: None)
    samples = settings.samples_per_prompt
    drawn = traces.sample(config, tokenizer, mesh, train, params, settings.prompts, samples, settings.temperature)
    drawn += wider_pool.sample(config, tokenizer, mesh, params, counts)
    checks = [*traces.basic_checks(settings.min_language_consistency), *readable(settings)]
    rows = [
        {
            "id": response.problem.id,
            "prompt": response.problem.text,
            "response": response.text,
            "provenance": traces.source(teacher, number, samples, response.text),
        }
        for number, response in traces.passing(drawn, checks, counts)
    ]
    rows = traces.capped(rows, settings.max_examples_per_prompt)
    counts["kept"] = len(rows)
    wanted = round(len(rows) * settings.general_fraction / (1 - settings.general_fraction))
    general = general_examples(config, wanted)
    counts["general"] = len(general)
    return rows + general, counts


def readable(settings: RejectionConfig) -> list[traces.Check]:
    """Returns the checks for long paragraphs and code blocks in the thinking; the paper gives no thresholds."""

    def short(response: Response) -> bool:
        thinking = response.text.split("</think>")[0]
        return all(len(part.split()) <= settings.max_paragraph_words for part in re.split(r"\n\s*\n", thinking))

    def no_code(response: Response) -> bool:
        return not settings.drop_code_blocks or "```" not in response.text

    return [("short paragraphs", short), ("no code block", no_code)]


def general_examples(config: Config, wanted: int) -> list[dict]:
    """Returns general examples: rows of task general that hold a response, or the tiny world's that keep its rules."""
    if not problems.has_files(config):
        rows = corpus.preferred(wanted, hash64(config.stage, config.seed, "general") % 2**32)
        return [row | {"provenance": {"teacher": "rules of the tiny world"}} for row in rows]
    found = [row for row in jsonl.read(config.data.path, required=("id", "prompt")) if row.get("task") == "general"]
    found = [row for row in found if row.get("response")]
    return [
        {name: row[name] for name in ("id", "prompt", "response")} | {"provenance": {"teacher": config.data.path}}
        for row in found[:wanted]
    ]
