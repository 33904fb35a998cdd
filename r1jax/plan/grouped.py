"""Static figures of grouped products, each compiled alone for one TPU chip.

Compared are XLA's product with the tile it chooses and with r1jax's tile, and megablox with r1jax's tile.
"""

import importlib
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from r1jax.kernels.grouped_matmul import (
    BY_OUTER,
    BY_ROWS,
    FORWARD,
    GroupedProduct,
    Tile,
    grouped_matmul,
    moved,
    ragged_dot_with_tile,
    seconds,
    tile_for,
)
from r1jax.plan import bundles
from r1jax.plan.compile import LoweredProgram, compile_program
from r1jax.plan.kernels import on_one

MODULE = "r1jax.plan.grouped"
DEADLINE_S = 300.0
KIND = "TPU v5"
TOPOLOGY = "v5p:1x1x1"  # other generations have no kernel that takes a tile
# Rows, width of the experts' input and of their output, experts per device: the 671B update on 512 chips (1.5 times an
# even share of 4,096 tokens x 8 experts), and Moonlight's experts on 8 chips.
SHAPES = {"v3": (49152, 7168, 2048, 1), "moonlight": (16384, 2048, 1408, 8)}
PRODUCTS = {"forward": FORWARD, "rows_gradient": BY_OUTER, "matrices_gradient": BY_ROWS}
FORMS = {"ragged_dot": "ragged-dot-none", "ragged_dot_tiled": "ragged-dot-none", "megablox": "gmm"}


def problem(product: str, shape: str) -> GroupedProduct:
    """Returns the problem of the product with a layer's first matrices, or of one of its gradients."""
    rows, width, inner, experts = SHAPES[shape]
    sides = (inner, width) if product == "rows_gradient" else (width, inner)
    return GroupedProduct(rows, *sides, experts, 2, transposed=product == "matrices_gradient")


def figures(form: str, product: str, shape: str) -> dict:
    """Returns tile, bundles per tile and per 2**27 products, shares of slots and spills, HBM bytes and a time ratio.

    The ratio is memory time over product time at a v5p's peak rates.
    """
    size = problem(product, shape)
    with tempfile.TemporaryDirectory(prefix="r1jax-grouped-") as folder:
        arguments = {"form": form, "product": product, "shape": shape}
        compile_program(
            TOPOLOGY, f"{MODULE}:program", arguments, "full", deadline_s=DEADLINE_S, keep=folder, bundles=True
        )
        name = "tgmm" if form == "megablox" and size.transposed else FORMS[form]
        (kernel,) = bundles.kernels(folder, [name]).values()
        tile = _tile(Path(folder)) if form == "ragged_dot" else tile_for(size, KIND)
    assert tile is not None  # the problems here are all large enough for one
    worst = max(kernel.regions, key=lambda region: region.bundles)
    memory, products = seconds(size, tile, KIND)
    return {
        "tile": list(tile),
        "bundles": worst.bundles,
        "bundles_of_2e27": worst.bundles * 2**27 / (tile[0] * tile[1] * tile[2]),
        "mxu_share": worst.mxu_share,
        "spill_share": worst.spill_share,
        "hbm_bytes": moved(size, tile),
        "memory_over_products": memory / products,
    }


def _tile(folder: Path) -> Tile:
    """Returns the tile that the compiler chose."""
    text = "".join(path.read_text() for path in (folder / "dump").glob("*.after_codegen.txt"))
    rows, inner, outer = map(int, re.findall(r'ragged_dot_tiling="([\d,]+)"', text)[0].split(","))
    return rows, inner, outer


def _arrays(devices: list):
    place = SingleDeviceSharding(devices[0])
    return lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype, sharding=place)


def program(devices: list, form: str, product: str, shape: str) -> LoweredProgram:
    """Returns one product lowered for the first device."""
    size, array = problem(product, shape), _arrays(devices)
    tile = tile_for(size, KIND)
    other = {
        "forward": (size.groups, size.inner, size.outer),
        "rows_gradient": (size.groups, size.outer, size.inner),
        "matrices_gradient": (size.rows, size.outer),
    }[product]

    def multiply(a, b, sizes):
        if form == "megablox":
            return _megablox(product, tile, a, b, sizes)
        return ragged_dot_with_tile(None if form == "ragged_dot" else tile, a, b, sizes, PRODUCTS[product])

    arrays = array(size.rows, size.inner), array(*other), array(size.groups, dtype=jnp.int32)
    return on_one(devices, multiply, arrays)


def _megablox(product: str, tile, a, b, sizes):
    megablox = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")  # the package has a function gmm
    if product == "matrices_gradient":
        return megablox.tgmm(a.swapaxes(0, 1), b, sizes, jnp.bfloat16, tile)
    return megablox.gmm(a, b, sizes, jnp.bfloat16, tile, transpose_rhs=product == "rows_gradient")


def gradients(devices: list, shape: str) -> LoweredProgram:
    """Returns a product with both its gradients as the model computes them, lowered for the first device."""
    (rows, width, inner, experts), array = SHAPES[shape], _arrays(devices)

    def multiply(a, b, sizes, d_out):
        out, pull = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes, devices[0].device_kind), a, b)
        return out, *pull(d_out)

    arrays = array(rows, width), array(experts, width, inner), array(experts, dtype=jnp.int32), array(rows, inner)
    return on_one(devices, multiply, arrays)
