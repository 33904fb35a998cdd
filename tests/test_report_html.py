"""Claims about the report page, rendered by headless Chromium."""

import html as entities
import json
import math
import os
import re
import shutil
import subprocess
import threading

import pytest

from r1jax.evals.behaviour import parse_trace
from r1jax.report import html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *(
        "--disable-component-update",
        "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--window-size=1280,1600",
    ),
)
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & \u2028 \ud83d"
)
GOOD = "<think> 7 * 4 = 28 + 5 = 33 < 40 no wait 7 * 5 = 35 + 5 = 40 = 40 ok </think> <answer> 5 </answer>"
FALSE_SUM = "<think> 7 * 3 = 21 + 5 = 27 = 40 ok </think> <answer> 3 </answer>"
UNTAGGED = "7 * 3 = 21 + 5 = 27 = 40 attends 35 = 40 + 2"
CUT_OFF = "<think> 7 * 9 = 63 + 5 = 69 > 40 non attends <think> 7 * 35 = 40 -3 < -2 wait 1 = 1"
TEXTS = (GOOD, HOSTILE, FALSE_SUM, UNTAGGED, CUT_OFF)
FIGURES = {
    "base": {"pass@1": 0.1234, "arithmetic_true": 0.97, "compute": 0.0, "problems": 583.0, "samples": 2332.0},
    "dev1": {"pass@1": 0.6115, "compute": 1.3e11, "language_consistency": math.nan},
    "r1_zero": {
        **{"pass@1": 0.7384, "pass@1_se": 0.0114, "greedy": 0.6981, "cons@16": 0.9688, "compute": 4.44e12},
        **{"first_guess_accuracy": 0.370, "final_accuracy": 0.895, "fixed": 0.5274, "broken": 0.0021},
        **{"arithmetic_true": 0.978, "p_right_given_ok": 0.902, "accuracy_at_3_rechecks": 0.42},
        **{"share_at_3_rechecks": 0.38, "mean_tokens": 45.95},
    },
}


def sample(text, accuracy, **more):
    parts = {"accuracy": accuracy, "format": 1.0, "language": math.nan}
    fields = {"prompt": "solve 7 x + 5 = 40 :", "answer": "5", "text": text, "tokens": 31, "truncated": False}
    return fields | {"parts": parts} | more


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Returns a run's folder: an RL stage with five responses and an SFT stage with a thousand."""
    folder = tmp_path_factory.mktemp("run")
    zero, cold = folder / "r1_zero", folder / "stage1_coldstart"
    zero.mkdir()
    cold.mkdir()
    rows = [
        {"update": u, "reward": 0.01 * u, "accuracy": 0.008 * u, "length": 14 + u, "reflective_words": u / 50}
        for u in range(1, 101)
    ]
    write_lines(zero / "metrics.jsonl", rows)
    write_lines(
        zero / "timing.jsonl",
        [
            {"update": 1, "rollout_s": 4.0, "rollout_mfu": 0.02, "update_s": 1.0, "update_mfu": 0.332},
            {"update": 2, "rollout_s": 2.0, "rollout_mfu": 0.05},
        ],
    )
    write_lines(zero / "samples.jsonl", [sample(text, float(text == GOOD)) for text in TEXTS])
    scores = [{"update": update, "reward": update / 4, "advantage": None} for update in (1, 1, 41, 81)]
    write_lines(zero / "rollout_samples.jsonl", [sample(HOSTILE, 0.0, **more) for more in scores])
    (zero / "config.json").write_text(json.dumps({"preset": "tiny", "seed": 17}))
    (zero / "figures.json").write_text(json.dumps({"updates": 100, "seconds": 214.6}))
    write_lines(cold / "metrics.jsonl", [{"update": 1, "loss": 0.5}])
    write_lines(cold / "samples.jsonl", [sample(GOOD, 1.0, tokens=place) for place in range(1000)])
    with open(cold / "samples.jsonl", "a") as file:
        file.write('{"prompt": "cut of')
    return folder


