"""Compile the Pallas kernels and JAX's own for a TPU and compare their static figures; nothing runs."""

import sys
from pathlib import Path

from r1jax.plan import grouped, kernels
from r1jax.report import table
from r1jax.schema import Config


def run(config: Config, workdir: Path) -> dict:
    """Returns `kernels.<kernel>.<shape>`: VMEM and the regions of one step, all static figures of the compiler.

    A kernel has a region for whole blocks and one for blocks with a mask. bundles are of a step: in attention on 512
    queries and 512 keys of one head, in log-probs on a block of tokens and columns. Those have `roofline` too, by counted
    bytes. `grouped.<shape>.<product>.<form>` has experts' products on v5p. Raises ValueError without libtpu and for a topology that is none.
    """
    found: dict[str, dict] = {}
    for kernel, shapes in (kernels.OURS | dict.fromkeys(kernels.SPLASH, kernels.SHAPES)).items():
        for shape in shapes:
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
    rows = [
        {"kernel": kernel, "shape": shape, "temporaries": told["temporary_bytes"]} | told["roofline"]
        for kernel, shapes in found.items()
        for shape, told in shapes.items()
        if "roofline" in told
    ]
    columns = ("kernel", "shape", "flops", "hbm_bytes", "memory_over_products", "temporaries")
    table.render(rows, columns, f"static: {kernels.LOGPROB_TOKENS} tokens, bytes counted by index maps")
    told = {"static": True, "topology": config.bench.topology, "kernels": found}
    return told | ({"grouped": _grouped()} if config.bench.topology == grouped.TOPOLOGY else {})


def _grouped() -> dict:
    """Returns `<shape>.<product>.<form>` of the products of experts, and shows them."""
    found: dict[str, dict] = {}
    for shape in grouped.SHAPES:
        for product in grouped.PRODUCTS:
            print(f"bench_kernels: compiling grouped products, {product} {shape}", file=sys.stderr, flush=True)
            told = {form: grouped.figures(form, product, shape) for form in grouped.FORMS}
            found.setdefault(shape, {})[product] = told
    rows = [
        {"shape": shape, "product": product, "form": form} | told | {"tile": "x".join(map(str, told["tile"]))}
        for shape, products in found.items()
        for product, forms in products.items()
        for form, told in forms.items()
    ]
    columns = (
        "shape",
        "product",
        "form",
        "tile",
        "bundles_of_2e27",
        "mxu_share",
        "spill_share",
        "memory_over_products",
    )
    table.render(rows, columns, f"grouped products, static figures for {grouped.TOPOLOGY}; nothing was run")
    return found
