"""What every test shares: the CPU backend, a compilation cache outside the checkout, and the shared data sets."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "r1jax" / "tests"

# Set before any test imports JAX. Tests that need several devices start a process of their own with XLA_FLAGS.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Returns the folder of real data sets: $R1JAX_SHARED/data, by default ../shared/data beside the checkout."""
    folder = pathlib.Path(os.environ.get("R1JAX_SHARED") or ROOT.parent / "shared") / "data"
    if not folder.is_dir():
        reason = f"no data sets in {folder}; set R1JAX_SHARED to the folder that holds data/"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
