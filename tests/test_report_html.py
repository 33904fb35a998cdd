"""Claims about the report page, rendered by headless Chromium."""

import html as entities
import json
import os
import re
import shutil
import subprocess

import pytest

from r1jax.report import html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"),
)
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & \u2028"
GOOD = "<think> 7 * 4 = 28 + 5 = 33 < 40 no wait 7 * 5 = 35 + 5 = 40 = 40 ok </think> <answer> 5 </answer>"


def sample(text, accuracy):
    parts = {"accuracy": accuracy, "format": 1.0, "language": 1.0}
    return {
        "prompt": "solve 7 x + 5 = 40 :",
        "answer": "5",
        "text": text,
        "tokens": 31,
        "truncated": False,
        "parts": parts,
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    rows = [
        {"update": u, "reward": 0.01 * u, "accuracy": 0.008 * u, "length": 14 + u, "reflective_words": u / 50}
        for u in range(1, 101)
    ]
    stages = [
        html.StageData("r1_zero", rows, {"rollout": 0.6, "update": 0.4}, [sample(GOOD, 1.0), sample(HOSTILE, 0.0)]),
        html.StageData("dev1", [], {}, [sample(GOOD, 1.0)] * 1000),
    ]
    checkpoints = [
        {"checkpoint": "base", "pass@1": 0.1234, "compute": 0.0},
        {"checkpoint": "r1_zero", "pass@1": 0.7384, "pass@1_se": 0.0114, "cons@16": 0.9688, "compute": 4.4e12},
    ]
    path = tmp_path_factory.mktemp("report") / "report.html"
    html.write(path, "The R1 recipe", "2 checkpoints", checkpoints, stages)
    return path


@pytest.fixture(scope="module")
def rendered(page, tmp_path_factory):
    """Returns the document as Chromium leaves it after its scripts."""
    if CHROMIUM is None:
        reason = "no chromium to open the report with (Debian package chromium)"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    profile = tmp_path_factory.mktemp("profile")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def test_table_and_curves_are_there_without_any_script(page):
    text = page.read_text()
    body = text[: text.index("<script")]
    assert "0.7384" in body and "4.40e+12" in body and "0.9688" in body
    assert body.count("<polyline") == 4
    assert "rollout 60.0%" in body


def test_page_asks_for_nothing_outside_itself(page):
    text = page.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'")
    assert not re.search(
        r"(?:src|href|action)\s*=|url\(|@import|https?://",
        re.sub(r'(?s)<script type="application/json".*?</script>', "", text),
    )


def test_chromium_shows_a_trace_with_its_thinking_marked(rendered):
    assert '<pre id="trace" tabindex="0"><span class="think">' in rendered
    assert '<span class="retry">wait</span>' in rendered
    assert entities.escape("<answer> 5 </answer>", quote=False) in rendered
    assert "1 of 2" in rendered


def test_hostile_text_of_a_sample_stays_text(page, rendered):
    assert "<title>The R1 recipe</title>" in rendered
    assert "<img" not in rendered
    found = json.loads(re.search(r'(?s)id="samples">(.*?)</script>', page.read_text())[1])
    assert found["r1_zero"][1]["text"] == HOSTILE


def test_samples_are_thinned_evenly(page):
    found = json.loads(re.search(r'(?s)id="samples">(.*?)</script>', page.read_text())[1])
    assert len(found["dev1"]) == html.SAMPLES_SHOWN
