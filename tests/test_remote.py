"""Claims about runs whose work folder, data, checkpoints and outputs are at URLs: what they leave is a local run's."""

import contextlib
import json
import os
import pathlib
import shutil
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
from r1jax import launch, paths, schema, sweep
from r1jax.core import mirror, remote, url_lock, urls
from r1jax.data import files, tasks
from r1jax.recipe import common, evaluate, lineage
from r1jax.rl.recorder import Recorder
from r1jax.schema import DataConfig

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


@pytest.mark.parametrize("completed", [True, False])
def test_a_record_that_is_cut_off_is_read_again_and_not_taken_for_none(store, completed):
    place = "/bucket/runs/.r1jax/lock.json"
    whole = json.dumps({"pid": 7, "host": "another", "since": "2025-01-20", "run": "x", "beats": 3}).encode()
    store.pipe_file(place, whole[:20])
    if completed:
        threading.Timer(0.3, store.pipe_file, [place, whole]).start()
        threading.Timer(0.8, store.pipe_file, [place, whole.replace(b"3", b"4")]).start()
        with pytest.raises(urls.InUseError, match="is in use by process 7 on another"):
            url_lock.UrlLock("memory://bucket/runs")
    else:  # its process was killed while it counted
        started = time.monotonic()
        url_lock.UrlLock("memory://bucket/runs").release()
        assert time.monotonic() - started >= url_lock.SILENT_S


@pytest.mark.parametrize(("pid", "run"), [(os.getpid(), "x"), (4_000_000, "x")], ids=["its_own_number", "no_process"])
def test_a_process_of_another_container_is_watched_though_its_host_has_the_same_name(store, pid, run):
    record = {"pid": pid, "host": socket.gethostname(), "processes": "boot pid:[1]", "since": "", "run": run}
    store.pipe_file("/bucket/runs/.r1jax/lock.json", json.dumps(record).encode())
    beat = json.dumps(record | {"beats": 2}).encode()
    threading.Timer(0.3, store.pipe_file, ["/bucket/runs/.r1jax/lock.json", beat]).start()
    with pytest.raises(urls.InUseError, match=f"is in use by process {pid} on"):
        url_lock.UrlLock("memory://bucket/runs")


def test_a_run_counts_on_whatever_error_one_count_meets_and_asks_again_after_it_stood_still(store, monkeypatch):
    place, read = "/bucket/runs/.r1jax/lock.json", urls.RemoteFolder.read
    lock = url_lock.UrlLock("memory://bucket/runs")
    failed = threading.Event()

    def fail(folder, name):
        failed.set()
        raise OSError("odd")

    with monkeypatch.context() as patch:
        patch.setattr(urls.RemoteFolder, "read", fail)
        assert failed.wait(5)
        beats = json.loads(store.cat_file(place))["beats"]
    ends = time.monotonic() + 5
    while (now := json.loads(read(urls.RemoteFolder("memory://bucket/runs"), ".r1jax/lock.json"))["beats"]) == beats:
        assert time.monotonic() < ends
    assert now > beats
    lock._ending.set()
    lock._thread.join()
    store.pipe_file(place, json.dumps({"pid": 7, "host": "another", "since": "", "run": "y"}).encode())
    lock._beaten = time.monotonic()
    lock.hold()  # it counted just before: no other run can have the lock yet
    monkeypatch.setattr(url_lock.time, "monotonic", lambda at=time.monotonic: at() + url_lock.SILENT_S)
    with pytest.raises(urls.InUseError, match="is in use by process 7 on another"):
        lock.hold()
    store.rm_file(place)  # the other one has come to its end
    with pytest.raises(urls.InUseError, match="lock.json is gone, so another run may have written there"):
        lock.hold()
    lock.release()


@pytest.mark.parametrize("ended_by", [None, KeyboardInterrupt])
def test_where_the_last_push_fails_the_error_names_the_folder_and_not_the_lock(ended_by, store, cache, capsys):
    expected, match = (ended_by, None) if ended_by else (urls.RemoteError, "; what this run made .* is in /.*run-")
    with pytest.raises(expected, match=match), remote.work_folder("failing://bucket/runs") as folder:
        (folder / "metrics.jsonl").write_text("a\n")
        FailingFileSystem.reset(limit=0)
        if ended_by:
            raise ended_by
    said = capsys.readouterr().err
    assert "warning: failing://bucket/runs/.r1jax/lock.json: cannot remove it" in said
    assert (f"is in {folder}" in said) == bool(ended_by) and (folder / "metrics.jsonl").read_text() == "a\n"
    shutil.rmtree(folder)
    remote._kept_mark(folder).unlink()


