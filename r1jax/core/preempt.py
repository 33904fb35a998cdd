"""A notice to end soon (SIGTERM), as a machine gives it that is about to be taken away. Imports no JAX.

Where nothing would be lost, `Preempted` is raised in the main thread at once. Inside `deferred`, which surrounds what has
to be whole (an update with its checkpoint), it waits for the end of the block. A thread of its own ends the process when
the grace period is over, whatever the main thread does then.
"""

import _thread
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Generator

PREEMPTED_EXIT = 75  # exit code: try again (EX_TEMPFAIL of sysexits.h)
GRACE_S = 30.0
_SIGNAL = "asked to end (SIGTERM)"
_KEPT_BACK = 0.1  # share of the grace period that is left to the machine


class Preempted(BaseException):
    """Raised where a run ends because of a notice; no handler of errors catches it."""


class _Notice:
    """Whether this process was asked to end, and whether that waits."""

    def __init__(self):
        self.grace_s = GRACE_S
        self.asked = self.mentioned = False
        self.deferrals = 0
        self.raised = False
        self.timer: threading.Timer | None = None  # ends the process


_lock = threading.Lock()
_notice = _Notice()
_wakeup: socket.socket | None = None  # the end that Python writes the numbers of signals to


def listen(grace_s: float = GRACE_S) -> None:
    """Makes SIGTERM a notice, after which the process ends within `grace_s`; to be called in the main thread.

    Called again it takes the signal back from whatever library took it meanwhile.
    """
    global _wakeup
    _notice.grace_s = grace_s
    signal.signal(signal.SIGTERM, _handle)
    if _wakeup is None:
        reader, _wakeup = socket.socketpair()
        _wakeup.setblocking(False)
        threading.Thread(target=_read, args=(reader,), name="preempt", daemon=True).start()
    signal.set_wakeup_fd(_wakeup.fileno(), warn_on_full_buffer=False)


def request(reason: str) -> None:
    """Gives this process the notice, from a thread that is not the main one; does nothing if it has it already."""
    with _lock:
        if _notice.timer is not None:
            return
        _notice.timer = threading.Timer((1 - _KEPT_BACK) * _notice.grace_s, _end)
    _notice.asked = True
    _notice.timer.daemon = True
    _notice.timer.start()
    _mention(reason)
    _thread.interrupt_main(signal.SIGTERM)


def requested() -> bool:
    """Returns whether this process has a notice."""
    return _notice.asked


def raise_if_requested() -> None:
    """Raises Preempted if this process has a notice, unless that is deferred."""
    if _notice.asked and not _notice.deferrals:
        _notice.raised = True
        raise Preempted


@contextlib.contextmanager
def deferred() -> Generator[None]:
    """Surrounds what has to be whole, in the main thread: a notice raises at the end of the outermost such block."""
    _notice.deferrals += 1
    try:
        yield
    finally:
        _notice.deferrals -= 1
    raise_if_requested()


def _handle(number: int, frame: object) -> None:
    """Raises Preempted in the main thread, once. Python calls it when that thread runs Python code again."""
    _notice.asked = True
    _mention(_SIGNAL)
    if not _notice.raised:
        raise_if_requested()


def _read(reader: socket.socket) -> None:
    """Gives the notice as soon as the signal arrives, also while the main thread is in C code."""
    while numbers := reader.recv(64):
        if signal.SIGTERM in numbers:
            request(_SIGNAL)


def _mention(reason: str) -> None:
    """Prints, once, that the process ends and why."""
    if not _notice.mentioned:
        _notice.mentioned = True
        _write(f"{reason}: this run ends within {_notice.grace_s:g} s")


def _end() -> None:
    _write("error: the grace period is over; the same command again goes on from the newest checkpoint")
    os._exit(PREEMPTED_EXIT)


def _write(line: str) -> None:
    """Prints a line on stderr, past Python's buffers, which another thread may be in."""
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
