import dataclasses

import pytest

from r1jax.data import jsonl
from r1jax.schema import Config, DataConfig, RewardConfig
from r1jax.tools import grade

ROWS = [
    {"id": "a", "task": "math", "reference": "#### 72", "response": "<think>x</think><answer>72</answer>"},
    {"id": 2, "task": "math", "reference": 72, "response": "It is 71."},
    {"id": "c", "task": "math", "reference": "\\sqrt{12}", "response": "so \\boxed{2\\sqrt{3}}"},
    {"id": "d", "task": "math", "reference": "\\frac{1}{", "response": "\\boxed{\\frac{1}{}}"},
    {"id": "e", "task": "math", "reference": "5", "response": "\\boxed{9^{9^{9^{9}}}}"},
]


def config(tmp_path, rows=ROWS, **changes):
    jsonl.write(tmp_path / "in.jsonl", rows)
    settings = Config(
        data=DataConfig(path=str(tmp_path / "in.jsonl")),
        output=str(tmp_path / "out" / "scores.jsonl"),
        reward=RewardConfig(deadline_s=1.0, format=1.0),
    )
    return dataclasses.replace(settings, **changes)


def test_grade_writes_the_accuracy_of_each_row_in_order(tmp_path):
    result = grade.run(config(tmp_path), str(tmp_path))
    rows = jsonl.read(tmp_path / "out" / "scores.jsonl", required=("id", "value", "scorable", "detail"))
    assert [(row["id"], row["value"], row["scorable"]) for row in rows] == [
        ("a", 1.0, True),
        (2, 0.0, True),
        ("c", 1.0, True),
        ("d", 0.0, False),
        ("e", 0.0, True),
    ]
    assert (result["rows"], result["scorable"], result["mean"]) == (5, 4, pytest.approx(2 / 4))
    assert 0.0 < result["seconds"] < 30.0


def test_grade_obeys_its_extraction_and_max_rows(tmp_path):
    settings = config(tmp_path, ROWS[:3], reward=RewardConfig(extraction="boxed"))
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, max_rows=2))
    result = grade.run(settings, "")
    assert (result["rows"], result["mean"]) == (2, 0.0)


@pytest.mark.parametrize("missing", ["data", "output"])
def test_grade_names_the_flags_when_one_is_missing(tmp_path, missing):
    settings = config(tmp_path, **({"output": ""} if missing == "output" else {"data": DataConfig()}))
    with pytest.raises(ValueError, match=r"^grade: .*--config\.data\.path=IN\.jsonl and --config\.output=OUT\.jsonl$"):
        grade.run(settings, "")


def test_grade_names_a_bad_row_and_an_unknown_task_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="in.jsonl, line 1: field 'response' is missing"):
        grade.run(config(tmp_path, [{"id": "a", "task": "math", "reference": "1"}]), "")
    with pytest.raises(ValueError, match="'a' has task 'poetry'; known tasks: math"):
        grade.run(config(tmp_path, [{**ROWS[0], "task": "poetry"}]), "")
    assert not (tmp_path / "out").exists()
