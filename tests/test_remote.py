"""Claims about runs whose work folder, data, checkpoints and outputs are at URLs: what they leave is a local run's."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import fsspec
import pytest
from remote_file_system import FailingFileSystem

from r1jax import config as configs
from r1jax import launch, paths, schema
from r1jax.core import remote, url_lock, urls
from r1jax.data import tasks
from r1jax.rl.recorder import Recorder

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHORT = [
    *("--config.grpo.updates=4", "--config.grpo.updates_per_rollout=2", "--config.grpo.prompts_per_update=4"),
    *("--config.grpo.group_size=4", "--config.sampler.slots=16", "--config.sampler.max_new_tokens=24"),
    *("--config.pack.rows_per_micro_batch=8", "--config.checkpointing.every_updates=1"),
    *("--config.evaluation.samples_per_problem=1", "--config.evaluation.max_problems=8"),
    "--config.evaluation.greedy=false",
]
CHANGING = {"timing.jsonl", "report.html", "curves.png", "phase"}  # hold seconds of the clock, or how they were drawn


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    before, os.environ["R1JAX_URL_CACHE"] = os.environ.get("R1JAX_URL_CACHE"), str(folder)
    yield folder
    os.environ.pop("R1JAX_URL_CACHE") if before is None else os.environ.update(R1JAX_URL_CACHE=before)


@pytest.fixture(autouse=True)
def store(monkeypatch):
    monkeypatch.setattr(url_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(url_lock, "SILENT_S", 1.0)
    FailingFileSystem.clear()
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield memory
    memory.store.clear()
    FailingFileSystem.clear()


def command(config, workdir, *more):
    return [f"--config={config}", f"--workdir={workdir}", *more]


def comparable(name, content):
    """Returns a file's content without what differs between two runs on one machine: seconds, and times of events."""
    if name == "DONE" or name.endswith("figures.json"):
        record = json.loads(content)
        figures = record.get("figures", record)
        for key in ("seconds", "split"):
            figures.pop(key, None)
        return record
    return content


def stage_files(files):
    """Returns {name: content} of a stage's files that two equal runs have alike."""
    return {
        name: comparable(name, content)
        for name, content in files.items()
        if name not in CHANGING and not name.startswith(("tensorboard/", "checkpoints/", "."))
    }


def local_files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def url_files(file_system, folder):
    start = f"{folder}/"
    return {name.removeprefix(start): file_system.cat_file(name) for name in file_system.find(folder)}


@pytest.fixture(scope="module")
def local_run(tmp_path_factory):
    """Returns the work folder of a run on local paths with its export beside."""
    folder = tmp_path_factory.mktemp("local") / "runs"
    assert launch.main(command("r1_zero", folder, *SHORT)) == 0
    assert (
        launch.main(
            ["--config=export_hf", f"--config.checkpoint={folder / 'r1_zero'}", f"--config.output={folder / 'hf'}"]
        )
        == 0
    )
    return folder


def interrupted_at(monkeypatch, update):
    """Makes the run end as by Ctrl-C when it has recorded an update."""
    recorded = Recorder.update

    def record(recorder, stats):
        recorded(recorder, stats)
        if recorder.run.cursor.update == update:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "update", record)


