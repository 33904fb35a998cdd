"""Claims about Weights & Biases: without a network it gets the rows of metrics.jsonl, and it neither ends nor outlives a run."""

import contextlib
import importlib.metadata
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import wandb
import wandb_rows

from r1jax import launch
from r1jax.core import checkpoint, metrics, preempt, wandb_log
from r1jax.core.metrics import EvaluationLog, MetricsLog
from r1jax.recipe import training
from r1jax.schema import Config, WatchConfig, replace

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOWHERE = "http://127.0.0.1:9"  # nothing answers there


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Leaves W&B no login, no network and no settings but these, and ends its process."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    settings = {"MODE": "offline", "BASE_URL": NOWHERE, "SILENT": "true"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_settings"))
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def write(log, updates):
    for update in updates:
        log.write(update, {"reward": update / 3, "kl": math.nan if update == 2 else 0.5}, {"update_s": 1.5})


def test_a_run_that_goes_on_is_the_same_run_with_every_row_of_metrics_and_the_config(tmp_path):
    folder = tmp_path / "r1_zero"
    first = MetricsLog(folder, tensorboard=False, wandb_project="recipe")
    (folder / "config.json").write_text(json.dumps({"grpo.updates": 8, "seed": 3}))
    write(first, range(1, 6))
    evaluations = EvaluationLog(folder, tensorboard=False)
    evaluations.write(3, {"pass@1": 0.25})
    evaluations.close()
    first.close()
    time.sleep(1.1)  # W&B names its folders by the second
    again = MetricsLog(folder, tensorboard=False, wandb_project="recipe")
    again.truncate(3)
    write(again, range(4, 9))
    again.send_evaluation(8, {"pass@1": 0.5})
    again.close()
    runs = wandb_rows.runs(folder)
    assert [run["id"] for run in runs] == [(folder / wandb_log.RUN_ID_FILE).read_text()] * 2
    assert all((run["project"], run["name"]) == ("recipe", f"{tmp_path.name}/r1_zero") for run in runs)
    assert all(run["config"].items() >= {"grpo.updates": 8, "seed": 3}.items() for run in runs)
    assert [[row["update"] for row in run["rows"]] for run in runs] == [[1, 2, 3, 4, 5], list(range(1, 9))]
    rows = {row["update"]: row for row in runs[1]["rows"]}  # whatever was lost of the first when it was killed
    assert math.isnan(rows[2].pop("metrics/kl")) and math.isnan(metrics.read(folder)[1]["kl"])
    for row in metrics.read(folder):
        expected = {"update": row["update"], "metrics/reward": row["reward"], "metrics/kl": 0.5, "timing/update_s": 1.5}
        if row["update"] == 2:
            del expected["metrics/kl"]
        if row["update"] in (3, 8):  # one from its file, one as it was made
            expected["evaluation/pass@1"] = 0.25 if row["update"] == 3 else 0.5
        assert rows[row["update"]] == expected


def test_over_the_network_the_rows_are_sent_that_the_run_lacks_there(environment, tmp_path):
    sent = []
    write(MetricsLog(tmp_path, tensorboard=False), range(1, 6))

    class Known:
        step = 4  # what a run that is resumed over the network says: it has rows up to 3

        def log(self, values, step):
            sent.append(step)

    log = MetricsLog(tmp_path, tensorboard=False, wandb_project="p")
    environment.setattr(wandb, "init", lambda **settings: Known())
    write(log, range(6, 9))
    assert sent == [4, 5, 6, 7, 8]