@pytest.fixture(scope="module")
def page(workdir):
    stages = html.collect(workdir, {"r1_zero": "r1_zero", "stage1_coldstart": "dev1", "distill": "student"})
    html.write_run(workdir / "report.html", {"checkpoints": FIGURES, "wall_s": 12.0}, stages)
    return workdir / "report.html"


@pytest.fixture(scope="module")
def opened(page, tmp_path_factory):
    """Returns a function that opens a page in Chromium after more of its own script; gives (document, network log)."""
    if CHROMIUM is None:
        reason = "no chromium to open the report with (Debian package chromium)"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)

    def run(script="", text=None):
        folder = tmp_path_factory.mktemp("opened")
        path, log = folder / "page.html", folder / "network.json"
        path.write_text((text or page.read_text()).replace("</body>", f"<script>{script}</script></body>"))
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", f"--log-net-log={log}", "--dump-dom"]
        done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-500:]
        return done.stdout, log.read_text()

    return run


@pytest.fixture(scope="module")
def rendered(opened):
    return opened()


def requests(log):
    """Returns the addresses that a page asked for; what Chromium asks for by itself has no origin and fails to resolve."""
    parameters = [event.get("params", {}) for event in json.loads(log)["events"]]
    return {found["url"] for found in parameters if found.get("initiator", "not an origin") != "not an origin"}


def samples_in(text):
    return json.loads(re.search(r'(?s)id="samples">(.*?)</script>', text)[1])


def cells(document, name):
    """Returns the texts of a checkpoint's rows in all tables, in order."""
    rows = re.findall(rf'<tr><th scope="row">{name}</th>(.*?)</tr>', document)
    return [re.findall(r"<td>(.*?)</td>", row) for row in rows]


def test_table_and_curves_are_there_without_any_script(page):
    body = page.read_text().split("<script")[0]
    assert body.count("<polyline") == len(html.MEASURES)
    assert "<td>85.7%</td>" in body and "<td>14.3%</td>" in body  # 6 s of rollout and 1 s of update
    assert "<p>Model FLOPs utilisation of r1_zero: rollout 3.0%, update 33.2%.</p>" in body
    assert cells(body, "r1_zero")[0] == ["r1_zero", "tiny", "17", "100", "–", "215"]
    assert "583 problems" not in body  # the checkpoints do not all say so


def test_chromium_shows_the_figures_of_every_checkpoint(rendered):
    _, main, checks, _ = cells(rendered[0], "r1_zero")
    assert main == [
        *("–", "0.738 ± 0.011", "0.698", "0.969", "46.0", "–", "–", "–", "–", "0.978", "0.370 → 0.895", "0.527"),
        *("0.0021", "4.44e12"),
    ]
    assert checks[1] == "0.902" and checks[-1] == "0.42 (38%)"
    assert cells(rendered[0], "dev1")[1][:2] == ["–", "0.612"] and "nan" not in rendered[0].split("<script")[0].lower()
    order = re.findall(r'<th scope="row">(\w+)</th>', rendered[0].split("Checkpoints on held-out problems")[1])[:3]
    assert order == ["base", "r1_zero", "dev1"]


def test_page_asks_for_nothing_outside_itself(page, opened, rendered):
    text = page.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:")
    own = re.sub(r'(?s)<script type="application/json".*?</script>', "", text)
    assert not re.search(r"(?:\bsrc|href|action)\s*=|url\(|@import|//[a-z]", own)
    assert requests(rendered[1]) == set()
    open_policy = "<body><img src='http://report.invalid/x.png'></body>"
    assert "http://report.invalid/x.png" in requests(opened(text=open_policy)[1])  # such a log does tell