def test_a_run_at_a_url_is_stopped_resumes_and_exports_with_the_bits_of_a_local_one(
    local_run, store, monkeypatch, cache, capfd
):
    url, arguments = "memory://bucket/runs", command("r1_zero", "memory://bucket/runs", *SHORT)
    with monkeypatch.context() as patch:
        interrupted_at(patch, 3)
        assert launch.main(arguments) == 130
    assert list(cache.glob("work/*/*")) == []  # nothing of the run is left on this machine
    stopped = url_files(store, "/bucket/runs")
    assert {name.split("/")[2] for name in stopped if name.startswith("r1_zero/checkpoints/")} == {"1", "2"}
    assert len(stopped["r1_zero/metrics.jsonl"].splitlines()) == 3 and ".r1jax/lock.json" not in stopped
    capfd.readouterr()
    assert launch.main(arguments) == 0
    shown = capfd.readouterr().err
    assert "memory://bucket/runs: fetched" in shown
    finished = url_files(store, "/bucket/runs/r1_zero")
    assert stage_files(finished) == stage_files(local_files(local_run / "r1_zero"))
    assert {name.split("/")[1] for name in finished if name.startswith("checkpoints/")} == {"3", "4"}
    assert (
        launch.main(arguments) == 0
        and launch.main(command("r1_zero", url, *SHORT, "--config.optimizer.learning_rate=1")) == 2
    )
    assert "memory://bucket/runs/r1_zero holds a run with another config" in capfd.readouterr().err
    export = ["--config=export_hf", f"--config.checkpoint={url}/r1_zero", "--config.output=memory://bucket/hf"]
    assert launch.main([*export, "--json=memory://bucket/figures.json"]) == 0
    assert url_files(store, "/bucket/hf") == local_files(local_run / "hf")
    assert json.loads(store.cat_file("/bucket/figures.json"))["tensors"] > 0
    assert launch.main(export) == 2
    assert "memory://bucket/hf exists already; name another --config.output" in capfd.readouterr().err
    naming = [name for name, content in finished.items() if str(cache).encode() in content]
    assert [name for name in naming if not name.startswith("checkpoints/")] == []  # orbax notes its path there


