"""A pod from one command, against a fake gcloud whose workers are folders: nothing here reaches Google Cloud.

Golden files are written anew by PYTHONPATH=. python tests/test_tpu_pod.py
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import fake_gcloud
import pytest
import yaml

from r1jax.core import preempt, slices, watch
from r1jax.pod import answers, archive, commands, gke, hardware, launcher, remedies, request, shell, worker

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = pathlib.Path(__file__).parent / "golden" / "pod"
FAST = launcher.Pace(poll=0.05, connect=60, silence=30, reconnect=60, wind_down=60, short=0)
POD = ("--name=r1", "--zone=us-east5-a", "--topology=v5p:2x2x2")
ONE_HOST = (*POD, "--topology=v5p:2x2x1")
RUN = ("--config=r1_zero", "--config.mesh.fsdp=8")
TEXT = 'It\'s "so": $HOME $$ $(HOME) `ls` \\ * \U0001f600'  # what shells and Kubernetes would like to change


def parsed(*arguments: str) -> request.PodRequest:
    result = request.parse(list(arguments))
    assert result is not None
    return result


def cases() -> dict[str, request.PodRequest]:
    """Returns the requests of the golden files."""
    run = ("--", "--config=r1_zero", "--config.mesh.fsdp=8", "--workdir=/mnt/runs", f"--config.data.instruction={TEXT}")
    many = ("--", "--config=r1_zero:v3_671b", "--config.mesh.fsdp=1", "--config.mesh.expert=8", "--workdir=/mnt/runs")
    return {
        "one_slice": parsed(*POD, *run),
        "spot": parsed(*POD, "--spot", "--project=my-project", "--setup=sudo mount -t nfs 10.0.0.2:/r1 /mnt", *run),
        "two_slices": parsed(*POD, "--slices=2", "--keep", "--ssh_flag=--tunnel-through-iap", *many),
        "shape": parsed(*POD, "--topology=v5p:4x4x12", "--reserved", "--gcloud_flag=--network=r1", "--only=create"),
        "one_host": parsed(*POD, "--topology=v6e:2x4", "--fetch=here", "--", *RUN),
        "fetch": parsed(*ONE_HOST, "--fetch=here", "--only=fetch", "--", *RUN, "--workdir=~/my runs"),
    }


def manifests() -> dict[str, request.PodRequest]:
    run = (
        "--gke",
        "--image=registry/r1jax:1",
        "--claim=shared:/mnt",
        "--",
        *RUN,
        "--workdir=/mnt/runs",
        f"--config.data.instruction={TEXT}",
    )
    return {
        "gke_one_slice": parsed(*POD, *run),
        "gke_spot_slices": parsed(*POD, "--topology=v6e:4x4", "--slices=2", "--spot", "--restarts=5", *run),
    }


@pytest.mark.parametrize("name", cases())
def test_commands_equal_their_golden_file(name):
    assert commands.script(cases()[name]) + "\n" == (GOLDEN / f"{name}.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", manifests())
def test_manifest_equals_its_golden_file(name):
    assert gke.manifest(manifests()[name]) == (GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> pathlib.Path:
    """Returns a small checkout: what runs on workers as it is here, with a stand-in for r1jax/launch.py."""
    root = tmp_path / "checkout"
    modules = [f"r1jax/{name}.py" for name in ("pod/worker", "core/files", "core/preempt", "core/watch", "core/errors")]
    for name in ("launch/tpu_worker.sh", "launch/venv.sh", "setup.py", "pyproject.toml", *modules):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    shutil.copy(ROOT / "tests" / "pod_trainer.py", root / "r1jax" / "launch.py")
    for command in (["git", "init", "-q"], ["git", "add", "."]):
        subprocess.run(command, cwd=root, check=True)
    monkeypatch.setattr(archive, "write", lambda path, extra: WRITE(path, extra, root))
    return root


WRITE = archive.write


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Returns a function that puts a fake gcloud on PATH, with what goes wrong in it, and returns its folder."""
    folder = tmp_path / "cloud"

    def make(**script) -> pathlib.Path:
        monkeypatch.setenv("PATH", f"{fake_gcloud.install(folder, **script)}:{os.environ['PATH']}")
        return folder

    yield make
    if (folder / "state.json").exists():
        fake_gcloud.Cloud(folder).preempt()


def called(folder: pathlib.Path) -> list[str]:
    """Returns the verbs that gcloud was asked for, without the questions, each only once in a row."""
    words = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    verbs = [" ".join([line[3], *(word for word in ("follow", "start") if f" {word} " in line[-1])]) for line in words]
    verbs = [verb for verb in verbs if verb != "describe"]
    return [verb for verb, before in zip(verbs, ["", *verbs], strict=False) if verb != before]


