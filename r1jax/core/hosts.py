"""Several processes of one run: start-up, and values that one process sends to the others.

Every process runs the same program and takes the same decisions; where a decision depends on time or on a file, process
0 takes it and the others receive it. These messages go through JAX's coordination service, not through the devices.
`core.watch` ends all processes when one is lost. With one process nothing is started, and every function returns at
once.
"""

import base64
import contextlib
import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from r1jax.core import preempt
from r1jax.core.errors import one_line
from r1jax.core.watch import LOST_EXIT, PeerLost, PeerWatch, named, print_error

HEARTBEAT_S = 30.0  # a process that is silent for longer is lost
START_DEADLINE_S = 300.0  # within which all processes must have been started
DEADLINE_S = 1800.0  # the longest that a process waits for another one at a named place
_SLICE_S = 1.0  # waits are cut into slices, so that Ctrl-C is heard
_GRACE_S = 5.0
_MEETING = 64  # of those questions, one in so many is put to all processes
_DISPATCHES = 16  # between two questions, while several processes sample, whether one was asked to end
_PIECE_BYTES = 1 << 20  # of a message at once: the coordination service stalls on values of tens of MB


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_s: float = HEARTBEAT_S,
    deadline_s: float = START_DEADLINE_S,
) -> None:
    """Joins the processes of a run; to be called before anything uses a JAX device. Nothing happens with one process.

    `coordinator` is HOST:PORT of process 0. With "auto", or without one on a pod of TPU hosts that the environment
    names, JAX finds address, number and place itself. Raises ValueError for values that do not go together, and ends
    the process, printing why, when the others do not come within `deadline_s`.
    """
    global _connection
    if _connection is not None:
        raise ValueError("the processes of this run are connected already")
    if coordinator is None and num_processes in (None, 1) and process_id in (None, 0):
        if num_processes == 1 or not _on_tpu_pod():
            return
        coordinator = "auto"
    if coordinator != "auto":
        _check(coordinator, num_processes, process_id)
        if num_processes == 1:
            return
    assert coordinator is not None  # or _check has raised
    _connection = _Connection(coordinator, num_processes, process_id, heartbeat_s, deadline_s)


def stop() -> None:
    """Waits for all processes to come to their end, then disconnects."""
    global _connection
    if _connection is not None:
        barrier("the end of the run")
        connection, _connection = _connection, None
        connection.close()


def await_verdict(error: BaseException) -> None:
    """Ends this process, printing which process was lost, if that caused `error`; otherwise returns."""
    if _connection is not None:
        _connection.watch.await_verdict(error)


def fail(error: BaseException, code: int) -> None:
    """Ends this process with exit code `code`, and the others with the reason; returns if it is the only process."""
    if _connection is not None:
        _connection.watch.fail(error, code)


def leave(code: int) -> None:
    """Ends this process with exit code `code`, as it was asked to, and the others too; returns if it is the only one."""
    if _connection is not None:
        _connection.watch.leave(code)


def in_step() -> contextlib.AbstractContextManager[None]:
    """Surrounds work that all processes do together: a notice ends it at a common `raise_if_preempted` alone."""
    return contextlib.nullcontext() if _connection is None else preempt.deferred()


def preempted(name: str, update: int | None = None, of_all: bool = True) -> bool:
    """Returns, in every process the same, whether one of them was asked to end; to be called by all of them together.

    `update` is the number of updates made; with it what JAX itself reports of a machine's end counts too. Without
    `of_all` process 0 answers for all, by what the watch has passed on to it so far.
    """
    if _connection is None:
        return preempt.requested()
    asked = preempt.requested() or (update is not None and _connection.reported(update))
    if of_all:
        answers = gather(asked, name)  # old messages go as well
        asked = answers is not None and any(answers)
    return broadcast(asked, name)


def raise_if_preempted(name: str, update: int | None = None, of_all: bool = True) -> None:
    """Raises Preempted in every process where `preempted` returns true; to be called by all of them together."""
    if preempted(name, update, of_all):
        raise preempt.Preempted


