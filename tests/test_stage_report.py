"""Claims about the page of a run at work: written again and again, never the end of a run, and true when that stops."""

import json
import time

import pytest

from r1jax.recipe import graph, stage_report


def pages_of(work, every_s=0.01, status=lambda: "3 of 8", failing=False):
    """Returns what is written, as (line about the run, seconds until a browser loads it again), while `work` runs."""
    pages = []

    def write(text, reload_s):
        pages.append((text, reload_s))
        if failing:
            raise OSError(28, "No space left on device", "report.html")

    try:
        with stage_report.refreshed(write, status, every_s):
            work()
    except KeyboardInterrupt:
        pass
    return pages


def test_the_page_is_written_at_once_and_again_and_not_after_the_work():
    pages = pages_of(lambda: time.sleep(0.3))
    assert len(pages) > 3 and all(text.startswith("At work: 3 of 8. A new page every ") for text, _ in pages)
    assert {seconds for _, seconds in pages} == {1}
    count = len(pages)
    time.sleep(0.05)
    assert len(pages) == count
    assert pages_of(lambda: None, every_s=0) == []


def test_a_page_that_takes_long_is_written_less_often(monkeypatch):
    monkeypatch.setattr(stage_report, "BUSY_SHARE", 0.25)
    slow = pages_of(lambda: time.sleep(1.0), status=lambda: time.sleep(0.1) or "3 of 8")
    assert 2 <= len(slow) <= 3  # 0.1 s of work and 0.4 s until the next
    assert "A new page every 0 s" in slow[0][0] and slow[1][1] == 1


def test_work_that_ends_with_an_error_leaves_a_page_that_says_so_and_reloads_no_more():
    def interrupted():
        raise KeyboardInterrupt

    text, reload_s = pages_of(interrupted)[-1]
    assert text.startswith("Stopped: 3 of 8. The same command goes on from here. Written at 2") and reload_s == 0
    with (
        pytest.raises(ZeroDivisionError, match="of the work"),
        stage_report.refreshed(lambda *page: 1 / 0, lambda: "", 0.01),
    ):
        raise ZeroDivisionError("of the work")


def test_a_page_that_cannot_be_written_is_mentioned_once_and_the_run_goes_on(capsys):
    ran = []
    assert len(pages_of(lambda: ran.append(time.sleep(0.1)), failing=True)) > 1
    lines = capsys.readouterr().err.splitlines()
    assert ran and lines == [
        "warning: the report could not be written, and the run goes on: report.html: no space left on device"
    ]


def test_the_page_of_a_graph_at_work_shows_what_is_done_and_which_stage_runs(tmp_path):
    figures = {"base": {"pass@1": 0.125}, "r1_zero": {"pass@1": 0.75, "pass@1_se": 0.01}, "compute": 1.0}
    for stage, name, text in (
        ("r1_zero", "DONE", json.dumps({"figures": figures})),
        ("stage1_coldstart", "metrics.jsonl", '{"loss": 1.5, "update": 1}\n'),
    ):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / name).write_text(text)
    with graph._report_while_working(("r1_zero", "stage1_coldstart", "distill"), tmp_path, 30):
        while not (tmp_path / "report.html").exists():
            time.sleep(0.01)
    page = (tmp_path / "report.html").read_text()
    assert "<p>At work: stage1_coldstart, 1 of 3 stages done. A new page every 30 s. Written at" in page
    assert "0.750 ± 0.010" in page and "Training on examples" in page


def test_the_status_counts_whole_rows_alone(tmp_path):
    assert stage_report.stage_status(tmp_path, 9) == "training, 0 of 9 updates made"
    rows = "".join(json.dumps({"update": update, "text": "x" * 20_000}) + "\n" for update in range(1, 9))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"update": 9')
    (tmp_path / "phase").write_text("rollout 8\n")
    assert stage_report.stage_status(tmp_path, 9) == "training (rollout), 8 of 9 updates made"
    assert stage_report.stage_status(tmp_path, None) == "evaluation after 8 updates"
    (tmp_path / "phase").write_text("")  # while it is written
    assert stage_report.stage_status(tmp_path, 9) == "training, 8 of 9 updates made"
