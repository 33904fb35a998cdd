"""Stage 1, cold start: R1-Zero's good traces, rewritten and checked again, teach the base to reason readably (SFT)."""

from collections import Counter
from pathlib import Path

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.data import rewrite
from r1jax.evals.benchmarks import Response
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import Config
from r1jax.stages import common, fine_tuning, lineage, traces

TEACHER = "r1_zero"


def run(config: Config, workdir: Path) -> dict:
    """Builds the examples (and R1-Zero first where it can be made), fine-tunes the base on them and evaluates."""
    sources = () if config.coldstart.teacher else (TEACHER,)
    return fine_tuning.run(config, workdir, sources, collect)


def collect(
    config: Config, tokenizer: Tokenizer, mesh: Mesh, train: list[EncodedPrompt], workdir: Path
) -> tuple[list[dict], Counter]:
    """Returns (examples with their provenance, how many traces each check let through) (P2 B.3.2)."""
    settings, counts = config.coldstart, Counter()
    teacher = Path(settings.teacher) if settings.teacher else lineage.require(TEACHER, config, workdir)
    params = common.load_weights(config, mesh, str(teacher), lambda: None)
    drawn = traces.sample(
        config, tokenizer, mesh, train, params, settings.prompts, settings.samples_per_prompt, temperature=1.0
    )
    good = traces.passing(drawn, traces.basic_checks(settings.min_language_consistency), counts)
    rewritten = [(n, r, text) for n, r in good if (text := _rewritten(r, r.problem.language)) is not None]
    counts["rewritten"] = len(rewritten)
    scores = traces.regrade([(response, text) for _, response, text in rewritten], config)
    rows = [
        {
            "id": response.problem.id,
            "prompt": response.problem.text,
            "response": text,
            "provenance": traces.source(teacher, number, settings.samples_per_prompt, response.text),
        }
        for (number, response, text), score in zip(rewritten, scores, strict=True)
        if score.scorable and score.parts["accuracy"] == score.parts["format"] == 1.0
    ]
    counts["right again"] = len(rows)
    rows = traces.capped(rows, settings.max_examples_per_prompt, settings.max_examples)
    counts["kept"] = len(rows)
    return rows, counts


def _rewritten(response: Response, language: str) -> str | None:
    """Returns the rewritten trace, or None when the rewrite refuses it. Text of real models is kept, only trimmed."""
    if rewrite.parse_linear(response.problem.text) is None:
        return response.text.strip()
    text = rewrite.tidy(response.problem.text, response.text, language)
    return text if text is not None and rewrite.is_sound(response.problem.text, text) else None
