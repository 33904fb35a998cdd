"""Measure the host memory that an import needs besides the parameters, in a separate process."""

import json
import math
import shutil
import sys
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.bench import measure
from r1jax.checkpoints import hf, hf_config, hf_export
from r1jax.checkpoints.tokenizer import tiny
from r1jax.core import sharding
from r1jax.core.say import say
from r1jax.schema import Config, MeshConfig, ModelConfig

SHARDS = 4  # files of a synthetic checkpoint, at least


def run(config: Config, workdir: Path) -> dict[str, float]:
    """Returns time and memory of importing config.model.checkpoint, or without one a synthetic checkpoint of
    config.model.

    A synthetic checkpoint has bfloat16 weights in at least 4 files; it is written below `workdir` and removed
    afterwards. The weights are loaded as config.optimizer.param_dtype. `ratio` is the peak resident memory, less the
    memory before the import and less the parameters, over the size of the largest file. Raises ValueError when the
    folder is not a checkpoint, or on a system without memory figures of a process.
    """
    measure.require_memory_figures("bench_import")
    dtype = config.optimizer.param_dtype
    if config.model.checkpoint:
        return _figures(Path(config.model.checkpoint), dtype)
    folder = Path(workdir) / config.stage / "checkpoint"
    hf_export.refuse_existing(folder)
    try:
        synthesise(folder, config.model)
        return _figures(folder, dtype)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def synthesise(folder: Path, model: ModelConfig) -> None:
    """Writes a checkpoint of random bfloat16 weights, one tensor at a time."""
    folder.mkdir(parents=True)
    tensors = hf_export.tensors(model, "bfloat16")

    def value(tensor: hf.Tensor) -> np.ndarray:
        draw = np.random.default_rng(zlib.crc32(tensor.name.encode()))
        return draw.random(tensor.shape, np.float32) - np.float32(0.5)

    total = sum(tensor.nbytes for tensor in tensors)
    hf_export.write_weights(folder, tensors, value, math.ceil(total / SHARDS))
    (folder / "config.json").write_text(json.dumps(hf_export.config_fields(model, tiny(), "bfloat16")))


def _figures(folder: Path, dtype: str) -> dict[str, float]:
    sizes = [path.stat().st_size for path in hf.weight_files(folder)[0]]
    figures = measure.in_own_process("r1jax.bench.checkpoint_import", str(folder), dtype, what="the import")
    extra = figures["peak_rss_bytes"] - figures["rss_before_bytes"] - figures["parameter_bytes"]
    figures |= {"checkpoint_bytes": sum(sizes), "files": len(sizes), "largest_shard_bytes": max(sizes)}
    figures |= {"extra_bytes": extra, "ratio": extra / max(sizes)}
    say(
        f"{folder}: {figures['parameter_bytes'] / 1e9:.2f} GB of parameters in {figures['load_s']:.1f} s, "
        f"{extra / 1e6:.0f} MB besides them, {figures['ratio']:.2f} of the largest file"
    )
    return figures


def load_figures(folder: Path, dtype: str) -> dict[str, float]:
    """Returns this process's resident memory before the import and at its peak, the parameters' bytes and the time."""
    mesh = sharding.make_mesh(MeshConfig())
    model = hf_config.model_config(folder)
    jnp.zeros(8).block_until_ready()  # allocates the backend's own memory before the measurement
    before = measure.restart_peak()
    start = time.perf_counter()
    params = hf.load(folder, model, mesh, jnp.dtype(dtype))
    seconds, peak = time.perf_counter() - start, measure.peak()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"rss_before_bytes": before, "peak_rss_bytes": peak, "parameter_bytes": held, "load_s": seconds}


if __name__ == "__main__":
    print(json.dumps(load_figures(Path(sys.argv[1]), sys.argv[2])))
