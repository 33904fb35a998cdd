"""Attention around a ring of devices, by the kernels in interpret mode and by XLA: values and gradients by the formulas.

The tolerance is that of tests/test_flash_attention.py, and sums of 8,192 float32 terms for the gradient of weights.
"""

import pytest
import small


@pytest.fixture(scope="module")
def report():
    return small.driver_report("ring_driver.py", timeout=1200)


@pytest.mark.parametrize("way", ["kernel", "xla"])
@pytest.mark.parametrize("row", ["long", "uneven"])
def test_values_and_gradients_around_a_ring_are_the_formulas(report, row, way):
    found = report[f"{row}/{way}"]
    print(f"{row}/{way}: {found}")
    assert max(found[name] for name in ("out", "d_q", "d_latent", "d_w")) < 4e-6


@pytest.mark.parametrize("way", ["kernel", "xla"])
def test_no_device_of_a_ring_holds_the_scores_of_whole_parts(report, way):
    assert report[f"long/{way}"]["largest_square"] <= 1024  # a part has 2,048 tokens
