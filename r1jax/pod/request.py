"""The command line of launch/tpu_pod.py: what pod is wanted, and the r1jax command that runs on it. Imports no JAX."""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from absl import flags as absl_flags

from r1jax import config, flags, paths, schema, stage_table
from r1jax.core import preempt
from r1jax.pod import hardware

STEPS = ("create", "copy", "run", "stop", "fetch", "delete")
_USAGE = "usage: python launch/tpu_pod.py --name=NAME --zone=ZONE --topology=v5p:4x4x8 [flags] -- --config=NAME [...]"
_SPOT_GRACE_S = 15.0  # what GKE leaves to a Pod on a Spot node, from the notice to its end


@dataclass(frozen=True)
class PodRequest:
    """What a command line of launch/tpu_pod.py asks for."""

    name: str  # of the queued resource, and of its one node or the prefix of its nodes
    zone: str
    project: str  # "" leaves it to gcloud
    slice: hardware.PodSlice
    slices: int
    runtime: str  # version of the TPU VMs' image
    spot: bool
    reserved: bool
    gcloud_flags: tuple[str, ...]  # further flags of `queued-resources create`
    ssh_flags: tuple[str, ...]  # further flags of `tpu-vm ssh` and `tpu-vm scp`
    setup: str  # shell command that every worker runs before the installation
    with_files: tuple[str, ...]  # files that git does not track and the run needs
    fetch: str  # folder on this machine for the results, "" for none
    keep: bool  # leave the pod running at the end
    only: str  # one of STEPS, "" for all that lead to a finished run
    queue_hours: float
    run_hours: float
    restarts: int
    gke: bool
    image: str
    claim: str  # NAME:/PATH of a PersistentVolumeClaim of GKE
    dry_run: bool
    arguments: tuple[str, ...]  # of r1jax.launch
    run: flags.Arguments  # the same, parsed
    resolved: schema.Config | None  # their config, None without arguments

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the TPU VMs, one a slice."""
        return (self.name,) if self.slices == 1 else tuple(f"{self.name}-{index}" for index in range(self.slices))

    @property
    def hosts(self) -> int:
        return self.slice.hosts * self.slices

    @property
    def workdir(self) -> str:
        """The run's --workdir, as the workers see it; an absolute one is taken to be of a shared mount."""
        return str(self.run.workdir)

    @property
    def grace_s(self) -> float:
        """The seconds after SIGTERM in which the run ends by itself."""
        if self.run.grace_s is not None:
            return self.run.grace_s
        return _SPOT_GRACE_S if self.gke and self.spot else preempt.GRACE_S

    @property
    def stop_s(self) -> float:
        """The seconds after SIGTERM in which a worker waits for the end of the run, before it ends it."""
        return self.grace_s + 90

    def worker_arguments(self, workers: int) -> tuple[str, ...]:
        """Returns the command line of each of so many workers.

        TPU VMs know their place in a pod, and in several slices, from the metadata server: JAX finds it there.
        """
        return self.arguments if workers == 1 else (*self.arguments, "--coordinator=auto")

    @property
    def run_id(self) -> str:
        """Identifies the command: the same one is followed, another one is refused while it runs."""
        return hashlib.sha256(json.dumps(self.arguments).encode()).hexdigest()[:12]


def parse(argv: list[str]) -> PodRequest | None:
    """Returns the request, or None where --help is asked for; raises ValueError with one line for a bad one."""
    split = argv.index("--") if "--" in argv else len(argv)
    values, ours, arguments = _define(), argv[:split], tuple(argv[split + 1 :])
    after = "flags of the run come after --"
    flags.read(values, ours, after, after)
    if values.help or values.h:
        return None
    request = _request(values, arguments)
    _check(request, values)
    return request


