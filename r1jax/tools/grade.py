"""Grades responses in a JSON Lines file with the verifiers that training uses."""

import dataclasses
import pathlib
import sys
import time

from rich.progress import Progress

from r1jax import config as configs
from r1jax.core import remote
from r1jax.core.say import say
from r1jax.data import jsonl
from r1jax.rewards import explaining, golds, references
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import Score
from r1jax.schema import Config, RewardConfig
from r1jax.tools import graded_rows

REQUIRED_FIELDS = ("id", "task", "reference", "response")
DEFAULT_WORKERS = 2
EXPLAINED = 20  # rows explained if no id is given
_ROWS_PER_BATCH = 256  # the unit of progress and of reward.batch_deadline_s


def run(config: Config, workdir: str) -> dict:
    """Writes {id, value, scorable, detail} per row of `config.data.path` to `config.output`; value is accuracy, 1 or 0.

    Returns rows, mean (of the scorable rows, 0 without any), scorable (rows), seconds. The output appears only when
    complete; `workdir` is not used. With `config.explain` it writes nothing, prints how rows are graded and returns
    that. Raises ValueError for a missing path or output, a bad row or an unknown task.
    """
    needed = {"data.path": config.data.path} | ({"output": config.output} if config.explain is None else {})
    for name, value in needed.items():
        if not value:
            raise ValueError(
                f"grade: --config.{name} is empty; it needs both --config.data.path=IN.jsonl and "
                "--config.output=OUT.jsonl"
            )
    rows = jsonl.read(config.data.path, REQUIRED_FIELDS)
    rows = rows[: config.data.max_rows or None]
    if config.explain is not None:
        return _explain(rows, config.explain, config.data.path, config.reward)
    started = time.monotonic()
    reward = _reward_config(config.reward)
    requests = [graded_rows.request(row) for row in rows]
    reference_check = references.check(requests, reward)
    gold_check = golds.check(requests, reference_check.unscorable, reward)
    say(reference_check.line(), *gold_check.lines(), *reference_check.warnings)
    scores = _score(rows, reward)
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
    target = remote.shown(config.output)
    print(f"graded {len(rows)} rows in {seconds:.1f} s: mean {mean:.4f} of {len(values)} scorable -> {target}")
    return {"rows": len(rows), "mean": mean, "scorable": len(values), "seconds": seconds}


def _score(rows: list[dict], reward: RewardConfig) -> list[Score]:
    scores: dict[int, Score] = {}
    with Progress(disable=not sys.stdout.isatty(), transient=True) as progress:
        bar = progress.add_task("grading", total=len(rows))
        for places, config in graded_rows.by_extraction(rows, reward):
            with RewardPool(config) as pool:
                for start in range(0, len(places), _ROWS_PER_BATCH):
                    batch = places[start : start + _ROWS_PER_BATCH]
                    batch_scores = pool.score([graded_rows.request(rows[place]) for place in batch])
                    scores |= zip(batch, batch_scores, strict=True)
                    progress.advance(bar, len(batch))
    return [scores[place] for place in range(len(rows))]


def _explain(rows: list[dict], row_id: str, path: str, reward: RewardConfig) -> dict:
    """Prints how the row with an id is graded, or for "" the first EXPLAINED rows, and returns that as `explained`.

    Raises ValueError if no row has that id.
    """
    chosen = [row for row in rows if str(row["id"]) == row_id] if row_id else rows[:EXPLAINED]
    if not chosen:
        near = configs.hint(row_id, [str(row["id"]) for row in rows]) or f"the first is {rows[0]['id']!r}"
        raise ValueError(f"--explain={row_id}: no row of {path} has that id; {near.rstrip('; ')}")
    by_place: dict[int, explaining.Explained] = {}
    for places, config in graded_rows.by_extraction(chosen, _reward_config(reward)):
        requests = [graded_rows.request(chosen[place]) for place in places]
        by_place |= zip(places, explaining.explain(requests, config), strict=True)
    explained = [by_place[place] for place in range(len(chosen))]
    print("\n\n".join("\n".join(explanation.lines()) for explanation in explained))
    if not row_id and len(rows) > len(chosen):
        print(f"\n{len(rows) - len(chosen)} more rows; --explain=ID shows one of them")
    return {"explained": [explanation.figures() for explanation in explained]}


def _reward_config(reward: RewardConfig) -> RewardConfig:
    return dataclasses.replace(
        reward,
        accuracy=1.0,
        format=0.0,
        language=0.0,
        workers=reward.workers or DEFAULT_WORKERS,
    )
