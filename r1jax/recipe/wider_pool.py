"""Stage 3's wider pool: prompts with a reference but without a rule verifier, whose responses a judge accepts (P2 B.3.3)."""

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
    """Returns {path: digest} of what the pool is made from; {} without one. Raises ValueError for a missing file or judge."""
    path = rejection.judged_prompts
    if not path:
        return {}
    judging.require_judge(stage, judge)
    return {path: files.digest(path), judge.checkpoint: common.checkpoint_digest(judge.checkpoint)}


def sample(config: Config, tokenizer: Tokenizer, mesh: Mesh, params: Any, counts: Counts) -> list[Response]:
    """Returns the policy's responses to config.rejection.judged_prompts, their accuracy the judge's verdict; [] without any.

    `counts` gets their number and the share of verdicts, in percent, that could be read.
    """
    settings = config.rejection
    if not settings.judged_prompts:
        return []
    rows = files.read(settings.judged_prompts, config.data.columns).rows
    judged = lambda task, fields: as_text(fields.get("answer"))  # noqa: E731
    found = [from_row(row.fields, row.place, judged, "judged") for row in rows]
    asked = prompts.encode(found, config.stage, config.model, config.data, config.sampler, tokenizer)
    own = replace(config, stage=f"{config.stage}/judged")  # draws of its own
    with judging.JudgePool(config.stage, config.seed, config.judge, config.reward, mesh) as pool:
        drawn = traces.sample(
            own, tokenizer, mesh, asked, params, len(asked), settings.samples_per_prompt, settings.temperature, pool
        )
        counts["judged"] = len(drawn)
        counts["verdicts read, %"] = round(100 * pool.parse_rate)
    return drawn