def test_whole_life_of_a_spot_pod_that_is_preempted_in_the_middle(tmp_path, cloud, checkout, capfd):
    folder, shared = cloud(breaks=1, outages=1, refuse_scp=1), tmp_path / "shared runs"
    (folder / "preempt").write_text("3")
    arguments = [f"--workdir={shared}", *RUN, f"--config.data.instruction={TEXT}"]
    code = launcher.main([*POD, "--spot", f"--fetch={tmp_path / 'here'}", "--", *arguments], FAST)
    out, error = capfd.readouterr()
    assert code == 0, error
    # Every worker got every argument as it was typed, and one that lets JAX find the other workers.
    assert f"arguments {json.dumps([*arguments, '--coordinator=auto'])}" in out.splitlines()
    # The run went on where it was: no update is missing, none was made twice, none was printed twice.
    assert (shared / "metrics").read_text().split() == ["1", "2", "3", "4", "5", "6"]
    assert [line for line in out.splitlines() if line.startswith("update")] == [f"update {n}" for n in range(1, 7)]
    assert (tmp_path / "here" / "shared runs" / "metrics").read_text() == (shared / "metrics").read_text()
    assert error.count("the connection to worker 0 broke") == 1 and "the workers take no files yet" in error
    assert "restart 1 of 20 at most: the pod is SUSPENDED" in error
    life = ["create", "ssh", "scp", "ssh", "ssh start", "ssh follow"]
    assert called(folder) == [*life, "delete", *life, "ssh", "scp", "delete"]
    assert json.loads((folder / "state.json").read_text()) == {} and "exists in" not in error


@pytest.mark.slow
def test_files_on_the_workers_are_those_of_the_checkout_and_only_they_are_removed(tmp_path, cloud, checkout, capfd):
    folder = cloud()
    (checkout / "old.py").write_text("")
    (checkout / "rows.jsonl").write_text("{}")
    subprocess.run(["git", "add", "old.py"], cwd=checkout, check=True)
    again = [*POD, "--only=copy", f"--with_file={checkout / 'rows.jsonl'}"]
    assert launcher.main([*POD, "--only=create"], FAST) == launcher.main(again, FAST) == 0
    homes = [folder / f"r1-w{index}" / "r1jax" for index in range(fake_gcloud.WORKERS)]
    assert all((home / "old.py").exists() and (home / "rows.jsonl").read_text() == "{}" for home in homes)
    for home in homes:
        (home / "runs").mkdir()
        assert len((home.parent / "pip.log").read_text().splitlines()) == 2
    (checkout / "old.py").unlink()
    assert launcher.main(again, FAST) == 0
    assert all(not (home / "old.py").exists() and (home / "runs").exists() for home in homes)
    assert all(len((home.parent / "pip.log").read_text().splitlines()) == 2 for home in homes)  # installed once


@pytest.fixture
def shared(tmp_path) -> list[str]:
    """Returns the run's arguments, with a working folder that outlives the workers."""
    return ["--", *RUN, f"--workdir={tmp_path / 'shared'}"]


def at_line(monkeypatch, text: str, action) -> None:
    """Calls a function once, when a line of the log that begins so has come."""
    whole = shell.stream

    def stream(words, silence_s, errors):
        for line in whole(words, silence_s, errors):
            yield line
            if line.startswith(f"|{text}"):
                monkeypatch.setattr(shell, "stream", whole)
                action()

    monkeypatch.setattr(shell, "stream", stream)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_run_outlives_its_launcher_and_the_same_command_follows_it(
    tmp_path, cloud, checkout, shared, monkeypatch, capfd
):
    folder = cloud()
    (folder / "hold").touch()
    at_line(monkeypatch, "update 2", interrupt)
    assert launcher.main([*POD, "--fetch=", *shared], FAST) == 130
    error = capfd.readouterr().err
    assert "a run that has begun goes on" in error and "r1 exists in us-east5-a (READY): it costs money" in error
    assert "--name=r1 --zone=us-east5-a --topology=v5p:2x2x2 --only=delete" in error
    other = [*POD, *shared, "--config.seed=1"]
    assert launcher.main(other, FAST) == 2
    assert "another command runs on r1" in capfd.readouterr().err
    at_line(monkeypatch, "update 1", (folder / "hold").unlink)
    (folder / "script.json").write_text(json.dumps({"refuse_ssh": 2}))  # no worker answers the first question
    assert launcher.main([*POD, "--fetch=", *shared], FAST) == 0
    out, error = capfd.readouterr()
    assert "asking the workers: 2 of 2 workers do not answer yet" in error
    assert "the run is under way: following it" in error and out.splitlines()[-1] == "update 6"
    assert (tmp_path / "shared" / "metrics").read_text().split() == ["1", "2", "3", "4", "5", "6"]
    verbs = called(folder)
    assert [verbs.count(verb) for verb in ("create", "scp", "ssh start", "delete")] == [1, 1, 1, 1]


