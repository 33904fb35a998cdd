"""Compile the TPU kernels for one chip and report bundles, units and spills: static figures, nothing measured.

Hardware: x86 Linux with libtpu, 4 GB of memory; minutes on two CPU cores.
Command: python -m r1jax.launch --config=bench_kernels --topology=v5p:1x1x1 --json=FIGURES.json
"""

from r1jax.schema import Config

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the run; bench.topology names the chip."""
    return Config(stage="bench_kernels", preset=preset)