def sent_about_the_machine(folder):
    """Returns (all that a run of W&B would send, the files among it, kinds of records)."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data = list(wandb_rows.records(path))
    kinds = {wandb_internal_pb2.Record.FromString(record).WhichOneof("record_type") for record in data}
    return b"".join(data), {file.name for file in (path.parent / "files").iterdir()}, kinds


def test_of_the_machine_and_the_code_nothing_is_sent_unless_the_environment_says_so(environment, tmp_path):
    environment.setattr(socket, "gethostname", lambda: "name-of-the-machine")
    environment.setattr(sys, "argv", ["launch", "--config.model.checkpoint=/name/of/a/folder"])
    environment.chdir(ROOT)
    with MetricsLog(tmp_path / "quiet", tensorboard=False, wandb_project="p") as log:
        write(log, [1])
        print("what is printed")
    data, files, kinds = sent_about_the_machine(tmp_path / "quiet")
    for text in (b"name-of-the-machine", b"/name/of/a/folder", b"what is printed", b"wandb_log.py"):
        assert text not in data
    assert files <= {"config.yaml", "wandb-summary.json"}
    assert not {"output", "output_raw", "stats", "environment"} & kinds
    wandb.teardown()
    environment.setenv("WANDB_HOST", "chosen-name")
    environment.setenv("WANDB__SAVE_REQUIREMENTS", "true")
    with MetricsLog(tmp_path / "open", tensorboard=False, wandb_project="p") as log:
        write(log, [1])
    data, files, _ = sent_about_the_machine(tmp_path / "open")
    assert b"chosen-name" in data and "requirements.txt" in files


@pytest.mark.parametrize("stopped", [False, True])
def test_a_stage_ends_its_run_there_last_and_only_where_it_has_ended(environment, tmp_path, stopped):
    done = []
    known = SimpleNamespace(step=0, log=lambda values, step: None, finish=lambda: done.append("run"))
    environment.setattr(wandb, "init", lambda **settings: known)
    for kind in (training.Evaluations, checkpoint.CheckpointStore):
        environment.setattr(kind, "close", lambda self: done.append(type(self).__name__))

    def fit(trainer, start, batch_at, updates, store, log, *more, **named):
        write(log, [1])
        if stopped:
            raise preempt.Preempted

    environment.setattr(training.supervised, "fit", fit)
    config = replace(Config(stage="distill"), watch=WatchConfig(wandb_project="p", report_every_s=0))
    with contextlib.suppress(preempt.Preempted):
        training.fit(training.StageFolder(config, tmp_path), None, None, None, 3, "student")
    assert done == ["Evaluations", "CheckpointStore", *([] if stopped else ["run"])]


def test_points_of_a_sweep_are_runs_of_different_names():
    names = [wandb_log.run_name(pathlib.Path(f"runs/sweep/{point}/r1_zero")) for point in ("kl_coef=0", "x" * 200)]
    assert names == ["kl_coef=0/r1_zero", f"{'x' * 120}/r1_zero"]


PROGRAM = """
import os, pathlib, signal, sys
from r1jax.core.metrics import MetricsLog
log = MetricsLog(pathlib.Path(sys.argv[1]), tensorboard=False, wandb_project="p")
log.write(1, {"reward": 0.5}, {})
if sys.argv[2] == "end":
    log.close()
for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    words = path.read_bytes().split(b"\\0")
    if words[0].endswith(b"wandb-core") and str(os.getpid()).encode() in words:
        print(path.parent.name, flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("kill", -signal.SIGKILL)])
def test_its_process_ends_with_the_run_however_that_ends(tmp_path, how, code):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == code
    (number,) = done.stdout.split()
    limit = time.monotonic() + 30
    while pathlib.Path(f"/proc/{number}").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    assert not pathlib.Path(f"/proc/{number}").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=r1_zero:tiny", "--config.watch.wandb_project=p"],
        ["--config=quickstart", "--config.watch.wandb_project=p"],
        ["--config=quickstart", "--config.set=stage1_coldstart.watch.wandb_project=p"],
    ],
)
def test_without_the_package_a_project_is_one_line_with_what_to_install_before_any_work(
    environment, tmp_path, capsys, arguments
):
    version = importlib.metadata.version

    def missing(name):
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    environment.setattr(importlib.metadata, "version", missing)
    assert launch.main([*arguments, f"--workdir={tmp_path}/runs"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: config.watch.wandb_project=p needs the package wandb; pip install 'wandb>=0.31', or leave the field out"
    ]
    assert not (tmp_path / "runs").exists()


def test_an_older_package_is_refused_as_well(environment):
    environment.setattr(importlib.metadata, "version", lambda name: "0.19.11")
    with pytest.raises(ValueError, match=r"pip install 'wandb>=0\.31'"):
        wandb_log.require("p")


def test_without_a_login_or_with_an_unknown_mode_a_project_is_refused_and_offline_it_is_not(environment):
    wandb_log.require("p")
    wandb_log.require("")
    for mode, message in (
        ("online", "config.watch.wandb_project=p needs a login: wandb login, or set WANDB_API_KEY"),
        ("offlin", "config.watch.wandb_project=p: wandb refuses its settings: .*'offlin'"),
    ):
        wandb.teardown()
        environment.setenv("WANDB_MODE", mode)
        with pytest.raises(ValueError, match=message):
            wandb_log.require("p")
    wandb.teardown()
    environment.setenv("WANDB_MODE", "online")
    environment.setenv("WANDB_API_KEY", "0" * 40)
    wandb_log.require("p")


def test_what_fails_there_is_one_warning_and_every_row_is_on_disk(environment, tmp_path, capsys):
    def refuse(**settings):
        raise RuntimeError("no such\nproject")

    environment.setattr(wandb, "init", refuse)
    log = MetricsLog(tmp_path, tensorboard=False, wandb_project="p")
    write(log, range(1, 4))
    log.close()
    assert [row["update"] for row in metrics.read(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().err.splitlines() == [
        "warning: no more rows go to Weights & Biases, and the run goes on: no such project"
    ]


def test_stages_that_learn_from_examples_send_their_rows_to_the_project_too(environment, tmp_path):
    seen = []
    environment.setattr(training.supervised, "fit", lambda *arguments, **more: seen.append(arguments[5]))
    folder = training.StageFolder(
        replace(Config(stage="distill"), watch=WatchConfig(wandb_project="p", report_every_s=0)), tmp_path
    )
    training.fit(folder, None, None, None, 3, "student")
    assert seen[0]._wandb.project == "p" and seen[0]._wandb.folder == tmp_path / "distill"
