"""FP8 blocks against a plain loop over blocks: dequantised, quantised, and back again without loss."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from r1jax.checkpoints import fp8
from r1jax.checkpoints.hf_config import Fields

SHAPES = [((576, 40), (128, 128)), ((10, 12), (4, 4)), ((7, 3), (2, 5)), ((1, 1), (128, 128)), ((256, 128), (128, 64))]


def by_block(shape: tuple[int, int], block: tuple[int, int]):
    """Yields (factor's place, the block's rows and columns), one block after the other."""
    for i, top in enumerate(range(0, shape[0], block[0])):
        for j, left in enumerate(range(0, shape[1], block[1])):
            yield (i, j), np.s_[top : top + block[0], left : left + block[1]]


def random(shape: tuple[int, int], block: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Returns weights whose blocks differ by several powers of ten, one of them zero."""
    draw = np.random.default_rng(seed)
    weights = draw.normal(size=shape).astype(np.float32)
    for place, cut in by_block(shape, block):
        weights[cut] *= np.float32(0 if place == (1, 1) else 10.0 ** draw.uniform(-6, 4))
    return weights


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_dequantise_multiplies_each_block_by_its_factor(shape, block):
    draw = np.random.default_rng(0)
    values = draw.normal(size=shape, scale=100).astype(fp8.TYPE)
    scales = draw.uniform(0.1, 2, fp8.scale_shape(shape, block)).astype(np.float32)
    expected = np.empty(shape, np.float32)
    for place, cut in by_block(shape, block):
        expected[cut] = values[cut].astype(np.float32) * scales[place]
    found = fp8.dequantise(values, scales, block)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_quantise_scales_the_largest_of_each_block_to_448(shape, block):
    weights = random(shape, block)
    values, scales = fp8.quantise(weights, block)
    assert (values.dtype, scales.dtype, scales.shape) == (fp8.TYPE, np.float32, fp8.scale_shape(shape, block))
    for place, cut in by_block(shape, block):
        largest, factor = np.abs(weights[cut]).max(), scales[place]
        if largest == 0:
            assert factor == 1 and not values[cut].any()
            continue
        assert factor == largest / np.float32(448)
        assert np.abs(values[cut].astype(np.float32)).max() == 448
        error = np.abs(values[cut].astype(np.float32) * factor - weights[cut])
        assert (error <= np.maximum(np.abs(weights[cut]) / 16, factor * 2.0**-10) * 1.0001).all()


def test_both_work_on_strips_as_on_the_whole(monkeypatch):
    weights, block = random((70, 30), (8, 7)), (8, 7)
    values, scales = fp8.quantise(weights, block)
    whole = fp8.dequantise(values, scales, block)
    monkeypatch.setattr(fp8, "_STRIP", 500)
    again = fp8.quantise(weights, block)
    assert (again[0].tobytes(), again[1].tobytes()) == (values.tobytes(), scales.tobytes())
    np.testing.assert_array_equal(fp8.dequantise(values, scales, block), whole)


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_quantising_what_was_dequantised_gives_the_same_bytes(shape, block):
    for seed in range(20):
        values, scales = fp8.quantise(random(shape, block, seed), block)
        again = fp8.quantise(fp8.dequantise(values, scales, block), block)
        assert again[0].tobytes() == values.tobytes()
        assert again[1].tobytes() == scales.tobytes()


def test_a_block_of_one_weight_keeps_its_factor_for_every_mantissa():
    # With one weight a block, nothing but 448 * factor tells the factor. All float32 numbers from 1 to 2; others differ
    # by powers of two.
    weights = np.arange(2**23, dtype=np.uint32).reshape(2048, 4096) + np.float32(1).view(np.uint32)
    weights = weights.view(np.float32)
    values, scales = fp8.quantise(weights, (1, 1))
    np.testing.assert_array_equal(scales, weights / np.float32(448))
    again = fp8.quantise(fp8.dequantise(values, scales, (1, 1)), (1, 1))
    assert again[0].tobytes() == values.tobytes() and again[1].tobytes() == scales.tobytes()


def test_weights_too_small_for_a_normal_factor_and_values_that_are_not_finite_do_not_overflow():
    weights = np.full((2, 2), 1e-40, np.float32)
    values, scales = fp8.quantise(weights, (2, 2))
    assert np.isfinite(values.astype(np.float32)).all() and scales[0, 0] == np.finfo(np.float32).tiny
    for bad in (np.inf, np.nan):
        assert not np.isfinite(fp8.quantise(np.asarray([[1, bad]], np.float32), (2, 2))[1]).all()
    largest = np.full((1, 1), np.finfo(np.float32).max)
    assert np.isfinite(fp8.dequantise(*fp8.quantise(largest, (1, 1)), (1, 1))).all()


def test_the_type_is_the_finite_one_with_three_mantissa_bits():
    assert fp8.TYPE == ml_dtypes.float8_e4m3fn
    assert ml_dtypes.finfo(fp8.TYPE).max == 448


MATRICES = (
    *(f"self_attn.{name}.weight" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
    *("self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.experts.3.up_proj.weight"),
    "mlp.shared_experts.down_proj.weight",
)
OTHERS = (
    *("eh_proj.weight", "mlp.gate.weight", "mlp.gate.e_score_correction_bias", "input_layernorm.weight"),
    *("self_attn.q_a_layernorm.weight", "self_attn.q_proj.bias", "enorm.weight", "shared_head.head.weight"),
)


def test_matrices_of_attention_and_feed_forward_are_quantised_and_nothing_else():
    for layer in ("model.layers.3.", "model.layers.61."):
        assert all(fp8.is_quantised(layer + name) for name in MATRICES)
        assert not any(fp8.is_quantised(layer + name) for name in OTHERS)
    assert not fp8.is_quantised("model.embed_tokens.weight") and not fp8.is_quantised("lm_head.weight")


def fields(folder: pathlib.Path, **quantisation) -> Fields:
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantisation or None}))
    return Fields(folder / "config.json")


def test_block_size_is_what_config_json_says(tmp_path):
    given = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 64])
    assert fp8.block_size(fields(tmp_path, **given)) == (128, 64)
    assert fp8.block_size(fields(tmp_path, quant_method="fp8", weight_block_size=[4, 4])) == (4, 4)
    assert fp8.block_size(fields(tmp_path)) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq' is not read, only 'fp8' is"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' is not read"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme='static' is not read"),
        ({"quant_method": "fp8"}, "weight_block_size=None must be two numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\] must be two numbers"),
        ({"bits": 8}, "quant_method=None is not read"),
    ],
)
def test_another_quantisation_is_refused_in_one_line(tmp_path, given, words):
    with pytest.raises(ValueError, match=words) as error:
        fp8.block_size(fields(tmp_path, **given))
    assert "config.json" in str(error.value) and "\n" not in str(error.value)
