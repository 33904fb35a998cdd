"""Runs untrusted programs in their own namespaces, without network and under limits, or else not at all.

A run is one process tree whose pid 1 is init.py. Namespaces and file system come from bubblewrap or from unshare(1);
everything after that is the same code. `attack.open_sandbox` returns a sandbox that has withstood an attack.
"""

import marshal
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from r1jax.rewards.sandbox import isolation
from r1jax.rewards.sandbox.isolation import BACKENDS, PYTHON, WORK, Isolation, SandboxUnavailable
from r1jax.schema import Limits

__all__ = [
    "BACKENDS",
    "PYTHON",
    "WORK",
    "Limits",
    "Outcome",
    "Program",
    "Sandbox",
    "SandboxUnavailable",
]

KILL_S = 10.0  # how long a killed tree may take to end; the kernel needs milliseconds
WALL_SLACK_S = 2.0  # how much later the deadline of init.py is, which matters only if this process has ended
_SPARE_PROCESSES = 2  # pid 1 and bubblewrap's process, which the kernel counts too


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: int  # exit status, or minus the number of the signal that ended the command
    stdout: bytes  # at most output_bytes of each
    stderr: bytes
    stopped_by: str  # wall, cpu, memory, output, file size, seccomp; "" when the command ended by itself
    seconds: float


@dataclass(frozen=True)
class Program:
    """A command, and the files (by relative path) in its working directory."""

    command: Sequence[str]
    files: Mapping[str, bytes] = field(default_factory=dict)


