"""Stage 3: SFT of the base on rejection-sampled traces of the reasoning model, mixed with general data."""

import re
from pathlib import Path

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core.say import say
from r1jax.evals.benchmarks import Response
from r1jax.recipe import fine_tuning, general_rows, judged_prompts, lineage, parts, teachers, traces
from r1jax.recipe.drafts import Counts, Draft, counts_line, tally
from r1jax.rl.rollout import EncodedPrompt
from r1jax.schema import Config, RejectionConfig, parts_of

TEACHER = "stage2_reasoning_rl"


def run(config: Config, workdir: Path) -> dict:
    """Samples Dev2, keeps good traces, adds general data, fine-tunes the base (not Dev2) and evaluates."""
    files = judged_prompts.inputs(config.stage, config.rejection, config.judge) | general_rows.inputs(
        config.stage, config.rejection, config.judge
    )
    return fine_tuning.run(config, workdir, (TEACHER,), collect, files)


def collect(
    config: Config, tokenizer: Tokenizer, mesh: Mesh, train: list[EncodedPrompt], workdir: Path
) -> tuple[list[dict], Counts]:
    """Returns (examples with their provenance, how many of each task passed every check) (P2 B.3.3)."""
    settings, counts, sampling = config.rejection, {}, parts_of(parts.SamplingParts, config)
    teacher = teachers.load(sampling, mesh, lineage.require(TEACHER, config, workdir))
    samples = settings.samples_per_prompt
    responses = teachers.sampled(teacher, mesh, train, settings.prompts, samples, settings.temperature)
    responses += judged_prompts.sample(teacher, settings, config.judge, mesh, counts)
    checks = [*traces.basic_checks(settings.min_language_consistency), *readable(settings)]
    drafts = [
        Draft(response.problem, response.text, traces.source(teacher.name, number, samples, response.text))
        for number, response in traces.passing(responses, checks, counts)
    ]
    drafts = traces.capped(drafts, settings.max_examples_per_prompt, row_of=Draft.row)
    tally(counts, "kept", (draft.task for draft in drafts))
    num_general = round(len(drafts) * settings.general_fraction / (1 - settings.general_fraction))
    general = general_rows.chosen(sampling, settings, config.judge, mesh, num_general, counts)
    say(counts_line(config.stage, counts))
    return [draft.row() for draft in drafts] + general, counts


def readable(settings: RejectionConfig) -> list[traces.Check]:
    """Returns the checks for long paragraphs and code blocks in the thinking; the paper gives no thresholds.

    Programs in the answer are allowed, because rows of task code ask for them.
    """

    def short(response: Response) -> bool:
        return all(
            len(part.split()) <= settings.max_paragraph_words for part in re.split(r"\n\s*\n", thinking(response))
        )

    def no_code(response: Response) -> bool:
        return not settings.drop_code_blocks or not re.search("```|~~~", thinking(response))

    return [("short paragraphs", short), ("no code block", no_code)]


def thinking(response: Response) -> str:
    """Returns the text before the end of the thought."""
    return response.text.split("</think>")[0]
