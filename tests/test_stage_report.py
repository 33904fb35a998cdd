"""Claims about the page of a run at work: written again and again, never the end of a run, and true when that stops."""

import contextlib
import itertools
import json
import threading
import time
from types import SimpleNamespace

import pytest

from r1jax.recipe import graph, stage_report

LIMIT_S = 60.0  # for what a thread does meanwhile, however busy the machine is


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Pages take no account of how long one took, which a busy machine decides."""
    monkeypatch.setattr(stage_report, "BUSY_SHARE", 1.0)


class Pages:
    """What is written, as (line about the run, seconds until a browser loads it again), and when, with a wait for it."""

    def __init__(self, failing=False):
        self.written, self.times, self._failing, self._more = [], [], failing, threading.Condition()

    def write(self, text, reload_s):
        with self._more:
            self.written.append((text, reload_s))
            self.times.append(time.monotonic())
            self._more.notify_all()
        if self._failing:
            raise OSError(28, "No space left on device", "report.html")

    def wait_for(self, count):
        with self._more:
            assert self._more.wait_for(lambda: len(self.written) >= count, LIMIT_S), f"no page {count}"

    def while_(self, work, every_s=0.01):
        """Returns the pages that are written while `work` runs."""
        with contextlib.suppress(KeyboardInterrupt), stage_report.refreshed(self.write, lambda: "3 of 8", every_s):
            work()
        return self.written


def test_the_page_is_written_at_once_and_again_and_not_after_the_work():
    pages = Pages()
    written = pages.while_(lambda: pages.wait_for(4))
    assert len(written) > 3 and all(text.startswith("At work: 3 of 8. A new page every ") for text, _ in written)
    assert {seconds for _, seconds in written} == {1}
    count = len(written)
    time.sleep(0.05)
    assert len(written) == count
    assert Pages().while_(lambda: None, every_s=0) == []


def test_a_page_that_takes_long_is_written_less_often(monkeypatch):
    monkeypatch.setattr(stage_report, "BUSY_SHARE", 0.25)
    clock = SimpleNamespace(perf_counter=itertools.count(0.0, 0.1).__next__, strftime=time.strftime)
    monkeypatch.setattr(stage_report, "time", clock)  # each page takes 0.1 s of it, so the next comes after 0.4 s
    pages = Pages()
    slow = pages.while_(lambda: pages.wait_for(3))
    assert "A new page every 0 s" in slow[0][0] and slow[1][1] == 1
    assert min(later - earlier for earlier, later in itertools.pairwise(pages.times)) > 0.39


def test_work_that_ends_with_an_error_leaves_a_page_that_says_so_and_reloads_no_more():
    def interrupted():
        raise KeyboardInterrupt

    text, reload_s = Pages().while_(interrupted)[-1]
    assert text.startswith("Stopped: 3 of 8. The same command goes on from here. Written at 2") and reload_s == 0
    with (
        pytest.raises(ZeroDivisionError, match="of the work"),
        stage_report.refreshed(lambda *page: 1 / 0, lambda: "", 0.01),
    ):
        raise ZeroDivisionError("of the work")


def test_a_page_that_cannot_be_written_is_mentioned_once_and_the_run_goes_on(capsys):
    ran, pages = [], Pages(failing=True)
    assert len(pages.while_(lambda: ran.append(pages.wait_for(2)))) > 1
    lines = capsys.readouterr().err.splitlines()
    assert ran and lines == [
        "warning: the report could not be written, and the run goes on: report.html: no space left on device"
    ]


def test_a_last_page_that_cannot_be_written_is_a_warning_too(tmp_path, capsys):
    (tmp_path / "samples.jsonl").write_text("damaged\n")
    stage_report.write_final(tmp_path, "r1_zero", {"checkpoints": {}})
    (tmp_path / "summary").mkdir()
    (tmp_path / "summary" / "report.html").mkdir()
    stage_report.write_or_warn(tmp_path / "summary" / "report.html", {"checkpoints": {}}, tmp_path / "summary", {})
    damaged, folder = capsys.readouterr().err.splitlines()
    assert damaged.endswith(f"the run goes on: {tmp_path}/samples.jsonl, line 1: not JSON, needs one object per line")
    assert folder.startswith("warning: the report could not be written, and the run goes on: ")


def test_the_page_of_a_stage_says_what_it_does_now_until_its_last_figure(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"update": 8}\n')
    seen = []

    def look(words):
        limit = time.monotonic() + LIMIT_S
        while not (page := tmp_path / "report.html").exists() or words not in page.read_text():
            assert time.monotonic() < limit, words
            time.sleep(0.005)
        seen.append(words)

    with pytest.raises(OSError, match="figures"), stage_report.while_working(tmp_path, "dev1", 0.01) as work:
        look("At work: preparation of the updates")
        work.updates = 9
        look("At work: training, 8 of 9 updates made")
        work.updates = None
        look("At work: evaluation after 8 updates")
        raise OSError("figures")
    look("<p>Stopped: evaluation after 8 updates. The same command goes on from here")
    assert len(seen) == 4 and 'http-equiv="refresh"' not in (tmp_path / "report.html").read_text()


def test_the_page_of_a_graph_at_work_shows_what_is_done_and_which_stage_runs(tmp_path):
    figures = {"base": {"pass@1": 0.125}, "r1_zero": {"pass@1": 0.75, "pass@1_se": 0.01}, "compute": 1.0}
    for stage, name, text in (
        ("r1_zero", "DONE", json.dumps({"figures": figures})),
        ("stage1_coldstart", "metrics.jsonl", '{"loss": 1.5, "update": 1}\n'),
    ):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / name).write_text(text)
    with graph._report_while_working(("r1_zero", "stage1_coldstart", "distill"), tmp_path, 30):
        limit = time.monotonic() + LIMIT_S
        while not (tmp_path / "report.html").exists():
            assert time.monotonic() < limit
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
