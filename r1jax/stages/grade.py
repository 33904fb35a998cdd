"""Grades responses in a JSON Lines file with the verifiers that training uses."""

import dataclasses
import pathlib
import sys
import time

from rich.progress import Progress

from r1jax.data import jsonl
from r1jax.rewards import references
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import Config, RewardConfig

REQUIRED_FIELDS = ("id", "task", "reference", "response")
DEFAULT_WORKERS = 2
_ROWS_PER_BATCH = 256  # the unit of progress and of reward.batch_deadline_s


def run(config: Config, workdir: str) -> dict:
    """Writes {id, value, scorable, detail} per row of `config.data.path` to `config.output`; value is the accuracy, 1 or 0.

    Returns rows, mean (of the scorable rows, 0 without any), scorable (rows), seconds. The output appears only when complete;
    `workdir` is not used. Raises ValueError for a missing path or output, a bad row or an unknown task.
    """
    for name, value in (("data.path", config.data.path), ("output", config.output)):
        if not value:
            raise ValueError(
                f"grade: --config.{name} is empty; it needs both --config.data.path=IN.jsonl and --config.output=OUT.jsonl"
            )
    rows = jsonl.read(config.data.path, REQUIRED_FIELDS)
    rows = rows[: config.data.max_rows or None]
    started = time.monotonic()
    requests, reward = [_request(row) for row in rows], _reward_config(config)
    checked = references.check(requests, reward)
    print(checked.line(), *checked.warnings, sep="\n", file=sys.stderr)
    scores = _score(requests, reward)
    jsonl.write(
        pathlib.Path(config.output),
        (
            {"id": row["id"], "value": score.value, "scorable": score.scorable, "detail": score.detail}
            for row, score in zip(rows, scores, strict=True)
        ),
    )
    values = [score.value for score in scores if score.scorable]
    mean = sum(values) / len(values) if values else 0.0
    seconds = time.monotonic() - started
    print(f"graded {len(rows)} rows in {seconds:.1f} s: mean {mean:.4f} of {len(values)} scorable -> {config.output}")
    return {"rows": len(rows), "mean": mean, "scorable": len(values), "seconds": seconds}


def _score(requests: list[RewardRequest], reward: RewardConfig) -> list[Score]:
    scores: list[Score] = []
    with RewardPool(reward) as pool, Progress(disable=not sys.stdout.isatty(), transient=True) as progress:
        bar = progress.add_task("grading", total=len(requests))
        for start in range(0, len(requests), _ROWS_PER_BATCH):
            batch = requests[start : start + _ROWS_PER_BATCH]
            scores += pool.score(batch)
            progress.advance(bar, len(batch))
    return scores


def _reward_config(config: Config) -> RewardConfig:
    return dataclasses.replace(
        config.reward,
        accuracy=1.0,
        format=0.0,
        language=0.0,
        workers=config.reward.workers or DEFAULT_WORKERS,
    )


def _request(row: dict) -> RewardRequest:
    return RewardRequest(
        id=str(row["id"]),
        task=row["task"],
        prompt=str(row.get("prompt") or ""),
        response=row["response"],
        reference=str(row["reference"]),
        prefill=str(row.get("prefill") or ""),
        truncated=row.get("truncated") is True,
    )
