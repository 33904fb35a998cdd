"""The watch of a run of several processes: it notices a lost one, and ends all others with the same reason."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from r1jax.core import preempt
from r1jax.core.errors import one_line

LOST_EXIT = 3  # exit code of a process that ends because another one was lost
RESUMES = "the same command again resumes the run"
_TRANSPORT = (  # words in errors of collectives and of the coordination service that a lost process causes
    "Gloo",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "heartbeat",
    "Connection closed",
    "Connection reset",
    "coordination",
)


class PeerLost(RuntimeError):
    """Raised when another process ended, or did not reach the point at which this one waits."""


class PeerWatch:
    """A thread that shows the others that this process lives, and ends it when another one failed or fell silent.

    Process 0 watches all others; they watch process 0, and read from the coordination service what it noticed.
    """

    def __init__(self, client: Any, index: int, count: int, heartbeat_s: float):
        """`client` is that of JAX's coordination service; a process silent for longer than `heartbeat_s` is lost."""
        self._client, self._index, self._heartbeat_s = client, index, heartbeat_s
        self._watched = range(1, count) if index == 0 else (0,)
        self._interval_s = min(1.0, heartbeat_s / 5)
        self._ending, self._last_word = threading.Event(), threading.Lock()
        self._show_alive()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread: the run is over."""
        self._ending.set()
        self._thread.join()

    def await_verdict(self, error: BaseException) -> None:
        """Ends this process, printing which process was lost, if that caused `error`; otherwise returns."""
        if isinstance(error, PeerLost):
            reason = f"{one_line(error)}; {RESUMES}"
            self._publish(reason)
            self._end(reason)
        if any(word in str(error) for word in _TRANSPORT):
            time.sleep(
                self._heartbeat_s + 3 * self._interval_s
            )  # the thread finds out who it was and ends this process
        with self._last_word:  # never free again once the thread is about to end this process
            pass

    def fail(self, error: BaseException, code: int) -> None:
        """Ends this process with exit code `code`, after publishing why for the others."""
        self._exit(code, lambda: self._publish(f"process {self._index} failed: {one_line(error)}"))

    def leave(self, code: int) -> None:
        """Ends this process with exit code `code` after the others have had the time to hear of its notice."""
        self._exit(code, self._pass_on)

    def _exit(self, code: int, last_word: Callable[[], None]) -> None:
        self._last_word.acquire()
        self._ending.set()
        last_word()
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(3 * self._interval_s)  # the others read it before the coordinator may go
        os._exit(code)

    def _pass_on(self) -> None:
        """Tries to let the others know of a notice to end that this process has, and takes one from them."""
        with contextlib.suppress(Exception):
            if preempt.requested():
                self._client.key_value_set(f"r1jax/preempted/{self._index}", "", allow_overwrite=True)
            elif noticed := self._client.key_value_dir_get("r1jax/preempted/"):
                preempt.request(f"{named([int(key.rsplit('/', 1)[1]) for key, _ in noticed])} was asked to end")

    def _run(self) -> None:
        counts, heard = {}, dict.fromkeys(self._watched, time.monotonic())
        while not self._ending.wait(self._interval_s):
            try:
                self._show_alive()
                self._pass_on()
                if failures := self._client.key_value_dir_get("r1jax/failed/"):
                    self._end(failures[0][1])
                alive = dict(self._client.key_value_dir_get("r1jax/alive/"))
            except Exception as error:
                if not self._ending.is_set():
                    self._end(f"the coordinator is gone ({one_line(error, 120)}); {RESUMES}")
                return
            now = time.monotonic()
            for peer in self._watched:
                count = alive.get(f"r1jax/alive/{peer}")
                if count != counts.get(peer):
                    counts[peer], heard[peer] = count, now
            lost = [peer for peer in self._watched if now - heard[peer] > self._heartbeat_s]
            if lost and not self._ending.is_set():
                verb = "has" if len(lost) == 1 else "have"
                reason = f"{named(lost)} {verb} not been heard of for {self._heartbeat_s:g} s; {RESUMES}"
                self._publish(reason)
                self._end(reason)

    def _show_alive(self) -> None:
        self._client.key_value_increment(f"r1jax/alive/{self._index}", 1)

    def _publish(self, reason: str) -> None:
        """Leaves the reason for the end of this process where the others look for it."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"r1jax/failed/{self._index}", reason, allow_overwrite=True)

    def _end(self, reason: str) -> None:
        self._last_word.acquire()  # never released: one thread prints why, any other waits for the end
        print_error(f"process {self._index} stops: {reason}")
        if self._index == 0:
            time.sleep(3 * self._interval_s)  # the others read the reason while process 0's coordinator still runs
        os._exit(preempt.PREEMPTED_EXIT if preempt.requested() else LOST_EXIT)


def named(peers: list[int]) -> str:
    """Returns "process 3" or "processes 1, 3"."""
    return ("process " if len(peers) == 1 else "processes ") + ", ".join(str(peer) for peer in peers)


def print_error(text: str) -> None:
    """Prints an error from a process that is about to end, past Python's buffers."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {text}\n".encode())
