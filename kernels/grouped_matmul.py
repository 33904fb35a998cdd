"""Grouped matrix products of a dropless mixture of experts, forward and backward, in tiles chosen for the TPU.

The products are XLA's `ragged_dot`. On v5p that is a kernel of libtpu over tiles of rows, with the grid of megablox
(Gale et al., arXiv 2211.15841). By default it takes tiles of 128 rows by 128 columns for most products of DeepSeek-V3's
experts and is bound by memory. Here the tile is the one whose grid costs least, counted in bytes and in products.
"""

import functools
from dataclasses import dataclass

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from r1jax.kernels.tpu import CHIPS, LANES

VMEM_BYTES = 16 * 2**20  # that libtpu allows one operation
ROWS = (128, 256, 512, 1024)  # of a tile
# By libtpu's listing, reading and writing the sum of a matrix's gradient costs as much as the products of this many
# rows.
SUM_ROWS = 48
HEEDING = ("TPU v5",)  # device kinds whose compiler follows a given tile
FORWARD = lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), [0], [0])
BY_OUTER = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])  # the gradient of the rows
BY_ROWS = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])  # the gradient of the matrices


@dataclass(frozen=True)
class GroupedProduct:
    """One grouped product: rows by groups, contracted over `inner` into `outer` columns.

    With `transposed` it is the gradient of the groups' matrices, [inner, outer] each, contracted over rows.
    """

    rows: int
    inner: int
    outer: int
    groups: int
    itemsize: int
    transposed: bool = False


Tile = tuple[int, int, int]  # rows, inner, outer


def moved(problem: GroupedProduct, tile: Tile) -> int:
    """Returns the bytes that libtpu's kernel moves: a block is moved when its index changes.

    Its grid goes over (outer, rows, inner) tiles, or (outer, inner, rows) when transposed, the last one fastest. A tile
    of rows that two groups share is visited by both.
    """
    p, (m, k, n) = problem, tile
    visits, inner, outer = _visits(p, m), -(-p.inner // k), -(-p.outer // n)
    if p.transposed:
        return p.itemsize * (outer * inner * visits * m * (k + n) + p.groups * p.inner * p.outer)
    rows = visits * m * p.inner * outer
    matrices = (p.groups if inner == 1 else visits) * p.inner * p.outer
    return p.itemsize * (rows + matrices + p.rows * p.outer)


def seconds(problem: GroupedProduct, tile: Tile, device_kind: str) -> tuple[float, float]:
    """Returns the seconds that memory and the products of whole tiles take at a chip's peak rates."""
    chip = CHIPS[device_kind]
    products = 2 * _visits(problem, tile[0]) * tile[0] * problem.inner * problem.outer
    return moved(problem, tile) / chip.hbm, products / chip.operations


def _visits(p: GroupedProduct, rows: int) -> int:
    return -(-p.rows // rows) + p.groups - 1


def _vmem(p: GroupedProduct, tile: Tile) -> int:
    """Returns the bytes of VMEM for a tile: blocks in two buffers, a float32 sum, and the compiler's temporaries."""
    m, k, n = tile
    blocks = 2 * p.itemsize * (m * k + k * n + m * n) + p.itemsize * m * k
    return blocks + (8 * k * n + 2**18 if p.transposed else (4 + p.itemsize) * m * n)


@functools.cache
def tile_for(problem: GroupedProduct, device_kind: str) -> Tile | None:
    """Returns the fastest tile, the smaller one of equals.

    Returns None where no tile divides rows and widths, or the compiler follows none.
    """
    if device_kind not in HEEDING:
        return None
    p, candidates = problem, []
    for m in ROWS:
        for k in _divisors(p.inner):
            for n in _divisors(p.outer):
                tile = (m, k, n)
                if p.rows % m == 0 and _vmem(p, tile) <= VMEM_BYTES:
                    memory, products = seconds(p, tile, device_kind)
                    products *= 1 + SUM_ROWS / m if p.transposed else 1
                    steps = _visits(p, m) * (p.inner // k) * (p.outer // n)
                    candidates.append((max(memory, products) + min(memory, products) / 8, steps, tile))
    return min(candidates)[2] if candidates else None


def _divisors(width: int) -> list[int]:
    return [size for size in range(LANES, width + 1, LANES) if width % size == 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(rows_MK, matrices_EKN, sizes_E, device_kind: str = "") -> jax.Array:
    """Returns rows times their group's matrix, [M, N] of the rows' dtype, summed in float32; rows are sorted by group.

    sizes int32 [E] are the rows of each group and may sum to fewer than M: the outputs of the remaining rows are
    undefined, and these rows give the matrices no gradient. `device_kind` is that of the device compiled for.
    """
    return _forward(rows_MK, matrices_EKN, sizes_E, device_kind)[0]


def _forward(rows, matrices, sizes, device_kind):
    (groups, inner, outer), size = matrices.shape, rows.dtype.itemsize
    tile = tile_for(GroupedProduct(rows.shape[0], inner, outer, groups, size), device_kind)
    return ragged_dot_with_tile(tile, rows, matrices, sizes, FORWARD), (rows, matrices, sizes)


def _backward(device_kind, saved, d_out):
    rows, matrices, sizes = saved
    (groups, inner, outer), count, size = matrices.shape, rows.shape[0], rows.dtype.itemsize
    tile = tile_for(GroupedProduct(count, outer, inner, groups, size), device_kind)
    d_rows = ragged_dot_with_tile(tile, d_out, matrices, sizes, BY_OUTER)
    tile = tile_for(GroupedProduct(count, inner, outer, groups, size, transposed=True), device_kind)
    d_matrices = ragged_dot_with_tile(tile, rows, d_out, sizes, BY_ROWS)
    return d_rows.astype(rows.dtype), d_matrices.astype(matrices.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def ragged_dot_with_tile(tile: Tile | None, a, b, sizes, dimensions) -> jax.Array:
    """Returns the grouped product of a and b. `tile` is a hint to XLA; None lets XLA choose."""
    with set_xla_metadata(ragged_dot_tiling=",".join(map(str, tile)) if tile else None):
        return lax.ragged_dot_general(a, b, sizes, dimensions)
