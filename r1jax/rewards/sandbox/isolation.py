"""Isolates a program from the machine: the files that it sees, its user and the system calls that it may make.

Namespaces and bind mounts come from bubblewrap or from unshare(1). When this process is root, the tools run as
nobody, in a mount namespace in which an ordinary user can reach the interpreter.
"""

import errno
import functools
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

BACKENDS = ("bubblewrap", "unshare")
WORK = "/program"  # directory of the program's files, in which the command starts
NOBODY = 65534  # user and group inside; outside too when this process is root
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
PREFIX = os.path.realpath(sys.base_prefix)
PYTHON = (f"{PREFIX}/bin/{VERSION}", "-I", "-S", "-B")  # isolated, no site-packages, no bytecode written
ENVIRONMENT = {"PATH": f"{PREFIX}/bin:/usr/bin:/bin", "HOME": WORK, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
_SYSTEM = ("/usr", "/etc/ld.so.cache", "/etc/alternatives")
_MASKED = (f"{PREFIX}/lib/{VERSION}/site-packages", "/usr/local", "/usr/src")
_ROOT_LINKS = ("/bin", "/lib", "/lib32", "/lib64", "/sbin")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_DEVICE_LINKS = {"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1"}
_PACKAGES = {"bubblewrap": ("bwrap", "bubblewrap"), "unshare": ("unshare", "util-linux")}
_REACHABLE = (  # arguments: a directory to mount on, the interpreter's prefix, and the command line to execute
    'mount -t tmpfs -o mode=755 tmpfs "$1"; mkdir "$1/python"; mount --rbind "$2" "$1/python"; shift 2; exec "$@"'
)
# Calls that reach rarely used parts of the kernel, other processes, or memory that the limits do not count.
_DENIED_CALLS = """
    memfd_create memfd_secret shmget shmat msgget semget mq_open
    ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd pidfd_open
    unshare setns mount umount2 pivot_root chroot move_mount open_tree mount_setattr fsopen fsconfig fsmount fspick
    quotactl swapon acct open_by_handle_at name_to_handle_at fanotify_init
    bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register personality
    add_key request_key keyctl syslog reboot kexec_load kexec_file_load init_module finit_module delete_module
    settimeofday clock_settime adjtimex sched_setattr
""".split()
_CLONE_NEW = 0x7E020080  # every CLONE_NEW* flag


class SandboxUnavailable(ValueError):
    """This machine cannot isolate a program; the message names what is missing and how to install it."""


@dataclass(frozen=True)
class Isolation:
    """A backend, and the directories that programs may read in addition to the system's and the interpreter's."""

    backend: str
    readable: tuple[str, ...] = ()

    def layout(self) -> dict:
        """Returns the description of the file system that init.py builds (unshare) or completes (bubblewrap)."""
        kept = (PREFIX, *self.readable)
        masked = [path for path in _MASKED if os.path.isdir(path) and not any(_holds(path, one) for one in kept)]
        return {
            "build": self.backend == "unshare",
            "base": self._mount_point(),
            "binds": self._binds(),
            "links": _links(),
            "devices": _DEVICES,
            "masked": masked,
            "directory": WORK,
        }

    def command_line(self, spec: int, report: int) -> list[str]:
        """Returns the command that starts init.py isolated; `spec` and `report` are its two descriptors."""
        python = PYTHON[0]
        line = ["setpriv", "--no-new-privs", "--pdeathsig=KILL"]
        if _is_root():
            base = self._mount_point()
            line = ["unshare", "--mount", "--", "sh", "-euc", _REACHABLE, "sh", base, PREFIX, *line]
            line += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
        if self.backend == "bubblewrap":
            line += ["--", *self._bubblewrap()]
        else:
            identity = (f"--map-user={NOBODY}", f"--map-group={NOBODY}", "--keep-caps")
            spaces = ("--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup")
            line += ["--", "unshare", "--user", *identity, *spaces, "--fork", "--kill-child=KILL"]
            python = self._interpreter_outside()
        return [*line, "--", python, *PYTHON[1:], "-c", _init_source(), str(spec), str(report)]

    def _bubblewrap(self) -> list[str]:
        line = ["bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--as-pid-1"]
        line += ["--clearenv", "--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox"]
        line += ["--cap-add", "CAP_SYS_ADMIN", "--cap-add", "CAP_SETPCAP"]  # for init.py, which drops them
        for source, target in self._binds():
            line += ["--ro-bind", source, target]
        for target, destination in _links().items():
            line += ["--symlink", destination, target]
        for name in _DEVICES:
            line += ["--dev-bind", name, name]
        return [*line, "--dir", "/tmp", "--dir", WORK, "--proc", "/proc", "--remount-ro", "/", "--chdir", "/"]

    def _binds(self) -> list[tuple[str, str]]:
        """Returns (path outside, path inside) of everything that programs may read."""
        paths = [path for path in (*_SYSTEM, *_ROOT_LINKS) if os.path.exists(path) and not os.path.islink(path)]
        binds = [(path, path) for path in (*paths, *self.readable)]
        if not _holds("/usr", PREFIX):
            binds.append((f"{self._mount_point()}/python" if _is_root() else PREFIX, PREFIX))
        return binds

    def _interpreter_outside(self) -> str:
        hidden = _is_root() and not _holds("/usr", PREFIX)
        return f"{self._mount_point()}/python/bin/{VERSION}" if hidden else PYTHON[0]

    def _mount_point(self) -> str:
        """Returns a directory on which to mount, in a new mount namespace, without hiding anything that is needed."""
        for path in ("/mnt", "/media", "/srv", "/opt", "/tmp"):
            if os.path.isdir(path) and not any(_holds(path, kept) for kept in (PREFIX, *self.readable)):
                return path
        raise SandboxUnavailable("the sandbox needs one of /mnt, /media, /srv, /opt, /tmp to mount on: mkdir /mnt")


def installed(backend: str) -> str:
    """Returns the backend; for `auto` bubblewrap if it is installed, else unshare.

    Raises SandboxUnavailable if its tools are not installed or this is not Linux, ValueError for an unknown name.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"Sandbox: backend={backend!r} must be auto, bubblewrap or unshare")
    if not sys.platform.startswith("linux"):
        raise SandboxUnavailable(f"the sandbox needs Linux (namespaces), this is {sys.platform}: grade code on Linux")
    if backend == "auto":
        backend = "bubblewrap" if shutil.which("bwrap", path=os.defpath) else "unshare"
    for tool, package in (_PACKAGES[backend], ("setpriv", "util-linux"), ("unshare", "util-linux")):
        if shutil.which(tool, path=os.defpath) is None:
            raise SandboxUnavailable(f"the sandbox ({backend}) needs {tool}: apt-get install {package}")
    return backend


@functools.cache
def system_call_filter() -> bytes:
    """Returns the seccomp program, which denies network sockets, new namespaces and the calls of _DENIED_CALLS.

    Raises SandboxUnavailable without libseccomp.
    """
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
    # The flags of clone3 are behind a pointer, which a filter cannot read; without it C libraries use clone.
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    with open(os.memfd_create("filter"), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def diagnosis(message: str) -> str:
    """Returns one line with the reason why the isolation failed and its remedy."""
    line = " ".join(message.split())[:300] or "it ended without a word"
    return (
        f"the sandbox cannot isolate programs here ({line}): run as root, or allow user namespaces "
        "(sysctl -w kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000; "
        "on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0; in Docker --privileged)"
    )


def _is_root() -> bool:
    return os.geteuid() == 0


def _holds(directory: str, path: str) -> bool:
    return f"{path}/".startswith(f"{directory}/")


@functools.cache
def _links() -> dict[str, str]:
    return {path: os.readlink(path) for path in _ROOT_LINKS if os.path.islink(path)} | _DEVICE_LINKS


@functools.cache
def _init_source() -> str:
    return Path(__file__).with_name("init.py").read_text(encoding="utf-8")
