"""Stage 3's judged prompts: they have a reference but no rule verifier, and a judge accepts responses (P2 B.3.3)."""

from jax.sharding import Mesh

from r1jax.data import files
from r1jax.data.problems import as_text, from_row
from r1jax.evals.benchmarks import Response
from r1jax.recipe import common, judging, problems, prompts, traces
from r1jax.recipe.drafts import Counts
from r1jax.recipe.teachers import Teacher
from r1jax.schema import JudgeConfig, RejectionConfig, replace


def inputs(stage: str, rejection: RejectionConfig, judge: JudgeConfig) -> dict[str, str]:
    """Returns {path: digest} of file and judge; {} without a file. Raises ValueError if file or judge is missing."""
    path = rejection.judged_prompts
    if not path:
        return {}
    judging.require_judge(stage, judge)
    return problems.file_digests([path]) | {judge.checkpoint: common.checkpoint_digest(judge.checkpoint)}


def sample(
    teacher: Teacher, rejection: RejectionConfig, judge: JudgeConfig, mesh: Mesh, counts: Counts
) -> list[Response]:
    """Returns the teacher's responses to config.rejection.judged_prompts, with the judge's verdict as accuracy.

    `counts` gets their number and the percentage of verdicts that could be read.
    """
    settings = teacher.settings
    if not rejection.judged_prompts:
        return []
    rows = files.read(rejection.judged_prompts, settings.data.columns).rows
    reference = lambda task, fields: as_text(fields.get("answer"))  # noqa: E731
    problems = [from_row(row.fields, row.place, reference, "judged") for row in rows]
    encoded = prompts.encode(problems, settings, teacher.tokenizer)
    with judging.JudgePool(settings.stage, settings.seed, judge, settings.reward, mesh) as pool:
        responses = traces.sample(
            replace(settings, stage=f"{settings.stage}/judged"),  # so that its random draws differ
            teacher.tokenizer,
            mesh,
            encoded,
            teacher.params,
            len(encoded),
            rejection.samples_per_prompt,
            rejection.temperature,
            pool,
        )
        counts["judged"] = len(responses)
        counts["verdicts read, %"] = round(100 * pool.parse_rate)
    return responses
