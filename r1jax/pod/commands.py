"""The commands of a pod's life, built from the request alone: what gcloud is asked, and what the workers run.

Each function returns the words of one command, as `subprocess` takes them; `shlex.join` shows it as one types it. Text
for a worker's shell is quoted once, for that shell: gcloud passes --command on unchanged.
"""

import shlex

from r1jax.pod.request import PodRequest

ARCHIVE = "r1jax_checkout.tar.gz"  # in the home folder of each worker, like the two folders
CHECKOUT = "r1jax"
RUN = "r1jax_run"  # log, lock and exit code of the run, as r1jax.pod.worker keeps them
LABEL = "made-by"  # marks what the launcher created, and so may delete when the run is done
LABEL_VALUE = "r1jax"
MARK = "R1JAX"  # begins the lines by which a worker answers
STEP_TEXTS = {
    "create": "create the queued resource, and wait until it is ACTIVE and every worker READY",
    "copy": "copy the tracked files of this checkout to every worker, and install them",
    "run": "start the run on every worker, and follow worker 0's log until it ends",
    "fetch": "fetch the results",
    "delete": "delete the pod",
}


def _gcloud(request: PodRequest, *words: str) -> list[str]:
    project = [f"--project={request.project}"] if request.project else []
    return ["gcloud", "compute", "tpus", *words, f"--zone={request.zone}", *project, "--quiet"]


def create(request: PodRequest) -> list[str]:
    """Returns the command that puts the pod in the queue and does not wait for it."""
    one = request.slice
    if one.has_default_shape:
        chips = [f"--accelerator-type={one.accelerator_type}"]
    else:
        chips = [f"--type={one.series.accelerator}", f"--topology={one.shape}"]
    nodes = [f"--node-id={request.name}"]
    if request.slices > 1:
        nodes = [f"--node-count={request.slices}", f"--node-prefix={request.name}"]
    kind = ["--spot"] if request.spot else ["--reserved"] if request.reserved else []
    return [
        *_gcloud(request, "queued-resources", "create", request.name, *nodes, *chips),
        f"--runtime-version={request.runtime}",
        f"--labels={LABEL}={LABEL_VALUE}",
        *kind,
        *request.gcloud_flags,
        "--async",
    ]


def describe(request: PodRequest) -> list[str]:
    return [*_gcloud(request, "queued-resources", "describe", request.name), "--format=json"]


def describe_node(request: PodRequest, node: str) -> list[str]:
    return [*_gcloud(request, "tpu-vm", "describe", node), "--format=json"]


def delete(request: PodRequest) -> list[str]:
    """Returns the command that deletes the queued resource with its TPU VMs, in any state."""
    return [*_gcloud(request, "queued-resources", "delete", request.name), "--force"]


def delete_node(request: PodRequest, node: str) -> list[str]:
    return _gcloud(request, "tpu-vm", "delete", node)


def ssh(request: PodRequest, node: str, worker: str, command: str) -> list[str]:
    """Returns the command that runs a shell command on one worker of a node, or on `all` of them at once."""
    return [
        *_gcloud(request, "tpu-vm", "ssh", node, f"--worker={worker}"),
        *request.ssh_flags,
        f"--command={command}",
    ]


def copy(request: PodRequest, node: str, archive: str) -> list[str]:
    """Returns the command that copies the archive of the checkout to every worker of a node."""
    target = f"{node}:{ARCHIVE}"
    return [*_gcloud(request, "tpu-vm", "scp", archive, target, "--worker=all"), *request.ssh_flags]


def fetch(request: PodRequest) -> list[str]:
    """Returns the command that copies the run's working folder to this machine."""
    in_home = request.workdir.startswith("~/")  # from where scp's paths start
    folder = request.workdir.removeprefix("~/")
    if not in_home and not folder.startswith("/"):
        folder = f"{CHECKOUT}/{folder}"
    words = ("tpu-vm", "scp", "--recurse", f"{request.nodes[0]}:{folder}", request.fetch, "--worker=0")
    return [*_gcloud(request, *words), *request.ssh_flags]


def unpack() -> str:
    """Returns the worker's command that makes the checkout equal to the archive, and leaves other files alone.

    The files of the archive before are removed first, so that one which is gone from the checkout is gone here too.
    """
    return (
        f"mkdir -p {CHECKOUT} && cd {CHECKOUT} && touch .pod_files && xargs -d '\\n' rm -f -- < .pod_files && "
        f"tar -xvzf ../{ARCHIVE} > .pod_files && echo {MARK} $(hostname) unpacked"
    )


def install(request: PodRequest) -> str:
    """Returns the worker's command that prepares the machine, and installs the checkout."""
    setup = f"({request.setup}) && " if request.setup else ""
    return f"cd {CHECKOUT} && {setup}bash launch/tpu_worker.sh"


def worker(*words: str) -> str:
    """Returns the worker's command that calls r1jax.pod.worker."""
    return f"cd {CHECKOUT} && .venv/bin/python -m r1jax.pod.worker {shlex.join(words)}"


def status() -> str:
    """Returns the worker's command that says how the run is.

    Where r1jax cannot be asked, as on a new pod, the answer is "none" if no run holds its lock.
    """
    nothing = f"mkdir -p {RUN} && flock -n -s {RUN}/lock echo {MARK} $(hostname) none"
    return f"({worker('status')}) || ({nothing})"


def start(request: PodRequest, workers: int) -> str:
    """Returns the worker's command that starts the run, in its background."""
    return worker("start", request.run_id, f"{request.stop_s:g}", "--", *request.worker_arguments(workers))


def script(request: PodRequest) -> str:
    """Returns every command of a run without incidents, in order, for --dry_run."""
    steps: dict[str, list[list[str]]] = {
        "create": [create(request), describe(request), *(describe_node(request, node) for node in request.nodes)],
        "copy": [
            command
            for node in request.nodes
            for command in (
                copy(request, node, ARCHIVE),
                ssh(request, node, "all", unpack()),
                ssh(request, node, "all", install(request)),
            )
        ],
        "run": [
            *(ssh(request, node, "all", start(request, request.hosts)) for node in request.nodes),
            ssh(request, request.nodes[0], "0", worker("follow", "1")),
            *(ssh(request, node, "all", status()) for node in request.nodes),
        ],
        "stop": [ssh(request, node, "all", worker("stop")) for node in request.nodes],
        "fetch": [fetch(request)] if request.fetch else [],
        "delete": [delete(request)],
    }
    wanted = [request.only] if request.only else ["create", "copy", "run", "fetch", "delete"]
    if request.keep and not request.only:
        wanted.remove("delete")
    blocks = [
        "\n".join([f"# {STEP_TEXTS.get(step, step)}", *(shlex.join(command) for command in steps[step])])
        for step in wanted
        if steps[step]
    ]
    return "\n\n".join(blocks)
