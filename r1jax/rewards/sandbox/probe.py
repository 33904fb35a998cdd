"""A program that tries to get out of the sandbox. Its source runs inside, so it imports the standard library only.

Standard input is a JSON object: a secret of the process outside, paths to read, a path to write, a TCP port and a Unix
socket that listen outside, and the limits. It prints a JSON object {attack: what it reached}, empty if none succeeded.
"""

import ctypes
import errno
import json
import os
import resource
import socket
import sys

target = json.load(sys.stdin)
through = {}


def attempt(name, attack):
    """Records the result of an attack, unless that is empty or the attack is refused."""
    try:
        result = attack()
    except (OSError, MemoryError, ValueError):
        return
    if result:
        through[name] = str(result)[:200]


def connect(family, address):
    with socket.socket(family) as link:
        link.settimeout(1.0)
        link.connect(address)
        return f"connected to {address}"


def interfaces():
    with open("/proc/net/dev") as file:
        names = [line.split(":")[0].strip() for line in file if ":" in line]
    return [name for name in names if name != "lo"]


def readable():
    paths = [path for path in target["read"] if os.path.exists(path)]
    return paths + [
        entry for entry in ("/home", "/etc/passwd", "/etc/shadow", "/sys", "/var", "/boot") if os.path.exists(entry)
    ]


def secrets():
    """Looks for the secret in the environment of the process that started the sandbox."""
    for name in ("self", *filter(str.isdigit, os.listdir("/proc"))):
        for part in ("environ", "cmdline"):
            try:
                with open(f"/proc/{name}/{part}", "rb") as file:
                    if target["secret"].encode() in file.read():
                        return f"/proc/{name}/{part}"
            except OSError:
                continue


def writable():
    with open(target["write"], "w") as file:  # this may be a private file of that name: attack.py checks the real one
        file.write("escaped")


def writable_system():
    written = []
    for path in ("/escaped", "/usr/escaped", f"{sys.base_prefix}/escaped", "/etc/escaped", "/dev/escaped"):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
            written.append(path)
        except OSError:
            continue
    return written


def foreign_processes():
    """Returns the ids of processes other than pid 1, this one and its ancestors."""
    ancestors, pid = {1, os.getpid()}, os.getpid()
    while pid > 1:
        with open(f"/proc/{pid}/stat") as file:
            pid = int(file.read().rpartition(")")[2].split()[1])
        ancestors.add(pid)
    return sorted({int(name) for name in os.listdir("/proc") if name.isdigit()} - ancestors - {0})


def descriptors():
    numbers = []
    for number in range(3, 256):
        try:
            os.fstat(number)
            numbers.append(number)
        except OSError:
            continue
    return numbers


def privileges():
    with open("/proc/self/status") as file:
        state = dict(line.split(":", 1) for line in file.read().splitlines())
    bad = [name for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb") if int(state[name], 16)]
    bad += [name for name, wanted in (("NoNewPrivs", 1), ("Seccomp", 2)) if int(state[name]) != wanted]
    return bad + (["uid 0"] if 0 in (*os.getresuid(), *os.getresgid()) else [])


def namespace():
    return "a new user namespace" if ctypes.CDLL(None).unshare(0x10000000) == 0 else ""


def mounted():
    return "a mount" if ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0 else ""


def traced():
    return "pid 1 can be traced" if ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0 else ""


def hidden_memory():
    os.close(os.memfd_create("hidden"))
    return "memory that no limit counts"


def address_space():
    return f"{len(bytearray(target['memory_bytes']))} bytes of memory"


def forks():
    """Starts processes until that is refused; returns how many, if they are more than the limit."""
    children = []
    hold, release = os.pipe()
    while len(children) <= target["processes"] + 8:
        try:
            pid = os.fork()
        except OSError:
            break
        if pid == 0:
            os.close(release)
            os.read(hold, 1)
            os._exit(0)
        children.append(pid)
    os.close(release)
    for pid in children:
        os.waitpid(pid, 0)
    return f"{len(children)} processes" if len(children) > target["processes"] else ""


def disk(path):
    """Fills a private directory; returns the bytes written if they are more than the limit."""
    block, total = bytes(1 << 20), 0
    try:
        for number in range(target["disk_bytes"] // target["file_bytes"] + 2):
            with open(f"{path}/fill{number}", "wb", buffering=0) as file:
                try:
                    for _ in range(target["file_bytes"] // len(block) + 2):
                        total += file.write(block)
                except OSError as error:
                    if error.errno != errno.EFBIG:
                        raise
    except OSError:
        pass
    for name in os.listdir(path):
        if name.startswith("fill"):
            os.remove(f"{path}/{name}")
    return f"{total} bytes in {path}" if total > target["disk_bytes"] else ""


def unlimited():
    kinds = ("AS", "CPU", "FSIZE", "NPROC", "NOFILE", "CORE", "MEMLOCK", "MSGQUEUE")
    return [
        kind for kind in kinds if resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))[1] == resource.RLIM_INFINITY
    ]


for name, attack in {
    "network interfaces": interfaces,
    "network": lambda: connect(socket.AF_INET, ("127.0.0.1", target["port"])),
    "unix socket": lambda: connect(socket.AF_UNIX, "\0" + target["socket"]),
    "read": readable,
    "environment": secrets,
    "write": writable,
    "write to the system": writable_system,
    "processes": foreign_processes,
    "descriptors": descriptors,
    "privileges": privileges,
    "namespace": namespace,
    "mount": mounted,
    "trace": traced,
    "memfd": hidden_memory,
    "memory": address_space,
    "forks": forks,
    "disk": lambda: disk("/tmp") or disk(os.getcwd()),
    "limits": unlimited,
}.items():
    attempt(name, attack)
print(json.dumps(through))