def test_chromium_shows_a_trace_with_its_thinking_and_answer_marked(rendered):
    shown = re.search(r'(?s)<div id="trace".*?>(.*?)</div>', rendered[0])[1]
    assert shown.startswith('<span class="think"><span class="tag">&lt;think&gt;</span> 7 * 4 = ')
    assert '<span class="retry">wait</span>' in shown
    assert entities.escape("<answer>") + '</span> 5 <span class="tag">' in shown.split('<span class="answer">')[1]
    assert "1 of 5 (5 of 5 responses are in this page)" in rendered[0]


def test_arithmetic_is_marked_as_the_evaluation_counts_it(opened):
    script = """const counts = data.r1_zero.shown.map((s) => { at("trace").replaceChildren(); trace(s.text, true);
      return [".holds", ".fails"].map((name) => at("trace").querySelectorAll(name).length); });
      document.body.dataset.counts = JSON.stringify(counts);"""
    counts = json.loads(re.search(r'data-counts="([^"]*)"', opened(script)[0])[1])
    expected = [[statement.true for statement in parse_trace(text, 7, 5, 40).statements] for text in TEXTS]
    assert counts == [[found.count(True), found.count(False)] for found in expected]
    assert sum(fails for _, fails in counts) >= 5


def test_viewer_filters_searches_and_moves_by_button_and_key(opened):
    script = """const seen = [], note = () => seen.push(at("count").textContent.split(" (")[0] + ": " + at("trace").textContent);
      const set = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input")); note(); };
      const press = (key) => { at("trace").dispatchEvent(new KeyboardEvent("keydown", { key })); note(); };
      set("filter", "wrong"); set("search", "ATTENDS"); at("next").click(); note(); at("next").click(); note();
      at("previous").click(); note(); press("ArrowLeft"); press("ArrowRight"); set("search", "nowhere");
      set("search", ""); set("filter", "all"); set("stage", "dev1");
      document.body.dataset.seen = JSON.stringify(seen); document.body.dataset.width = document.documentElement.scrollWidth;"""
    document, _ = opened(script)
    seen = json.loads(entities.unescape(re.search(r'data-seen="([^"]*)"', document)[1]))
    assert [line.split(":")[0] for line in seen] == [
        *("1 of 4", "1 of 2", "2 of 2", "1 of 2", "2 of 2", "1 of 2", "2 of 2", "none", "1 of 4", "1 of 5", "1 of 200"),
    ]
    assert seen[1] == f"1 of 2: {UNTAGGED}" and seen[2] == f"2 of 2: {CUT_OFF}" and seen[7] == "none: "
    assert int(re.search(r'data-width="(\d+)"', document)[1]) <= 1280


def test_hostile_text_of_a_sample_stays_text(page, opened):
    script = 'at("next").click(); document.body.dataset.shown = at("trace").textContent;'
    document, _ = opened(script)
    shown = HOSTILE.encode("utf-8", "replace").decode()
    assert "<title>The R1 recipe</title>" in document and "<img" not in document
    assert entities.unescape(re.search(r'data-shown="([^"]*)"', document)[1]) == shown
    assert samples_in(page.read_text())["r1_zero"]["shown"][1]["text"] == shown
    assert page.read_text().count("<script") == 2


def test_responses_of_rollouts_are_shown_newest_first_and_hostile_text_stays_text(page, opened):
    script = """const set = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input")); };
      set("stage", "r1_zero, in training");
      document.body.dataset.shown = JSON.stringify([at("count").textContent, at("meta").textContent, at("trace").textContent]);"""
    document, _ = opened(script)
    count, meta, text = json.loads(entities.unescape(re.search(r'data-shown="([^"]*)"', document)[1]))
    assert count.startswith("1 of 4") and "update 81 · reward 20.25 · format 1" in meta and "advantage" not in meta
    assert text == HOSTILE.encode("utf-8", "replace").decode()
    assert "<title>The R1 recipe</title>" in document and "<img" not in document
    shown = samples_in(page.read_text())["r1_zero, in training"]["shown"]
    assert [one["update"] for one in shown] == [81, 41, 1, 1]