def _request(values: absl_flags.FlagValues, arguments: tuple[str, ...]) -> PodRequest:
    for name in ("name", "topology") if values.gke else ("name", "zone", "topology"):
        if not values[name].value:
            raise ValueError(f"--{name} is missing; {_USAGE}")
    chosen = hardware.parse(values.topology)
    run = flags.parse(list(arguments), is_here=False)
    _refuse_flags(run, chosen.hosts * values.slices)
    return PodRequest(
        name=values.name,
        zone=values.zone,
        project=values.project,
        slice=chosen,
        slices=values.slices,
        runtime=values.runtime or chosen.series.runtime,
        spot=values.spot,
        reserved=values.reserved,
        gcloud_flags=tuple(values.gcloud_flag),
        ssh_flags=tuple(values.ssh_flag),
        setup=values.setup,
        with_files=tuple(values.with_file),
        fetch=f"{values.name}_results" if values.fetch is None else values.fetch,
        keep=values.keep,
        only=values.only or "",
        queue_hours=values.queue_hours,
        run_hours=values.run_hours,
        restarts=values.restarts,
        gke=values.gke,
        image=values.image,
        claim=values.claim,
        dry_run=values.dry_run,
        arguments=arguments,
        run=run,
        resolved=config.load(run.spec, run.overrides) if arguments else None,
    )


def _refuse_flags(run: flags.Arguments, hosts: int) -> None:
    """Raises ValueError for flags of r1jax.launch that the launcher sets itself, or with which no run would begin."""
    for name in ("coordinator", "num_processes", "process_id"):
        if getattr(run, name) is not None:
            raise ValueError(f"--{name} is set by the launcher on each worker; leave it out")
    for name, is_there in (("plan", run.plan is not None), ("dry_run", run.dry_run), ("help", run.help)):
        if is_there:
            raise ValueError(f"--{name} runs nothing and needs no pod: give it to python -m r1jax.launch here")
    if run.sweep and hosts > 1:
        raise ValueError(f"--sweep runs its points on one machine, and this pod has {hosts} hosts")


