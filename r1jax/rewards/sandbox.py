"""Runs programs that nobody trusts: in namespaces of their own, without network, under limits, or not at all.

A run is one process tree below sandbox_init.py, its pid 1. Namespaces and file system come from bubblewrap or from
unshare(1); everything after that is the same code. `open_sandbox` attacks the sandbox before it hands it out.
"""

import errno
import functools
import marshal
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from r1jax.schema import Limits, SandboxConfig

__all__ = ["BACKENDS", "PYTHON", "Limits", "Outcome", "Program", "Sandbox", "SandboxUnavailable", "open_sandbox"]

BACKENDS = ("bubblewrap", "unshare")
WORK = "/work"  # where the files are and the command starts
NOBODY = 65534  # user and group inside; outside too when we are root
KILL_S = 10.0  # how long a killed tree may take to be gone; the kernel needs milliseconds
WALL_SLACK_S = 2.0  # the supervisor's own deadline comes this much later than ours, for when we are gone
_PREFIX = os.path.realpath(sys.base_prefix)
_INTERPRETER = f"{_PREFIX}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
PYTHON = (_INTERPRETER, "-I", "-S", "-B")  # isolated, no site-packages, no bytecode written
ENVIRONMENT = {"PATH": f"{_PREFIX}/bin:/usr/bin:/bin", "HOME": WORK, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
_SYSTEM = ("/usr", "/etc/ld.so.cache", "/etc/alternatives")
_MASKED = (
    f"{_PREFIX}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages",
    "/usr/local",
    "/usr/src",
)
_ROOT_LINKS = ("/bin", "/lib", "/lib32", "/lib64", "/sbin")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_DEVICE_LINKS = {"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1"}
_SPARE_PROCESSES = 2  # pid 1, and bubblewrap's own; they count for the kernel
_PACKAGES = {"bubblewrap": ("bwrap", "bubblewrap"), "unshare": ("unshare", "util-linux")}
# As root: the interpreter gets a path that an ordinary user can reach, in a mount namespace of our own, and then we are one.
_AS_NOBODY = (
    'mount -t tmpfs -o mode=755 tmpfs "$1"; mkdir "$1/python"; mount --rbind "$2" "$1/python"; shift 2; exec "$@"'
)
_DENIED_CALLS = (  # they reach the kernel's rarer parts, other processes, or memory that no limit of ours counts
    *("memfd_create", "memfd_secret", "shmget", "shmat", "msgget", "semget", "mq_open"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "pidfd_open", "process_madvise"),
    *("unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "mount_setattr"),
    *(
        "fsopen",
        "fsconfig",
        "fsmount",
        "fspick",
        "quotactl",
        "open_by_handle_at",
        "name_to_handle_at",
        "swapon",
        "acct",
    ),
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "personality"),
    *("add_key", "request_key", "keyctl", "syslog", "reboot", "kexec_load", "kexec_file_load", "init_module"),
    *("finit_module", "delete_module", "fanotify_init", "settimeofday", "clock_settime", "adjtimex", "sched_setattr"),
)
_CLONE_NEW = 0x7E020080  # every CLONE_NEW* flag


class SandboxUnavailable(ValueError):
    """This machine cannot isolate a program; the message says what is missing and how to get it."""


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
    """A command, and the files (by relative path) it finds in its working directory."""

    command: Sequence[str]
    files: Mapping[str, bytes] = field(default_factory=dict)


class Sandbox:
    """Runs commands isolated. Use `open_sandbox` to get one that has been attacked first."""

    def __init__(
        self,
        limits: Limits,
        backend: Literal["auto", "bubblewrap", "unshare"] = "auto",
        readable: Sequence[str] = (),
    ):
        """`readable`: absolute paths of directories that programs may read, besides the system's and the interpreter's.

        Raises SandboxUnavailable if the backend is not installed or this is not Linux; ValueError for limits or paths out of range.
        """
        for name, value in vars(limits).items():
            if name != "backend" and value <= 0:
                raise ValueError(f"Sandbox: {name}={value} must be more than 0")
        for path in readable:
            if not os.path.isabs(path) or not os.path.isdir(path):
                raise ValueError(f"Sandbox: readable path {path!r} is not an absolute path of a directory")
        self.limits, self.backend, self._readable = limits, _installed(backend), tuple(readable)

    def limited(self, **limits: float) -> "Sandbox":
        """Returns the same sandbox with some of its limits replaced."""
        return Sandbox(replace(self.limits, **limits), self.backend, self._readable)

    def run(self, command: Sequence[str], files: Mapping[str, bytes], stdin: bytes = b"") -> Outcome:
        """Returns the outcome of `command` in a fresh private directory that holds `files` (by relative path).

        A command's first word is found in the sandbox's PATH; PYTHON starts our interpreter. Raises SandboxUnavailable
        if the isolation could not be set up: then the command did not run.
        """
        read, write = os.pipe()
        with open(write, "wb") as feed, open(read, "rb") as source:
            with self._started(Program(command, files), source.fileno()) as run:
                source.close()
                return _collect([run], self.limits, feed, stdin)[0]

    def converse(self, first: Program, second: Program) -> tuple[Outcome, Outcome]:
        """Returns the outcomes of two programs in a sandbox each, whose standard inputs are the two ends of one socket.

        When either has ended the other sees the end of the stream. Raises as `run` does.
        """
        ends = socket.socketpair()
        with (
            ends[0],
            ends[1],
            self._started(first, ends[0].fileno()) as one,
            self._started(second, ends[1].fileno()) as two,
        ):
            ends[0].close(), ends[1].close()
            return tuple(_collect([one, two], self.limits))

    @contextmanager
    def _started(self, program: Program, stdin: int) -> Iterator["_Run"]:
        """A started run; on leaving, its whole tree is gone."""
        report, reported = os.pipe()
        spec = os.memfd_create("spec")
        try:
            with open(os.dup(spec), "wb") as file:
                file.write(marshal.dumps(self._spec(program)))
            os.lseek(spec, 0, os.SEEK_SET)
            process = subprocess.Popen(
                self._command_line(spec, reported),
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
            "build": self.backend == "unshare",
            "base": _mount_point(),
            "binds": self._binds(),
            "links": _links(),
            "devices": _DEVICES,
            "private": {"/tmp": limits.disk_bytes, WORK: limits.disk_bytes},
            "masked": [path for path in _MASKED if os.path.isdir(path) and not f"{_PREFIX}/".startswith(f"{path}/")],
            "directory": WORK,
            "files": {str(name): bytes(content) for name, content in program.files.items()},
            "command": list(program.command),
            "environment": ENVIRONMENT,
            "limits": {name: (value, value) for name, value in exact.items()} | {"RLIMIT_CPU": (cpu, cpu + 1)},
            "filter": _system_call_filter(),
            "memory_bytes": limits.memory_bytes,
            "cpu_s": limits.cpu_s,
            "wall_s": limits.wall_s + WALL_SLACK_S,
        }

    def _binds(self) -> list[tuple[str, str]]:
        """Returns (where it is now, where it goes) of what programs may read."""
        prefix = (f"{_mount_point()}/python" if _is_root() else _PREFIX, _PREFIX)
        paths = [path for path in (*_SYSTEM, *_ROOT_LINKS) if os.path.exists(path) and not os.path.islink(path)]
        return [(path, path) for path in (*paths, *self._readable)] + ([] if _is_system(_PREFIX) else [prefix])

    def _command_line(self, spec: int, report: int) -> list[str]:
        python = _INTERPRETER
        line = ["setpriv", "--no-new-privs", "--pdeathsig=KILL"]
        if _is_root():
            line += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
            prelude = ["unshare", "--mount", "--", "sh", "-euc", _AS_NOBODY, "sh", _mount_point(), _PREFIX]
            line = [*prelude, *line]
            python = python if _is_system(_PREFIX) else f"{_mount_point()}/python{_INTERPRETER.removeprefix(_PREFIX)}"
        if self.backend == "bubblewrap":
            line += ["--", *self._bubblewrap()]
            python = _INTERPRETER
        else:
            identity = (f"--map-user={NOBODY}", f"--map-group={NOBODY}", "--keep-caps")
            spaces = ("--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup")
            line += ["--", "unshare", "--user", *identity, *spaces, "--fork", "--kill-child=KILL"]
        return [*line, "--", python, *PYTHON[1:], "-c", _init_source(), str(spec), str(report)]

    def _bubblewrap(self) -> list[str]:
        line = [
            "bwrap",
            "--unshare-all",
            "--unshare-user",
            "--die-with-parent",
            "--new-session",
            "--as-pid-1",
            "--clearenv",
        ]
        line += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
        line += ["--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP"]  # for sandbox_init.py, which drops them
        for source, target in self._binds():
            line += ["--ro-bind", source, target]
        for target, destination in _links().items():
            line += ["--symlink", destination, target]
        for name in _DEVICES:
            line += ["--dev-bind", name, name]
        return [*line, "--dir", "/tmp", "--dir", WORK, "--proc", "/proc", "--remount-ro", "/", "--chdir", "/"]


class _Run:
    """One running tree: the process that is its root here, and the pipes to it."""

    def __init__(self, process: subprocess.Popen, report: int):
        self.process, self.report = process, open(report, "rb", buffering=0)
        self.started = time.monotonic()
        self.received = {self.process.stdout: bytearray(), self.process.stderr: bytearray(), self.report: bytearray()}
        self.stopped_by = ""
        self.seconds = 0.0

    def stop(self, reason: str) -> None:
        self.stopped_by = self.stopped_by or reason
        self.process.kill()  # all the others die of it: parent-death signals down to pid 1, and the kernel's from there

    def end(self) -> None:
        """Kills what is left and waits until it is gone: pid 1, the last to go, holds the report's other end."""
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
        for stream in (self.process.stdout, self.process.stderr, self.report):
            stream.close()

    def outcome(self, backend_error: str = "") -> Outcome:
        status, _, reason = bytes(self.received[self.report]).decode().partition(" ")
        stdout, stderr = (bytes(self.received[stream]) for stream in (self.process.stdout, self.process.stderr))
        if reason.startswith("setup: ") or not (status or self.stopped_by):
            raise SandboxUnavailable(_diagnosis(reason or stderr.decode(errors="replace")))
        return Outcome(int(status or -signal.SIGKILL), stdout, stderr, self.stopped_by or reason, self.seconds)


def _collect(runs: list[_Run], limits: Limits, feed=None, stdin: bytes = b"") -> list[Outcome]:
    """Reads what the runs print, feeds the first one's input, and stops them all at the deadline or a full output."""
    deadline = time.monotonic() + limits.wall_s
    left = memoryview(stdin)
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
                for run in runs:
                    run.stop("wall")
                deadline = time.monotonic() + KILL_S
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
    """Takes what a stream holds, up to the limit, and returns whether it has ended."""
    chunk = os.read(stream.fileno(), 65536)
    kept = run.received[stream]
    kept += chunk[: max(0, limit - len(kept))]
    if len(chunk) and len(kept) >= limit:
        run.stop("output")
    return not chunk


def _is_root() -> bool:
    return os.geteuid() == 0


def _is_system(path: str) -> bool:
    return path == "/usr" or path.startswith("/usr/")


@functools.cache
def _mount_point() -> str:
    """Returns a directory to mount on, in our own mount namespace, that hides nothing which is needed there."""
    for path in ("/mnt", "/media", "/srv", "/opt", "/tmp"):
        if os.path.isdir(path) and not f"{_PREFIX}/".startswith(f"{path}/"):
            return path
    raise SandboxUnavailable("the sandbox needs one of /mnt, /media, /srv, /opt, /tmp to mount on: mkdir /mnt")


@functools.cache
def _links() -> dict[str, str]:
    return {path: os.readlink(path) for path in _ROOT_LINKS if os.path.islink(path)} | _DEVICE_LINKS


@functools.cache
def _init_source() -> str:
    return Path(__file__).with_name("sandbox_init.py").read_text(encoding="utf-8")


@functools.cache
def _installed(backend: str) -> str:
    """Returns the backend, or for `auto` the better one that works here. Raises SandboxUnavailable if it is not installed."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"Sandbox: backend={backend!r} must be auto, bubblewrap or unshare")
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable(
            f"the sandbox needs Linux (namespaces), this is {sys.platform}: grade code on a Linux machine"
        )
    if backend == "auto":
        backend = "bubblewrap" if shutil.which("bwrap", path=os.defpath) else "unshare"
    for tool, package in (_PACKAGES[backend], ("setpriv", "util-linux"), ("unshare", "util-linux")):
        if shutil.which(tool, path=os.defpath) is None:
            raise SandboxUnavailable(f"the sandbox ({backend}) needs {tool}: apt-get install {package}")
    return backend


@functools.cache
def _system_call_filter() -> bytes:
    """Returns the seccomp program: no sockets but local pairs, no namespaces, none of _DENIED_CALLS."""
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError) as error:
        raise SandboxUnavailable(
            f"the sandbox needs libseccomp and pyseccomp ({error}): apt-get install libseccomp2; pip install pyseccomp"
        ) from None
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    denied = pyseccomp.ERRNO(errno.EPERM)
    for name in _DENIED_CALLS:
        rules.add_rule(denied, name)
    rules.add_rule(denied, "socket", pyseccomp.Arg(0, pyseccomp.NE, socket.AF_UNIX))
    for bit in range(32):
        if _CLONE_NEW >> bit & 1:
            rules.add_rule(denied, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, 1 << bit, 1 << bit))
    rules.add_rule(
        pyseccomp.ERRNO(errno.ENOSYS), "clone3"
    )  # its flags are behind a pointer; the C library then uses clone
    with open(os.memfd_create("filter"), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _diagnosis(message: str) -> str:
    """Returns one line that says why the isolation failed and what to do about it."""
    line = " ".join(message.split())[:300] or "it ended without a word"
    remedy = "run as root or allow user namespaces (sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000; "
    remedy += "on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0; in Docker --privileged)"
    return f"the sandbox cannot isolate programs here ({line}): {remedy}"


def open_sandbox(config: SandboxConfig) -> Sandbox:
    """Returns the sandbox of a config after it withstood its own attack (once in a process).

    Raises SandboxUnavailable if it is not installed, does not work here, or lets anything out.
    """
    from r1jax.rewards import sandbox_attack

    sandbox = Sandbox(config, config.backend)
    sandbox_attack.require(sandbox.backend)
    return sandbox
