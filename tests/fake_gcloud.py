"""A gcloud of a test: queued resources in a JSON file, and workers that are folders of this machine.

`install(folder)` makes folder/bin/gcloud. A worker's home is folder/NODE-wI; what ssh is asked to run there is really
run, by bash. folder/script.json says what goes wrong: {"create": gcloud's error text, "states": states on the way to
ACTIVE, "breaks": how many connections of follow break within the third line, after which gcloud connects again by itself,
"outages": how many break so for good, "refuse_ssh": how many workers' commands get no connection, "refuse_scp": how
often scp is refused, "no_key": the text with which scp is refused for good, "flaky": how many questions and deletions
get no answer, "refuse_create" and "lose_create": how many creations fail, and succeed without an answer, "workers": how
many a node has}. folder/state.json may begin with a TPU VM that no queued resource holds.
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

WORKERS = 2  # of a node, unless the script says another number
UNAVAILABLE = "ERROR: (gcloud.compute.tpus.{group}.{verb}) UNAVAILABLE: The service is currently unavailable."
MARK = "FAKE_TPU_WORKER"  # in the environment of whatever runs on a worker
CONNECTIONS, PAUSE_S = 3, 0.2  # which gcloud tries for one command, and between two of them; Google's tries 10, of 5 s

PYTHON = """#!/bin/bash
# A worker's python3: makes environments at once, and installs nothing.
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") echo "$@" >>"$HOME/pip.log" ;;
*) exec REAL "$@" ;;
esac
"""


def install(folder: pathlib.Path, **script) -> pathlib.Path:
    """Makes the folder with gcloud and the workers' python3; returns the folder to put on PATH."""
    programs, workers = folder / "bin", folder / "worker_bin"
    for place in (programs, workers):
        place.mkdir(parents=True)
    texts = {
        programs / "gcloud": f'#!/bin/bash\nexport FAKE_GCLOUD={folder}\nexec {sys.executable} {__file__} "$@"\n',
        workers / "python3": PYTHON.replace("REAL", sys.executable),
    }
    for path, text in texts.items():
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (folder / "script.json").write_text(json.dumps(script))
    return programs