def _check(request: PodRequest, values: absl_flags.FlagValues) -> None:
    """Raises ValueError for flags that do not go together, before anything is created or paid for."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", request.name):
        raise ValueError(f"--name={request.name}: use 1 to 40 lower-case letters, digits and -, a letter first")
    if request.spot and request.reserved:
        raise ValueError("--spot and --reserved exclude each other")
    if not request.gke and not request.runtime:
        raise ValueError(f"--topology={values.topology}: {request.slice.generation} is rented by GKE alone; give --gke")
    if request.gke and not request.image:
        raise ValueError("--gke needs --image=IMAGE, a container image with r1jax; docs/pod.md says how to build one")
    if request.only in ("create", "copy", "stop", "delete") and not request.gke:
        return
    if request.only == "fetch" and not request.fetch:
        raise ValueError("--only=fetch copies to a folder; give --fetch=DIR")
    if request.resolved is None:
        raise ValueError(f"the run's command is missing; {_USAGE}")
    _check_run(request, request.resolved)


def _check_run(request: PodRequest, resolved: schema.Config) -> None:
    """Raises ValueError for a command that r1jax.launch would refuse, and for one that could not be resumed."""
    stage_table.check(resolved, config.keys(request.run.overrides))
    if request.hosts > 1:
        paths.refuse(resolved, {}, paths.ONE_PROCESS)
    alone = "" if stage_table.several_processes(resolved.stage) else resolved.stage
    if resolved.mode == "disaggregated":
        alone = "config.mode=disaggregated"
    if request.hosts > 1 and alone:
        raise ValueError(
            f"{alone} runs in one process, and this pod has {request.hosts} hosts; give a --topology of one"
        )
    reason = _needs_shared_folder(request)
    if reason and not request.workdir.startswith("/"):
        raise ValueError(
            f"--workdir={request.workdir} is on each worker's disk, and {reason}; give --workdir=/MOUNT/... of a file "
            "system that every worker mounts (" + ("--claim" if request.gke else "--setup") + ")"
        )
    name, _, path = request.claim.partition(":")
    is_mounted = name and path.startswith("/") and PurePosixPath(request.workdir).is_relative_to(path)
    if request.gke and not is_mounted:
        raise ValueError(f"--gke with --workdir={request.workdir} needs --claim=NAME:/PATH, what is mounted there")


def _needs_shared_folder(request: PodRequest) -> str:
    """Returns why results have to be where every worker sees them, and where they outlive the workers, "" if not."""
    if request.hosts > 1:
        return f"the {request.hosts} workers of a run share one folder"
    if request.spot:
        return "a preemption of --spot deletes it, so that the run could not resume"
    return "a container's disk goes with it" if request.gke else ""


def unused_chips(request: PodRequest) -> str:
    """Returns a line that warns of a mesh with other slices, or fewer or more devices, than the pod has, "" if it fits.

    A chip of v4 or tpu7x is one device or two, as its image decides; these are not compared.
    """
    resolved = request.resolved
    stage = stage_table.STAGES.get(resolved.stage) if resolved is not None else None
    if resolved is None or stage is None or "mesh" not in stage.reads:
        return ""
    if resolved.mesh.slice != request.slices:
        return f"warning: config.mesh.slice is {resolved.mesh.slice}, and --slices of the pod is {request.slices}"
    if request.slice.generation in ("v4", "tpu7x"):
        return ""
    devices, chips = math.prod(resolved.mesh.shape), request.slice.chips * request.slices
    if resolved.mode == "disaggregated" and "sampler_mesh" in stage.reads:
        devices += math.prod(resolved.sampler_mesh.shape)
    return "" if devices == chips else f"warning: config.mesh uses {devices} devices, and the pod has {chips} chips"


def _define() -> absl_flags.FlagValues:
    values = absl_flags.FlagValues()
    texts = {
        "name": ("", "Name of the queued resource and its TPU VMs; the same name finds them again."),
        "zone": ("", "Zone, such as us-east5-a."),
        "project": ("", "Google Cloud project; default: gcloud's."),
        "topology": ("", "The slice, as --plan takes it: v5p:4x4x8, v5e:4x8, v6e:8x8."),
        "runtime": ("", "Image of the TPU VMs; default: that of the generation."),
        "setup": ("", "Shell command that every worker runs before the installation, such as a mount."),
        "fetch": (None, "Folder here for the results; default: NAME_results; empty for none."),
        "image": ("", "--gke: container image with r1jax."),
        "claim": ("", "--gke: NAME:/PATH, a PersistentVolumeClaim that all hosts write to, mounted at PATH."),
    }
    for name, (default, text) in texts.items():
        absl_flags.DEFINE_string(name, default, text, flag_values=values)
    several = {
        "gcloud_flag": "A further flag of `queued-resources create`, such as --network=NAME; repeatable.",
        "ssh_flag": "A further flag of ssh and scp to the workers, such as --tunnel-through-iap; repeatable.",
        "with_file": "A file or folder of the checkout that git does not track and the run needs; repeatable.",
    }
    for name, text in several.items():
        absl_flags.DEFINE_multi_string(name, [], text, flag_values=values)
    switches = {
        "spot": "Cheaper TPUs that Google may take back; the run resumes on new ones.",
        "reserved": "TPUs of your reservation.",
        "keep": "Leave the pod running after a run that succeeded.",
        "gke": "Print a JobSet for GKE and do nothing.",
        "dry_run": "Print each command and run none.",
        "help": "Show this text.",
        "h": "Show this text.",
    }
    for name, text in switches.items():
        absl_flags.DEFINE_boolean(name, False, text, flag_values=values)
    absl_flags.DEFINE_integer("slices", 1, "How many slices.", lower_bound=1, flag_values=values)
    absl_flags.DEFINE_integer("restarts", 20, "Restarts after preemptions, at most.", lower_bound=0, flag_values=values)
    hours = {"queue_hours": (24.0, "Hours to wait for TPUs."), "run_hours": (168.0, "Hours to follow the run.")}
    for name, (default, text) in hours.items():
        absl_flags.DEFINE_float(name, default, f"{text[:-1]}, at most.", lower_bound=0, flag_values=values)
    absl_flags.DEFINE_enum("only", None, list(STEPS), "Do this one step.", flag_values=values)
    return values


def help_text() -> str:
    """Returns the usage and one line a flag."""
    return "\n".join([_USAGE, "", *flags.flag_lines(_define(), {})])
