"""Files as they come, a Parquet file, a data set's own column names, messages, a byte order mark: RL and SFT run on each."""

import json
import pathlib

import pytest
from test_io_cases_lineage import RL, SMALL, done, rows, run, write_model

TRACE = "<think> 7 * 1 = 7 ok </think> <answer> {answer} </answer>"


def as_parquet(path: pathlib.Path, some: list[dict]) -> pathlib.Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_lines(path: pathlib.Path, some: list[dict], mark: bytes = b"", end: str = "\n") -> pathlib.Path:
    path.write_bytes(mark + "".join(json.dumps(row) + end for row in some).encode())
    return path


def written(kind: str, path: pathlib.Path) -> pathlib.Path:
    """Writes twelve equations with right traces in one form of file."""
    some = [row | {"response": TRACE.format(**row)} for row in rows(12)]
    if kind == "parquet":
        return as_parquet(path, some)
    if kind == "problem, solution, answer":
        return as_lines(
            path, [{"problem": r["prompt"], "solution": r["response"], "answer": r["answer"]} for r in some]
        )
    if kind == "messages":
        turns = [
            [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}] for r in some
        ]
        return as_lines(path, [{"messages": turn, "answer": r["answer"]} for turn, r in zip(turns, some, strict=True)])
    return as_lines(path, some, b"\xef\xbb\xbf", "\r\n")


@pytest.mark.parametrize("kind", ["parquet", "problem, solution, answer", "messages", "byte order mark"])
def test_rl_and_sft_run_on_files_as_they_come(kind, tmp_path):
    path = written(kind, tmp_path / "F.jsonl")
    world = write_model(tmp_path / "base", 0), path, tmp_path / "W"
    assert run("r1_zero", world, fields=RL | {"data.task": "math"}) == 0
    data = done(world, "r1_zero")["figures"]["data"]
    assert data["rows_by_task"] == {"math": 12} and data["training"] + data["held_out"] == 12
    fields = SMALL | {"distill.examples": path, "data.path": None, "data.holdout_fraction": None, "data.task": "math"}
    fields |= {"sft.epochs": 1, "sft.examples_per_update": 5, "pack.row_tokens": 48, "pack.rows_per_micro_batch": 4}
    assert run("distill", world, fields=fields | {"evaluation.max_problems": 2}) == 0
    assert done(world, "distill")["figures"]["examples"] == 12
