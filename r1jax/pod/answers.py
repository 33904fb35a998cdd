"""What gcloud answers about a queued resource and a TPU VM, as JSON, and what the workers answer."""

from dataclasses import dataclass
from typing import Any

from r1jax.pod import commands
from r1jax.pod.request import PodRequest

TAKEN_BACK = ("SUSPENDING", "SUSPENDED", "FAILED", "PREEMPTED")  # Google has the TPUs: a deletion loses nothing
_LOST = (*TAKEN_BACK, "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDING", "HIDDEN", "")


@dataclass(frozen=True)
class QueuedPod:
    """A queued resource."""

    state: str  # CREATING, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, FAILED, SUSPENDING, SUSPENDED
    accelerator: str
    count: int  # of slices
    is_ours: bool  # whether the launcher created it
    error: str  # why it failed, "" where it did not


@dataclass(frozen=True)
class PodNode:
    """A TPU VM: the workers of one slice."""

    state: str  # CREATING, READY, PREEMPTED, ...
    accelerator: str
    workers: int


def queued(answer: dict[str, Any]) -> QueuedPod:
    """Returns what `queued-resources describe` says."""
    specs = answer.get("tpu", {}).get("nodeSpec", [{}])
    node = specs[0].get("node", {})
    several = specs[0].get("multisliceParams") or specs[0].get("multiNodeParams") or {}
    state = answer.get("state", {})
    error = state.get("failedData", {}).get("error", {})
    return QueuedPod(
        state=state.get("state", "STATE_UNSPECIFIED"),
        accelerator=_accelerator(node),
        count=int(several.get("nodeCount", len(specs))),
        is_ours=node.get("labels", {}).get(commands.LABEL) == commands.LABEL_VALUE,
        error=" ".join(str(error[key]) for key in ("status", "message") if key in error),
    )


def node(answer: dict[str, Any]) -> PodNode:
    """Returns what `tpu-vm describe` says."""
    return PodNode(
        state=answer.get("state", "STATE_UNSPECIFIED"),
        accelerator=_accelerator(answer),
        workers=max(1, len(answer.get("networkEndpoints", []))),
    )


def is_lost(state: str) -> bool:
    """Returns whether no run can be on a pod in this state, of its queued resource or of a TPU VM; "" is that of none."""
    return state in _LOST


def _accelerator(node: dict[str, Any]) -> str:
    """Returns `v5p 4x4x8` where the shape is stated, otherwise the accelerator type, such as v5p-256."""
    shape = node.get("acceleratorConfig", {})
    if "topology" in shape:
        return f"{str(shape.get('type', '')).lower().replace('_', '')} {shape['topology']}"
    return node.get("acceleratorType", "unknown")


def differences(request: PodRequest, accelerator: str, count: int) -> str:
    """Returns how what exists under the request's name differs from it, "" where it does not."""
    one = request.slice
    shape = f"{one.series.accelerator} {one.shape}"
    wanted = (one.accelerator_type, shape) if one.has_default_shape else (shape,)
    if accelerator in wanted and count == request.slices:
        return ""
    return f"{count} x {accelerator}, and {request.slices} x {wanted[0]} is asked for"


def of_workers(output: str) -> dict[str, str]:
    """Returns {host: answer} of the lines `R1JAX HOST ANSWER`, the last one of each host."""
    words = [line.split(maxsplit=2) for line in output.splitlines() if line.startswith(f"{commands.MARK} ")]
    return {parts[1]: parts[2] for parts in words if len(parts) == 3}
