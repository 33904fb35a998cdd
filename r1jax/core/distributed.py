"""Several processes of one run: start-up, what one tells the others, and how all end when one is lost.

Every process runs the same program and takes the same decisions; where a decision depends on time or on a file, process 0
takes it and the others read it here. All of it goes through JAX's coordination service, not through the devices. With one
process nothing is started, and every function returns at once.
"""

import base64
import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

HEARTBEAT_S = 30.0  # a process that is silent for longer is lost
START_DEADLINE_S = 300.0  # within which all processes must have been started
DEADLINE_S = 1800.0  # the longest that a process waits for another one at a named place
LOST_EXIT = 3  # exit code of a process that ends because another one was lost
_SLICE_S = 1.0  # waits are cut into slices, so that Ctrl-C is heard
_GRACE_S = 5.0
_SPARE_S = 6.0  # the coordinator outlives process 0 by this and a heartbeat, so that the others can end in order
_TRANSPORT = (
    "Gloo",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "heartbeat",
    "Connection closed",
    "Connection reset",
    "coordination",
)


_AGAIN = "the same command again resumes the run"


class PeerLost(RuntimeError):
    """Another process did not come to where this one waits, or ended."""


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_s: float = HEARTBEAT_S,
    deadline_s: float = START_DEADLINE_S,
) -> None:
    """Joins the processes of a run; to be called before anything uses a JAX device. Nothing happens with one process.

    `coordinator` is HOST:PORT of process 0. With "auto", or without one on a pod of TPU hosts that the environment names,
    JAX finds address, number and place itself. Raises ValueError for values that do not go together, and ends the process,
    saying why, when the others do not come within `deadline_s`.
    """
    global _cluster
    if _cluster is not None:
        raise ValueError("the processes of this run are connected already")
    if coordinator is None and num_processes in (None, 1) and process_id in (None, 0):
        if num_processes == 1 or not _on_tpu_pod():
            return
        coordinator = "auto"
    if coordinator != "auto":
        _check(coordinator, num_processes, process_id)
        if num_processes == 1:
            return
    _cluster = _Cluster(coordinator, num_processes, process_id, heartbeat_s, deadline_s)


def stop() -> None:
    """Waits for all processes to come to their end, then disconnects."""
    global _cluster
    if _cluster is not None:
        barrier("the end of the run")
        cluster, _cluster = _cluster, None
        cluster.close()


def await_verdict(error: BaseException) -> None:
    """Ends this process, saying who was lost, when the error comes of another process's going away; else returns."""
    if _cluster is not None:
        _cluster.await_verdict(error)


def fail(error: BaseException, code: int) -> None:
    """Ends this process with exit code `code` after telling the others why; returns only when it is the only process."""
    if _cluster is not None:
        _cluster.fail(error, code)


def process_index() -> int:
    return 0 if _cluster is None else _cluster.index


def process_count() -> int:
    return 1 if _cluster is None else _cluster.count


def is_writer() -> bool:
    """Returns whether this process writes the run's files: process 0 does."""
    return process_index() == 0


def broadcast(value: Any, name: str = "a value", deadline_s: float = DEADLINE_S) -> Any:
    """Returns process 0's `value` in every process: numbers, text, None, lists, dicts with text keys, numpy arrays.

    Raises PeerLost, saying what was waited for, when process 0 does not send it in time.
    """
    return value if _cluster is None else _cluster.broadcast(value, name, deadline_s)


def gather(value: Any, name: str = "values", deadline_s: float = DEADLINE_S) -> list | None:
    """Returns every process's value by process on process 0, None elsewhere; values and errors as in `broadcast`."""
    return [value] if _cluster is None else _cluster.gather(value, name, deadline_s)


def all_gather_hosts(array: np.ndarray, name: str = "arrays", deadline_s: float = DEADLINE_S) -> np.ndarray:
    """Returns the arrays of all processes joined along their first axis, in every process."""
    if _cluster is None:
        return np.asarray(array)
    parts = gather(np.asarray(array), name, deadline_s)
    return broadcast(np.concatenate(parts) if parts is not None else None, name, deadline_s)