@pytest.fixture(scope="module")
def live(workdir):
    """Returns the text of the page while the run goes on."""
    stages = html.collect(workdir, {"r1_zero": "r1_zero"})
    html.write_run(workdir / "live.html", {"checkpoints": {}}, stages, "At work: update 3", 30)
    return (workdir / "live.html").read_text()


def test_a_page_of_a_run_at_work_loads_itself_again_and_one_of_a_finished_run_does_not(page, live):
    assert '<meta http-equiv="refresh" content="30">' in live and "<p>At work: update 3</p>" in live
    assert 'http-equiv="refresh"' not in page.read_text()
    assert "Checkpoints on held-out problems" not in live and live.count("<polyline") == len(html.MEASURES)


def test_a_page_that_is_loaded_again_shows_the_response_that_was_read_also_after_the_last_reload(page, live, opened):
    """The place in the list has changed meanwhile; the response is known by its text. The last page reloads no more."""
    script = """at("filter").value = "wrong"; at("filter").dispatchEvent(new Event("input"));
      while (current.text !== "%s") at("next").click();
      at("marks").checked = false; dispatchEvent(new Event("pagehide"));
      document.body.dataset.kept = sessionStorage.getItem(kept);"""
    kept = entities.unescape(re.search(r'data-kept="([^"]*)"', opened(script % UNTAGGED, live)[0])[1])
    before = json.loads(kept)
    assert before["values"] == ["r1_zero", "wrong", ""] and before["current"]["text"] == UNTAGGED
    stored = f"<script>sessionStorage.setItem(`r1jax ${{location.pathname}}`, {json.dumps(kept)})</script>"
    newer = json.loads(re.search(r'(?s)id="samples">(.*?)</script>', live)[1])
    newer["r1_zero"]["shown"].insert(0, newer["r1_zero"]["shown"][2])
    script = "document.body.dataset.shown = JSON.stringify([at('count').textContent, at('filter').value, current.text])"
    for later in (live, page.read_text()):
        grown = re.sub(r'(?s)(id="samples">).*?(</script>)', lambda m: m[1] + html._safe_json(newer) + m[2], later)
        document, _ = opened(script, grown.replace("<body>", f"<body>{stored}", 1))
        count, filtered, text = json.loads(entities.unescape(re.search(r'data-shown="([^"]*)"', document)[1]))
        assert text == UNTAGGED and filtered == "wrong" and count.startswith("4 of 5 (")
        assert 'id="marks" type="checkbox"' in document


@pytest.mark.usefixtures("opened")
def test_a_browser_loads_the_page_of_a_run_at_work_again_and_shows_the_same_place(live, tmp_path):
    script = """const loads = Number(sessionStorage.getItem("loads") || 0) + 1; sessionStorage.setItem("loads", loads);
      const seen = [at("count").textContent.split(" (")[0], `scrolled by ${scrollY}`, `read to ${at("trace").scrollTop}`];
      console.log(`load ${loads}: ${seen.join(", ")}, in ${document.activeElement.id} at ${at("search").selectionStart}.`);
      if (loads === 1) { at("next").click(); scrollTo(0, 200); at("trace").scrollTop = 7; at("trace").focus({ preventScroll: true }); }
      if (loads === 2) { at("search").value = "cr"; at("search").focus({ preventScroll: true }); at("search").setSelectionRange(1, 1); }"""
    page = live.replace('content="30"', 'content="1"').replace("</body>", f"<script>{script}</script></body>")
    page = page.replace("</style>", "#trace { max-height: 10px; }</style>")
    (tmp_path / "page.html").write_text(page)
    flags = [*FLAGS, "--window-size=900,500", "--enable-logging=stderr", "--remote-debugging-port=0"]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path}/profile", (tmp_path / "page.html").as_uri()]
    seen, pattern = [], re.compile(r"load (\d+): (.*?)\.")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as browser:
        stop = threading.Timer(60, browser.kill)
        stop.start()
        for line in browser.stderr:
            if match := pattern.search(line):
                seen.append(match[2])
                if match[1] == "3":
                    browser.terminate()
        stop.cancel()
    assert seen[:3] == [
        "1 of 5, scrolled by 0, read to 0, in  at 0",
        "2 of 5, scrolled by 200, read to 7, in trace at 0",
        "1 of 1, scrolled by 200, read to 7, in search at 1",
    ]


