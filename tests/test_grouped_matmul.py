"""Grouped products of experts: values and gradients by the formula in float64, and the tile that a v5p is told to take.

Tolerance: sums of at most 200 float32 products of size 1 differ from float64 by less than 1e-5 of the largest.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax.kernels.grouped_matmul import VMEM_BYTES, GroupedProduct, _vmem, grouped_matmul, moved, seconds, tile_for
from r1jax.plan import grouped

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu; pip install 'r1jax[plan]'"
)


@functools.partial(jax.jit, static_argnames="kind")
def products(rows, matrices, sizes, d_out, kind=""):
    out, pull = jax.vjp(lambda r, m: grouped_matmul(r, m, sizes, kind), rows, matrices)
    return out, *pull(d_out)


def compare(sizes, inner=12, outer=20, spare=0, dtype=np.float32, tolerance=1e-5, seed=0):
    generator, count = np.random.default_rng(seed), sum(sizes) + spare
    shapes = ((count, inner), (len(sizes), inner, outer), (count, outer))
    rows, matrices, d_out = (jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes)
    found = products(rows, matrices, jnp.asarray(sizes, jnp.int32), d_out)
    a, w, d = (np.asarray(array, np.float64) for array in (rows, matrices, d_out))
    out, d_rows, d_matrices = np.zeros(d.shape), np.zeros(a.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(sizes):
        part = slice(start, start + size)
        out[part], d_rows[part] = a[part] @ w[group], d[part] @ w[group].T
        d_matrices[group] = a[part].T @ d[part]
        start += size
    for value, wanted, rows_of in zip(found, (out, d_rows, d_matrices), (start, start, len(sizes)), strict=True):
        assert value.dtype == dtype
        error = np.abs(np.asarray(value, np.float64)[:rows_of] - wanted[:rows_of]).max(initial=0)
        assert error <= tolerance * max(1, np.abs(wanted).max(initial=0))


@pytest.mark.parametrize("sizes", [[5, 0, 11, 1], [0, 0, 9], [16], [0, 7, 0], [1, 1, 1]])
def test_values_and_gradients_are_the_formulas(sizes):
    compare(sizes)


def test_rows_of_no_group_give_the_matrices_no_gradient():
    compare([5, 0, 3], spare=9)


def test_no_row_at_all_gives_no_gradient():
    compare([0, 0], spare=4)


def test_bfloat16_is_summed_in_float32():
    compare([60, 140], dtype=jnp.bfloat16, tolerance=2**-7)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=10, deadline=None)
def test_any_groups_and_widths_are_the_formula(sizes, inner, outer, seed):
    compare(sizes, inner, outer, spare=1, seed=seed)


def test_bytes_are_those_of_blocks_whose_index_changes():
    p = GroupedProduct(rows=512, inner=256, outer=384, groups=2, itemsize=2)
    rows, matrices, out = 512 * 256 * 2, 2 * 256 * 384 * 2, 512 * 384 * 2
    visits = 3  # of two tiles of 256 rows, one of them shared by both groups
    assert (
        moved(p, (256, 256, 384)) == rows * visits // 2 + matrices + out
    )  # a group's matrix stays while its rows pass
    assert (
        moved(p, (256, 256, 128)) == 3 * rows * visits // 2 + matrices + out
    )  # rows pass once for each part of columns
    assert (
        moved(p, (256, 128, 384)) == rows * visits // 2 + matrices // 2 * visits + out
    )  # and a cut matrix with each tile
    transposed = GroupedProduct(512, 256, 384, 2, 2, transposed=True)
    assert moved(transposed, (256, 128, 384)) == (rows + 2 * out) * visits // 2 + matrices


@pytest.mark.parametrize("shape", grouped.SHAPES)
@pytest.mark.parametrize("product", grouped.PRODUCTS)
def test_a_tile_divides_the_widths_and_fits_vmem(product, shape):
    p = grouped.problem(product, shape)
    tile = tile_for(p, "TPU v5")
    assert p.inner % tile[1] == p.outer % tile[2] == 0
    assert _vmem(p, tile) <= VMEM_BYTES
    memory, multiplied = seconds(p, tile, "TPU v5")
    assert memory < multiplied  # not bound by memory


def test_a_tile_is_told_to_the_chips_that_heed_one_and_only_for_whole_registers():
    p = grouped.problem("forward", "v3")
    assert tile_for(p, "TPU v5") == (1024, 512, 1024)
    assert tile_for(p, "TPU v6 lite") is tile_for(p, "cpu") is None
    assert tile_for(GroupedProduct(512, 100, 128, 2, 2), "TPU v5") is None
    assert tile_for(GroupedProduct(16, 128, 128, 2, 2), "TPU v5") is None
    assert tile_for(GroupedProduct(384, 128, 128, 2, 2), "TPU v5")[0] == 128


@needs_libtpu
@pytest.mark.parametrize("product", grouped.PRODUCTS)
def test_the_compiler_takes_the_tile_and_memory_no_longer_bounds_experts_of_v3(product):
    """XLA's own tile for the products into 2,048 columns moves bytes for longer than it multiplies."""
    own, ours = (grouped.figures(form, product, "v3") for form in ("ragged_dot", "ragged_dot_tiled"))
    assert ours["tile"] != own["tile"]
    assert ours["memory_over_products"] <= 0.5
    assert ours["hbm_bytes"] < own["hbm_bytes"]
    assert ours["bundles_of_2e27"] < 1.05 * own["bundles_of_2e27"]
    if product != "rows_gradient":
        assert own["memory_over_products"] > 1


@needs_libtpu
def test_the_loss_of_experts_is_compiled_with_a_tile_of_its_own_for_each_product(tmp_path):
    from r1jax.plan.compile import compile_program

    compile_program("v5p:1x1x1", "r1jax.plan.grouped:gradients", {"shape": "moonlight"}, keep=tmp_path)
    (module,) = (
        path.read_text() for path in (tmp_path / "dump").glob("*.after_optimizations_before_buffer_assignment.txt")
    )
    wanted = [",".join(map(str, tile_for(grouped.problem(p, "moonlight"), "TPU v5"))) for p in grouped.PRODUCTS]
    assert len(set(wanted)) == 3
    assert all(f'ragged_dot_tiling="{tile}"' in module for tile in wanted)