def is_running(pid: int) -> bool:
    """Returns whether a process runs; one that ended and that nobody waited for does not."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_stopped_run_ends_on_every_worker_and_is_not_started_again(cloud, checkout, shared, monkeypatch, capfd):
    folder, codes = cloud(), []
    (folder / "hold").touch()
    at_line(monkeypatch, "update 2", lambda: codes.append(launcher.main([*POD, "--only=stop"], FAST)))
    assert launcher.main([*POD, "--restarts=0", *shared], FAST) == 2 and codes == [0]
    error = capfd.readouterr().err
    assert "error: the run was stopped by --only=stop; the same command again resumes it" in error
    assert called(folder).count("ssh start") == 1
    for index in range(fake_gcloud.WORKERS):
        home = folder / f"r1-w{index}" / "r1jax_run"
        last = (home / "log").read_text().splitlines()[-1].split()
        # The run alone was asked to end; its grader, which it ends itself, lived until it had.
        assert (home / "exit").read_text() == "143" and last[0] == "grader" and last[2:] == ["ended", "with", "None"]
        assert not is_running(int(last[1]))
    assert launcher.main([*POD, "--only=delete"], FAST) == 0
    assert launcher.main([*POD, "--only=delete"], FAST) == 2
    assert "there is nothing to delete" in capfd.readouterr().err


def test_failure_of_one_worker_is_the_runs_and_keeps_the_pod(cloud, checkout, shared, capfd):
    folder = cloud()
    (folder / "exit").write_text("[3, 2]")  # worker 1 has an error, worker 0 ends since another one was lost
    assert launcher.main([*POD, *shared], FAST) == 2
    error = capfd.readouterr().err
    assert ": error: worker 1 ends with 2" in error and ": error: worker 0" not in error
    assert "the run failed with exit code 2; the pod is kept" in error and "r1 exists in us-east5-a (READY)" in error
    assert "delete" not in called(folder)


@pytest.mark.slow
def test_run_that_ends_again_and_again_without_a_preemption_is_not_started_for_ever(cloud, checkout, shared, capfd):
    folder = cloud()
    (folder / "exit").write_text("[3, 3]")
    assert launcher.main([*POD, *shared], dataclasses.replace(FAST, short=600)) == 2
    error = capfd.readouterr().err
    assert "error: the run ended 3 times in a row within 10 min, and the pod is healthy" in error
    assert called(folder).count("ssh start") == 3 and called(folder).count("create") == 1


@pytest.mark.slow
def test_several_slices_start_every_worker_of_each_and_are_one_request(tmp_path, cloud, checkout, shared, capfd):
    folder = cloud()
    (folder / "state.json").write_text("{}")
    many = ["--config.mesh.slice=2" if text == "--config.mesh.fsdp=8" else text for text in shared]
    assert launcher.main([*POD, "--slices=2", "--keep", "--fetch=", *many], FAST) == 0
    assert "is ready with 4 workers" in capfd.readouterr().err
    for node in ("r1-0", "r1-1"):
        for index in range(fake_gcloud.WORKERS):
            log = (folder / f"{node}-w{index}" / "r1jax_run" / "log").read_text().splitlines()
            assert json.loads(log[0].removeprefix("arguments "))[-1] == "--coordinator=auto" and log[-1] == "update 6"


def put_vm(folder: pathlib.Path, state: str) -> None:
    """Makes a TPU VM r1 that no queued resource holds."""
    node = {"state": "ACTIVE", "node_state": state, "nodes": ["r1"], "type": "v5p-16", "plain": True}
    (folder / "state.json").write_text(json.dumps({"r1": node}))


@pytest.mark.parametrize(("state", "expected"), [("READY", []), ("PREEMPTED", ["delete", "create"])])
def test_tpu_vm_made_by_hand_is_reused_and_a_preempted_one_is_replaced(cloud, capfd, state, expected):
    folder = cloud(flaky=2)  # an error of gcloud that goes away ends nothing
    put_vm(folder, state)
    assert launcher.main([*POD, "--only=create"], FAST) == 0
    error = capfd.readouterr().err
    assert called(folder) == expected and "r1 is ready with 2 workers" in error
    assert error.count("UNAVAILABLE: The service is currently unavailable.); trying again") == 2


@pytest.mark.parametrize(
    ("step", "state", "expected"),
    [
        (
            ["--only=create"],
            "STOPPED",
            "and was not created by this launcher: start it again, or delete it with --only=",
        ),
        (["--only=stop"], "STOPPED", "leave out --only to wait for it or create it again"),
        (["--only=copy"], "PREEMPTED", "leave out --only to wait for it or create it again"),
        (["--only=fetch", "--", *RUN, "--workdir=/mnt"], "STOPPED", "leave out --only to wait for it"),
        (["--only=run", "--", *RUN, "--workdir=/mnt"], "TERMINATED", "leave out --only to wait for it"),
    ],
)
def test_tpu_vm_that_its_owner_stopped_is_never_deleted(cloud, capfd, step, state, expected):
    folder = cloud()
    put_vm(folder, state)
    assert launcher.main([*POD, *step], FAST) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]
    assert lines[0].startswith(f"error: r1 is {state}") and expected in lines[0]
    assert called(folder) == [] and "r1" in json.loads((folder / "state.json").read_text())


@pytest.mark.slow
def test_tpu_vm_made_by_hand_is_kept_after_the_run(cloud, checkout, shared, capfd):
    folder = cloud()
    put_vm(folder, "READY")
    assert launcher.main([*POD, "--fetch=", *shared], FAST) == 0
    assert "the pod was not created by this launcher, and is kept" in capfd.readouterr().err
    assert "delete" not in called(folder)
    assert launcher.main([*POD, "--only=delete"], FAST) == 0
    assert json.loads((folder / "state.json").read_text()) == {}


def test_interrupt_ends_every_command_at_once(tmp_path):
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        shell.run_all([["sleep", "60"], ["bash", "-c", f"sleep 60 & echo $! > {tmp_path / 'pid'}; wait"]], 60)
    assert time.monotonic() - started < 20
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_command_that_does_not_answer_is_ended():
    assert shell.run(["sleep", "60"], 0.2) == shell.Finished(shell.TIMED_OUT, "", "no answer within 0.2 s")
    errors = collections.deque[str](maxlen=2)
    assert list(shell.stream(["bash", "-c", "echo a; seq 3 >&2; sleep 60"], 2, errors)) == ["a"]
    assert list(errors) == ["2\n", "3\n"]


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        (
            {"w0": "running MINE", "w1": "ended 3"},
            "the run did not start on 1 of 2 workers (w1: ended 3): give --only=stop",
        ),
        ({"w0": "running MINE", "w1": "running abc"}, "another command runs on r1 (abc, and this one is MINE)"),
    ],
)
def test_run_that_did_not_start_everywhere_is_not_followed(monkeypatch, shared, started, expected):
    launch = launcher.Launch(parsed(*POD, *shared), FAST)
    launch.workers, mine = 2, launch.request.run_id
    monkeypatch.setattr(launch, "states", lambda: {"w0": "none", "w1": "ended 3"})
    monkeypatch.setattr(launch, "copy", lambda: None)
    monkeypatch.setattr(launch, "follow", lambda line: None)
    texts = {host: state.replace("MINE", mine) for host, state in started.items()}
    monkeypatch.setattr(launch, "everywhere", lambda *_: texts)
    with pytest.raises(remedies.PodError) as caught:
        launch.attempt()
    assert str(caught.value).startswith(expected.replace("MINE", mine))


def test_run_that_is_stopped_while_the_checkout_is_copied_does_not_start(monkeypatch, shared):
    launch, states = launcher.Launch(parsed(*POD, *shared), FAST), [{"w0": "ended 75"}, {"w0": "stopped"}]
    monkeypatch.setattr(launch, "states", lambda: states.pop(0))
    monkeypatch.setattr(launch, "copy", lambda: None)
    with pytest.raises(remedies.PodError, match="was stopped by --only=stop"):
        launch.attempt()
    started = []
    monkeypatch.setattr(
        launch, "everywhere", lambda *_: started.append(1) or {"w0": f"running {launch.request.run_id}"}
    )
    monkeypatch.setattr(launch, "follow", lambda line: 0)
    states[:] = [{"w0": "stopped"}] * 2  # since before this command, which resumes it
    assert launch.attempt() == 0 and started


@pytest.mark.parametrize(
    ("step", "state", "expected"),
    [
        ("copy", "running abc", "a run is under way on r1, and would go on with other files"),
        ("stop", "running abc", "a run has not ended: give --only=stop again"),
    ],
)
def test_step_is_refused_where_a_run_is_under_way(monkeypatch, step, state, expected):
    launch = launcher.Launch(parsed(*POD, f"--only={step}"), FAST)
    monkeypatch.setattr(launch, "_require", lambda: None)
    monkeypatch.setattr(launch, "everywhere", lambda *_: {"w0": state})
    monkeypatch.setattr(launch, "copy", lambda: pytest.fail("copied"))
    with pytest.raises(remedies.PodError, match=expected):
        launch.step()


def test_worker_that_answers_twice_is_one():
    output = "R1JAX w0 none\nnoise\nR1JAX w0 running abc\nR1JAX w1 ended 3\n"
    assert answers.of_workers(output) == {"w0": "running abc", "w1": "ended 3"}


def test_log_is_printed_whole_when_gcloud_connects_again_by_itself(monkeypatch, shared, capsys):
    log = [f"|line {number}|" for number in range(1, 10)]
    # gcloud gives `follow -2` again, which begins two lines before the end of the log as it is then.
    parts = {"-2": ["R1JAX alive 3", *log[2:4], "|li", "R1JAX alive 8", *log[7:]], "5": ["R1JAX alive 5", *log[4:]]}
    asked = []

    def stream(words, silence_s, errors):
        asked.append(words[-1].split()[-1])
        yield from parts[asked[-1]]
        yield "R1JAX ended 0"

    monkeypatch.setattr(shell, "stream", stream)
    launch = launcher.Launch(parsed(*POD, *shared), FAST)
    monkeypatch.setattr(launch, "state", lambda: "READY")
    monkeypatch.setattr(launch, "_verdict", lambda end: end)
    assert launch.follow(-2) == "ended 0" and asked == ["-2", "5"]
    assert capsys.readouterr().out.splitlines() == [f"line {number}" for number in range(3, 10)]


def test_whatever_ends_the_launcher_it_says_what_costs_money(cloud, monkeypatch, capfd):
    cloud()

    def fail(self):
        raise ZeroDivisionError

    monkeypatch.setattr(launcher.Launch, "await_ready", fail)
    with pytest.raises(ZeroDivisionError):
        launcher.main([*POD, "--only=create"], FAST)
    assert "r1 exists in us-east5-a (READY): it costs money" in capfd.readouterr().err


def test_creation_that_fails_for_a_moment_or_whose_answer_is_lost_goes_on(cloud, capfd):
    folder = cloud(refuse_create=1, lose_create=1)
    assert launcher.main([*POD, "--only=create"], FAST) == 0
    verbs = [json.loads(line)[3] for line in (folder / "calls.jsonl").read_text().splitlines()]
    assert verbs.count("create") == 2 and capfd.readouterr().err.count("trying again") == 2


def test_error_of_gcloud_that_lasts_ends_the_wait(cloud, capfd):
    cloud(flaky=1000)
    assert launcher.main([*POD, "--only=create"], dataclasses.replace(FAST, connect=0.3)) == 2
    error = capfd.readouterr().err
    assert "error: gcloud failed: (gcloud.compute.tpus.queued-resources.describe) UNAVAILABLE" in error


QUOTA = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit 'TPUV5PPerProject' exceeded"
)
ZONE = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: Permission denied on 'locations/us-east5-a' "
    "(or it may not exist)."
)
TYPE = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) INVALID_ARGUMENT: Cloud TPU received a bad request. the "
    "accelerator v5p-16 was not found in zone us-east5-a [EID: 0x945e]"
)
IMAGE = "ERROR: (gcloud) INVALID_ARGUMENT: runtime version 'v2-alpha-tpuv5' was not found"
LOGIN = (
    "ERROR: (gcloud.compute.tpus.queued-resources.describe) You do not currently have an active account selected.\n"
    "Please run:\n\n  $ gcloud auth login\n\nto obtain new credentials."
)
API = "ERROR: Cloud TPU API has not been used in project 1 before or it is disabled. reason: SERVICE_DISABLED"
PROJECT = "ERROR: The required property [project] is not currently set."
ROLE = "ERROR: (gcloud) PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on resource"
ROOM = "ERROR: (gcloud) RESOURCE_EXHAUSTED: There is no more capacity in the zone"
KEY = (
    'ERROR: (gcloud.compute.tpus.tpu-vm.scp) SSH Key is not present in the SSH agent. Please run "ssh-add '
    '/home/me/.ssh/google_compute_engine" to add it, and try again.'
)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ({"create": QUOTA}, "the project's quota is too small for a v5p-16 in us-east5-a: ask for more on the page"),
        (
            {"create": ZONE},
            "no zone us-east5-a with TPUs, or the project may not use it: see the zones: gcloud compute",
        ),
        (
            {"create": TYPE},
            "us-east5-a has no v5p-16: see what the zone has: gcloud compute tpus accelerator-types list",
        ),
        ({"create": IMAGE}, "the image v2-alpha-tpuv5 does not exist in us-east5-a: give --runtime=VERSION"),
        ({"create": ROLE}, "this account may not do that in the project: ask for the roles TPU Admin"),
        ({"create": ROOM}, "there is no room for a v5p-16 in us-east5-a: try later, in another --zone, or with --spot"),
        ({"create": "ERROR: something new"}, "gcloud failed: something new"),
        ({"logged_out": LOGIN}, "gcloud is not logged in: run: gcloud auth login"),
        (
            {"logged_out": API},
            "the Cloud TPU API is off in this project: run: gcloud services enable tpu.googleapis.com",
        ),
        ({"logged_out": PROJECT}, "gcloud has no project: give --project=ID"),
    ],
    ids=["quota", "zone", "type", "image", "role", "room", "unknown", "login", "api", "project"],
)
def test_error_of_gcloud_is_one_line_with_its_remedy_and_leaves_nothing(cloud, capfd, script, expected):
    folder = cloud(**script)
    assert launcher.main([*POD, "--only=create"], FAST) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]
    assert line.startswith("error: ") and expected in line
    assert not (folder / "state.json").exists()


def test_missing_key_of_ssh_is_said_at_once(cloud, checkout, capfd):
    folder = cloud(no_key=KEY)
    assert launcher.main([*POD, "--only=create"], FAST) == 0
    assert launcher.main([*POD, "--only=copy"], FAST) == 2
    error = capfd.readouterr().err
    assert "does not hold gcloud's key: run: ssh-add ~/.ssh/google_compute_engine (gcloud: " in error
    assert called(folder) == ["create", "ssh", "scp"] and "trying again" not in error  # ssh asks whether a run is there


def test_failed_request_is_deleted_and_says_why(cloud, capfd):
    message = 'There is no more capacity in the zone "us-east5-a"; you can try in another zone'
    folder = cloud(states=["WAITING_FOR_RESOURCES", "FAILED"], error={"code": 8, "message": message})
    assert launcher.main([*POD, "--only=create"], FAST) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]
    assert line.startswith("error: there is no room for a v5p-16 in us-east5-a: try later, in another --zone")
    assert line.endswith("the failed request was deleted") and json.loads((folder / "state.json").read_text()) == {}


def test_preemption_while_the_pod_is_created_is_a_restart_and_an_error_when_they_are_used_up(cloud, shared, capfd):
    folder = cloud(states=["PROVISIONING", "SUSPENDED"])
    assert launcher.main([*POD, "--restarts=1", *shared], FAST) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]
    assert lines[0].startswith("error: the pod was preempted while it was being created; --restarts=1 are used up")
    assert lines[1] == "r1 exists in us-east5-a (SUSPENDED): it costs nothing, but counts towards the quota"
    assert called(folder) == ["create", "delete", "create"]


def test_wait_in_the_queue_has_a_deadline_and_says_what_is_left(cloud, capfd):
    cloud(states=["WAITING_FOR_RESOURCES"])
    assert launcher.main([*POD, "--only=create", "--queue_hours=0"], FAST) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]
    assert lines[0] == "error: no TPUs within --queue_hours=0 (state WAITING_FOR_RESOURCES)"
    assert lines[1].startswith(
        "r1 exists in us-east5-a (WAITING_FOR_RESOURCES): it waits in the queue and costs nothing"
    )
    assert lines[3].endswith("--only=delete")


def test_name_of_another_pod_is_refused_with_both_types(cloud, capfd):
    folder = cloud()
    assert launcher.main([*POD, "--only=create"], FAST) == 0
    capfd.readouterr()
    assert launcher.main([*POD, "--topology=v5p:2x2x1", "--only=create"], FAST) == 2
    error = capfd.readouterr().err
    assert "error: --name=r1 is taken in us-east5-a: it has 1 x v5p-16, and 1 x v5p-8 is asked for" in error
    assert called(folder) == ["create"]


def test_missing_gcloud_is_one_line(monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/nowhere")
    assert launcher.main([*POD, "--only=create"], FAST) == 2
    assert capfd.readouterr().err.startswith("error: gcloud is not installed, or not on PATH: see https://")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--zone=z", "--topology=v5p:2x2x1"], "--name is missing; usage: python launch/tpu_pod.py"),
        ([*POD, "--topology=v5p:4x4"], "--topology=v5p:4x4: a slice of v5p has a shape such as 8x16x16"),
        ([*POD, "--topology=v6e:3x3"], "--topology=v6e:3x3 is not sold; v6e has 1x1, 2x2"),
        ([*POD, "--topology=v5p:1x1x1"], "--topology=v5p:1x1x1 is not sold; v5p has 2x2x1, 2x2x2"),
        ([*POD, "--topology=v5p:2x2x8"], "16x16x24, and others of up to 6144 chips whose sides are multiples of 4"),
        ([*POD, "--topology=v5p:16x20x24"], "--topology=v5p:16x20x24 is not sold"),
        ([*POD, "--topology=v5p:8x4x4"], "--topology=v5p:8x4x4 is not sold"),
        ([*POD, "--topology=v4:16x16x24"], "16x16x16, and others of up to 4096 chips"),
        ([*POD, "--topology=tpu7x:2x2x1"], "tpu7x is rented by GKE alone; give --gke"),
        ([*POD, "--spt"], "unknown flag --spt; did you mean '--spot'?"),
        ([*POD, "--spot", "--reserved"], "--spot and --reserved exclude each other"),
        ([*POD, "--name=R1"], "--name=R1: use 1 to 40 lower-case letters"),
        ([*POD], "the run's command is missing; usage"),
        ([*POD, "r1"], "unexpected argument 'r1'; flags of the run come after --"),
        ([*POD, "--", "--config=r1_zer"], "no config named 'r1_zer'; did you mean 'r1_zero'?"),
        ([*POD, "--", "--config=r1_zero", "--config.grpo.update=1"], "GRPOConfig has no field 'update'"),
        ([*POD, "--", "--config=r1_zero", "--process_id=1"], "--process_id is set by the launcher on each worker"),
        ([*POD, "--", *RUN, "--coordinator=auto"], "--coordinator is set by the launcher on each worker"),
        ([*POD, "--", *RUN, "--dry_run"], "--dry_run runs nothing and needs no pod: give it to python -m r1jax.launch"),
        ([*POD, "--", "--help"], "--help runs nothing and needs no pod"),
        ([*POD, "--", *RUN, "--plan", "--topology=v5p:2x2x2"], "--plan runs nothing and needs no pod"),
        ([*POD, "--", *RUN, "--workdir=/mnt", "--sweep=seed=1,2"], "--sweep runs its points on one machine"),
        ([*POD, "--", *RUN], "--workdir=runs is on each worker's disk, and the 2 workers of a run share one folder"),
        ([*POD, "--topology=v5p:2x2x1", "--spot", "--", *RUN], "a preemption of --spot deletes it"),
        ([*POD, "--", *RUN, "--config.mode=disaggregated"], "config.mode=disaggregated runs in one process"),
        ([*POD, "--", "--config=grade"], "grade runs in one process, and this pod has 2 hosts"),
        ([*POD, "--", *RUN, "--workdir=gs://b/runs"], "--workdir=gs://b/runs: r1jax writes to paths, not to URLs"),
        (
            [*POD, "--", *RUN, "--workdir=/mnt/runs", "--config.data.path=gs://b/x.jsonl"],
            "gs://b/x.jsonl: several processes need one folder that all see",
        ),
        ([*POD, "--gke", "--", *RUN, "--workdir=/mnt"], "--gke needs --image=IMAGE"),
        ([*POD, "--gke", "--image=i", "--", *RUN, "--workdir=/mnt"], "needs --claim=NAME:/PATH"),
        ([*POD, "--gke", "--image=i", "--claim=c:/data", "--", *RUN, "--workdir=/mnt"], "needs --claim=NAME:/PATH"),
    ],
)
def test_mistake_is_one_line_before_anything_is_asked_of_gcloud(cloud, capfd, arguments, expected):
    folder = cloud()
    assert launcher.main(arguments, FAST) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line and not (folder / "calls.jsonl").exists()


def test_work_folder_is_read_as_the_run_reads_it_and_not_looked_for_here(tmp_path):
    (tmp_path / "file").touch()  # no run on this machine could write below it
    for words in (["--workdir=PATH"], ["-workdir=PATH"], ["--workdir", "PATH"], ["--workdir=a", "--workdir=PATH"]):
        words = [word.replace("PATH", f"{tmp_path}/file/runs") for word in words]
        assert parsed(*POD, "--", *RUN, *words).workdir == f"{tmp_path}/file/runs"


def test_mesh_that_leaves_chips_idle_is_warned_of():
    assert request.unused_chips(parsed(*POD, "--", *RUN, "--workdir=/mnt/runs")) == ""
    one = parsed(*POD, "--", "--config=r1_zero", "--workdir=/mnt/runs")
    assert request.unused_chips(one) == "warning: config.mesh uses 1 devices, and the pod has 8 chips"
    one = parsed(*POD, "--slices=2", "--", *RUN, "--workdir=/mnt/runs")
    assert request.unused_chips(one) == "warning: config.mesh.slice is 1, and --slices of the pod is 2"


def test_shapes_and_hosts_are_those_of_the_plan():
    assert set(hardware.SERIES) == set(slices.SHAPES)
    known = {"v5p:2x2x1": ("v5p-8", 1, 4), "v5p:4x4x8": ("v5p-256", 32, 4), "v6e:2x4": ("v6e-8", 1, 8)}
    known |= {"v5e:4x4": ("v5litepod-16", 4, 4), "v4:2x2x2": ("v4-16", 2, 4), "v6e:1x1": ("v6e-1", 1, 1)}
    for text, expected in known.items():
        one = hardware.parse(text)
        assert (one.accelerator_type, one.hosts, one.chips_per_host) == expected
    assert hardware.parse("v5p:16x16x24").accelerator_type == "v5p-12288"


def expanded(text: str) -> str:
    """Returns what Kubernetes makes of an argument: $ of $$, and the value of a variable of $(NAME)."""
    return re.sub(r"\$(\$|\((\w+)\))", lambda found: "$" if found[1] == "$" else f"value of {found[2]}", text)


def test_manifest_is_yaml_with_every_argument_as_it_was_typed():
    assert expanded("$(HOME) $$(HOME) $$$$ $a") == "value of HOME $(HOME) $$ $a"
    one = manifests()["gke_spot_slices"]
    (job,) = yaml.safe_load(gke.manifest(one))["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    container = pods["template"]["spec"]["containers"][0]
    assert (job["replicas"], pods["completions"], pods["parallelism"]) == (2, 4, 4)
    assert [expanded(text) for text in container["args"]] == [*one.arguments, "--grace_s=15"]
    assert one.arguments[-1].endswith(TEXT) and pods["template"]["spec"]["terminationGracePeriodSeconds"] == 15
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["volumeMounts"][0]["mountPath"] == "/mnt"


@pytest.mark.parametrize(("more", "expected"), [([], 60), (["--grace_s=100.5"], 131)])
def test_pod_of_kubernetes_has_the_time_of_the_runs_grace_period(more, expected):
    one = manifests()["gke_one_slice"]
    one = parsed(*POD, "--gke", "--image=i", "--claim=shared:/mnt", "--", *one.arguments, *more)
    (job,) = yaml.safe_load(gke.manifest(one))["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == expected
    assert f"start {one.run_id} {one.grace_s + 90:g} -- " in commands.start(one, 1)


def test_run_that_cannot_begin_says_why_in_its_log(tmp_path):
    code = (
        "import sys; sys.executable = '/nowhere/python'; from r1jax.pod import worker; "
        "worker.start('abc', 1.0, []); lines = list(worker.follow(1)); print(lines[-1], lines[-2])"
    )
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("R1JAX ended 127 |FileNotFoundError: "), done.stderr


def test_run_whose_record_cannot_be_written_is_ended(tmp_path):
    python, number = tmp_path / "python", tmp_path / "number"
    python.write_text(f"#!/bin/sh\necho $$ > {number}\nexec sleep 60\n")
    python.chmod(0o755)
    code = f"""if True:
        import pathlib, sys, time
        from r1jax.core import files
        from r1jax.pod import worker
        sys.executable, write = {str(python)!r}, files.write_text
        def full(path, text):
            while "group" in text and not pathlib.Path({str(number)!r}).exists():
                time.sleep(0.01)
            if "group" in text:
                raise OSError(28, "No space left on device")
            write(path, text)
        files.write_text = full
        worker.start("abc", 1.0, [])
        print(list(worker.follow(1))[-1])"""
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "R1JAX ended 127\n", done.stderr
    assert not is_running(int(number.read_text()))


def test_stop_before_a_run_has_begun_counts(tmp_path):
    code = "from r1jax.pod import worker; print(worker.state(), worker.stop(), worker.state())"
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "none stopped stopped\n", done.stderr


def test_line_that_a_progress_bar_writes_again_is_one_line(tmp_path, monkeypatch):
    folder = tmp_path / "r1jax_run"
    folder.mkdir()
    (folder / "log").write_bytes(b"a\n10%\r20%\r\nb\r\n")
    (folder / "run.json").write_text("{}")
    (folder / "exit").write_text("0")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = [sys.executable, "-m", "r1jax.pod.worker", "follow", "1"]
    lines = list(shell.stream(words, 30.0, collections.deque()))
    assert lines == ["", "R1JAX alive 1", "|a|", "|10% 20%|", "|b|", "R1JAX ended 0"]


def test_lost_and_preempted_processes_end_with_exit_codes_that_restart():
    assert {watch.LOST_EXIT, preempt.PREEMPTED_EXIT} < set(worker.RESTART_EXITS)
    assert not {0, 1, 2, 130} & set(worker.RESTART_EXITS)


def test_script_runs_from_any_folder_and_needs_no_gcloud_for_a_dry_run(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "launch" / "tpu_pod.py"),
        *POD,
        "--dry_run",
        "--",
        *RUN,
        "--workdir=/mnt/runs",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env={"PATH": "/nowhere"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == commands.script(parsed(*POD, "--", *RUN, "--workdir=/mnt/runs")) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("--run_hours=0", "error: followed for --run_hours=0; the run goes on"),
        ("--keep", "error: no connection to worker 0 for 0 min (state READY); the run may go on"),
    ],
)
def test_following_has_a_deadline_and_the_run_goes_on(cloud, checkout, shared, capfd, limit, expected):
    cloud(outages=1)
    assert launcher.main([*POD, limit, *shared], dataclasses.replace(FAST, reconnect=0)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[")]
    assert lines[0] == expected and lines[1].startswith("r1 exists in us-east5-a (READY): it costs money")


def test_results_that_cannot_be_fetched_leave_the_pod(tmp_path, cloud, capfd):
    cloud()
    fetch = [*POD, "--only=fetch", f"--fetch={tmp_path / 'here'}", "--", *RUN, "--workdir=/nowhere/runs"]
    assert launcher.main(fetch, FAST) == 2
    assert "r1 does not exist in us-east5-a; leave out --only to create it" in capfd.readouterr().err
    assert launcher.main([*POD, "--only=create"], FAST) == 0
    capfd.readouterr()
    assert launcher.main(fetch, FAST) == 2
    error = capfd.readouterr().err
    assert "error: the results could not be fetched" in error and "r1 exists in us-east5-a (READY)" in error


OLD_PYTHON = """#!/bin/bash
# A python3 that is too old, with pip, and with uv once that is installed.
case "$*" in
"-c "*) exit 1 ;;
"-m uv python find 3.12") echo "$HOME/new" ;;
*) echo "$@" >>"$HOME/calls" ;;
esac
"""


def test_worker_with_an_old_python_gets_a_newer_one(tmp_path, checkout):
    home = tmp_path / "home"
    home.mkdir()
    new = fake_gcloud.PYTHON.replace("REAL", sys.executable)
    for name, text in {"python3": OLD_PYTHON, "new": new}.items():
        (home / name).write_text(text)
        (home / name).chmod(0o755)
    environment = {"HOME": str(home), "PATH": f"{home}:/usr/bin:/bin"}
    command = ["bash", str(checkout / "launch" / "tpu_worker.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=home)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"R1JAX {socket.gethostname()} installed"), (
        done.stderr
    )
    assert (home / "calls").read_text().splitlines() == [
        "-m pip install --quiet --user uv",
        "-m uv python install --quiet 3.12",
    ]
    assert "--editable .[tpu,data,wandb,jetstream-light]" in (home / "pip.log").read_text()
    assert (checkout / ".venv" / "bin" / "python").exists()


@pytest.mark.slow
def test_real_run_on_a_pod_that_is_preempted_ends_in_the_bits_of_one_that_is_not(tmp_path, cloud, capfd):
    fields = {"grpo.updates": 8, "grpo.updates_per_rollout": 2, "grpo.prompts_per_update": 4, "grpo.group_size": 4}
    fields |= {"sampler.slots": 16, "sampler.max_new_tokens": 16, "pack.rows_per_micro_batch": 8}
    fields |= {"checkpointing.every_updates": 1, "evaluation.max_problems": 1}
    arguments = ["--config=r1_zero", *(f"--config.{name}={value}" for name, value in fields.items())]
    alone = [sys.executable, "-m", "r1jax.launch", *arguments, f"--workdir={tmp_path / 'alone'}"]
    subprocess.run(alone, cwd=ROOT, check=True, capture_output=True, timeout=600)
    folder, metrics, seen = cloud(workers=1), tmp_path / "pod" / "r1_zero" / "metrics.jsonl", []

    def preempt() -> None:
        limit = time.monotonic() + 600
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < limit:
            time.sleep(0.02)
        fake_gcloud.Cloud(folder).preempt()
        seen.append(metrics.read_text().count("\n"))

    thread = threading.Thread(target=preempt)
    thread.start()
    one_host = ["--name=r1", "--zone=us-east5-a", "--topology=v5p:2x2x1", "--spot", f"--fetch={tmp_path / 'here'}"]
    code = launcher.main([*one_host, "--", *arguments, f"--workdir={tmp_path / 'pod'}"], FAST)
    thread.join()
    error = capfd.readouterr().err
    assert code == 0, error
    assert 3 <= seen[0] < 8 and "restart 1 of 20 at most" in error
    whole, resumed = tmp_path / "alone" / "r1_zero", tmp_path / "here" / "pod" / "r1_zero"
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    weights = [json.loads((place / "DONE").read_text())["output"] for place in (whole, resumed)]  # their digest
    assert weights[0] == weights[1]


if __name__ == "__main__":
    for name, one in cases().items():
        (GOLDEN / f"{name}.sh").write_text(commands.script(one) + "\n", encoding="utf-8")
    for name, one in manifests().items():
        (GOLDEN / f"{name}.yaml").write_text(gke.manifest(one), encoding="utf-8")
