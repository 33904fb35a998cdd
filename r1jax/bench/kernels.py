"""Compile the Pallas kernels and JAX's own for a TPU and compare their static figures; nothing runs."""

from pathlib import Path

from r1jax.core.say import say
from r1jax.plan import grouped, kernels
from r1jax.report import table
from r1jax.schema import Config


def run(config: Config, workdir: Path) -> dict:
    """Returns `kernels.<kernel>.<shape>`: VMEM and the regions of one step, all static figures of the compiler.

    A kernel has a region for whole blocks and one for blocks with a mask. Bundles are counted for one step: in
    attention 512 queries and 512 keys of one head, in log-probs a block of tokens and columns. Log-prob kernels also
    have `roofline`, from counted bytes. `grouped.<shape>.<product>.<form>` has experts' products on v5p. Raises
    ValueError without libtpu and for an unknown topology.
    """
    by_kernel: dict[str, dict] = {}
    for kernel, shapes in (kernels.OURS | dict.fromkeys(kernels.SPLASH, kernels.SHAPES)).items():
        for shape in shapes:
            say(f"bench_kernels: compiling {kernel} {shape} for {config.bench.topology}")
            by_kernel.setdefault(kernel, {})[shape] = kernels.figures(kernel, shape, config.bench.topology)
    rows = [
        {"kernel": kernel, "shape": shape, "region": number, "VMEM bytes": figures["vmem_bytes"]} | region
        for kernel, shapes in by_kernel.items()
        for shape, figures in shapes.items()
        for number, region in enumerate(figures["regions"], 1)
    ]
    columns = ("kernel", "shape", "region", "bundles", "mxu_share", "spill_share", "spill_stores", "VMEM bytes")
    table.render(rows, columns, f"static figures by the compiler for {config.bench.topology}; nothing was run")
    rows = [
        {"kernel": kernel, "shape": shape, "temporaries": figures["temporary_bytes"]} | figures["roofline"]
        for kernel, shapes in by_kernel.items()
        for shape, figures in shapes.items()
        if "roofline" in figures
    ]
    columns = ("kernel", "shape", "flops", "hbm_bytes", "memory_over_products", "temporaries")
    table.render(rows, columns, f"static: {kernels.LOGPROB_TOKENS} tokens, bytes counted by index maps")
    figures = {"static": True, "topology": config.bench.topology, "kernels": by_kernel}
    return figures | ({"grouped": _grouped()} if config.bench.topology == grouped.TOPOLOGY else {})


def _grouped() -> dict:
    """Returns and prints `<shape>.<product>.<form>`, the figures of the experts' products."""
    by_shape: dict[str, dict] = {}
    for shape in grouped.SHAPES:
        for product in grouped.PRODUCTS:
            say(f"bench_kernels: compiling grouped products, {product} {shape}")
            figures = {form: grouped.figures(form, product, shape) for form in grouped.FORMS}
            by_shape.setdefault(shape, {})[product] = figures
    rows = [
        {"shape": shape, "product": product, "form": form} | figures | {"tile": "x".join(map(str, figures["tile"]))}
        for shape, products in by_shape.items()
        for product, forms in products.items()
        for form, figures in forms.items()
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
    return by_shape
