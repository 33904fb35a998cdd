import csv
import struct

import numpy as np
import pytest

from r1jax.report.curves import PANELS, plot, write_csv
from r1jax.report.table import cell, render

ROWS = [
    {"update": update, "reward": 0.1 * update, "accuracy": 0.05 * update, "length": 14.0 + update}
    for update in range(5)
]


def test_write_csv_gives_values_that_read_back_the_same(tmp_path):
    path = tmp_path / "deep" / "curves.csv"
    rows = [{"update": 0, "reward": 0.1 + 0.2}, {"update": 1, "name": "a,b"}]
    write_csv(rows, path, ("update", "reward", "name"))
    read = list(csv.reader(path.open()))
    assert read == [["update", "reward", "name"], ["0", "0.30000000000000004", ""], ["1", "", "a,b"]]
    assert float(read[1][1]) == 0.1 + 0.2


def test_write_csv_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "curves.csv"
    write_csv([{"update": 7}], path, ("update",))
    with pytest.raises(AttributeError):
        write_csv([{"update": 8}, None], path, ("update",))
    assert path.read_text() == "update\n7\n" and [file.name for file in tmp_path.iterdir()] == ["curves.csv"]


def test_plot_writes_a_png_of_three_panels_and_nothing_else(tmp_path):
    path = tmp_path / "curves.png"
    plot(ROWS, path)
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and (width, height) == (960, 936)
    assert len(PANELS) == 3 and [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_plot_refuses_rows_without_any_of_its_columns(tmp_path):
    with pytest.raises(ValueError, match="1 rows without a value of reward, accuracy, length"):
        plot([{"update": 0, "reward": float("nan")}], tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("a", "a"),
        (True, "True"),
        (10400, "10400"),
        (np.int64(3), "3"),
        (0.123456, "0.1235"),
        (np.float32(0.5), "0.5"),
        (1234567.8, "1234568"),
        (3e-6, "3e-06"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_cell_shows_four_digits_of_fractions_and_whole_numbers_in_full(value, text):
    assert cell(value) == text


def test_render_prints_every_cell_as_it_is(capsys):
    render([{"model": "[bold]base[/bold]", "pass_at_1": 0.0913}], ("model", "pass_at_1"), "held-out [problems]")
    printed = capsys.readouterr().out
    for text in ("held-out [problems]", "model", "pass_at_1", "[bold]base[/bold]", "0.0913"):
        assert text in printed


def test_render_does_not_cut_wide_tables_when_the_output_is_a_pipe(capsys):
    columns = [f"column_number_{index}" for index in range(10)]
    render([dict.fromkeys(columns, 0.5)], columns, "wide")
    printed = capsys.readouterr().out
    assert all(column in printed for column in columns)
