import json
import math
import subprocess
import sys

import numpy as np
import pytest

from r1jax.core.metrics import EvaluationLog, MetricsLog, read, read_evaluation, read_timing


def fill(folder, updates, **kwargs):
    log = MetricsLog(folder, tensorboard=False, **kwargs)
    for update in updates:
        log.write(update, {"reward": update / 3, "accuracy": np.float32(0.1)}, {"step_s": 0.5})
    return log


def test_write_appends_one_sorted_line_that_reads_back_bit_for_bit(tmp_path):
    fill(tmp_path, range(2)).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"accuracy": 0.10000000149011612, "reward": 0.3333333333333333, "update": 1}'
    assert read(tmp_path)[1] == {"accuracy": float(np.float32(0.1)), "reward": 1 / 3, "update": 1}
    assert read_timing(tmp_path)[1] == {"step_s": 0.5, "update": 1}


def test_write_keeps_whole_numbers_and_non_finite_values(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(0, {"tokens": np.int64(3), "kl": math.inf, "x": math.nan}, {})
    row = read(tmp_path)[0]
    assert row["tokens"] == 3 and isinstance(row["tokens"], int)
    assert row["kl"] == math.inf and math.isnan(row["x"])


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    log = fill(tmp_path, [4])
    assert [row["update"] for row in read(tmp_path)] == [4]
    log.close()


@pytest.mark.parametrize("row", [{"reward": "high"}, {"reward": None}, {"update": 1.0}])
def test_write_refuses_what_is_no_number_and_writes_nothing(tmp_path, row):
    log = MetricsLog(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="MetricsLog"):
        log.write(0, row, {})
    assert read(tmp_path) == [] and read_timing(tmp_path) == []


def test_truncate_drops_later_rows_and_writing_goes_on_as_if_uninterrupted(tmp_path):
    fill(tmp_path / "whole", range(6)).close()
    fill(tmp_path / "cut", range(5)).close()
    with open(tmp_path / "cut" / "metrics.jsonl", "ab") as file:
        file.write(b'{"accuracy": 0.1')
    log = MetricsLog(tmp_path / "cut", tensorboard=False)
    log.truncate(2)
    assert [row["update"] for row in read(tmp_path / "cut")] == [0, 1, 2]
    log.close()
    fill(tmp_path / "cut", range(3, 6)).close()
    for name in ("metrics.jsonl", "timing.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "cut").glob("*.tmp"))


def test_a_half_written_last_line_is_left_out_and_the_next_row_starts_a_new_one(tmp_path):
    fill(tmp_path, range(2)).close()
    data = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(data[:-5])
    assert [row["update"] for row in read(tmp_path)] == [0]
    fill(tmp_path, [1]).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == data


def test_a_damaged_row_before_the_last_is_named_by_file_and_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 0}\n{"upd\n{"update": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read(tmp_path)


def test_read_without_a_file_is_empty(tmp_path):
    assert read(tmp_path / "nowhere") == []


def test_tensorboard_holds_the_scalars_of_rows_and_timing(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(3, {"reward": 0.25}, {"step_s": 2.0})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert data.count(b"metrics/reward") == 1 and data.count(b"timing/step_s") == 1
    assert np.float32(0.25).tobytes() in data


def test_tensorboard_is_told_to_forget_the_steps_after_a_truncation(tmp_path):
    log = MetricsLog(tmp_path)
    log.truncate(6)
    log.write(7, {"reward": 0.25}, {})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    # protobuf of an Event: field 2 (step) is 7, then field 7 (session_log), 2 bytes long, whose status is START
    assert b"\x10\x07\x3a\x02\x08\x01" in events.read_bytes()


def test_evaluations_have_a_file_and_a_tensorboard_run_beside_the_metrics(tmp_path):
    log, other = MetricsLog(tmp_path), EvaluationLog(tmp_path)
    log.write(7, {"reward": 0.25}, {})
    for update in (6, 9):
        other.write(update, {"pass@1": 0.5})
    other.truncate(6)  # steps of the metrics after it stay
    other.close()
    log.close()
    assert [row["update"] for row in read_evaluation(tmp_path)] == [6] and len(read(tmp_path)) == 1
    (events,) = (path for path in (tmp_path / "tensorboard").iterdir() if path.is_file())
    assert b"evaluation/pass_1" not in events.read_bytes()
    (events,) = (tmp_path / "tensorboard" / "evaluation").iterdir()
    assert b"evaluation/pass_1" in events.read_bytes()


def test_host_side_modules_do_not_import_jax():
    names = ("core.metrics", "data.prompts", "data.packing", "evals.metrics", "evals.behaviour", "rl.schedules")
    names += ("report.curves", "report.table")
    code = f"import sys, importlib; [importlib.import_module('r1jax.' + n) for n in {names!r}]; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_rows_are_plain_json(tmp_path):
    fill(tmp_path, [0]).close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == read(tmp_path)[0]