def barrier(name: str, deadline_s: float = DEADLINE_S) -> None:
    """Returns when every process is here. Raises PeerLost with the name and, on process 0, who is missing."""
    if _cluster is not None:
        gather(None, name, deadline_s)
        broadcast(None, name, deadline_s)


def decide(function: Callable, *arguments: Any, name: str = "", deadline_s: float = DEADLINE_S) -> Any:
    """Returns in every process what `function(*arguments)` returns in process 0, where alone it runs.

    An error there is raised in every process: a ValueError as such, any other as RuntimeError.
    """
    if _cluster is None:
        return function(*arguments)
    name = name or f"process 0's {getattr(function, '__qualname__', 'decision')}"
    if not is_writer():
        outcome = broadcast(None, name, deadline_s)
        if outcome["error"] is not None:
            raise (ValueError if outcome["by_user"] else RuntimeError)(outcome["error"])
        return outcome["value"]
    try:
        value = function(*arguments)
    except Exception as error:
        broadcast({"error": _one_line(error), "by_user": isinstance(error, ValueError)}, name, deadline_s)
        raise
    return broadcast({"error": None, "value": value}, name, deadline_s)["value"]


def require_one(what: str) -> None:
    """Raises ValueError when there are several processes: `what` runs in one alone."""
    if _cluster is not None:
        raise ValueError(
            f"{what} runs in one process, here are {_cluster.count}; run it without --coordinator and --num_processes"
        )


def place(value: Any, sharding: Any) -> Any:
    """Returns a host value, the same in every process, as an array with this sharding."""
    import jax

    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def to_host(array: Any) -> np.ndarray:
    """Returns a whole array in the memory of every process; where it is divided between them, all must call this."""
    import jax

    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(jax.device_get(array))
    return np.asarray(_replicate(array.sharding.mesh)(array))


@functools.cache
def _replicate(mesh: Any) -> Callable:
    import jax

    return jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


