import ast
import json
import pathlib
import sys

import pytest

from r1jax import config as configs
from r1jax.bench import code as bench_code
from r1jax.bench import mutants
from r1jax.data import jsonl
from r1jax.schema import replace

ROWS = [
    {
        "id": "sum",
        "prompt": "def total(values):\n    '''Add up.'''\n",
        "tests": {
            "kind": "python-check",
            "entry_point": "total",
            "code": "def check(f):\n    assert f([1, 2, 4]) == 7\n",
        },
        "solution": "    result = 0\n    for value in values:\n        result += value\n    return result\n",
    },
    {
        "id": "larger",
        "prompt": "Write a function.",
        "tests": {
            "kind": "python-asserts",
            "setup": "",
            "asserts": ["assert larger(1, 2) == 2", "assert larger(4, 3) == 4"],
        },
        "solution": "def larger(a, b):\n    return a if a > b else b\n",
    },
]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux's namespaces")


def figures_of(paths, rows, tmp_path, **bench):
    config = configs.load("bench_code")
    config = replace(
        config, data=replace(config.data, max_rows=rows), bench=replace(config.bench, code_files=paths, **bench)
    )
    return bench_code.run(config, tmp_path)


def test_solutions_pass_and_their_mutants_are_killed(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl.write(path, ROWS)
    found = figures_of((str(path),), 0, tmp_path, mutants_per_row=4, samples=2)
    assert (found["rows"]["rows"], found["rows"]["passed"], found["rows"]["failed"]) == (2, 2, {})
    assert found["rows"]["mutants"] == 6  # of each solution's places for a mistake
    assert found["rows"]["survivors"] == []
    assert found["throughput"]["unshare"]["passed"] == 1


def test_a_slice_of_humaneval_and_mbpp_passes_and_most_mutants_fail(shared_data, tmp_path):
    paths = tuple(str(shared_data / f"{name}.jsonl") for name in ("humaneval", "mbpp"))
    found = figures_of(paths, 6, tmp_path, samples=3)
    for name in ("humaneval", "mbpp"):
        assert found[name]["failed"] == {}
        assert found[name]["killed"] >= 5


def test_the_committed_figures_are_of_every_row_and_nothing_failed():
    found = json.loads(pathlib.Path("docs/results/bench_code.json").read_text())
    assert [(found[name]["rows"], found[name]["passed"]) for name in ("humaneval", "mbpp")] == [(164, 164), (974, 974)]
    assert min(found[name]["killed_share"] for name in ("humaneval", "mbpp")) > 0.85


def test_mutants_have_one_mistake_each_in_the_lines_asked_for_and_are_drawn_by_key():
    code = "def f(a):\n    '''Doc.'''\n    if a < 3:\n        return a + 1\n    return 2 * a\n"
    found = mutants.mutants(code, 3, 99, key=1)
    assert {mutant.kind for mutant in found} == set(mutants.KINDS)
    assert len({mutant.code for mutant in found}) == len(found)
    assert all(mutant.code != ast.unparse(ast.parse(code)) for mutant in found)
    assert mutants.mutants(code, 3, 2, key=1) == found[:2]
    assert mutants.mutants(code, 5, 99, key=1) != found
    assert all(mutant.line >= 5 for mutant in mutants.mutants(code, 5, 99, key=1))


def test_no_files_is_an_error_that_says_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"bench.code_files is empty; it needs \('FILE.jsonl',\)"):
        figures_of((), 0, tmp_path)