def test_what_fails_before_there_is_anything_to_keep_leaves_no_folder_on_this_machine(store, cache):
    before = set(cache.glob("work/*/*"))
    manifest = {"files": {"config.json": [2, "config.json"]}, "folders": [], "vanished": [], "writer": "x"}
    store.pipe_file("/bucket/broken/.r1jax/manifest-00000003.json", json.dumps(manifest).encode())
    with pytest.raises(urls.RemoteError, match="config.json is not there any more"):
        with remote.work_folder("memory://bucket/broken"):
            pass
    with pytest.raises(KeyboardInterrupt), remote.output("memory://bucket/unmade") as path:
        path.mkdir()
        raise KeyboardInterrupt
    assert set(cache.glob("work/*/*")) == before and not store.exists("/bucket/unmade")


def test_what_a_killed_process_was_fetching_is_removed_when_it_is_old(store, cache):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    places = [
        cache / "files" / f".{name}.tmp" for name in (f"a.{dead.stdout.strip()}", f"b.{os.getpid()}", "c.4000000")
    ]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / "x").write_text("x")
    for place in places[:2]:
        for path in (place / "x", place):
            os.utime(path, (1, 1))
    store.pipe_file("/data/new.jsonl", b"1")
    remote.local("memory://data/new.jsonl")
    assert [place.exists() for place in places] == [False, True, True]


STAGE = {
    "inputs.json": '{"inputs": {}}',
    "config.json": "{}",
    "metrics.jsonl": "a",
    "model/shape.json": "{}",
    "checkpoints/3/params/d": "weights",
    "checkpoints/4/params/d": "newer",
    "best/checkpoints/3/params/d": "weights",
    "wandb/run/x": "log",
}


@pytest.mark.parametrize("pushed", [True, False])
def test_of_the_best_weights_of_a_stage_what_is_read_with_them_is_fetched_and_of_a_stage_not_they(
    store, pushed, tmp_path
):
    url = f"memory://bucket/runs{pushed}/r1_zero"
    if pushed:
        work = mirror.Mirror(url.rpartition("/")[0], tmp_path / "runs")
        work.pull()
        for name, text in STAGE.items():
            (tmp_path / "runs" / "r1_zero" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "runs" / "r1_zero" / name).write_text(text)
        work.push()
    else:
        for name, text in STAGE.items():
            store.pipe_file(f"{url.removeprefix('memory:/')}/{name}", text.encode())
    remote.forget()
    stage, best = pathlib.Path(remote.local(url)), pathlib.Path(remote.local(f"{url}/best"))
    assert set(local_files(stage)) == set(list(STAGE)[:4]) | {"checkpoints/4/params/d"}
    assert best.name == "best" and common.run_folder(best) == best.parent != stage
    read_with_them = {"inputs.json", "config.json", "model/shape.json"}
    assert set(local_files(best.parent)) == read_with_them | {"best/checkpoints/3/params/d"}
    assert remote.shown(f"{best} {best.parent}") == f"{url}/best {url}" and remote.beside(best.parent) == url[:-8]


def test_a_folder_called_best_that_is_no_stages_is_fetched_as_it_is(store):
    store.pipe_file("/models/best/config.json", b"{}")
    assert set(local_files(pathlib.Path(remote.local("memory://models/best")))) == {"config.json"}


def stage_at(store, folder, made_from, **fields):
    """Writes the records of a finished stage, made from {input: digest}, with a checkpoint."""
    store.pipe_file(f"{folder}/inputs.json", json.dumps({"inputs": made_from}).encode())
    store.pipe_file(f"{folder}/config.json", json.dumps(fields).encode())
    store.pipe_file(f"{folder}/DONE", json.dumps({"inputs": made_from, "output": "d", "figures": {}}).encode())
    store.pipe_file(f"{folder}/checkpoints/1/params/d", b"weights")