class _Cluster:
    """This process's connection to the others. Calls must come in the same order in all of them."""

    def __init__(self, coordinator: str, count: int | None, index: int | None, heartbeat_s: float, deadline_s: float):
        import jax

        if "tpu" not in os.environ.get("JAX_PLATFORMS", ""):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        self._service: subprocess.Popen | None = None
        # JAX's own watch ends a process with a stack trace; ours comes first and says who was lost.
        settings = {
            "heartbeat_timeout_seconds": int(4 * heartbeat_s) + 60,
            "initialization_timeout": int(deadline_s) + 60,
        }
        if coordinator != "auto":
            settings |= {"num_processes": count, "process_id": index, "cluster_detection_method": "deactivate"}
            settings |= {"coordinator_address": coordinator}
            if index == 0:
                self._service = _start_service(coordinator, count, heartbeat_s)
                # JAX would serve from process 0 itself and take all others down, without a word, when that is killed.
                settings["coordinator_bind_address"] = "localhost:0"
        said = f"the processes of the run did not come together at {coordinator} within {deadline_s:g} s"
        timer = threading.Timer(deadline_s, self._give_up, (said,))
        timer.daemon = True
        timer.start()
        try:
            jax.distributed.initialize(**settings)
        except ValueError as error:
            raise ValueError(
                f"--coordinator={coordinator}: JAX finds no other processes here ({_one_line(error)}); "
                "give --coordinator=HOST:PORT --num_processes=N --process_id=I"
            ) from None
        except RuntimeError as error:
            raise PeerLost(f"{said} ({_one_line(error)[:160]})") from None
        finally:
            timer.cancel()
        self._client = jax._src.distributed.global_state.client
        self.index, self.count, self._heartbeat_s = jax.process_index(), jax.process_count(), heartbeat_s
        self._calls, self._sent, self._ending, self._last_word = 0, [], threading.Event(), threading.Lock()
        self._interval_s = min(1.0, heartbeat_s / 5)
        self._client.key_value_increment(f"r1jax/alive/{self.index}", 1)
        self._watch = threading.Thread(target=self._watch_others, name="watch", daemon=True)
        self._watch.start()

    def _give_up(self, said: str) -> None:
        _print_error(said)
        if self._service is not None:
            self._service.kill()
        os._exit(LOST_EXIT)

    def broadcast(self, value: Any, name: str, deadline_s: float) -> Any:
        self._calls += 1
        key = f"r1jax/broadcast/{self._calls}"
        if self.index == 0:
            self._client.key_value_set_bytes(key, _encode([name, value]))
            self._sent.append(key)
            return _decode(_encode(value))  # what the others get, so that all go on with the same
        # Process 0, when it waits too long itself, knows for whom: its word comes first.
        limit = time.monotonic() + deadline_s + _GRACE_S
        return self._receive(key, name, 0, limit, deadline_s + _GRACE_S)

    def gather(self, value: Any, name: str, deadline_s: float) -> list | None:
        self._calls += 1
        key = f"r1jax/gather/{self._calls}"
        if self.index:
            self._client.key_value_set_bytes(f"{key}/{self.index}", _encode([name, value]))
            return None
        limit, found = time.monotonic() + deadline_s, [_decode(_encode(value))]
        found += [self._receive(f"{key}/{peer}", name, peer, limit, deadline_s, key) for peer in range(1, self.count)]
        # All have come here, so all have read what was sent before.
        for old in [*self._sent, *(f"{key}/{peer}" for peer in range(1, self.count))]:
            self._client.key_value_delete(old)
        self._sent = []
        return found

    def _receive(self, key: str, name: str, peer: int, limit: float, deadline_s: float, prefix: str = "") -> Any:
        while True:
            left = limit - time.monotonic()
            try:
                wait_ms = int(1000 * max(0.01, min(_SLICE_S, left)))
                theirs, value = _decode(self._client.blocking_key_value_get_bytes(key, wait_ms))
                break
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if left <= 0:
                missing = [peer]
                if prefix:
                    here = {int(found.rsplit("/", 1)[1]) for found, _ in self._client.key_value_dir_get_bytes(prefix)}
                    missing = [other for other in range(1, self.count) if other >= peer and other not in here]
                raise PeerLost(f"waited {deadline_s:g} s at '{name}' for {_named(missing)}")
        if theirs != name:
            raise RuntimeError(f"process {peer} is at '{theirs}', process {self.index} at '{name}'")
        return value

    def _watch_others(self) -> None:
        """Runs in a thread: tells that this process lives, and ends it when another one has failed or fallen silent.

        Process 0 watches all; the others watch process 0 and read what it found.
        """
        watched = range(1, self.count) if self.index == 0 else (0,)
        counts, heard = {}, dict.fromkeys(watched, time.monotonic())
        while not self._ending.wait(self._interval_s):
            try:
                self._client.key_value_increment(f"r1jax/alive/{self.index}", 1)
                if failures := self._client.key_value_dir_get("r1jax/failed/"):
                    self._end(failures[0][1])
                alive = dict(self._client.key_value_dir_get("r1jax/alive/"))
            except Exception as error:
                if not self._ending.is_set():
                    self._end(f"the coordinator is gone ({_one_line(error)[:120]}); {_AGAIN}")
                return
            now = time.monotonic()
            for peer in watched:
                count = alive.get(f"r1jax/alive/{peer}")
                if count != counts.get(peer):
                    counts[peer], heard[peer] = count, now
            lost = [peer for peer in watched if now - heard[peer] > self._heartbeat_s]
            if lost and not self._ending.is_set():
                verb = "has" if len(lost) == 1 else "have"
                reason = f"{_named(lost)} {verb} not been heard of for {self._heartbeat_s:g} s; {_AGAIN}"
                self._tell(reason)
                self._end(reason)

    def _tell(self, reason: str) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"r1jax/failed/{self.index}", reason, allow_overwrite=True)

    def _end(self, reason: str) -> None:
        self._last_word.acquire()  # never released: one thread says why, any other waits for the end
        _print_error(f"process {self.index} stops: {reason}")
        if self.index == 0:
            time.sleep(3 * self._interval_s)  # the others read the reason where process 0's coordinator keeps it
        os._exit(LOST_EXIT)

    def await_verdict(self, error: BaseException) -> None:
        if isinstance(error, PeerLost):
            reason = f"{_one_line(error)}; {_AGAIN}"
            self._tell(reason)
            self._end(reason)
        if any(word in str(error) for word in _TRANSPORT):
            time.sleep(self._heartbeat_s + 3 * self._interval_s)  # the watch finds out who it was and ends this process
        with self._last_word:  # never to be had once the watch is about to end this process
            pass

    def fail(self, error: BaseException, code: int) -> None:
        self._last_word.acquire()
        self._ending.set()
        self._tell(f"process {self.index} failed: {_one_line(error)}")
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(3 * self._interval_s)  # the others read it before the coordinator may go
        os._exit(code)

    def close(self) -> None:
        import jax

        self._ending.set()
        self._watch.join()
        jax.distributed.shutdown()
        if self._service is not None:
            self._service.stdin.write(b"done\n")
            self._service.stdin.close()
            self._service.wait()