def test_stages_that_learn_from_examples_have_a_curve_of_their_loss_and_long_curves_are_thinned(tmp_path):
    rows = [{"update": update, "loss": 2 / update} for update in range(1, 2 * html.POINTS + 2)]
    html.write(tmp_path / "report.html", "one", "", [], [html.StageData("dev1", rows, {}, [])])
    text = (tmp_path / "report.html").read_text()
    assert "Training on examples" in text and "Training by reinforcement learning" not in text
    points = re.search(r'<polyline points="([^"]*)"', text)[1].split()
    assert html.POINTS / 2 < len(points) <= html.POINTS
    assert f"from {rows[1]['loss']:.2f}" in text or f"from {rows[0]['loss']:.2f}" in text
    assert points[-1].startswith(f"{html.RIGHT:.1f},")  # the last update


def test_a_response_that_no_grader_scored_is_not_called_wrong(tmp_path):
    rows = [{**sample(GOOD, 1.0), "update": 1, "parts": parts} for parts in ({"reward_model": 0.5}, {"accuracy": 0.0})]
    html.write(tmp_path / "report.html", "one", "", [], [html.StageData("rl", [], {}, [], rollouts=rows)])
    shown = samples_in((tmp_path / "report.html").read_text())["rl, in training"]["shown"]
    assert [one["verdict"] for one in shown] == ["not graded", "wrong"]


