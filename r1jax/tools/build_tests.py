"""Builds tests for code prompts: generated inputs with outputs that accepted programs agree on (P2 B.3.2)."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

from r1jax.core import hosts, sharding
from r1jax.core.say import say
from r1jax.data import jsonl
from r1jax.data.hashing import hash64
from r1jax.recipe import judging
from r1jax.rewards.code import cases as code_cases
from r1jax.rewards.code.programs import SourceCode, extract_program
from r1jax.rewards.models.judge import Judge, Request
from r1jax.rewards.sandbox.attack import open_sandbox
from r1jax.schema import BuildTestsConfig, Config, DataConfig, JudgeConfig, MeshConfig, RewardConfig, replace

ROWS_PER_PART = 8


def run(config: Config, workdir: Path) -> dict:
    """Writes rows {id, task, prompt, tests, built} to config.output, in the form that the task `code` reads.

    The rows of config.data.path are {id, prompt, accepted, wrong, generators?, float_tolerance?}; config.judge writes
    missing generators. Returns numbers of rows, tests and broken programs. A row without a test is left out. The
    output appears when it is complete; a stopped run continues where it was. Raises ValueError for a bad row, or when
    no row gets a test.
    """
    judging.require_paths(config.stage, config.data, config.output)
    started, folder = time.monotonic(), Path(workdir) / config.stage
    problems = {problem.id: problem for problem in read(config.data)}
    open_sandbox(config.reward.sandbox)
    writer = None
    if any(not problem.generators for problem in problems.values()):
        writer = generator_writer(config.stage, config.seed, config.data, config.judge, config.mesh)
    key = judging.work_key(config, config.judge.checkpoint if writer else "")

    def work(part: list[dict]) -> list[dict]:
        ready = [with_generators(problems[row["id"]], writer, config.seed, config.build_tests) for row in part]
        built = [built_row(problem, config.seed, config.reward, config.build_tests) for problem in hosts.share(ready)]
        return hosts.join_shares(built, "the tests that were built")

    built = judging.in_parts(folder, key, [{"id": name} for name in problems], work, "problems", ROWS_PER_PART)
    rows = [row for row in built if row["tests"]["cases"]]
    figures = summary(built) | {"seconds": round(time.monotonic() - started, 1)}
    say(json.dumps(figures))
    if not rows:
        raise ValueError(f"{config.stage}: no row of {config.data.path} gets a test; see 'built' of {folder}/parts-*")
    hosts.decide(jsonl.write, config.output, rows, name=config.output)
    judging.finish_parts(folder)
    return figures


def read(data: DataConfig) -> list[code_cases.CodeProblem]:
    """Returns the problems of config.data.path. Raises ValueError with file and line for a bad one."""
    problems: dict[str, code_cases.CodeProblem] = {}
    rows = jsonl.read_numbered(data.path, ("id", "prompt", "accepted", "wrong"), data.max_rows)
    for line, row in rows:
        where = f"{data.path}, line {line}"
        if str(row["id"]) in problems:
            raise ValueError(f"{where}: id {row['id']!r} was used before, needs its own")
        if not isinstance(row["accepted"], list) or len(row["accepted"]) < 2:
            raise ValueError(
                f"{where}: 'accepted' needs two programs or more, since tests they disagree on are dropped"
            )
        generators = row.get("generators") or []
        if not isinstance(generators, list) or not all(isinstance(text, str) for text in generators):
            raise ValueError(f"{where}: 'generators' must be a list of Python texts")
        programs = [tuple(source(program, where) for program in row[name]) for name in ("accepted", "wrong")]
        tolerance = row.get("float_tolerance")
        problems[str(row["id"])] = code_cases.CodeProblem(
            str(row["id"]), row["prompt"], *programs, tuple(generators), tolerance
        )
    return list(problems.values())


def source(program: object, where: str) -> SourceCode:
    """Returns a program from Python text or from {language: python or cpp, text}; ValueError for anything else."""
    if isinstance(program, str):
        return SourceCode(program, "python")
    if (
        isinstance(program, dict)
        and program.get("language") in ("python", "cpp")
        and isinstance(program.get("text"), str)
    ):
        return SourceCode(program["text"], program["language"])
    raise ValueError(
        f"{where}: a program must be Python text or {{language: python or cpp, text}}, not {str(program)[:60]!r}"
    )


def generator_writer(stage: str, seed: int, data: DataConfig, judge: JudgeConfig, mesh: MeshConfig) -> Judge:
    """Returns the model of config.judge. Raises ValueError, with the remedy, without one."""
    if not judge.checkpoint:
        raise ValueError(
            f"{stage}: rows of {data.path} have no 'generators', and no model is given to write them; "
            "give --config.judge.checkpoint=DIR"
        )
    return judging.load(stage, seed, judge, sharding.make_mesh(mesh))


def with_generators(
    problem: code_cases.CodeProblem, writer: Judge | None, seed: int, build_tests: BuildTestsConfig
) -> code_cases.CodeProblem:
    """Returns the problem with generators: its own, or the programs in the model's replies."""
    if problem.generators:
        return problem
    keys = [hash64("generator", seed, problem.id, n) for n in range(build_tests.generators_per_prompt)]
    assert writer is not None  # there is one where a problem has no generators
    [replies] = writer.replies(
        [Request(code_cases.prompt(writer.escape_special_tokens(problem.statement)), tuple(keys))]
    )
    return replace(problem, generators=generators_of(replies))


def generators_of(replies: Iterable[str | None]) -> tuple[str, ...]:
    """Returns the distinct Python programs in a model's replies; a reply without one (or None) gives none."""
    programs = [extract_program(reply) for reply in replies if reply]
    return tuple(dict.fromkeys(program.text for program in programs if program and program.language == "python"))


def built_row(problem: code_cases.CodeProblem, seed: int, reward: RewardConfig, build_tests: BuildTestsConfig) -> dict:
    """Returns the row of a problem with its tests and, in `built`, figures of how they were built."""
    built = code_cases.build(problem, build_tests, reward, seed)
    tests = {
        "kind": "stdin-stdout",
        "cases": [{"input": input_text, "output": output} for input_text, output in built.cases],
        "float_tolerance": problem.float_tolerance,
    }
    record = {name: value for name, value in vars(built).items() if name != "cases"}
    return {
        "id": problem.id,
        "task": "code",
        "prompt": problem.statement,
        "tests": tests,
        "built": record | {"generators": len(problem.generators)},
    }


def summary(rows: list[dict]) -> dict[str, int]:
    """Returns the figures of a run."""
    return {
        "rows": len(rows),
        "rows_with_tests": sum(bool(row["tests"]["cases"]) for row in rows),
        "inputs": sum(row["built"]["inputs"] for row in rows),
        "dropped_inputs": sum(row["built"]["dropped"] for row in rows),
        "tests": sum(len(row["tests"]["cases"]) for row in rows),
        "wrong_broken": sum(len(row["built"]["broken"]) for row in rows),
        "wrong_unbroken": sum(len(row["built"]["unbroken"]) for row in rows),
    }