def test_what_earlier_stages_at_urls_were_trained_on_is_held_out_also_of_a_file_that_has_changed(store, capsys):
    rows_at(store, "memory://data/held.jsonl")
    url = "memory://data/held.jsonl"
    digest = files.digest(remote.local(url))
    trained = {"data.path": url, "data.holdout_fraction": 0.2}
    stage_at(store, "/first/r1_zero", {url: digest}, **trained)
    stage_at(store, "/first/stage1", {"r1_zero": "d"})
    stage_at(store, "/second/stage2", {"stage1": "d"}, inputs="memory://first")
    stage_at(store, "/third/distill", {"memory://second/stage2": "d", "memory://gone/base": "e"})
    held_out = {}
    for count in (6, 5):  # as it was; changed since
        rows_at(store, url, count)
        remote.forget()
        for checkpoint in ("memory://first/stage1", "memory://second/stage2", "memory://third/distill"):
            data = DataConfig(path=remote.local(url), holdout_fraction=1.0)
            now = evaluate.as_trained(remote.local(checkpoint), data)
            held_out[count, checkpoint] = now.holdout_fraction
    assert set(held_out.values()) == {0.2} and len(held_out) == 6
    assert capsys.readouterr().err.count("which has changed since") == 3


def test_a_base_at_a_url_that_is_gone_is_replaced_by_config_model_checkpoint(store, tmp_path):
    for name, fields in (("stage1", {"model.checkpoint": "memory://gone/base"}), ("stage2", {"start": "stage1"})):
        stage_at(store, f"/runs/{name}", {"memory://gone/base": "d"}, **fields)
    folder = remote.records("memory://runs/stage2")
    assert lineage._base_of_run(folder) == ("memory://gone/base", "d")
    assert set(local_files(folder)) == {"inputs.json", "config.json", "DONE", "checkpoints/1/params/d"}
    assert local_files(folder)["checkpoints/1/params/d"] == b""  # not fetched
    store.pipe_file("/moved/DONE", b'{"inputs": {}, "output": "d", "figures": {}}')
    store.pipe_file("/moved/inputs.json", b"{}")
    moved = remote.local("memory://moved")
    assert lineage._base_digest("stage3", "stage2", moved, "memory://gone/base", "d") == "d"
    with pytest.raises(ValueError, match="is another model than config.model.checkpoint"):
        lineage._base_digest("stage3", "stage2", moved, "memory://gone/base", "e")
    gone = remote.local_if_any("memory://gone/base")
    with pytest.raises(ValueError, match="memory://gone/base, which is not there; name its place with --config.model"):
        lineage._base_digest("stage3", "stage2", gone, "memory://gone/base", "d")


def test_of_what_is_only_looked_at_no_weights_are_fetched(store, cache):
    stage_at(store, "/look/r1_zero", {})
    store.pipe_file("/look/hf/model.safetensors", b"w")
    assert remote.looked_at("memory://look/hf") == "memory://look/hf"
    for url in ("memory://look", "memory://look/r1_zero"):
        found = local_files(pathlib.Path(remote.looked_at(url)))
        assert {name: text for name, text in found.items() if "checkpoints" in name or "hf" in name} == {
            next(name for name in found if "checkpoints" in name): b""
        }
    assert launch.main(command("r1", "memory://look", "--config.list")) == 0
    assert launch.main(command("r1", "memory://nothing", "--config.list")) == 2


def test_what_is_not_yet_in_the_work_folder_is_fetched_where_it_is_at_the_url(store):
    with remote.work_folder("memory://bucket/later") as folder:
        rows_at(store, "memory://bucket/later/rows.jsonl")
        assert pathlib.Path(remote.local("memory://bucket/later/rows.jsonl")).read_text().count("\n") == 6
        assert remote.local("memory://bucket/later/r1_zero") == str(folder / "r1_zero")  # which the run may make
    with remote.work_folder("memory://bucket/later") as folder:
        (folder / "stage").mkdir()
        (folder / "stage" / "DONE").write_text("{}")
    with remote.work_folder("memory://bucket/later") as folder:
        (folder / "stage" / "DONE").unlink()
        assert remote.local("memory://bucket/later/stage/DONE") == str(folder / "stage" / "DONE")  # the run removed it


