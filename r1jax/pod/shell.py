"""Runs gcloud with a deadline and signs of life, several at once where a pod has several slices."""

import collections
import concurrent.futures
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from r1jax.pod.remedies import PodError

SAY_S = 60.0  # between two lines about a command that is still running
TIMED_OUT = 124


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return f"{self.out}\n{self.err}"


def say(text: str) -> None:
    """Prints a line of the launcher on stderr, with the time; stdout has the run's log alone."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def run(words: Sequence[str], timeout_s: float, what: str = "") -> Finished:
    """Returns the finished command; its code is TIMED_OUT after `timeout_s`. `what` names it in signs of life."""
    (done,) = run_all([words], timeout_s, what)
    return done


def run_all(several: Sequence[Sequence[str]], timeout_s: float, what: str = "") -> list[Finished]:
    """Returns the finished commands, which run at the same time; ends them all when this one is interrupted."""
    processes: list[subprocess.Popen[str]] = []
    started = time.monotonic()
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=len(several))
    try:
        processes += [_popen(words) for words in several]
        results = [pool.submit(_finish, process, timeout_s) for process in processes]
        while concurrent.futures.wait(results, timeout=SAY_S).not_done:
            if what:
                say(f"{what}: {(time.monotonic() - started) / 60:.0f} min, of {timeout_s / 60:.0f} at most")
        return [result.result() for result in results]
    finally:
        for process in processes:  # before the pool waits for the threads that read their output
            _end(process)
        pool.shutdown()


def _finish(process: subprocess.Popen[str], timeout_s: float) -> Finished:
    try:
        out, err = process.communicate(timeout=timeout_s)
        return Finished(process.returncode, out, err)
    except subprocess.TimeoutExpired:
        _end(process)
        return Finished(TIMED_OUT, "", f"no answer within {timeout_s:g} s")


def stream(words: Sequence[str], silence_s: float, errors: collections.deque[str]) -> Iterator[str]:
    """Yields the lines that a command prints on stdout, until it ends or is silent for `silence_s`.

    Those that it prints on stderr are put into `errors`.
    """
    process = _popen(words)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # closed by _end
            for line in process.stdout:
                lines.put(line.rstrip("\r\n"))
        lines.put(None)

    def read_errors() -> None:
        assert process.stderr is not None
        with contextlib.suppress(ValueError, OSError):
            errors.extend(process.stderr)

    threads = [threading.Thread(target=target, daemon=True) for target in (read, read_errors)]
    for thread in threads:
        thread.start()
    try:
        while True:
            try:
                line = lines.get(timeout=silence_s)
            except queue.Empty:
                return
            if line is None:
                return
            yield line
    finally:
        _end(process)
        for thread in threads:
            thread.join(timeout=5)


def _popen(words: Sequence[str]) -> subprocess.Popen[str]:
    """Starts a command in a session of its own, which Ctrl-C does not reach, and which cannot ask anything."""
    environment = os.environ | {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    try:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise PodError(
            f"{words[0]} is not installed, or not on PATH: see https://cloud.google.com/sdk/docs/install"
        ) from None


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a command with all that it started, if it is still running."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
