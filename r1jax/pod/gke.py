"""A JobSet for GKE that runs the same command on the same slices, as YAML; XPK makes such ones. Pure functions.

Every slice is one Job, every host one Pod of it. GKE itself sets the variables (TPU_WORKER_HOSTNAMES, TPU_WORKER_ID and,
with several slices, MEGASCALE_*) from which each process knows its place, so the command needs no flags for it.
Source: github.com/kubernetes-sigs/jobset, docs.cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice.
"""

import json
import math

from r1jax.pod.request import PodRequest
from r1jax.pod.worker import RESTART_EXITS

_MARGIN_S = 30  # from the end of the run's grace period to SIGKILL; a Spot node leaves no time for it
_PORTS = (8471, 8080, 8482)  # libtpu between hosts, between slices, and JAX's coordinator


def manifest(request: PodRequest) -> str:
    """Returns the JobSet.

    An exit code that a restart would repeat fails the JobSet at once; after any other, a preempted node among them, all
    Jobs start again, `--restarts` times at most.
    """
    one = request.slice
    spot = ['            cloud.google.com/gke-spot: "true"'] if request.spot else []
    grace = [f"--grace_s={request.grace_s:g}"] if request.spot and request.run.grace_s is None else []
    arguments = [f"              - {_argument(text)}" for text in (*request.arguments, *grace)]
    grace_s = math.ceil(request.grace_s) + (0 if request.spot else _MARGIN_S)
    return "\n".join(
        [
            "apiVersion: jobset.x-k8s.io/v1alpha2",
            "kind: JobSet",
            "metadata:",
            f"  name: {request.name}",
            "  annotations:",
            "    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool",
            "spec:",
            "  failurePolicy:",
            f"    maxRestarts: {request.restarts}",
            "    rules:",
            "    - action: FailJobSet",
            "      onJobFailureReasons: [PodFailurePolicy]",
            "  replicatedJobs:",
            "  - name: slice",
            f"    replicas: {request.slices}",
            "    template:",
            "      spec:",
            f"        parallelism: {one.hosts}",
            f"        completions: {one.hosts}",
            "        completionMode: Indexed",
            "        backoffLimit: 0",
            *_failure_rules(),
            "        template:",
            "          spec:",
            "            restartPolicy: Never",
            f"            terminationGracePeriodSeconds: {grace_s}",
            "            hostNetwork: true",
            "            dnsPolicy: ClusterFirstWithHostNet",
            "            nodeSelector:",
            f"              cloud.google.com/gke-tpu-accelerator: {one.series.gke}",
            f"              cloud.google.com/gke-tpu-topology: {one.shape}",
            *(f"  {line}" for line in spot),
            "            containers:",
            "            - name: r1jax",
            f"              image: {json.dumps(request.image)}",
            "              command: [python, -u, -m, r1jax.launch]",
            "              args:",
            *arguments,
            "              ports:",
            *(f"              - containerPort: {port}" for port in _PORTS),
            "              resources:",
            "                requests:",
            f"                  google.com/tpu: {one.chips_per_host}",
            "                limits:",
            f"                  google.com/tpu: {one.chips_per_host}",
            *_volumes(request.claim),
            "",
        ]
    )


def _argument(text: str) -> str:
    """Returns a container's argument as YAML: Kubernetes makes $ of $$, and puts a variable in place of $(NAME)."""
    return json.dumps(text.replace("$", "$$"), ensure_ascii=False)


def _volumes(claim: str) -> list[str]:
    """Returns the lines that mount the claim NAME:/PATH, none without one."""
    name, _, path = claim.partition(":")
    if not name:
        return []
    return [
        "              volumeMounts:",
        "              - name: shared",
        f"                mountPath: {json.dumps(path)}",
        "            volumes:",
        "            - name: shared",
        "              persistentVolumeClaim:",
        f"                claimName: {json.dumps(name)}",
    ]


def _failure_rules() -> list[str]:
    """Returns the lines that make a Job fail for good by an exit code which is not one of RESTART_EXITS.

    A Pod that was evicted is left out before the exit codes are looked at: its code may be any.
    """
    return [
        "        podFailurePolicy:",
        "          rules:",
        "          - action: Count",
        "            onPodConditions:",
        "            - type: DisruptionTarget",
        '              status: "True"',
        "          - action: FailJob",
        "            onExitCodes:",
        "              containerName: r1jax",
        "              operator: NotIn",
        f"              values: [{', '.join(str(code) for code in RESTART_EXITS)}]",
    ]
