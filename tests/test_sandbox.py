import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from r1jax.rewards.sandbox import attack as sandbox_attack
from r1jax.rewards.sandbox.attack import open_sandbox
from r1jax.rewards.sandbox.run import BACKENDS, PYTHON, Limits, Program, Sandbox, SandboxUnavailable, isolation
from r1jax.schema import SandboxConfig

SMALL = Limits(wall_s=20.0, cpu_s=10.0, memory_bytes=256 << 20, processes=8, output_bytes=1 << 16)

HOARD = "import os, time\nfor _ in range(5):\n    if os.fork() == 0: break\nhoard = bytearray(60 << 20)\ntime.sleep(60)"  # 360 MiB

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux's namespaces")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")
    return request.param


def python(backend, source, stdin=b"", limits=SMALL, files=None):
    return Sandbox(limits, backend).run([*PYTHON, "-c", source], files or {}, stdin)


def test_run_returns_what_a_program_printed_its_status_and_its_files(backend):
    source = (
        "import sys; print(sys.stdin.read() + open('deep/er.txt').read()); print('no', file=sys.stderr); sys.exit(3)"
    )
    outcome = python(backend, source, b"in", files={"deep/er.txt": b"side"})
    assert (outcome.status, outcome.stdout, outcome.stderr) == (3, b"inside\n", b"no\n")
    assert outcome.stopped_by == ""
    assert 0 < outcome.seconds < SMALL.wall_s


def test_nothing_gets_out_of_the_sandbox(backend):
    assert sandbox_attack.attack(Sandbox(sandbox_attack.LIMITS, backend)) == []


def test_a_large_input_that_is_not_read_neither_blocks_nor_fails(backend):
    assert python(backend, "print(1)", bytes(1 << 20)).stdout == b"1\n"


@pytest.mark.parametrize(
    ("limit", "source", "limits"),
    [
        ("wall", "import time; time.sleep(60)", {"wall_s": 0.5}),
        ("cpu", "while True: pass", {"cpu_s": 1.0}),
        ("output", "while True: print('x' * 4096)", {}),
        ("memory", HOARD, {}),
    ],
)
def test_a_limit_ends_the_whole_tree_and_is_named(backend, limit, source, limits):
    outcome = python(backend, source, limits=Limits(**{**vars(SMALL), **limits}))
    assert outcome.stopped_by == limit
    assert len(outcome.stdout) <= SMALL.output_bytes


def test_processes_that_outlive_their_parent_end_with_the_run(backend):
    source = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\n"
    started = time.monotonic()
    assert python(backend, source).status == 0
    assert time.monotonic() - started < SMALL.wall_s


def test_two_programs_talk_over_their_standard_inputs_and_end_apart(backend):
    talk = "import socket\nlink = socket.socket(fileno=0)\n"
    ask = Program([*PYTHON, "-c", talk + "link.sendall(b'seven\\n'); print(link.recv(64))"])
    answer = Program([*PYTHON, "-c", talk + "link.sendall(link.recv(64).upper())"])
    first, second = Sandbox(SMALL, backend).converse(ask, answer)
    assert (first.stdout, second.stdout) == (b"b'SEVEN\\n'\n", b"")


def test_a_missing_command_is_status_127_and_said(backend):
    outcome = Sandbox(SMALL, backend).run(["no-such-program"], {})
    assert outcome.status == 127
    assert b"no-such-program" in outcome.stderr


SCRIPT = """
import os, sys, threading, time
from r1jax.rewards.sandbox.run import PYTHON, Limits, Sandbox
sandbox = Sandbox(Limits(wall_s=100, cpu_s=100), sys.argv[1])
run = lambda: sandbox.run([*PYTHON, "-c", "import time; time.sleep(100)", "marker-" + sys.argv[2]], {})
threading.Thread(target=run, daemon=True).start()
deadline = time.monotonic() + 20
while time.monotonic() < deadline and not any("time.sleep" in line for line in os.popen("ps -ww -eo args | grep marker-" + sys.argv[2] + " | grep -v grep")):
    time.sleep(0.05)
if time.monotonic() >= deadline:
    os._exit(3)  # the program was never there
os.kill(os.getpid(), 9)
"""


def processes_with(marker):
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if marker.encode() in file.read() and int(name) != os.getpid():
                    found.append(int(name))
        except OSError:
            continue
    return found


def test_no_process_outlives_a_killed_grader(backend, tmp_path):
    marker = f"marker-{backend}-{os.getpid()}"
    killed = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, marker.removeprefix("marker-")],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        timeout=60,
    )
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10.0
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(marker) == []


def test_open_sandbox_refuses_in_one_line_when_something_gets_out(monkeypatch):
    monkeypatch.setattr(sandbox_attack, "attack", lambda sandbox: ["network: connected"])
    monkeypatch.setattr(sandbox_attack, "withstood", set())
    with pytest.raises(SandboxUnavailable, match="leaks, so no program is run: network: connected"):
        open_sandbox(SandboxConfig(backend="unshare"))


def test_a_missing_tool_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(isolation.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SandboxUnavailable, match="needs bwrap: apt-get install bubblewrap"):
        Sandbox(SMALL, "bubblewrap")


def test_auto_takes_unshare_where_bubblewrap_does_not_work(monkeypatch):
    def only_unshare(sandbox):
        if sandbox.backend == "bubblewrap":
            raise SandboxUnavailable("bwrap: no permissions")
        return []

    monkeypatch.setattr(sandbox_attack, "attack", only_unshare)
    monkeypatch.setattr(sandbox_attack, "withstood", set())
    assert open_sandbox(SandboxConfig()).backend == "unshare"
    assert sandbox_attack.withstood == {"unshare"}


def test_a_directory_made_readable_is_seen_and_stays_as_it_is(backend, tmp_path):
    shared = tmp_path if os.geteuid() else pathlib.Path(tempfile.mkdtemp(dir="/var/tmp"))
    shared.chmod(0o755)
    (shared / "data.txt").write_text("data")
    source = f"print(open('{shared}/data.txt').read()); open('{shared}/data.txt', 'a')"
    outcome = Sandbox(SMALL, backend, [str(shared)]).run([*PYTHON, "-c", source], {})
    shutil.rmtree(shared)
    assert outcome.stdout == b"data\n"
    assert b"Read-only file system" in outcome.stderr or b"Permission denied" in outcome.stderr


def test_limits_and_paths_out_of_range_are_errors():
    with pytest.raises(ValueError, match="wall_s=0 must be more than 0"):
        Sandbox(Limits(wall_s=0))
    with pytest.raises(ValueError, match="readable path 'data'"):
        Sandbox(SMALL, readable=["data"])
    with pytest.raises(ValueError, match="backend='docker'"):
        Sandbox(SMALL, "docker")
