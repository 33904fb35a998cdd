"""The first process inside a sandbox. Its source is passed to `python -c`, so it imports the standard library only.

Its arguments are the descriptor of a marshalled spec and the descriptor of the report. It builds the file system
(unless bubblewrap did), writes the files, gives up every privilege, starts the command in a child under hard limits,
and watches what the kernel limits only per process: the memory, processor time and wall time of all processes
together. It is pid 1 of its namespace, so that nothing inside can stop or trace it, and the kernel kills all other
processes when it ends. When the child ends, it writes `status stopped_by` to the report, which no other process has
open.
"""

import ctypes
import marshal
import os
import resource
import signal
import sys
import time

POLL_S = 0.02
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 4, 22, 24, 38, 47
libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    names = [None if name is None else name.encode() for name in (source, target, kind)]
    checked(libc.mount(*names, ctypes.c_ulong(flags), data.encode()), f"mount {kind or source} on {target}")


def build_root(spec: dict) -> None:
    """Makes a tmpfs the root and binds the needed parts of the old root into it, read-only."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    base = spec["base"]
    mount("tmpfs", base, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir(f"{base}/old")
    os.chdir(base)
    checked(libc.pivot_root(b".", b"old"), "pivot_root")
    os.chdir("/")
    for source, target in spec["binds"]:
        os.makedirs(target, exist_ok=True) if os.path.isdir(f"/old{source}") else make_file(target)
        mount(f"/old{source}", target, None, MS_BIND | MS_REC)
        make_read_only(target)
    for target, destination in spec["links"].items():
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(destination, target)
    for name in spec["devices"]:
        make_file(name)
        mount(f"/old{name}", name, None, MS_BIND)
    for target in (*spec["private"], "/proc"):
        os.makedirs(target)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    checked(libc.umount2(b"/old", MNT_DETACH), "umount of the old root")
    os.rmdir("/old")
    mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    checked(libc.sethostname(b"sandbox", 7), "sethostname")


def make_file(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def make_read_only(target: str) -> None:
    """Remounts the mount at `target` and all below it read-only; a bind mount's read-only flag does not cover those."""
    with open("/old/proc/self/mountinfo") as file:
        points = [line.split()[4] for line in file]
    for point in points:
        point = point.replace("\\040", " ")
        if point == target or point.startswith(target + "/"):
            mount("none", point, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def mount_private(sizes: dict[str, int]) -> None:
    """Mounts an empty file system in memory on each path, with limits on bytes and files (bubblewrap limits bytes)."""
    for target, size in sizes.items():
        mount("tmpfs", target, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=755,nr_inodes=16384")


def mask(paths: list[str]) -> None:
    """Hides directories that were bound with their parent behind empty read-only ones."""
    for path in paths:
        mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,mode=755")


def write_files(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        os.makedirs(os.path.dirname(os.path.abspath(name)), exist_ok=True)
        with open(name, "wb") as file:
            file.write(content)
        os.chmod(name, 0o755)


def drop_privileges() -> None:
    """Gives up all capabilities and every way to regain them; hides this process from the command's processes."""
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(PR_CAP_AMBIENT, 4, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    checked(libc.capset(header, none), "capset")
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    checked(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")


def filter_system_calls(program: bytes) -> None:
    class FilterProgram(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    checked(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(FilterProgram(len(program) // 8, program)), 0, 0), "seccomp")


def start(spec: dict) -> int:
    """Starts the command in its own session, under limits, with descriptors 0 to 2 only, and returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        os.closerange(3, 1 << 16)
        for name, value in spec["limits"].items():
            resource.setrlimit(getattr(resource, name), value)
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        filter_system_calls(spec["filter"])
        os.execve(find_command(spec["command"][0], spec["environment"]["PATH"]), spec["command"], spec["environment"])
    except BaseException as error:  # the child must never go on as a second supervisor
        os.write(2, f"sandbox: {spec['command'][0]}: {error}\n".encode())
    finally:
        os._exit(127)


def find_command(command: str, path: str) -> str:
    """Returns the path of a command. os.execvpe is not used, since it imports a module that is unreachable by now."""
    places = [command] if "/" in command else [f"{directory}/{command}" for directory in path.split(":")]
    return next((place for place in places if os.access(place, os.X_OK)), command)


def usage() -> tuple[int, float]:
    """Returns (resident bytes, processor seconds) of all processes of the namespace but this one."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    pages, seconds = 0, ended.ru_utime + ended.ru_stime
    for name in os.listdir("/proc"):
        if not name.isdigit() or name == "1":
            continue
        try:
            with open(f"/proc/{name}/statm", "rb") as file:
                pages += int(file.read().split()[1])
            with open(f"/proc/{name}/stat", "rb") as file:  # bytes: a process may have a name that is not text
                fields = file.read().rpartition(b")")[2].split()
                seconds += (int(fields[11]) + int(fields[12])) / TICKS
        except (OSError, IndexError):  # it has just ended
            continue
    return pages * PAGE_BYTES, seconds


def supervise(pid: int, spec: dict) -> tuple[int, str]:
    """Returns (exit status of the command, or minus the signal's number if one ended it; limit that stopped it)."""
    deadline = time.monotonic() + spec["wall_s"]
    while True:
        signal.sigtimedwait({signal.SIGCHLD}, POLL_S)
        ended = 1
        while ended:
            try:
                ended, code = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return -signal.SIGKILL, ""
            if ended == pid:
                status = os.waitstatus_to_exitcode(code)
                return status, {-signal.SIGXCPU: "cpu", -signal.SIGXFSZ: "file size", -signal.SIGSYS: "seccomp"}.get(
                    status, ""
                )
        memory, seconds = usage()
        for name, over in (
            ("memory", memory > spec["memory_bytes"]),
            ("cpu", seconds > spec["cpu_s"]),
            ("wall", time.monotonic() > deadline),
        ):
            if over:
                return -signal.SIGKILL, name


def main() -> None:
    spec_file, report = int(sys.argv[1]), int(sys.argv[2])
    with open(spec_file, "rb") as file:
        spec = marshal.load(file)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        if spec["build"]:
            build_root(spec)
        mask(spec["masked"])
        mount_private(spec["private"])
        os.chdir(spec["directory"])
        write_files(spec["files"])
        drop_privileges()
        pid = start(spec)
    except OSError as error:
        os.write(report, f"126 setup: {error}".encode())
        return
    status, stopped_by = supervise(pid, spec)
    os.write(report, f"{status} {stopped_by}".encode())


main()
