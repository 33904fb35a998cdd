"""Process-wide set-up of JAX (the persistent compilation cache), and the count of compiled programs."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import jax


def setup() -> None:
    """Turns on the persistent compilation cache (JAX_COMPILATION_CACHE_DIR, else the user's cache folder)."""
    home = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(home) / "r1jax" / "xla"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev/vfio").glob("*")):
        for name, value in WITHOUT_TPU.items():
            os.environ.setdefault(name, value)


# Where the TPU compiler is installed (extras plan and test) but no TPU is, JAX looks for one: quickly and silently so.
WITHOUT_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}


class ProgramSet:
    """The jitted programs of a run by name: all are compiled at warm-up, and none may be compiled again.

    Threads may add programs while others check.
    """

    def __init__(self):
        self._counters: dict[str, Callable[[], int]] = {}
        self._frozen: dict[str, int] | None = None
        self._lock = threading.Lock()

    def add(self, name: str, counter: Callable[[], int]) -> None:
        """Adds a compiled program, or replaces one; `counter` returns how many times it has been compiled."""
        with self._lock:
            self._counters[name] = counter
            if self._frozen is not None:
                self._frozen[name] = counter()

    def counts(self) -> dict[str, int]:
        return {name: counter() for name, counter in self._counters.items()}

    def freeze(self) -> dict[str, int]:
        """Declares the warm-up over and returns the counts, which `check` then holds constant."""
        with self._lock:
            self._frozen = self.counts()
            return dict(self._frozen)

    def check(self) -> None:
        """Raises RuntimeError when a program was compiled after the warm-up."""
        with self._lock:
            frozen, counts = self._frozen, self.counts()
            changed = {} if frozen is None else {n: (frozen[n], now) for n, now in counts.items() if now != frozen[n]}
        if changed:
            raise RuntimeError(f"programs were compiled again after warm-up (before, now): {changed}")