class Sandbox:
    """Runs commands in isolation. Use `attack.open_sandbox` to get one that has withstood an attack."""

    def __init__(
        self,
        limits: Limits,
        backend: str = "auto",
        readable: Sequence[str] = (),
    ):
        """`readable`: absolute paths of directories that programs may read, besides the system's and the interpreter's.

        Raises SandboxUnavailable if the backend is not installed or this is not Linux, ValueError for invalid limits or
        paths.
        """
        for name, value in vars(limits).items():
            if name != "backend" and value <= 0:
                raise ValueError(f"Sandbox: {name}={value} must be more than 0")
        for path in readable:
            if not os.path.isabs(path) or not os.path.isdir(path):
                raise ValueError(f"Sandbox: readable path {path!r} is not an absolute path of a directory")
        self.limits, self.backend = limits, isolation.installed(backend)
        self._isolation = Isolation(self.backend, tuple(readable))

    def limited(self, **limits: float) -> "Sandbox":
        """Returns a copy of the sandbox with some of its limits replaced."""
        return Sandbox(replace(self.limits, **limits), self.backend, self._isolation.readable)

    def run(self, command: Sequence[str], files: Mapping[str, bytes], stdin: bytes = b"") -> Outcome:
        """Returns the outcome of `command` in a fresh private directory that holds `files` (by relative path).

        The command's first word is looked up in the sandbox's PATH; PYTHON starts this interpreter. Raises
        SandboxUnavailable if the isolation could not be set up; the command did not run then.
        """
        read, write = os.pipe()
        with open(write, "wb") as feed, open(read, "rb") as source:
            with self._started(Program(command, files), source.fileno()) as run:
                source.close()
                return _collect([run], self.limits, feed, stdin)[0]

    def converse(self, first: Program, second: Program) -> tuple[Outcome, Outcome]:
        """Returns the outcomes of two programs in separate sandboxes, whose standard inputs are the ends of one socket.

        When one ends, the other reads the end of the stream. Raises as `run` does.
        """
        ends = socket.socketpair()
        with (
            ends[0],
            ends[1],
            self._started(first, ends[0].fileno()) as one,
            self._started(second, ends[1].fileno()) as two,
        ):
            ends[0].close(), ends[1].close()
            outcome, other = _collect([one, two], self.limits)
            return outcome, other

    @contextmanager
    def _started(self, program: Program, stdin: int) -> Generator["_Run"]:
        """Yields a started run, and ends its whole process tree on leaving."""
        report, reported = os.pipe()
        spec = os.memfd_create("spec")
        try:
            with open(os.dup(spec), "wb") as file:
                file.write(marshal.dumps(self._spec(program)))
            os.lseek(spec, 0, os.SEEK_SET)
            process = subprocess.Popen(
                self._isolation.command_line(spec, reported),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(spec, reported),
                env={"PATH": os.defpath},
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            os.close(report)
            raise
        finally:
            os.close(spec)
            os.close(reported)
        run = _Run(process, report)
        try:
            yield run
        finally:
            run.end()

    def _spec(self, program: Program) -> dict:
        limits = self.limits
        cpu = max(1, int(limits.cpu_s + 0.999))
        exact = {
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_NPROC": limits.processes + _SPARE_PROCESSES,
            "RLIMIT_FSIZE": limits.file_bytes,
            **{"RLIMIT_NOFILE": 256, "RLIMIT_STACK": 64 << 20},
            **dict.fromkeys(("RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE"), 0),
        }
        return {
            **self._isolation.layout(),
            "private": {"/tmp": limits.disk_bytes, WORK: limits.disk_bytes},
            "files": {str(name): bytes(content) for name, content in program.files.items()},
            "command": list(program.command),
            "environment": isolation.ENVIRONMENT,
            "limits": {name: (value, value) for name, value in exact.items()} | {"RLIMIT_CPU": (cpu, cpu + 1)},
            "filter": isolation.system_call_filter(),
            "memory_bytes": limits.memory_bytes,
            "cpu_s": limits.cpu_s,
            "wall_s": limits.wall_s + WALL_SLACK_S,
        }


class _Run:
    """One running process tree: its root process outside the sandbox, and the pipes to it."""

    def __init__(self, process: subprocess.Popen, report: int):
        assert process.stdout is not None and process.stderr is not None
        self.process, self.stdout, self.stderr = process, process.stdout, process.stderr
        self.report = open(report, "rb", buffering=0)
        self.started = time.monotonic()
        self.received = {stream: bytearray() for stream in (self.stdout, self.stderr, self.report)}
        self.stopped_by = ""
        self.seconds = 0.0

    def stop(self, reason: str) -> None:
        self.stopped_by = self.stopped_by or reason
        self.process.kill()  # this ends all others: parent-death signals down to pid 1, and the kernel from there

    def end(self) -> None:
        """Kills the tree and waits until it has ended: pid 1, which ends last, holds the report's other end."""
        self.process.kill()
        self.process.wait()
        with selectors.DefaultSelector() as selector:
            selector.register(self.report, selectors.EVENT_READ)
            deadline = time.monotonic() + KILL_S
            while selector.select(max(0.0, deadline - time.monotonic())):
                if not self.report.read(256):
                    break
            else:
                raise RuntimeError(f"sandbox: killed processes are still there after {KILL_S:g} s")
        for stream in self.received:
            stream.close()

    def outcome(self) -> Outcome:
        status, _, reason = bytes(self.received[self.report]).decode().partition(" ")
        stdout, stderr = (bytes(self.received[stream]) for stream in (self.stdout, self.stderr))
        if reason.startswith("setup: ") or not (status or self.stopped_by):
            raise SandboxUnavailable(isolation.diagnosis(reason or stderr.decode(errors="replace")))
        return Outcome(int(status or -signal.SIGKILL), stdout, stderr, self.stopped_by or reason, self.seconds)


def _collect(runs: list[_Run], limits: Limits, feed=None, stdin: bytes = b"") -> list[Outcome]:
    """Returns the outcomes of runs, after reading their output and feeding `stdin` to the first one.

    Stops all of them at the deadline, and each one that prints too much.
    """
    deadline = time.monotonic() + limits.wall_s
    left, stopping = memoryview(stdin), False
    with selectors.DefaultSelector() as selector:
        for run in runs:
            for stream in run.received:
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ, run)
        if feed is not None:
            os.set_blocking(feed.fileno(), False)
            selector.register(feed, selectors.EVENT_WRITE)
        while any(key.data for key in selector.get_map().values()):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                if stopping:
                    raise RuntimeError(f"sandbox: killed processes are still there after {KILL_S:g} s")
                for run in runs:
                    run.stop("wall")
                stopping, deadline = True, time.monotonic() + KILL_S
            for key, _ in ready:
                if key.data is None:
                    left = _write(key.fileobj, left, selector)
                elif _read(key.data, key.fileobj, limits.output_bytes):
                    selector.unregister(key.fileobj)
                    key.data.seconds = time.monotonic() - key.data.started
    return [run.outcome() for run in runs]


def _write(feed, left: memoryview, selector: selectors.BaseSelector) -> memoryview:
    try:
        left = left[os.write(feed.fileno(), left[:65536]) :] if left else left
    except BrokenPipeError:  # a program need not read its input
        left = left[:0]
    if not left:
        selector.unregister(feed)
        feed.close()
    return left


def _read(run: _Run, stream, limit: int) -> bool:
    """Reads a chunk of a stream, keeps at most `limit` bytes in all, and returns whether the stream has ended."""
    chunk = os.read(stream.fileno(), 65536)
    kept = run.received[stream]
    kept += chunk[: max(0, limit - len(kept))]
    if len(chunk) and len(kept) >= limit:
        run.stop("output")
    return not chunk
