"""Claims about several processes of one run: they end as one process does, and none outlives another for long."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small

from r1jax import launch
from r1jax.core import hosts, preempt, watch
from r1jax.core.metrics import read
from r1jax.train.evaluations import best_of

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEADLINE_S = 600.0
HEARTBEAT_S = 8.0
GRACE_S = 60.0
STOP_WITHIN_S = HEARTBEAT_S + 22.0  # a busy machine is slow to hear and to say it
FIELDS = {
    **small.RL_FIELDS,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 2,
    "grpo.updates_per_rollout": 2,
    "grpo.prompts_per_update": 4,
    "grpo.group_size": 4,
    "sampler.slots": 16,
    "sampler.max_new_tokens": 24,
    "pack.rows_per_micro_batch": 8,
    "checkpointing.keep": 20,
    "reward.language": 1.0,  # random text earns some of it, so that groups have a signal
}
EVALUATED = {
    "train_eval.every": 4,
    "train_eval.metric": "language_consistency",
    "evaluation.samples_per_problem": 2,
}
SMALL = {"preset": "tiny_dense", "fields": FIELDS | {"model.num_hidden_layers": 1}, "mesh": {"fsdp": 2}}
MEASURED = SMALL | {"fields": SMALL["fields"] | EVALUATED}  # ends in the same bits
WIDE = {"preset": "tiny", "fields": FIELDS | {"model.num_hidden_layers": 2}, "mesh": {"fsdp": 2, "expert": 2}}
STATE = ("params", "optimizer", "reference", "cursor")


class Group:
    """Processes of one run; `folder` is the run's, their output lies beside it."""

    def __init__(self, folder, processes, *, updates=6, checkpoint_every=2, slow_s=0.0, delays=(), listens=True, **run):
        devices = int(np.prod(list(run["mesh"].values())))
        self.folder, self.outputs = pathlib.Path(folder), []
        self.folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Of the processes of a CPU run only the first has a compilation cache, so compiling is made cheap for all.
        xla = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        xla += f" --xla_force_host_platform_device_count={devices // processes}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla}
        self.processes = []
        for index in range(processes):
            settings = run | {"folder": str(folder), "processes": processes, "index": index, "port": port}
            settings |= {"updates": updates, "checkpoint_every": checkpoint_every, "heartbeat_s": HEARTBEAT_S}
            settings |= {"delays": delays if index == processes - 1 else [], "slow_s": slow_s}
            settings |= {"grace_s": GRACE_S, "listens": listens}
            settings |= {"weights": str(self._beside("npz", 0))}
            self.outputs.append(tuple(self._beside(f"{processes}.{kind}", index) for kind in ("out", "err")))
            out, error = (path.open("w") for path in self.outputs[-1])
            command = [sys.executable, str(ROOT / "tests" / "multihost_driver.py"), json.dumps(settings)]
            self.processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=error))

    def _beside(self, kind, index):
        return self.folder.parent / f"{self.folder.name}.{index}.{kind}"

    def error(self, index):
        return self.outputs[index][1].read_text()

    def finish(self):
        """Returns what each process printed, after all have ended well."""
        try:
            for index, process in enumerate(self.processes):
                assert process.wait(DEADLINE_S) == 0, f"process {index}: {self.error(index)[-3000:]}"
        finally:
            self.end()
        return [json.loads(out.read_text().splitlines()[-1]) for out, _ in self.outputs]

    def kill_at(self, victim, update, number=signal.SIGKILL):
        """Signals one process once `update` updates are made; returns (exit codes of the others, seconds they took)."""
        return self.signal_at(victim, update, number, [i for i in range(len(self.processes)) if i != victim])

    def signal_at(self, victim, update, number, awaited):
        """Signals one process once `update` updates are made; returns (exit codes of those awaited, seconds taken)."""
        try:
            limit = time.monotonic() + DEADLINE_S
            while self.update() < update:
                assert time.monotonic() < limit and all(p.poll() is None for p in self.processes), self.error(0)[-3000:]
                time.sleep(0.01)
            self.processes[victim].send_signal(number)
            started = time.monotonic()
            codes = [self.processes[index].wait(120) for index in awaited]
            return codes, time.monotonic() - started
        finally:
            self.end()

    def update(self):
        try:
            return int((self.folder / "phase").read_text().split()[1])
        except (OSError, IndexError, ValueError):
            return -1

    def end(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def state(found):
    return {name: found[name] for name in STATE}


def rows(folder):
    return (pathlib.Path(folder) / "metrics.jsonl").read_bytes()


def lines_of_error(text):
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Returns (what one process on two devices left, its folder); it was evaluated between its updates."""
    folder = tmp_path_factory.mktemp("several") / "one"
    return Group(folder, 1, **MEASURED).finish()[0], folder


def test_two_processes_of_which_one_is_late_end_in_the_bits_of_one_and_grade_their_own_prompts(one, tmp_path):
    expected, folder = one
    shared = range(expected["calls"] // 2)  # a process of two makes fewer calls than the one: it grades half
    late = [(call, 0.7) for call in sorted(random.Random(5).sample(shared, 4))]
    found = Group(tmp_path / "two", 2, delays=late, **MEASURED).finish()
    assert [round(process["slept_s"], 3) for process in found] == [0.0, 2.8]
    assert [process["graded"] for process in found] == [list(range(own, 24, 2)) for own in (0, 1)]
    assert expected["graded"] == list(range(24))
    assert [state(process) for process in found] == [state(expected)] * 2
    assert rows(tmp_path / "two") == rows(folder)
    evaluations = [(run / "evaluation.jsonl").read_bytes() for run in (tmp_path / "two", folder)]
    assert evaluations[0] == evaluations[1] and evaluations[0].count(b"\n") == 2
    assert best_of(tmp_path / "two") == best_of(folder) is not None
    assert [row["update"] for row in read(folder)] == list(range(1, 7))
    assert sum(row["grad_norm"] > 0 for row in read(folder)) >= 3
    assert set(found[1]["programs"].values()) == {1}


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_stops_the_others_with_one_line_and_the_run_resumes_in_one_process_or_two(
    one, tmp_path, victim
):
    expected, folder = one
    group = Group(tmp_path / "killed", 2, slow_s=0.3, **SMALL)
    codes, seconds = group.kill_at(victim, update=3)
    print(f"process {victim} killed: the other ended with {codes} after {seconds:.1f} s")
    assert codes == [watch.LOST_EXIT]
    assert seconds < STOP_WITHIN_S
    (line,) = lines_of_error(group.error(1 - victim))
    assert line == (
        f"error: process {1 - victim} stops: process {victim} has not been heard of for 8 s; "
        "the same command again resumes the run"
    )
    assert (tmp_path / "killed" / "checkpoints" / "2").is_dir()
    for processes in (1, 2) if victim == 0 else (1,):
        copy = tmp_path / f"resumed{processes}"
        shutil.copytree(tmp_path / "killed", copy)
        found = Group(copy, processes, **SMALL).finish()
        assert state(found[0]) == state(expected)
        assert rows(copy) == rows(folder)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_hangs_is_named_within_the_heartbeat(tmp_path, victim):
    group = Group(tmp_path / "hung", 2, slow_s=0.3, **SMALL)
    codes, seconds = group.kill_at(victim, update=2, number=signal.SIGSTOP)
    print(f"process {victim} stopped: the other ended with {codes} after {seconds:.1f} s")
    assert codes == [watch.LOST_EXIT] and seconds < STOP_WITHIN_S
    (line,) = lines_of_error(group.error(1 - victim))
    assert f"process {victim} has not been heard of for 8 s" in line


@pytest.mark.parametrize(
    ("victim", "listens"),
    [(1, True), pytest.param(0, True, marks=pytest.mark.slow), pytest.param(1, False, marks=pytest.mark.slow)],
)
def test_processes_of_which_one_is_asked_to_end_save_the_same_update_together_and_resume_bit_equal(
    one, tmp_path, victim, listens
):
    expected, folder = one
    group = Group(tmp_path / "asked", 2, checkpoint_every=100, slow_s=0.3, listens=listens, **SMALL)
    codes, seconds = group.signal_at(victim, 3, signal.SIGTERM, [0, 1])
    saved = [int(path.name) for path in (tmp_path / "asked" / "checkpoints").iterdir()]
    print(f"process {victim} asked: {codes} after {seconds:.1f} s, saved {saved}")
    assert codes == [preempt.PREEMPTED_EXIT] * 2, group.error(0)[-2000:] + group.error(1)[-2000:]
    assert seconds < GRACE_S
    assert len(saved) == 1 and 3 <= saved[0] < 6  # nothing that was made is lost
    found = Group(tmp_path / "asked", 1, **SMALL).finish()
    assert state(found[0]) == state(expected)
    assert rows(tmp_path / "asked") == rows(folder)


@pytest.mark.slow
def test_four_processes_of_which_one_is_five_seconds_late_equal_one_and_their_checkpoint_goes_on_in_two_and_one(
    tmp_path, results
):
    expected = Group(tmp_path / "one", 1, updates=20, checkpoint_every=10, **WIDE).finish()[0]
    shared = range(expected["calls"] // 2)  # the process of four makes fewer calls than the one: it decodes a part
    late = [(call, 5.0) for call in sorted(random.Random(7).sample(shared, 4))]
    four = Group(tmp_path / "four", 4, updates=20, checkpoint_every=10, delays=late, **WIDE).finish()
    figures = {"updates": 20, "late": late, "four": difference(tmp_path, "four", four, expected)}
    assert [process["graded"] for process in four] == [list(range(own, 80, 4)) for own in range(4)]
    assert four[3]["slept_s"] == 20.0

    group = Group(tmp_path / "killed", 4, updates=20, checkpoint_every=10, slow_s=0.3, **WIDE)
    codes, seconds = group.kill_at(2, update=12)
    figures["killed"] = {"exit_codes": codes, "seconds": round(seconds, 1)}
    figures["said"] = [lines_of_error(group.error(index)) for index in (0, 1, 3)]
    assert codes == [watch.LOST_EXIT] * 3
    assert seconds < STOP_WITHIN_S
    assert all(len(lines) == 1 and "process 2 has not been heard of" in lines[0] for lines in figures["said"])
    for processes in (4, 2, 1):
        name = f"resumed_in_{processes}"
        shutil.copytree(tmp_path / "killed", tmp_path / name)
        found = Group(tmp_path / name, processes, updates=20, checkpoint_every=10, **WIDE).finish()
        figures[name] = difference(tmp_path, name, found, expected)
        assert processes != 4 or state(found[0]) == state(four[0])
    print(json.dumps(figures, indent=1))
    results("multihost", figures)


def difference(folder, name, found, expected):
    """Returns how far a run is from the one-process run; it must be within float32 rounding, with the same tokens."""
    with np.load(folder / f"{name}.0.npz") as ours, np.load(folder / "one.0.npz") as theirs:
        weights = max(float(np.abs(ours[leaf] - theirs[leaf]).max()) for leaf in theirs.files)
    pairs = list(zip(read(folder / name), read(folder / "one"), strict=True))
    assert [row["update"] for row, _ in pairs] == list(range(1, 21))
    for row, wanted in pairs:
        for value in ("length", "tokens", "accuracy", "truncated", "reward"):
            assert row[value] == pytest.approx(wanted[value], rel=1e-6), (name, row["update"], value)
        for value in ("loss", "grad_norm", "kl", "entropy"):
            assert row[value] == pytest.approx(wanted[value], rel=1e-4, abs=1e-6), (name, row["update"], value)
    assert weights < 1e-5
    assert {process["params"] for process in found} == {found[0]["params"]}
    return {"largest_weight_difference": weights, "bit_equal": state(found[0]) == state(expected)}


def test_start_refuses_an_address_a_number_and_a_place_that_do_not_go_together():
    for given, said in (
        (("host:1", 2, None), "give all three"),
        ((None, 2, 0), "give all three"),
        (("host", 2, 0), "--coordinator=host: needs HOST:PORT"),
        (("host:1", 2, 2), "--process_id=2: must be 0 to 1"),
    ):
        with pytest.raises(ValueError, match=said):
            hosts.start(*given)


THREE = """
import sys, time
import numpy as np
from r1jax.core import hosts as d
address, index = sys.argv[1], int(sys.argv[2])
d.start(address, 3, index, 8)
assert d.broadcast({"of": index}) == {"of": 0}
assert d.gather(index * 10) == ([0, 10, 20] if index == 0 else None)
assert d.broadcast(np.arange(index + 2)).tolist() == [0, 1]
assert d.join_shares([10 * number for number in d.share(range(7))], "tens") == list(range(0, 70, 10))
assert d.decide(lambda: [d.process_count(), d.gather(5), d.decide(len, "four"), d.share("ab")]) == [1, [5], 4, "ab"]
assert d.process_count() == 3
long = "a" * (3 << 20)  # in several pieces
assert d.broadcast(long + str(index)) == long + "0"
assert d.gather(str(index) + long) == ([place + long for place in "012"] if index == 0 else None)
try:
    d.decide(int, "seven" if index == 0 else "7")
except ValueError as error:
    print(error, flush=True)
try:
    if index == 2 and sys.argv[3] == "late":
        time.sleep(30)
    if index == 2:
        raise KeyError("a shelf")
    d.barrier("the fitting of shelves", 3)
except Exception as error:
    d.await_verdict(error)
    d.fail(error, 1)
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("late", "waited 3 s at 'the fitting of shelves' for process 2; the same command again resumes the run"),
        ("failed", "process 2 failed: 'a shelf'"),
    ],
)
def test_a_process_that_does_not_come_or_fails_is_named_by_all(how, said):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = []
    for index in range(3):
        command = [sys.executable, "-c", THREE, address, str(index), how]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    found = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in found] == ["invalid literal for int() with base 10: 'seven'\n"] * 3
    for index in range(3 if how == "late" else 2):
        assert processes[index].returncode == watch.LOST_EXIT
        assert lines_of_error(found[index][1]) == [f"error: process {index} stops: {said}"]
    assert how == "late" or processes[2].returncode == 1