def between_dispatches() -> Callable[[], None]:
    """Returns what a sampler that all processes run together calls before each dispatch, to end where one is asked to.

    It asks at every 16th call, and now and then all of them.
    """
    if _connection is None:
        return preempt.raise_if_requested
    calls = itertools.count()

    def ask() -> None:
        number = next(calls)
        if number % _DISPATCHES == 0:
            raise_if_preempted("a dispatch of the sampler", of_all=number % (_DISPATCHES * _MEETING) == 0)

    return ask


def process_index() -> int:
    return 0 if _connection is None else _connection.index


def process_count() -> int:
    """Returns the number of processes that act together: within a decision (`decide`) process 0 acts alone."""
    connection = _together()
    return 1 if connection is None else connection.count


def is_writer() -> bool:
    """Returns whether this process writes the run's files and messages: process 0 does."""
    return process_index() == 0


def broadcast(value: Any, name: str = "a value", deadline_s: float = DEADLINE_S) -> Any:
    """Returns process 0's `value` in every process: numbers, text, None, lists, dicts with text keys, numpy arrays.

    Raises PeerLost, naming what was waited for, when process 0 does not send it in time.
    """
    connection = _together()
    return value if connection is None else connection.broadcast(value, name, deadline_s)


def gather(value: Any, name: str = "values", deadline_s: float = DEADLINE_S) -> list | None:
    """Returns every process's value by process on process 0, None elsewhere; values and errors as in `broadcast`."""
    connection = _together()
    return [value] if connection is None else connection.gather(value, name, deadline_s)


def barrier(name: str, deadline_s: float = DEADLINE_S) -> None:
    """Returns when every process is here. Raises PeerLost with the name and, on process 0, who is missing."""
    if _together() is not None:
        gather(None, name, deadline_s)
        broadcast(None, name, deadline_s)


def decide(function: Callable, *arguments: Any, name: str = "", deadline_s: float = DEADLINE_S) -> Any:
    """Returns in every process what `function(*arguments)` returns in process 0, where alone it runs.

    An error there is raised in every process: a ValueError as such, any other as RuntimeError. What `function` decides,
    sends or gathers in turn stays in process 0.
    """
    if _together() is None:
        return function(*arguments)
    name = name or f"process 0's {getattr(function, '__qualname__', 'decision')}"
    if not is_writer():
        outcome = broadcast(None, name, deadline_s)
        if outcome["error"] is not None:
            raise (ValueError if outcome["by_user"] else RuntimeError)(outcome["error"])
        return outcome["value"]
    try:
        value = _alone(function, *arguments)
    except Exception as error:
        broadcast({"error": one_line(error), "by_user": isinstance(error, ValueError)}, name, deadline_s)
        raise
    return broadcast({"error": None, "value": value}, name, deadline_s)["value"]


def share(items: Sequence[Any]) -> Sequence[Any]:
    """Returns this process's share of work that is divided: the items whose number modulo the processes is its own."""
    return items[process_index() :: process_count()]


def join_shares(results: list, name: str, deadline_s: float = DEADLINE_S) -> list:
    """Returns in every process the results of all, one an item, in the order of the items that `share` divided."""
    shares = gather(results, name, deadline_s)
    if shares is not None:
        joined = [None] * sum(map(len, shares))
        for index, one in enumerate(shares):
            joined[index :: len(shares)] = one
        results = joined
    return broadcast(results, name, deadline_s)


def refuse_unconnected() -> None:
    """Raises ValueError where JAX counts several processes and this one was started as if it were alone.

    Sets up JAX's devices: on a TPU pod each process then sees the other hosts, whether flags named them or not.
    """
    import jax

    if _connection is None and jax.process_count() > 1:
        raise ValueError(
            f"this process was started alone, and JAX counts {jax.process_count()} processes on these devices; start "
            "one on each host with --coordinator=HOST:PORT --num_processes=N --process_id=I (or --coordinator=auto)"
        )