class Cloud:
    """What exists, in a file."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.script = json.loads((folder / "script.json").read_text())
        self.file = folder / "state.json"
        self.queued = json.loads(self.file.read_text()) if self.file.exists() else {}

    def save(self) -> None:
        aside = self.file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(self.queued))
        aside.replace(self.file)

    def takes(self, key: str) -> bool:
        """Returns whether the script has one more of this kind, and uses it up."""
        left = int(self.script.get(key, 0))
        self.script[key] = left - 1
        if left > 0:
            (self.folder / "script.json").write_text(json.dumps(self.script))
        return left > 0

    def homes(self, node: str) -> list[pathlib.Path]:
        return [self.folder / f"{node}-w{index}" for index in range(self.script.get("workers", WORKERS))]

    def preempt(self) -> None:
        """Takes every TPU back: what runs on the workers is killed, and their disks are gone."""
        for one in self.queued.values():
            one["state"] = "SUSPENDED"
            for node in one["nodes"]:
                self.clear(node)
        self.save()

    def clear(self, node: str) -> None:
        for home in self.homes(node):
            mark = f"{MARK}={home}".encode()
            for process in pathlib.Path("/proc").glob("[0-9]*"):
                try:
                    if mark in (process / "environ").read_bytes().split(b"\0"):
                        os.kill(int(process.name), signal.SIGKILL)
                except OSError:
                    pass
            shutil.rmtree(home, ignore_errors=True)


def flag(words: list[str], name: str, default: str = "") -> str:
    values = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return values[-1] if values else default


def fail(text: str, code: int = 1) -> int:
    print(text, file=sys.stderr)
    return code


def missing(group: str, verb: str, kind: str, name: str, words: list[str]) -> int:
    resource = f"projects/my-project/locations/{flag(words, 'zone')}/{kind}/{name}"
    return fail(f"ERROR: (gcloud.compute.tpus.{group}.{verb}) NOT_FOUND: Resource '{resource}' was not found")


def queued_resources(cloud: Cloud, verb: str, name: str, words: list[str]) -> int:
    one = cloud.queued.get(name)
    if one is not None and one.get("plain"):
        one = None
    if verb == "create":
        if "create" in cloud.script:
            return fail(cloud.script["create"])
        if one is not None:
            return fail("ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: Resource already exists")
        count = int(flag(words, "node-count", "1"))
        nodes = [flag(words, "node-id")] if count == 1 else [f"{flag(words, 'node-prefix')}-{i}" for i in range(count)]
        states = cloud.script.get("states", ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
        key, _, value = flag(words, "labels").partition("=")
        cloud.queued[name] = {
            "state": "CREATING",
            "states": states,
            "nodes": nodes,
            "type": flag(words, "accelerator-type"),
            "labels": {key: value},
        }
        cloud.save()
        return 0
    if one is None:
        return missing("queued-resources", verb, "queuedResources", name, words)
    if verb == "delete":
        for node in one["nodes"]:
            cloud.clear(node)
        del cloud.queued[name]
        cloud.save()
        return 0
    if one["states"] and one["state"] != "SUSPENDED":
        one["state"] = one["states"].pop(0)
        cloud.save()
    state = {"state": one["state"]}
    if one["state"] == "FAILED":
        state["failedData"] = {"error": cloud.script["error"]}
    node = {"acceleratorType": one["type"], "labels": one["labels"]}
    several = {"multisliceParams": {"nodeCount": len(one["nodes"])}} if len(one["nodes"]) > 1 else {}
    print(json.dumps({"tpu": {"nodeSpec": [{"node": node, **several}]}, "state": state}))
    return 0


def holder(cloud: Cloud, node: str) -> dict | None:
    return next((one for one in cloud.queued.values() if node in one["nodes"]), None)


def tpu_vm(cloud: Cloud, verb: str, words: list[str]) -> int:
    plain = [word for word in words if not word.startswith("--")]
    node = next(word.split(":")[0] for word in plain if not word.startswith("/") or verb != "scp")
    one = holder(cloud, node)
    if one is None or one["state"] == "SUSPENDED":
        return missing("tpu-vm", verb, "nodes", node, words)
    if verb == "delete":
        cloud.clear(node)
        del cloud.queued[node]
        cloud.save()
        return 0
    if verb == "describe":
        ends = [{"ipAddress": f"10.0.0.{index}"} for index in range(len(cloud.homes(node)))]
        print(
            json.dumps(
                {"state": one.get("node_state", "READY"), "acceleratorType": one["type"], "networkEndpoints": ends}
            )
        )
        return 0
    homes = cloud.homes(node)
    chosen = homes if flag(words, "worker") == "all" else [homes[int(flag(words, "worker", "0"))]]
    for home in chosen:
        home.mkdir(exist_ok=True)
    if verb == "scp":
        return scp(cloud, plain, chosen)
    command = flag(words, "command")
    codes = [ssh(cloud, home, command) for home in chosen]
    return max(codes)


def scp(cloud: Cloud, plain: list[str], homes: list[pathlib.Path]) -> int:
    if cloud.takes("refuse_scp"):
        return fail("ERROR: (gcloud.compute.tpus.tpu-vm.scp) Could not SSH: port 22: Connection refused", 255)
    if "no_key" in cloud.script:
        return fail(cloud.script["no_key"])
    source, target = plain
    for home in homes:
        if ":" in target:
            shutil.copy(source, home / target.partition(":")[2])
        else:
            folder = home / source.partition(":")[2]
            shutil.copytree(folder, pathlib.Path(target) / folder.name)
    return 0


def ssh(cloud: Cloud, home: pathlib.Path, command: str) -> int:
    """Runs a command on a worker, and gives the same command again where the connection breaks, as gcloud does."""
    is_refused, is_follow = cloud.takes("refuse_ssh"), " follow " in command
    has_outage = False
    for _ in range(CONNECTIONS):
        print(f"SSH: Attempting to connect to worker {home.name.rpartition('-w')[2]}...", file=sys.stderr)
        if home.exists() and not is_refused and not has_outage:
            breaks = is_follow and cloud.takes("breaks")
            has_outage = is_follow and not breaks and cloud.takes("outages")
            code = connect(cloud, home, command, breaks or has_outage)
            if code != 255:
                return code
        print("Retrying: SSH command error: [/usr/bin/ssh] exited with return code [255].", file=sys.stderr)
        time.sleep(PAUSE_S)
    return fail("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].", 255)


def connect(cloud: Cloud, home: pathlib.Path, command: str, breaks: bool) -> int:
    """Runs a command on a worker over one connection; returns its exit code, 255 where the connection breaks."""
    environment = {"HOME": str(home), MARK: str(home), "FAKE_GCLOUD": str(cloud.folder)}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    environment["PATH"] = f"{cloud.folder / 'worker_bin'}:/usr/bin:/bin"
    process = subprocess.Popen(["bash", "-c", command], cwd=home, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for number, line in enumerate(process.stdout):
        if breaks and number == 4:
            print(line[: len(line) // 2], end="", flush=True)
            process.kill()
            return fail("client_loop: send disconnect: Broken pipe", 255)
        print(of_worker(line, home), end="", flush=True)
    code = process.wait()
    return code if code >= 0 else 255


def of_worker(line: str, home: pathlib.Path) -> str:
    """Returns a line with the name of the worker, where it begins with that of this machine."""
    host = socket.gethostname()
    is_named = line.startswith((f"R1JAX {host} ", f"|{host}: "))
    return line.replace(host, home.name, 1) if is_named else line


def main() -> int:
    folder = pathlib.Path(os.environ["FAKE_GCLOUD"])
    cloud, words = Cloud(folder), sys.argv[1:]
    if words == ["preempt"]:
        cloud.preempt()
        return 0
    with (folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps(words) + "\n")
    if "logged_out" in cloud.script:
        return fail(cloud.script["logged_out"])
    group, verb, rest = words[2], words[3], words[4:]
    if verb in ("describe", "delete") and cloud.takes("flaky"):
        return fail(UNAVAILABLE.format(group=group, verb=verb))
    assert f"--zone={flag(rest, 'zone')}" in rest and "--quiet" in rest
    if verb == "create" and cloud.takes("refuse_create"):
        return fail(UNAVAILABLE.format(group=group, verb=verb))
    code = queued_resources(cloud, verb, rest[0], rest) if group == "queued-resources" else tpu_vm(cloud, verb, rest)
    if verb == "create" and cloud.takes("lose_create"):
        return fail(UNAVAILABLE.format(group=group, verb=verb))
    return code


if __name__ == "__main__":
    sys.exit(main())
