"""What every test shares: the CPU backend, a compilation cache outside the checkout, the data sets and SmolLM2."""

import datetime
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import typing

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
HOME = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "r1jax"
CACHE = HOME / "tests"

# Set before any test imports JAX. Tests that need several devices start a process of their own with XLA_FLAGS.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def unavailable(reason: str) -> typing.NoReturn:
    """Skips the test, or fails it when CI=true."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def shared_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("R1JAX_SHARED") or ROOT.parent / "shared")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Returns the folder of real data sets: $R1JAX_SHARED/data, by default ../shared/data beside the checkout."""
    folder = shared_folder() / "data"
    if not folder.is_dir():
        unavailable(f"no data sets in {folder}; set R1JAX_SHARED to the folder that holds data/")
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> pathlib.Path:
    """Returns a Hugging Face folder of SmolLM2-135M-Instruct: $R1JAX_SMOLLM2, or built once into the cache folder."""
    if given := os.environ.get("R1JAX_SMOLLM2"):
        if not (pathlib.Path(given) / "model.safetensors").exists():
            pytest.fail(f"R1JAX_SMOLLM2={given} holds no model.safetensors")
        return pathlib.Path(given)
    folder = HOME / "smollm2"
    if (folder / "model.safetensors").exists():
        return folder
    builder = shared_folder() / "tools" / "smollm2_checkpoint.py"
    if not builder.exists():
        unavailable(f"no SmolLM2: no {builder}; set R1JAX_SMOLLM2 to a Hugging Face folder, or R1JAX_SHARED")
    missing = [name for name in ("torch", "transformers", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        unavailable(f"no SmolLM2: building it needs {', '.join(missing)}; set R1JAX_SMOLLM2 to a Hugging Face folder")
    unfinished = HOME / f"smollm2.{os.getpid()}"
    done = subprocess.run([sys.executable, str(builder), str(unfinished)], capture_output=True, text=True)
    if done.returncode:
        unavailable(f"no SmolLM2: {builder} failed: {done.stderr.strip().splitlines()[-1:]}")
    try:
        unfinished.rename(folder)
    except OSError:  # another process of the tests was first
        if not (folder / "model.safetensors").exists():
            raise
        shutil.rmtree(unfinished)
    return folder


@pytest.fixture(scope="session")
def results():
    """Returns a function (name, figures) that keeps a long check's figures, with commit and date, in $R1JAX_RESULTS."""

    def keep(name: str, figures: dict) -> None:
        if not (folder := os.environ.get("R1JAX_RESULTS")):
            return
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        record = {"commit": git.stdout.strip(), "date": datetime.date.today().isoformat(), **figures}
        path = pathlib.Path(folder) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")

    return keep
