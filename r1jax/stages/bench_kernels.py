"""Compile the Pallas kernels and JAX's own for a TPU and compare their static figures; nothing runs."""

import sys
from pathlib import Path

from r1jax.plan import kernels
from r1jax.report import table
from r1jax.schema import Config


def run(config: Config, workdir: Path) -> dict:
    """Returns `kernels.<kernel>.<shape>`: VMEM and the regions of one step, all static figures of the compiler.

    A kernel has a region for blocks of which every pair is seen and one for blocks with a mask. bundles are of a step on
    512 queries and 512 keys of one head. Raises ValueError without libtpu and for a topology that is none.
    """
    found: dict[str, dict] = {}
    for shape in kernels.SHAPES:
        for kernel in (*kernels.OURS, *kernels.SPLASH):
            print(f"bench_kernels: compiling {kernel} {shape} for {config.bench.topology}", file=sys.stderr, flush=True)
            found.setdefault(kernel, {})[shape] = kernels.figures(kernel, shape, config.bench.topology)
    rows = [
        {"kernel": kernel, "shape": shape, "region": number, "VMEM bytes": told["vmem_bytes"]} | region
        for kernel, shapes in found.items()
        for shape, told in shapes.items()
        for number, region in enumerate(told["regions"], 1)
    ]
    columns = ("kernel", "shape", "region", "bundles", "mxu_share", "spill_share", "spill_stores", "VMEM bytes")
    table.render(rows, columns, f"static figures by the compiler for {config.bench.topology}; nothing was run")
    return {"static": True, "topology": config.bench.topology, "kernels": found}
