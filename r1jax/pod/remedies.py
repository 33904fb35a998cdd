"""What gcloud's errors mean, and what to do about each: one line in place of a page. Pure functions of its text."""

import re

from r1jax.pod.request import PodRequest


class PodError(ValueError):
    """Raised for what the user can mend: its text is one line that says how."""


WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES")  # states in which a queued resource costs nothing
_MISSING = r"Resource '([^']*/(nodes|queuedResources)/)?[^'/]+' was not found"
_REMEDIES = (  # (pattern of gcloud's text, what it means, what to do); the first that matches counts
    (
        r"gcloud auth login|active account selected|[Rr]eauthentication|invalid_grant|Request had invalid authent",
        "gcloud is not logged in",
        "run: gcloud auth login",
    ),
    (
        r"[Kk]ey is not present in the SSH agent",
        "the ssh agent, which gcloud uses for several workers, does not hold gcloud's key",
        "run: ssh-add ~/.ssh/google_compute_engine",
    ),
    (_MISSING, "{name} does not exist in {zone}", "give the same command again"),
    (
        r"property \[?project\]? is (not currently set|required)|required property \[project\]",
        "gcloud has no project",
        "give --project=ID, or run: gcloud config set project ID",
    ),
    (
        r"SERVICE_DISABLED|API has not been used|tpu\.googleapis\.com.{0,80}(disabled|not enabled)",
        "the Cloud TPU API is off in this project",
        "run: gcloud services enable tpu.googleapis.com",
    ),
    (
        r"no more capacity|[Ii]nsufficient (reserved )?capacity|stockout|ZONE_RESOURCE_POOL",
        "there is no room for {pod}",
        "try later, in another --zone, or with --spot",
    ),
    (
        r"RESOURCE_EXHAUSTED|[Qq]uota",
        "the project's quota is too small for {pod}",
        "ask for more on the page IAM & Admin > Quotas, API tpu.googleapis.com; or give a smaller --topology, another "
        "--zone, or --spot, which has a quota of its own",
    ),
    (
        r"accelerator.{0,40}not found|(not found|not available|unsupported|invalid).{0,40}accelerator",
        "{zone} has no {type}",
        "see what the zone has: gcloud compute tpus accelerator-types list --zone={zone}",
    ),
    (
        r"runtime.?version.{0,80}(not found|invalid|unsupported)|(not found|[Ii]nvalid).{0,40}runtime",
        "the image {runtime} does not exist in {zone}",
        "give --runtime=VERSION, one of: gcloud compute tpus versions list --zone={zone}",
    ),
    (
        r"[Ll]ocation.{0,80}(not found|may not exist|is invalid)|locations/\S+ \(or it may not exist|[Ii]nvalid.{0,20}zone",
        "there is no zone {zone} with TPUs, or the project may not use it",
        "see the zones: gcloud compute tpus locations list",
    ),
    (
        r"PERMISSION_DENIED|does not have permission|Permission '.{0,80}denied",
        "this account may not do that in the project",
        "ask for the roles TPU Admin (roles/tpu.admin) and Service Account User (roles/iam.serviceAccountUser)",
    ),
    (r"ALREADY_EXISTS|already exists", "{name} exists already", "give another --name, or the same command again"),
    (r"[Pp]reempted|PREEMPT", "{pod} was preempted while it was being created", "give the same command again"),
)


def is_missing(text: str) -> bool:
    """Returns whether gcloud says that what it was asked to describe or delete does not exist."""
    return bool(re.search(_MISSING, text))


def is_transient(text: str) -> bool:
    """Returns whether the same command may succeed a little later: no remedy is known, or too much was asked at once."""
    return "per minute" in text or not any(re.search(pattern, text) for pattern, _, _ in _REMEDIES)


def of_gcloud(text: str) -> str:
    """Returns the errors of gcloud itself in what it and the workers print."""
    return "\n".join(line for line in text.splitlines() if line.startswith("ERROR: (gcloud"))


def explain(text: str, request: PodRequest) -> str:
    """Returns one line: what gcloud's text means and what to do; an unknown text is shown as it is, shortened."""
    pod = f"{request.slices if request.slices > 1 else 'a'} {request.slice.accelerator_type} in {request.zone}"
    for pattern, meaning, remedy in _REMEDIES:
        if re.search(pattern, text):
            places = {"pod": pod, "zone": request.zone, "runtime": request.runtime, "name": request.name}
            places["type"] = request.slice.accelerator_type
            return f"{meaning.format(**places)}: {remedy.format(**places)} (gcloud: {last_error(text)})"
    return f"gcloud failed: {last_error(text)}"


def last_error(text: str) -> str:
    """Returns the line of gcloud's text that says what failed, at most 200 characters long."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    errors = [line for line in lines if re.match(r"ERROR|error|fatal|.*[Pp]ermission denied", line)] or lines
    return errors[-1].removeprefix("ERROR: ")[:200]


def is_preemption(text: str) -> bool:
    """Returns whether a failed request says that its TPUs were taken back while they were being prepared."""
    return bool(re.search(r"[Pp]reempted|PREEMPT", text))


def leftovers(request: PodRequest, state: str) -> str:
    """Returns the lines that say what exists after an end before its time, what it costs, and how to go on or delete it."""
    flags = f"--name={request.name} --zone={request.zone}" + (
        f" --project={request.project}" if request.project else ""
    )
    cost = "costs money until it is deleted"
    if state in WAITING:
        cost = "waits in the queue and costs nothing until it is ACTIVE"
    elif state in ("FAILED", "SUSPENDED"):
        cost = "costs nothing, but counts towards the quota"
    topology = request.slice.topology
    count = f" --slices={request.slices}" if request.slices > 1 else ""
    return (
        f"{request.name} exists in {request.zone} ({state}): it {cost}\n"
        "  go on:  the same command again\n"
        f"  delete: python launch/tpu_pod.py {flags} --topology={topology}{count} --only=delete"
    )