def require_one(what: str) -> None:
    """Raises ValueError when there are several processes: `what` runs in one alone."""
    if _connection is not None:
        raise ValueError(
            f"{what} runs in one process, here are {process_count()}; run it without --coordinator and --num_processes"
        )


class _Connection:
    """This process's connection to the others. Calls must come in the same order in all of them."""

    def __init__(self, coordinator: str, count: int | None, index: int | None, heartbeat_s: float, deadline_s: float):
        from r1jax.core import private_jax

        private_jax.check()
        self._service: subprocess.Popen | None = None
        self._join(coordinator, count, index, heartbeat_s, deadline_s)
        self._client = private_jax.coordination_client()
        self._calls, self._sent, self._gathered = 0, [], []  # keys that are set, and those that this process gathered
        self.watch = PeerWatch(self._client, self.index, self.count, heartbeat_s)

    def _join(self, coordinator: str, count: int | None, index: int | None, heartbeat_s: float, deadline_s: float):
        """Connects to the others through JAX. Raises PeerLost, or ends the process, when they do not come in time."""
        import jax

        from r1jax.core import coordinator as coordinators

        if "tpu" not in os.environ.get("JAX_PLATFORMS", ""):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # JAX's own watch ends a process with a stack trace; ours comes first and names who was lost.
        settings: dict[str, Any] = {
            "heartbeat_timeout_seconds": int(4 * heartbeat_s) + 60,
            "initialization_timeout": int(deadline_s) + 60,
        }
        if coordinator != "auto":
            assert count is not None
            settings |= {"num_processes": count, "process_id": index, "cluster_detection_method": "deactivate"}
            settings |= {"coordinator_address": coordinator}
            if index == 0:
                self._service = coordinators.start(coordinator, count, heartbeat_s)
                # JAX would serve from process 0 itself and take all others down, without a word, when that is killed.
                settings["coordinator_bind_address"] = "localhost:0"
        reason = f"the processes of the run did not come together at {coordinator} within {deadline_s:g} s"
        timer = threading.Timer(deadline_s, self._give_up, (reason,))
        timer.daemon = True
        timer.start()
        try:
            jax.distributed.initialize(**settings)
        except ValueError as error:
            raise ValueError(
                f"--coordinator={coordinator}: JAX finds no other processes here ({one_line(error)}); "
                "give --coordinator=HOST:PORT --num_processes=N --process_id=I"
            ) from None
        except RuntimeError as error:
            raise PeerLost(f"{reason} ({one_line(error, 160)})") from None
        finally:
            timer.cancel()
        self.index, self.count = jax.process_index(), jax.process_count()

    def _give_up(self, reason: str) -> None:
        print_error(reason)
        if self._service is not None:
            self._service.kill()
        os._exit(LOST_EXIT)

    def reported(self, update: int) -> bool:
        """Returns whether JAX reports the end of a machine; all processes get to know at the same update."""
        import jax
        from jax.experimental import multihost_utils

        listens = jax.config.values.get("jax_enable_preemption_service")
        return bool(listens) and multihost_utils.reached_preemption_sync_point(update)

    def broadcast(self, value: Any, name: str, deadline_s: float) -> Any:
        self._calls += 1
        key = f"r1jax/broadcast/{self._calls}"
        if self.index == 0:
            self._sent += self._send(key, _encode([name, value]))
            return _decode(_encode(value))  # the value as the others receive it, so that all continue with the same one
        # Process 0, when it waits too long itself, knows for whom: it has the time to publish that first.
        limit = time.monotonic() + deadline_s + _GRACE_S
        return self._receive(key, name, 0, limit, deadline_s + _GRACE_S)

    def gather(self, value: Any, name: str, deadline_s: float) -> list | None:
        self._calls += 1
        key = f"r1jax/gather/{self._calls}"
        if self.index:
            self._send(f"{key}/{self.index}", _encode([name, value]))
            return None
        limit, values = time.monotonic() + deadline_s, [_decode(_encode(value))]
        values += [self._receive(f"{key}/{peer}", name, peer, limit, deadline_s, key) for peer in range(1, self.count)]
        # All have come here, so all have read what was sent before.
        for old in (*self._sent, *self._gathered):
            self._client.key_value_delete(old)
        self._sent, self._gathered = [], []
        return values

    def _send(self, key: str, data: bytes) -> list[str]:
        """Sets a message in pieces and returns their keys; the first, which says how many there are, is set last."""
        pieces = [data[start : start + _PIECE_BYTES] for start in range(0, len(data), _PIECE_BYTES)]
        keys = _piece_keys(key, len(pieces))
        for one, piece in reversed(list(zip(keys, pieces, strict=True))):
            head = len(pieces).to_bytes(4, "big") if one == key else b""
            self._client.key_value_set_bytes(one, head + piece)
        return keys

    def _read(self, key: str, wait_ms: int) -> tuple[bytes, list[str]]:
        """Returns (a message, the keys of its pieces). Raises JAX's error when it is not there in time."""
        first = self._client.blocking_key_value_get_bytes(key, wait_ms)
        keys = _piece_keys(key, int.from_bytes(first[:4], "big"))
        rest = [self._client.blocking_key_value_get_bytes(one, int(1000 * DEADLINE_S)) for one in keys[1:]]
        return b"".join([first[4:], *rest]), keys

    def _receive(self, key: str, name: str, peer: int, limit: float, deadline_s: float, prefix: str = "") -> Any:
        while True:
            left = limit - time.monotonic()
            try:
                wait_ms = int(1000 * max(0.01, min(_SLICE_S, left)))
                data, keys = self._read(key, wait_ms)
                break
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if left <= 0:
                missing = [peer]
                if prefix:
                    arrived = self._client.key_value_dir_get_bytes(prefix)
                    here = {int(arrived_key.rsplit("/", 1)[1]) for arrived_key, _ in arrived}
                    missing = [other for other in range(1, self.count) if other >= peer and other not in here]
                raise PeerLost(f"waited {deadline_s:g} s at '{name}' for {named(missing)}")
        peer_name, value = _decode(data)
        self._gathered += keys if prefix else []
        if peer_name != name:
            raise RuntimeError(f"process {peer} is at '{peer_name}', process {self.index} at '{name}'")
        return value

    def close(self) -> None:
        import jax

        from r1jax.core import coordinator

        self.watch.stop()
        jax.distributed.shutdown()
        if self._service is not None:
            coordinator.stop(self._service)


