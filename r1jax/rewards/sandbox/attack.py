"""The attack that a sandbox must withstand before anything is graded in it; `open_sandbox` runs it."""

import contextlib
import json
import os
import secrets
import socket
import sys
import tempfile
from pathlib import Path

from r1jax.rewards.sandbox.run import BACKENDS, PYTHON, Outcome, Sandbox, SandboxUnavailable
from r1jax.schema import Limits, SandboxConfig

LIMITS = Limits(
    wall_s=20.0,
    cpu_s=10.0,
    memory_bytes=128 << 20,
    processes=6,
    file_bytes=2 << 20,
    disk_bytes=4 << 20,
    output_bytes=64 << 10,
)
withstood: set[str] = set()  # backends that withstood an attack by this process or by the one that started it
_FLOOD = "while True: print('x' * 1000)"
_SHARED_MEMORY = """
import os, time
for _ in range(4):
    if os.fork() == 0:
        hoard = bytearray(60 << 20)
        time.sleep(60)
time.sleep(60)
"""


def open_sandbox(config: SandboxConfig) -> Sandbox:
    """Returns the sandbox of a config, which has withstood the attack (run once per process).

    `auto` falls back to unshare where bubblewrap is missing or does not work. Raises SandboxUnavailable if the
    backend is not installed, does not work here, or lets anything out.
    """
    automatic = sorted(BACKENDS, key=lambda name: name not in withstood)
    *others, last = [config.backend] if config.backend != "auto" else automatic
    for backend in others:
        with contextlib.suppress(SandboxUnavailable):
            return _withstanding(config, backend)
    return _withstanding(config, last)


def _withstanding(config: SandboxConfig, backend: str) -> Sandbox:
    sandbox = Sandbox(config, backend)
    require(sandbox.backend)
    return sandbox


def attack(sandbox: Sandbox) -> list[str]:
    """Returns a line for each attack that got out of the sandbox or past its limits; empty if the sandbox holds.

    Takes about a second. Raises SandboxUnavailable if programs cannot be isolated here at all.
    """
    escaped = [f"{name}: {result}" for name, result in _probe(sandbox).items()]
    weak = {
        "output": _started(sandbox, _FLOOD),
        "memory": _started(sandbox, _SHARED_MEMORY),
        "wall": _started(Sandbox(Limits(wall_s=0.5), sandbox.backend), "import time; time.sleep(60)"),
    }
    return escaped + [
        f"{limit} limit: ended with {outcome.status}, stopped by {outcome.stopped_by or 'nothing'}"
        for limit, outcome in weak.items()
        if outcome.stopped_by != limit
    ]


def require(backend: str) -> None:
    """Raises SandboxUnavailable if anything gets out of the backend's sandbox. Runs the attack once in a process."""
    if backend in withstood:
        return
    escaped = attack(Sandbox(LIMITS, backend))
    if escaped:
        raise SandboxUnavailable(f"the sandbox ({backend}) leaks, so no program is run: {'; '.join(escaped)}")
    withstood.add(backend)


def _started(sandbox: Sandbox, source: str) -> Outcome:
    return sandbox.run([*PYTHON, "-c", source], {})


def _probe(sandbox: Sandbox) -> dict[str, str]:
    """Runs probe.py against a file, two listening sockets and this process; returns {attack: what it reached}."""
    source = Path(__file__).with_name("probe.py")
    name = f"r1jax-{secrets.token_hex(8)}"
    with (
        tempfile.NamedTemporaryFile() as bait,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as local,
    ):
        os.chmod(bait.name, 0o666)
        local.bind("\0" + name)
        local.listen()
        limits = sandbox.limits
        target = {
            "secret": next((f"{key}={value}" for key, value in os.environ.items() if len(value) > 8), name),
            "read": [bait.name, str(source), os.getcwd() if os.getcwd() != "/" else bait.name],
            "write": bait.name,
            "port": server.getsockname()[1],
            "socket": name,
            **{key: getattr(limits, key) for key in ("memory_bytes", "processes", "file_bytes", "disk_bytes")},
        }
        outcome = sandbox.run(PYTHON + ("probe.py",), {"probe.py": source.read_bytes()}, json.dumps(target).encode())
        escaped = {"write": bait.name} if os.path.getsize(bait.name) else {}
    try:
        return json.loads(outcome.stdout) | escaped
    except ValueError:
        words = outcome.stderr.decode(errors="replace").split()[-20:]
        raise SandboxUnavailable(
            f"the sandbox ({sandbox.backend}) broke its own probe: status {outcome.status}, "
            f"stopped by {outcome.stopped_by or 'nothing'}, {' '.join(words)}"
        ) from None


def main() -> int:
    """Attacks both backends and prints the result; the exit code is the number of those that failed."""
    failed = 0
    for backend in sys.argv[1:] or ("bubblewrap", "unshare"):
        try:
            escaped = attack(Sandbox(LIMITS, backend))
        except SandboxUnavailable as error:
            escaped = [str(error)]
        print(f"{backend}: {'nothing got out' if not escaped else '; '.join(escaped)}")
        failed += bool(escaped)
    return failed


if __name__ == "__main__":
    sys.exit(main())