def test_auto_says_what_to_give_where_jax_knows_no_cluster():
    command = [sys.executable, "-m", "r1jax.launch", "--config=r1_zero", "--coordinator=auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert lines_of_error(done.stderr) == [
        "error: --coordinator=auto: JAX finds no other processes here (coordinator_address should be defined.); "
        "give --coordinator=HOST:PORT --num_processes=N --process_id=I"
    ]


def test_processes_that_do_not_come_together_end_with_one_line():
    program = "import sys; from r1jax.core import hosts as d; d.start(sys.argv[1], 2, int(sys.argv[2]), 4, 3)"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    for index in ("0", "1"):
        command = [sys.executable, "-c", program, address, index]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == watch.LOST_EXIT
        said = f"error: the processes of the run did not come together at {address} within 3 s"
        assert lines_of_error(done.stderr) == [said]


def test_one_process_starts_nothing_and_every_function_returns_its_own_value():
    hosts.start(None, 1, 0)
    hosts.start("127.0.0.1:1", 1, 0)
    assert (hosts.process_index(), hosts.process_count(), hosts.is_writer()) == (0, 1, True)
    value = {"kept": object()}
    assert hosts.broadcast(value) is value
    assert hosts.gather(value) == [value]
    assert hosts.decide(len, [1, 2]) == 2
    assert hosts.join_shares([2 * number for number in hosts.share([3, 4])], "doubles") == [6, 8]
    hosts.barrier("nobody")
    hosts.stop()


def test_a_process_of_a_pod_that_was_started_alone_refuses_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    flags = ["--config=stage0_base", f"--workdir={tmp_path}"]
    assert launch.main(flags) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: this process was started alone, and JAX counts 4 processes on these devices; start one on each host "
        "with --coordinator=HOST:PORT --num_processes=N --process_id=I (or --coordinator=auto)"
    ]


def test_values_come_out_of_their_message_as_they_went_in():
    sent = {"a": np.arange(6, dtype=np.float32).reshape(2, 3) / 7, "b": [1, 0.1, None, "x"], "c": np.float32(0.1)}
    found = hosts._decode(hosts._encode(sent))
    assert np.array_equal(found["a"], sent["a"]) and found["a"].dtype == np.float32
    assert (found["b"], found["c"]) == (sent["b"], float(np.float32(0.1)))
    with pytest.raises(TypeError, match="set cannot be sent"):
        hosts._encode({1})


@pytest.mark.parametrize(
    ("environment", "pod"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_a_pod_is_known_by_its_environment(monkeypatch, environment, pod):
    for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._on_tpu_pod() == pod
