"""The process that keeps JAX's coordination service for a run of several processes.

JAX would keep it in process 0, and a killed process 0 would take all others down without a word. Process 0 starts this
one instead; it outlives process 0 for a while, so that the others can learn what happened and end in order.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time

from r1jax.core import private_jax

_SPARE_S = 6.0  # the service outlives process 0 by this and a heartbeat
_MODULE = "r1jax.core.coordinator"


def start(coordinator: str, count: int, heartbeat_s: float) -> subprocess.Popen:
    """Returns the process that keeps the service of `count` processes at `coordinator`, HOST:PORT.

    It ends with this process, a little later if this one is killed. Raises ValueError when the port is in use.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    port = int(coordinator.rsplit(":", 1)[1])
    _await_port(port, heartbeat_s + 2 * _SPARE_S)
    service = subprocess.Popen(
        [sys.executable, "-m", _MODULE, f"[::]:{port}", str(count), str(heartbeat_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": search},
        start_new_session=True,
    )
    assert service.stdout is not None
    if service.stdout.readline().strip() != b"ready":
        raise ValueError(f"--coordinator={coordinator}: cannot listen there; give a free port of this machine")
    return service


def stop(service: subprocess.Popen) -> None:
    """Ends the service and its process; to be called when every process of the run has disconnected."""
    assert service.stdin is not None
    service.stdin.write(b"done\n")
    service.stdin.close()
    service.wait()


def _await_port(port: int, deadline_s: float) -> None:
    """Returns when nothing listens at a port any more: the coordinator of a killed run does so for a while."""
    limit = time.monotonic() + deadline_s
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return
        if time.monotonic() > limit:
            raise ValueError(f"--coordinator: port {port} of this machine is in use; give a free one")
        time.sleep(0.5)


def _serve(address: str, count: int, heartbeat_s: float) -> None:
    """Keeps the service until process 0 sends "done", or for a while after process 0 ended without sending it."""
    service = private_jax.coordination_service(address, count, int(4 * heartbeat_s) + 60)
    print("ready", flush=True)
    if sys.stdin.readline().strip() != "done":
        time.sleep(heartbeat_s + _SPARE_S)
        os._exit(1)
    service.shutdown()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