def test_a_file_of_weights_brings_its_config_and_tokenizer_and_sizes_may_be_unknown(store, monkeypatch):
    for name in ("model.safetensors", "other.safetensors", "config.json", "tokenizer.json"):
        store.pipe_file(f"/weights/{name}", name.encode())
    info = urls.RemoteFolder.info
    monkeypatch.setattr(urls.RemoteFolder, "info", lambda folder, name: info(folder, name) | {"size": None})
    path = pathlib.Path(remote.local("memory://weights/model.safetensors"))
    assert set(local_files(path.parent)) == {"model.safetensors", "config.json", "tokenizer.json"}
    assert set(remote.WITH_WEIGHTS) == {"config.json", common.GENERATION, *common.TOKENIZER_FILES}


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
    assert launch.main([*arguments[:2], f"--config.output=file://{tmp_path}/graded.jsonl"]) == 0
    assert len((tmp_path / "graded.jsonl").read_text().splitlines()) == 3
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
                "('distill.distill.examples=gs://b/e.jsonl', 'r1_zero.data.instruction=gs://b/x', 'r1_zero.seed=3', "
                "'r1_zero.data.path=a.jsonl, gs://b/c.jsonl')",
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
        "r1_zero.data.path=a.jsonl,/here/c.jsonl",
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
        (
            ["--config=r1_zero", "--sweep=seed=0,1", "--workdir=nowhere", "--json=nosuch://b/x"],
            "error: nosuch://b/x cannot be opened: Protocol not known: nosuch",
        ),
        (
            ["--config=r1_zero", "--plan", "--topology=v5p:2x2x1", "--json=nosuch://b/x"],
            "error: nosuch://b/x cannot be opened: Protocol not known: nosuch",
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


def test_the_table_of_a_sweep_is_there_where_its_copy_at_a_url_fails(tmp_path, monkeypatch, capsys):
    point = sweep.PointResult("seed=0", {"seed": "0"}, "done", 0, 1.0, {"pass@1": 0.5})
    monkeypatch.setattr(sweep, "_run_point", lambda *arguments: point)
    FailingFileSystem.reset(limit=0)
    arguments = ["--config=r1_zero", "--sweep=seed=0", f"--workdir={tmp_path}", "--json=failing://b/table.json"]
    (tmp_path / "sweep").mkdir()
    assert launch.main(arguments) == 2
    assert "error: failing://b/table.json: cannot write it" in capsys.readouterr().err
    assert json.loads((tmp_path / "sweep" / "table.json").read_text())[0]["point"] == "seed=0"


def test_several_processes_are_refused_with_the_remedy():
    asked = configs.load("r1_zero", [("data.eval_path", "gs://b/rows.jsonl")])
    for named in ({"workdir": "gs://b/runs"}, {}):
        with pytest.raises(ValueError, match="gs://b/.*: several processes need .*; mount the bucket"):
            paths.refuse(asked, named, paths.ONE_PROCESS)
    remote.refuse(paths.ONE_PROCESS)  # of what an earlier stage's config.json names
    try:
        with pytest.raises(ValueError, match="gs://b/model: several processes need"):
            remote.local("gs://b/model")
        assert remote.local("/b/model") == "/b/model"
    finally:
        remote.refuse("")
    paths.refuse(configs.load("r1_zero"), {"workdir": pathlib.Path("runs"), "json": None}, paths.ONE_PROCESS)


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
    """Returns the numbers of the checkpoints that the newest whole manifest names; the run may be writing another."""
    for path in sorted(folder.glob(".r1jax/manifest-*.json"), reverse=True):
        with contextlib.suppress(ValueError, FileNotFoundError):
            names = json.loads(path.read_text())["files"]
            return {int(name.split("/")[2]) for name in names if name.startswith("r1_zero/checkpoints/")}
    return set()


@pytest.mark.slow
def test_runs_at_a_url_that_are_killed_or_asked_to_end_go_on_elsewhere_with_the_same_bits(running, tmp_path):
    folder, longer = tmp_path / "bucket" / "runs", [*SHORT, "--config.grpo.updates=12"]
    assert launch.main(command("r1_zero", tmp_path / "local", *longer)) == 0
    arguments = command("r1_zero", f"local://{folder}", *longer)
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
    assert stage_files(local_files(folder / "r1_zero")) == stage_files(local_files(tmp_path / "local" / "r1_zero"))


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