LOCKER = """
import sys, time
from r1jax.core import url_lock
url_lock.BEAT_S = 0.1
lock = url_lock.UrlLock(sys.argv[1])
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def locked(tmp_path):
    """Yields (a URL whose lock another process has, the process)."""
    url = f"local://{tmp_path}/runs"
    process = subprocess.Popen([sys.executable, "-c", LOCKER, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield url, process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_until_the_first_one_is_killed(locked, capsys, tmp_path):
    url, process = locked
    assert launch.main(command("r1_zero", url, *SHORT)) == 2
    said = f"error: {url} is in use by process {process.pid} on {socket.gethostname()} since "
    assert said in capsys.readouterr().err and not (tmp_path / "runs" / "r1_zero").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    started = time.monotonic()
    url_lock.UrlLock(url).release()  # a dead process of this host is known at once
    assert time.monotonic() - started < url_lock.SILENT_S
    assert not (tmp_path / "runs" / ".r1jax" / "lock.json").exists()


def test_the_lock_of_a_dead_process_of_another_host_is_taken_over_after_its_silence(store):
    record = {"pid": 7, "host": "another", "since": "2025-01-20 10:00:00", "run": "x", "beats": 3}
    store.pipe_file("/bucket/runs/.r1jax/lock.json", json.dumps(record).encode())
    started = time.monotonic()
    lock = url_lock.UrlLock("memory://bucket/runs")
    assert url_lock.SILENT_S <= time.monotonic() - started < 3 * url_lock.SILENT_S
    with pytest.raises(urls.RemoteError, match=f"is in use by process {os.getpid()} on"):
        url_lock.UrlLock("memory://bucket/runs")
    store.pipe_file("/bucket/runs/.r1jax/lock.json", json.dumps(record).encode())  # it was alive after all
    with pytest.raises(urls.RemoteError, match="is in use by process 7 on another since 2025-01-20 10:00:00"):
        lock.check()
    lock.release()
    assert store.exists("/bucket/runs/.r1jax/lock.json")  # it is the other's


def test_a_lock_that_is_given_up_meanwhile_is_taken(store):
    record = {"pid": 7, "host": "another", "since": "", "run": "x", "beats": 3}
    store.pipe_file("/bucket/runs/.r1jax/lock.json", json.dumps(record).encode())
    threading.Timer(0.3, store.rm_file, ["/bucket/runs/.r1jax/lock.json"]).start()
    url_lock.UrlLock("memory://bucket/runs").release()


def rows_at(store, url, count=6):
    rows = [json.dumps({"id": str(n), "task": "math", "reference": str(n), "response": "4"}) for n in range(count)]
    store.pipe_file(url.removeprefix("memory:/"), "\n".join(rows).encode() + b"\n")


def test_rows_are_read_from_a_url_and_a_changed_file_is_read_anew(store, tmp_path, capsys):
    arguments = [
        "--config=grade",
        "--config.data.path=memory://data/rows.jsonl",
        "--config.output=memory://out/graded.jsonl",
    ]
    for count in (6, 3):
        rows_at(store, "memory://data/rows.jsonl", count)
        assert launch.main(arguments) == 0
        graded = [json.loads(line) for line in store.cat_file("/out/graded.jsonl").splitlines()]
        assert [row["value"] for row in graded] == [float(n == 4) for n in range(count)]
    assert "-> memory://out/graded.jsonl" in capsys.readouterr().out
    assert launch.main([*arguments[:1], "--config.data.path=memory://data/none.jsonl", arguments[2]]) == 2
    assert "error: no such file or folder: memory://data/none.jsonl" in capsys.readouterr().err


def test_every_text_field_is_in_the_table_of_paths_or_is_no_path():
    fields = configs.flatten(configs.load("r1_zero"))
    texts = {key for key in fields if "str" in str(configs.field_type(schema.Config(), key))}
    listed = {*paths.READ, *paths.WRITTEN, *paths.HERE_ALONE, *paths.SETTINGS}
    assert listed <= texts and texts - listed == NO_PATHS


NO_PATHS = {
    *("bench.losses", "bench.topology", "bench.trl_python", "bench.tunix_python", "coldstart.sources", "data.columns"),
    *("data.instruction", "data.task", "explain", "from_stage", "grpo.kl_estimator", "input_preset", "only", "preset"),
    *("judge.sampler.stop_strings", "sampler.stop_strings", "rejection.kinds", "stage", "start"),
    *("train_eval.metric", "watch.wandb_project"),
    "reward.graders",  # of modules and files of this machine
}


def test_urls_are_replaced_in_lists_with_splits_and_in_settings_of_stages():
    asked = configs.load(
        "r1",
        [
            ("data.path", "a.jsonl, gs://b/c.jsonl,gs://b/d:train,ORG/NAME:train"),
            ("model.checkpoint", "gs://b/model"),
            (
                "set",
                "('distill.distill.examples=gs://b/e.jsonl', 'r1_zero.data.instruction=gs://b/x', 'r1_zero.seed=3')",
            ),
        ],
    )
    local = paths.changed(asked, lambda path: path.replace("gs://b", "/here"))
    assert local.data.path == "a.jsonl,/here/c.jsonl,/here/d:train,ORG/NAME:train"
    assert local.model.checkpoint == "/here/model"
    assert local.set == (
        "distill.distill.examples=/here/e.jsonl",
        "r1_zero.data.instruction=gs://b/x",
        "r1_zero.seed=3",
    )
    plain = configs.load("r1", [("data.path", "a.jsonl, b.jsonl")])
    assert paths.changed(plain, str) == plain


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=r1_zero", "--sweep=seed=0,1"], "--workdir=memory://b/runs: --sweep needs a local folder; give one"),
        (
            ["--config=stage1_coldstart", "--config.coldstart.review=gs://b/review.jsonl"],
            "config.coldstart.review=gs://b/review.jsonl: is read and written on this machine alone; give a path",
        ),
        (
            ["--config=r1_zero", "--plan", "--topology=v5p:2x2x1", "--config.model.checkpoint=gs://b/model"],
            "gs://b/model: --plan reads no URL; give a local folder",
        ),
        (["--config=r1_zero", "--workdir=gs://b/runs"], "error: gs://b/runs: needs a package that is not installed"),
        (
            ["--config=r1_zero", "--json=nosuch://b/x"],
            "error: nosuch://b/x cannot be opened: Protocol not known: nosuch",
        ),
    ],
)
def test_what_cannot_be_at_a_url_is_refused_in_one_line(arguments, said, capsys, store):
    assert launch.main(["--workdir=memory://b/runs", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and said in lines[0]
    assert store.find("/b") == []


def test_several_processes_are_refused_with_the_remedy():
    asked = configs.load("r1_zero", [("data.eval_path", "gs://b/rows.jsonl")])
    for named in ({"workdir": "gs://b/runs"}, {}):
        with pytest.raises(ValueError, match="gs://b/.*: several processes need .*; mount the bucket"):
            paths.refuse(asked, named, launch.ONE_PROCESS)
    remote.refuse(launch.ONE_PROCESS)  # of what an earlier stage's config.json names
    try:
        with pytest.raises(ValueError, match="gs://b/model: several processes need"):
            remote.local("gs://b/model")
        assert remote.local("/b/model") == "/b/model"
    finally:
        remote.refuse("")
    paths.refuse(configs.load("r1_zero"), {"workdir": pathlib.Path("runs"), "json": None}, launch.ONE_PROCESS)


def test_file_urls_are_paths(tmp_path):
    path = tmp_path / "figures.json"
    assert launch.main(["--config=grade", "--dry_run", f"--json=file://{path}"]) == 0
    assert json.loads(path.read_text())["stage"] == "grade"


@pytest.fixture
def running(tmp_path):
    """Yields a function that starts a command in a process of its own, with a fresh cache folder."""
    processes = []

    def start(arguments):
        cache = tmp_path / f"cache{len(processes)}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "R1JAX_URL_CACHE": str(cache)}
        command = [sys.executable, "-m", "r1jax.launch", *arguments]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def pushed_checkpoints(folder):
    names = sorted(folder.glob(".r1jax/manifest-*.json"))
    files = json.loads(names[-1].read_text())["files"] if names else {}
    return {int(name.split("/")[2]) for name in files if name.startswith("r1_zero/checkpoints/")}


@pytest.mark.slow
def test_runs_at_a_url_that_are_killed_or_asked_to_end_go_on_elsewhere_with_the_same_bits(local_run, running, tmp_path):
    folder = tmp_path / "bucket" / "runs"
    arguments = command("r1_zero", f"local://{folder}", *SHORT)
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        before = max(pushed_checkpoints(folder) if folder.exists() else (), default=0)
        process = running(arguments)
        ends = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < ends:
            if folder.exists() and max(pushed_checkpoints(folder), default=0) > before:
                break
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate()[1]
        assert process.returncode == code, said
        assert (folder / ".r1jax" / "lock.json").exists() == (number == signal.SIGKILL)
    process = running(arguments)
    said = process.communicate()[1]
    assert process.returncode == 0 and f"local://{folder}: fetched" in said, said
    assert stage_files(local_files(folder / "r1_zero")) == stage_files(local_files(local_run / "r1_zero"))


@pytest.mark.slow
def test_a_stage_starts_from_weights_and_rows_at_urls_as_from_local_ones(local_run, store, tmp_path, capsys):
    chosen = tasks.linear_prompts("train")[:60]
    rows = [{"id": one.id, "task": one.task, "prompt": one.prompt, "answer": one.reference} for one in chosen]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "rows.jsonl").write_bytes(text)
    store.pipe_file("/data/rows.jsonl", text)
    store.put(str(local_run / "r1_zero"), "/models/r1_zero", recursive=True)

    def run(workdir, weights, path):
        fields = (f"--config.model.checkpoint={weights}", f"--config.data.path={path}")
        return launch.main(command("r1_zero", workdir, *SHORT, *fields, "--config.grpo.updates=2"))

    assert run(tmp_path / "local", local_run / "r1_zero", tmp_path / "rows.jsonl") == 0
    assert run("memory://there", "memory://models/r1_zero", "memory://data/rows.jsonl") == 0
    local, there = local_files(tmp_path / "local" / "r1_zero"), url_files(store, "/there/r1_zero")
    assert there["metrics.jsonl"] == local["metrics.jsonl"]
    done, expected = json.loads(there["DONE"]), json.loads(local["DONE"])
    url_of = {
        str(local_run / "r1_zero"): "memory://models/r1_zero",
        str(tmp_path / "rows.jsonl"): "memory://data/rows.jsonl",
    }
    assert done["output"] == expected["output"]
    assert done["inputs"] == {url_of[name]: digest for name, digest in expected["inputs"].items()}
    fields = json.loads(there["config.json"])
    assert [fields["model.checkpoint"], fields["data.path"]] == list(url_of.values())
    capsys.readouterr()
    store.pipe_file("/data/rows.jsonl", text[: text.rindex(b"\n", 0, -1) + 1])
    assert run("memory://there", "memory://models/r1_zero", "memory://data/rows.jsonl") == 2
    said = "memory://there/r1_zero is stale: its input memory://data/rows.jsonl has changed since"
    assert said in capsys.readouterr().err
