"""The cases of ../shared/cases/io_cases.jsonl: inputs that readers, import, export and the chain of stages once got wrong."""

import functools
import json

from conftest import shared_folder, unavailable


@functools.cache
def rows() -> dict[str, dict]:
    """Returns {id: row} of every case; skips the test where the file is absent (fails it when CI=true)."""
    path = shared_folder() / "cases" / "io_cases.jsonl"
    if not path.is_file():
        unavailable(f"no cases in {path}; set R1JAX_SHARED to the folder that holds cases/")
    with path.open(encoding="utf-8") as file:
        return {row["id"]: row for row in map(json.loads, file)}


def io_case(name: str) -> dict:
    """Returns one case {id, area, input, expected, why}."""
    return rows()[name]
