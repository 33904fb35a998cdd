"""Measure the code reward: whether right programs pass and programs with a mistake fail, and samples per second."""

import json
import os
import time
from pathlib import Path

from r1jax.bench import mutants
from r1jax.core.say import say
from r1jax.data import jsonl
from r1jax.data.hashing import hash64
from r1jax.report import table
from r1jax.rewards.code.rows import MalformedTests, read_tests
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.sandbox.attack import open_sandbox
from r1jax.rewards.sandbox.run import BACKENDS, SandboxUnavailable
from r1jax.rewards.score import RewardRequest, Score
from r1jax.schema import BenchConfig, Config, RewardConfig, replace

REQUIRED_FIELDS = ("id", "prompt", "tests", "solution")
SURVIVORS_LISTED = 100


def run(config: Config, workdir: Path) -> dict:
    """Returns the figures of config.bench.code_files: JSONL rows of id, prompt, tests and solution.

    By file: how many solutions pass, with the reason for each that fails, and how many mutants of passing ones are
    killed, by kind, with the survivors (some of which behave like the original). `throughput`: by backend, samples per
    second on the first config.bench.samples solutions. Raises ValueError for no files, a bad row, or a machine without
    a sandbox.
    """
    if not config.bench.code_files:
        raise ValueError(
            "bench_code: --config.bench.code_files is empty; it needs ('FILE.jsonl',) with id, prompt, tests, solution"
        )
    reward = replace(config.reward, accuracy=1.0, format=0.0, language=0.0)
    files = {
        Path(path).stem: jsonl.read(path, REQUIRED_FIELDS)[: config.data.max_rows or None]
        for path in config.bench.code_files
    }
    figures: dict = {
        "workers": reward.workers,
        "cores": os.cpu_count(),
        "backend": open_sandbox(reward.sandbox).backend,
    }
    figures |= {name: _file_figures(name, rows, reward, config.seed, config.bench) for name, rows in files.items()}
    rows = [row for group in files.values() for row in group][: config.bench.samples]
    figures["throughput"] = _throughput(rows, reward)
    _show(figures, list(files))
    return figures


def reference_request(row: dict) -> RewardRequest:
    """Returns the request whose response to a row is the row's own solution."""
    return _request(row, row["solution"], "solution")


def mutant_requests(row: dict, count: int, seed: int) -> list[tuple[mutants.Mutant, RewardRequest]]:
    """Returns up to `count` mutants of a row's solution, each with the request whose response is that mutant.

    The mistake is always in the solution. Raises SyntaxError if the solution, even after its prompt, is no program.
    """
    prelude = ""
    if read_tests(json.dumps(row["tests"]), row["prompt"])["kind"] == "python-check":
        prelude = row["prompt"].rstrip("\n") + "\n"  # the solution may be a bare body
    mutated = mutants.mutants(
        prelude + row["solution"], prelude.count("\n") + 1, count, hash64("bench_code", seed, row["id"])
    )
    return [(mutant, _request(row, mutant.code, f"{mutant.kind}, line {mutant.line}")) for mutant in mutated]


def _request(row: dict, code: str, what: str) -> RewardRequest:
    response = f"<think>\n</think>\n```python\n{code}\n```\n"
    return RewardRequest(f"{row['id']}: {what}", "code", row["prompt"], response, json.dumps(row["tests"]))


def _file_figures(name: str, rows: list[dict], reward: RewardConfig, seed: int, bench: BenchConfig) -> dict:
    scores = _scores([reference_request(row) for row in rows], reward)
    failed = {row["id"]: score.detail for row, score in zip(rows, scores, strict=True) if score.parts["accuracy"] < 1}
    pairs = []
    for row in rows:
        if row["id"] not in failed:
            try:
                pairs += mutant_requests(row, bench.mutants_per_row, seed)
            except (SyntaxError, MalformedTests) as error:
                raise ValueError(f"bench_code: {name}, row {row['id']!r}: {error}") from None
    mutant_scores = _scores([request for _, request in pairs], reward)
    killed, kinds, survivors = 0, {}, []
    for (mutant, request), score in zip(pairs, mutant_scores, strict=True):
        dead = score.parts["accuracy"] < 1
        killed += dead
        total = kinds.setdefault(mutant.kind, [0, 0])
        total[0], total[1] = total[0] + dead, total[1] + 1
        if not dead:
            survivors.append(request.id)
    return {
        "rows": len(rows),
        "passed": len(rows) - len(failed),
        "failed": failed,
        "mutants": len(pairs),
        "killed": killed,
        "killed_share": killed / max(1, len(pairs)),
        "killed_by_kind": {kind: {"killed": dead, "mutants": total} for kind, (dead, total) in sorted(kinds.items())},
        "unscorable_mutants": sum(not score.scorable for score in mutant_scores),
        "survivors": survivors[:SURVIVORS_LISTED],
    }


def _scores(requests: list[RewardRequest], reward: RewardConfig) -> list[Score]:
    with RewardPool(reward) as pool:
        return pool.score(requests)


def _throughput(rows: list[dict], reward: RewardConfig) -> dict:
    figures = {}
    for backend in BACKENDS:
        limited = replace(reward, sandbox=replace(reward.sandbox, backend=backend))
        try:
            with RewardPool(limited) as pool:
                pool.score([reference_request(rows[-1])])  # the workers start, the sandbox is attacked
                started = time.monotonic()
                scores = pool.score([reference_request(row) for row in rows[:-1]])
                seconds = time.monotonic() - started
        except SandboxUnavailable as error:
            say(f"bench_code: no figures of {backend}: {error}")
            continue
        passed = sum(score.parts["accuracy"] for score in scores)
        figures[backend] = {
            "samples": len(scores),
            "passed": int(passed),
            "seconds": seconds,
            "samples_per_s": len(scores) / seconds,
        }
    return figures


def _show(figures: dict, names: list[str]) -> None:
    columns = ("rows", "passed", "mutants", "killed", "killed_share")
    table.render([{"": name} | figures[name] for name in names], ("", *columns), "programs and their mutants")
    rows = [{"": backend} | backend_figures for backend, backend_figures in figures["throughput"].items()]
    table.render(rows, ("", "samples", "passed", "seconds", "samples_per_s"), f"{figures['workers']} workers")
