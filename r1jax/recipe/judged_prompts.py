"""Stage 3's judged prompts: they have a reference but no rule verifier, and a judge accepts responses (P2 B.3.3)."""

from typing import Any

from jax.sharding import Mesh

from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.data import files
from r1jax.data.problems import as_text, from_row
from r1jax.evals.benchmarks import Response
from r1jax.recipe import common, judging, prompts, traces
from r1jax.recipe.drafts import Counts
from r1jax.schema import Config, JudgeConfig, RejectionConfig, replace


def inputs(stage: str, rejection: RejectionConfig, judge: JudgeConfig) -> dict[str, str]:
    """Returns {path: digest} of file and judge; {} without a file. Raises ValueError if file or judge is missing."""
    path = rejection.judged_prompts
    if not path:
        return {}
    judging.require_judge(stage, judge)
    return {path: files.digest(path), judge.checkpoint: common.checkpoint_digest(judge.checkpoint)}


def sample(config: Config, tokenizer: Tokenizer, mesh: Mesh, params: Any, counts: Counts) -> list[Response]:
    """Returns the policy's responses to config.rejection.judged_prompts, with the judge's verdict as accuracy.

    `counts` gets their number and the percentage of verdicts that could be read.
    """
    settings = config.rejection
    if not settings.judged_prompts:
        return []
    rows = files.read(settings.judged_prompts, config.data.columns).rows
    reference = lambda task, fields: as_text(fields.get("answer"))  # noqa: E731
    problems = [from_row(row.fields, row.place, reference, "judged") for row in rows]
    encoded = prompts.encode(problems, config.stage, config.model, config.data, config.sampler, tokenizer)
    judged_config = replace(config, stage=f"{config.stage}/judged")  # so that its random draws differ
    with judging.JudgePool(config.stage, config.seed, config.judge, config.reward, mesh) as pool:
        responses = traces.sample(
            judged_config,
            tokenizer,
            mesh,
            encoded,
            params,
            len(encoded),
            settings.samples_per_prompt,
            settings.temperature,
            pool,
        )
        counts["judged"] = len(responses)
        counts["verdicts read, %"] = round(100 * pool.parse_rate)
    return responses