_connection: _Connection | None = None
_deciding = threading.local()  # `now`: whether this thread is within a decision


def _piece_keys(key: str, count: int) -> list[str]:
    """Returns the keys of a message's pieces; those behind the first are not beside it, where `gather` looks."""
    return [key, *(f"{key.replace('r1jax/', 'r1jax/more/', 1)}/{number}" for number in range(1, count))]


def _together() -> _Connection | None:
    """Returns the connection to the others; None where there are none, and within a decision."""
    return None if getattr(_deciding, "now", False) else _connection


def _alone(function: Callable, *arguments: Any) -> Any:
    _deciding.now = True
    try:
        return function(*arguments)
    finally:
        _deciding.now = False


def _on_tpu_pod() -> bool:
    """Returns whether the environment names several TPU hosts, as it does on a pod of GKE."""
    if os.environ.get("JAX_PLATFORMS", "tpu") == "cpu":
        return False
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or ""
    return len(hosts.split(",")) > 1 or os.environ.get("MEGASCALE_NUM_SLICES", "1") not in ("", "1")


def _check(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Raises ValueError when address, number and place of the processes do not go together."""
    if coordinator is None or count is None or index is None:
        flags = f"--coordinator={coordinator} --num_processes={count} --process_id={index}"
        raise ValueError(f"{flags}: give all three, or none of them, or --coordinator=auto")
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"--coordinator={coordinator}: needs HOST:PORT of process 0")
    if not 0 <= index < count:
        raise ValueError(f"--process_id={index}: must be 0 to {count - 1} with --num_processes={count}")


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
