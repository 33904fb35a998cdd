"""Measure the graders on known answers, rewritten answers and near misses, or on cases with known verdicts."""

import dataclasses
import pathlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from r1jax.bench import grading_cases
from r1jax.data import answer_forms, jsonl
from r1jax.report import table
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.score import RewardRequest
from r1jax.schema import Config

FILES = ("gsm8k_test.jsonl", "math500.jsonl", "mmlu_stem.jsonl")  # of a folder
WORKERS = 2
MISSES_KEPT = 50  # of each file, written out
_SAMPLES_PER_BATCH = 1024


@dataclass(frozen=True)
class Sample:
    """One response to grade: an unchanged answer ("gold"), a rewritten one ("rewritten") or a wrong one."""

    group: str
    kind: str
    request: RewardRequest


def run(config: Config, workdir: str) -> dict:
    """Returns, by file: rows, samples, samples_per_s, fewest_rewritings (of an answer), shares, shares by kind, misses.

    `config.data.path` is a JSONL file with task math or mcq, or a folder of FILES; of each file `config.data.max_rows`
    rows are used, evenly spread. For a file of cases (grading_cases.py) it returns {workers, cases: figures} instead.
    `gold` and `rewritten` are shares graded right, `perturbed` is the share graded wrong; an unscorable sample counts
    as neither. Raises ValueError for a missing file, a bad row or another task.
    """
    if not config.data.path:
        raise ValueError(
            f"bench_grading: config.data.path is empty; give a JSONL file, or a folder with {', '.join(FILES)}"
        )
    path = pathlib.Path(config.data.path)
    reward = dataclasses.replace(config.reward, workers=config.reward.workers or WORKERS)
    if path.is_file() and grading_cases.holds(path):
        case_figures = grading_cases.measure(_spread(grading_cases.read(path), config.data.max_rows), reward)
        grading_cases.show(case_figures)
        return {"workers": reward.workers, "cases": case_figures}
    paths = [path / name for name in FILES] if path.is_dir() else [path]
    rows = {
        path.stem: _spread(jsonl.read(path, ("id", "task", "prompt", "answer")), config.data.max_rows) for path in paths
    }
    figures: dict = {"workers": reward.workers, "files": {}}
    with RewardPool(reward) as pool:
        pool.score([_request({"id": "warm", "task": "math", "prompt": "", "answer": "x"}, "\\sqrt{x}")])
        for name, file_rows in rows.items():
            figures["files"][name] = _graded(
                [sample for row in file_rows for sample in samples(row)], len(file_rows), pool
            )
    _show(figures["files"])
    return figures


def samples(row: dict) -> Iterator[Sample]:
    """Yields the samples of one row: its answer, every rewriting, every perturbation. ValueError for another task."""
    answer = str(row["answer"])
    if row["task"] == "math":
        rewritten, perturbed = answer_forms.rewritings(answer), answer_forms.perturbations(answer)
    elif row["task"] == "mcq":
        options = dict(zip("ABCDEFGHIJ", map(str, row["meta"]["options"]), strict=False))
        rewritten = answer_forms.option_rewritings(answer, options)
        perturbed = answer_forms.option_perturbations(answer, options)
    else:
        raise ValueError(f"bench_grading: row {row['id']!r} has task {row['task']!r}, needs math or mcq")
    for group, forms in (("gold", {"as it is": answer}), ("rewritten", rewritten), ("perturbed", perturbed)):
        for kind, text in forms.items():
            yield Sample(group, kind, _request(row, text))


def _request(row: dict, text: str) -> RewardRequest:
    final = f"<answer>{text}</answer>" if row["task"] == "mcq" else f"So it is \\boxed{{{text}}}"
    response = f"<think>It may be \\boxed{{0}} or <answer>A</answer>.</think>\n{final}"
    return RewardRequest(str(row["id"]), row["task"], row["prompt"], response, str(row["answer"]))


def _spread(rows: list[dict], count: int) -> list[dict]:
    return rows if not count or count >= len(rows) else [rows[index * len(rows) // count] for index in range(count)]


def _graded(batch: list[Sample], rows: int, pool: RewardPool) -> dict:
    started = time.monotonic()
    scores = []
    for start in range(0, len(batch), _SAMPLES_PER_BATCH):
        scores += pool.score([sample.request for sample in batch[start : start + _SAMPLES_PER_BATCH]])
    seconds = time.monotonic() - started
    good, total = defaultdict(int), defaultdict(int)
    rewritings, misses = defaultdict(int), []
    for sample, score in zip(batch, scores, strict=True):
        expected = float(sample.group != "perturbed")
        as_expected = score.scorable and score.parts["accuracy"] == expected
        for key in ((sample.group,), (sample.group, sample.kind)):
            good[key] += as_expected
            total[key] += 1
        rewritings[sample.request.id] += sample.group == "rewritten"
        if not as_expected:
            misses.append({"id": sample.request.id, "group": sample.group, "kind": sample.kind, "detail": score.detail})
    figures: dict[str, Any] = {"rows": rows, "samples": len(batch), "samples_per_s": len(batch) / seconds}
    figures["fewest_rewritings"] = min(rewritings.values())
    figures |= {key[0]: good[key] / total[key] for key in total if len(key) == 1}
    figures["by_kind"] = {" ".join(key): [good[key], total[key]] for key in total if len(key) == 2}
    return figures | {"misses": len(misses), "first_misses": misses[:MISSES_KEPT]}


def _show(files: dict[str, dict]) -> None:
    names = ("rows", "samples", "gold", "rewritten", "perturbed", "samples_per_s")
    rows = [{"file": name} | {field: figures[field] for field in names} for name, figures in files.items()]
    table.render(rows, ("file", *names), "graded as they should be")