_cluster: _Cluster | None = None


def _start_service(coordinator: str, count: int, heartbeat_s: float) -> subprocess.Popen:
    """Returns the process that keeps JAX's coordination service; it ends with this one, a little later if that is killed."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    port = int(coordinator.rsplit(":", 1)[1])
    _await_port(port, heartbeat_s + 2 * _SPARE_S)
    bind = f"[::]:{port}"
    command = [sys.executable, "-m", "r1jax.core.distributed", bind, str(count), str(heartbeat_s)]
    service = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": search},
        start_new_session=True,
    )
    if service.stdout.readline().strip() != b"ready":
        raise ValueError(f"--coordinator={coordinator}: cannot listen there; give a free port of this machine")
    return service


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


def _serve(bind: str, count: int, heartbeat_s: float) -> None:
    """Keeps the coordination service until process 0 says so, or for a while after process 0 went away without a word."""
    from jax._src.lib import _jax

    silence_s = int(4 * heartbeat_s) + 60
    service = _jax.get_distributed_runtime_service(bind, count, heartbeat_timeout=silence_s, shutdown_timeout=60)
    print("ready", flush=True)
    if sys.stdin.readline().strip() != "done":
        time.sleep(heartbeat_s + _SPARE_S)
        os._exit(1)
    service.shutdown()


def _on_tpu_pod() -> bool:
    """Returns whether the environment names several TPU hosts, as it does on a pod of GKE."""
    if os.environ.get("JAX_PLATFORMS", "tpu") == "cpu":
        return False
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    return len(hosts.split(",")) > 1 or os.environ.get("MEGASCALE_NUM_SLICES", "1") not in ("", "1")


def _check(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Raises ValueError when address, number and place of the processes do not go together."""
    if coordinator is None or count is None or index is None:
        given = f"--coordinator={coordinator} --num_processes={count} --process_id={index}"
        raise ValueError(f"{given}: give all three, or none of them, or --coordinator=auto")
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"--coordinator={coordinator}: needs HOST:PORT of process 0")
    if not 0 <= index < count:
        raise ValueError(f"--process_id={index}: must be 0 to {count - 1} with --num_processes={count}")


def _named(peers: list[int]) -> str:
    return ("process " if len(peers) == 1 else "processes ") + ", ".join(str(peer) for peer in peers)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _print_error(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"error: {text}\n".encode())


def _encode(value: Any) -> bytes:
    return json.dumps(value, default=_packed).encode()


def _packed(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        text = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"__array__": [value.dtype.str, value.shape, text]}
    raise TypeError(f"broadcast: {type(value).__name__} cannot be sent to other processes")


def _decode(data: bytes) -> Any:
    return json.loads(data, object_hook=_unpacked)


def _unpacked(value: dict) -> Any:
    if "__array__" not in value:
        return value
    dtype, shape, text = value["__array__"]
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype)).reshape(shape).copy()


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