def test_samples_are_thinned_evenly(page):
    found = samples_in(page.read_text())["dev1"]
    assert found["drawn"] == 1000  # the last line was cut off
    assert [one["tokens"] for one in found["shown"]] == list(range(0, 1000, 1000 // html.SAMPLES_SHOWN))


def test_page_stays_below_three_megabytes_when_responses_are_long(tmp_path):
    long = [sample("<think> " + "wait < é " * 20_000, 0.0)] * 300
    stages = [html.StageData(f"stage{place}", [], {}, long) for place in range(8)]
    html.write(tmp_path / "report.html", "long", "", [], stages)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    found = samples_in((tmp_path / "report.html").read_text())
    assert {len(one["shown"]) for one in found.values()} == {len(found["stage0"]["shown"])}
    assert len(found["stage0"]["shown"]) >= 10
    assert found["stage0"]["shown"][0]["text"].endswith("characters left out]")


def test_axes_hold_every_value_and_a_single_point_is_a_dot(tmp_path):
    assert html._axis(-0.3, 1.1) == pytest.approx([-0.5, 0.0, 0.5, 1.0, 1.5])
    assert html._axis(0.0, 0.0)[0] == 0.0
    rows = [{"update": 1, "reward": -0.25, "accuracy": 0.0, "length": math.nan}]
    html.write(tmp_path / "report.html", "one", "", [], [html.StageData("r1_zero", rows, {}, [])])
    text = (tmp_path / "report.html").read_text()
    assert text.count("<circle") == 2 and "<polyline" not in text and "Sampled traces" not in text


def test_evaluations_between_updates_are_a_curve_of_their_own(tmp_path):
    folder = tmp_path / "r1_zero"
    folder.mkdir()
    rows = [{"update": update, "pass@1": value} for update, value in ((10, 0.25), (20, 0.5), (30, math.nan))]
    (folder / "evaluation.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "metrics.jsonl").write_text('{"update": 1, "reward": 0.5}\n')
    (folder / "timing.jsonl").write_text('{"update": 11, "update_s": 3.0, "evaluation_s": 1.0}\n')
    html.write(tmp_path / "report.html", "one", "", [], html.collect(tmp_path, {"r1_zero": "r1_zero"}))
    text = (tmp_path / "report.html").read_text()
    assert "r1_zero, Held-out pass@1 (evaluated between updates) by policy update: from 0.25 to 0.50" in text
    assert text.count("<polyline") == 1
    assert '<span class="swatch p5"></span>evaluation' in text and "<td>25.0%</td>" in text


def test_damaged_row_is_named_with_file_and_line(tmp_path):
    (tmp_path / "r1_zero").mkdir()
    (tmp_path / "r1_zero" / "samples.jsonl").write_text('{"prompt": 1}\n{"pro\n{"prompt": 2}\n')
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2: not JSON"):
        html.collect(tmp_path, {"r1_zero": "r1_zero"})


def test_counts_of_every_filter_are_shown_by_task(tmp_path):
    folder = tmp_path / "stage1_coldstart"
    folder.mkdir()
    data = {
        **{"rows": 9, "rows_by_task": {"math": 6, "code": 2, "general": 1}, "training": 7},
        **{"training_by_task": {"math": 5, "code": 2}, "left_out": {"too_long": {"math": 1}}, "repeated_prompts": 0},
    }
    (folder / "figures.json").write_text(json.dumps({"data": data, "dev1": {"pass@1_se": 0.1, "tasks": {"mcq": {}}}}))
    examples = {"sampled": {"math": 20, "mcq": 4}, "right": {"math": 3}, "kept": {"math": 3, "": 2}, "parse rate": 0.25}
    (folder / "examples_counts.json").write_text(json.dumps(examples))
    stages = html.collect(tmp_path, {"stage1_coldstart": "dev1"})
    assert html._counted(stages) == [
        {
            "name": "dev1",
            "labels": ["(none)", "code", "general", "math", "mcq", "all"],
            "rows": [
                ["rows", "–", "2", "1", "6", "–", "9"],
                ["training", "–", "2", "–", "5", "–", "7"],
                ["left out / too long", "–", "–", "–", "1", "–", "1"],
                ["repeated prompts", "–", "–", "–", "–", "–", "0"],
                ["sampled", "–", "–", "–", "20", "4", "24"],
                ["right", "–", "–", "–", "3", "–", "3"],
                ["kept", "2", "–", "–", "3", "–", "5"],
                ["parse rate", "–", "–", "–", "–", "–", "0.25"],
            ],
        }
    ]
    html.write_run(tmp_path / "report.html", {"checkpoints": {}, "wall_s": 1.0}, stages)
    body = (tmp_path / "report.html").read_text().split("<script")[0]
    assert cells(body, "left out / too long") == [["–", "–", "–", "1", "–", "1"]]


def test_tasks_and_sources_have_a_table_where_there_are_several(tmp_path):
    each = {"problems": 3, "pass@1": 0.5, "pass@4": 0.75, "truncated": 0.25, "unscorable": 0.125, "mean_tokens": 9.5}
    figures = {**each, "tasks": {"math": each, "mcq": {**each, "pass@1": 0.25}}, "sources": {"one": each}}
    figures["notes"] = ["cons@16 leaves out 1 of 2 problems"]
    html.write_run(tmp_path / "report.html", {"checkpoints": {"r1": figures}, "wall_s": 1.0}, [])
    body = (tmp_path / "report.html").read_text().split("<script")[0]
    assert "<h2>By task</h2>" in body and "<h2>By source</h2>" not in body
    assert cells(body, "r1")[1:] == [
        ["math", "3", "0.500", "–", "0.750", "9.5", "0.250", "0.125"],
        ["mcq", "3", "0.250", "–", "0.750", "9.5", "0.250", "0.125"],
    ]
    assert "<p>r1: cons@16 leaves out 1 of 2 problems</p>" in body
