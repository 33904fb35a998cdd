"""Claims about tiled log-probabilities: equal to the formula in float64, on any tiles and meshes, and without logits."""

import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from fused_logprob_driver import RUNS

from r1jax.bench import loss as bench_loss
from r1jax.core import private_jax
from r1jax.kernels.fused_logprob import WHOLE_LOGITS, Tile, tile_of, token_logprobs
from r1jax.plan.compile import compile_program

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5  # of values near 1 in float32, and of the largest gradient


def reference(hidden, matrix, targets, temperature, d_logp, d_entropy):
    """Returns (logp, entropy, gradients of hidden and matrix) by the whole softmax in float64, one token at a time."""
    hidden, matrix = np.asarray(hidden, np.float64), np.asarray(matrix, np.float64)
    d_logp, d_entropy = np.asarray(d_logp, np.float64), np.asarray(d_entropy, np.float64)
    logp, entropy = np.zeros(targets.shape), np.zeros(targets.shape)
    d_hidden, d_matrix = np.zeros_like(hidden), np.zeros_like(matrix)
    for at in np.ndindex(targets.shape):
        logits = hidden[at] @ matrix / temperature
        log_probs = logits - logits.max()
        log_probs = log_probs - np.log(np.exp(log_probs).sum())
        probs = np.exp(log_probs)
        logp[at], entropy[at] = log_probs[targets[at]], -np.sum(probs * log_probs)
        chosen = np.arange(matrix.shape[1]) == targets[at]
        d_logits = d_logp[at] * (chosen - probs) - d_entropy[at] * probs * (log_probs + entropy[at])
        d_hidden[at] = matrix @ d_logits / temperature
        d_matrix += np.outer(hidden[at], d_logits) / temperature
    return logp, entropy, d_hidden, d_matrix


@functools.partial(jax.jit, static_argnames=("chunks",))
def tiled(hidden, matrix, targets, temperature, d_logp, d_entropy, chunks):
    found, pull = jax.vjp(lambda h, m: token_logprobs(h, m, targets, temperature, *chunks), hidden, matrix)
    return *found, *pull((d_logp, d_entropy))


def problem(batch, length, width, vocab, scale=1.0, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    hidden = jnp.asarray(generator.normal(size=(batch, length, width)) * scale, dtype)
    matrix = jnp.asarray(generator.normal(size=(width, vocab)) / np.sqrt(width), dtype)
    targets = generator.integers(0, vocab, (batch, length)).astype(np.int32)
    weights = generator.normal(size=(2, batch, length)).astype(np.float32)
    return hidden, matrix, targets, *weights


def assert_equal(found, expected, tolerance=TOLERANCE, names=("logp", "entropy", "d_hidden", "d_unembedding")):
    for name, a, b in zip(names, found, expected, strict=True):
        a = np.asarray(a, np.float64)
        assert np.isfinite(a).all(), name
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max()), name


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("chunks", [(0, 0), (4, 0), (0, 7), (4, 7), (1, 1), (5, 23), (18, 22), (100, 1000)])
def test_tiled_equals_the_formula_in_values_and_gradients(chunks, temperature):
    hidden, matrix, targets, d_logp, d_entropy = problem(2, 9, 16, 23, scale=3.0)
    found = tiled(hidden, matrix, targets, temperature, d_logp, d_entropy, chunks)
    assert_equal(found, reference(hidden, matrix, targets, temperature, d_logp, d_entropy))


def narrowed(hidden, matrix, targets, temperature, d_logp, d_entropy, used):
    """Returns the `reference` of the first `used` columns alone; the others have a gradient of 0."""
    found = reference(hidden, matrix[:, :used], targets, temperature, d_logp, d_entropy)
    return *found[:3], np.pad(found[3], ((0, 0), (0, matrix.shape[1] - used)))


@pytest.mark.parametrize("used", [1, 9, 14, 21])
@pytest.mark.parametrize("chunks", [(0, 0), (4, 7), (5, 22), (1, 1)])
def test_columns_beyond_the_used_ones_neither_count_nor_move(chunks, used):
    hidden, matrix, targets, d_logp, d_entropy = problem(2, 9, 16, 23, scale=3.0)
    matrix, targets = matrix.at[:, used:].mul(20.0), targets % used  # much larger logits than all others
    found, pull = jax.vjp(
        lambda h, m: token_logprobs(h, m, targets, 0.7, *chunks, used=used),
        hidden,
        matrix,
    )
    given = jnp.asarray(d_logp), jnp.asarray(d_entropy)
    assert_equal((*found, *pull(given)), narrowed(hidden, matrix, targets, 0.7, d_logp, d_entropy, used))


@pytest.mark.parametrize("kept", ["logp", "entropy"])
def test_each_result_has_a_gradient_of_its_own(kept):
    hidden, matrix, targets, d_logp, d_entropy = problem(3, 5, 8, 31, scale=2.0)
    d_logp, d_entropy = (d_logp, 0 * d_entropy) if kept == "logp" else (0 * d_logp, d_entropy)
    for chunks in ((0, 0), (4, 8)):
        found = tiled(hidden, matrix, targets, 0.8, d_logp, d_entropy, chunks)
        assert_equal(found, reference(hidden, matrix, targets, 0.8, d_logp, d_entropy))
        assert all(np.abs(value).max() > 0.01 for value in found[2:])


@pytest.mark.parametrize("shape", [(1, 1, 4, 5), (1, 1, 3, 1), (1, 3, 1, 130), (7, 1, 5, 129)])
def test_odd_and_single_sizes_equal_the_formula(shape):
    hidden, matrix, targets, d_logp, d_entropy = problem(*shape)
    for chunks in ((2, 2), (0, 128)):
        found = tiled(hidden, matrix, targets, 1.0, d_logp, d_entropy, chunks)
        assert_equal(found, reference(hidden, matrix, targets, 1.0, d_logp, d_entropy))


def test_chosen_tiles_equal_the_formula():
    hidden, matrix, targets, d_logp, d_entropy = problem(1, 30, 4, 600_011)
    assert tile_of(30, 600_011) == Tile(30, 66688)
    found = tiled(hidden, matrix, targets, 1.0, d_logp, d_entropy, (0, 0))
    assert_equal(found, reference(hidden, matrix, targets, 1.0, d_logp, d_entropy))


@pytest.mark.parametrize("target", ["likeliest", "likely", "unlikely"])
def test_logits_of_ten_thousand_keep_their_digits(target):
    """The logits are exact in float32, so the near ties at the top have to come out exactly too."""
    logits = np.asarray([-1e4, 9999.5, 1e4, -9998.25, 0.0, 9999.0, 1e4 - 0.75, -1e4, 3.0])
    matrix = np.stack([logits, -logits]).astype(np.float32)
    hidden = np.asarray([[[1, 0], [0, 1]]], np.float32)
    targets = np.asarray({"likeliest": [[2, 0]], "likely": [[1, 7]], "unlikely": [[0, 2]]}[target], np.int32)
    d_logp, d_entropy = np.asarray([[[1.0, -0.5]], [[0.25, 1.5]]], np.float32)
    expected = reference(hidden, matrix, targets, 1.0, d_logp, d_entropy)
    for chunks in ((2, 4), (1, 3), (1, 1)):
        logp, entropy, d_hidden, d_matrix = tiled(hidden, matrix, targets, 1.0, d_logp, d_entropy, chunks)
        assert_equal(
            (logp, entropy, d_matrix), (*expected[:2], expected[3]), names=("logp", "entropy", "d_unembedding")
        )
        np.testing.assert_allclose(d_hidden, expected[2], atol=1e4 * 2**-22)  # its terms are 1e4 and cancel


def test_bfloat16_equals_the_formula_of_the_rounded_inputs():
    hidden, matrix, targets, d_logp, d_entropy = problem(2, 24, 32, 50, dtype=jnp.bfloat16)
    expected = reference(hidden, matrix, targets, 0.9, d_logp, d_entropy)
    for chunks in ((16, 0), (0, 16), (7, 13)):
        found = tiled(hidden, matrix, targets, 0.9, d_logp, d_entropy, chunks)
        assert [value.dtype for value in found] == ["float32"] * 2 + ["bfloat16"] * 2
        assert_equal(found[:2], expected[:2], names=("logp", "entropy"))
        assert_equal(found[2:], expected[2:], 2**-8, ("d_hidden", "d_unembedding"))  # bfloat16 has 8 binary digits


def test_the_gradient_of_the_matrix_is_summed_in_float32():
    """4,096 tokens that each move a column by 1: a sum in bfloat16 stops at 256."""
    hidden, matrix = jnp.ones((1, 4096, 1), jnp.bfloat16), jnp.asarray([[-20.0, 20.0]], jnp.bfloat16)
    targets = np.zeros((1, 4096), np.int32)
    zeros = np.zeros((1, 4096), np.float32)
    d_matrix = tiled(hidden, matrix, targets, 1.0, zeros + 1, zeros, (16, 1))[3]
    np.testing.assert_allclose(np.asarray(d_matrix, np.float32), [[4096, -4096]], rtol=2**-8)


def test_temperature_changes_without_compiling_again_and_has_no_gradient():
    hidden, matrix, targets, *_ = problem(1, 4, 4, 9)
    loss = jax.jit(jax.value_and_grad(lambda t: token_logprobs(hidden, matrix, targets, t, 2, 4)[0].sum()))
    values = {float(loss(np.float32(t))[0]) for t in (0.5, 1.0)}
    assert len(values) == 2
    assert private_jax.compilations(loss) == 1
    assert float(loss(np.float32(0.5))[1]) == 0


def test_tiles_cover_and_stay_small():
    assert tile_of(4096, 196) is None
    assert tile_of(1, WHOLE_LOGITS) is None
    assert tile_of(1, WHOLE_LOGITS + 1) == Tile(1, 1864192)
    assert tile_of(4096, 49152) == Tile(1024, 2048)
    assert tile_of(8192, 129280) == Tile(1024, 2048)
    assert tile_of(8192, 129280, chunk_vocab=100) == Tile(1024, 100)
    assert tile_of(10, 50, chunk_tokens=3) == Tile(3, 50)
    for tokens, vocab in ((1025, 151936), (700, 128256), (333, 102400), (5, 10**7)):
        tile = tile_of(tokens, vocab)
        assert tile.vocab % 128 == 0
        assert tile.tokens * tile.vocab <= 1.2 * 2**21


@pytest.mark.parametrize("name", ["chunk_tokens", "chunk_vocab"])
def test_a_negative_chunk_is_refused(name):
    hidden, matrix, targets, *_ = problem(1, 2, 2, 3)
    with pytest.raises(ValueError, match=f"token_logprobs: {name}=-1 is negative") as error:
        token_logprobs(hidden, matrix, targets, **{name: -1})
    assert "\n" not in str(error.value)


def test_no_array_of_the_program_is_larger_than_inputs_gradients_and_tiles():
    hidden, matrix, targets, d_logp, d_entropy = problem(4, 64, 8, 1000)
    compiled = tiled.lower(hidden, matrix, targets, 1.0, d_logp, d_entropy, chunks=(32, 128)).compile()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())]
    assert max(sizes) == 8 * 1000
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 256 * 1000 / 4


@pytest.fixture(scope="module")
def report():
    return small.driver_report("fused_logprob_driver.py", timeout=300)


@pytest.mark.parametrize("run", RUNS)
def test_eight_devices_equal_one_in_values_and_gradients(report, run):
    found = report[run]
    assert found["difference"] < TOLERANCE
    assert found["smallest"] > 0.1


def test_a_divided_vocabulary_is_never_put_together(report):
    assert report["tensor4/both"]["widths"] == [15]
    assert report["fsdp2_tensor2_context2/both"]["widths"] == [30]
    assert report["fsdp8_rows_do_not_divide/both"]["widths"] == [60]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu; pip install 'r1jax[plan]'")
def test_temporaries_on_a_tpu_are_a_tenth_of_those_with_logits():
    whole, tiled = (
        compile_program(
            bench_loss.TOPOLOGY, f"{bench_loss.MODULE}:program", {"form": form, **vars(bench_loss.V3)}
        ).memory
        for form in bench_loss.FORMS
    )
    print(f"temporaries {tiled.temporaries / 2**20:.0f} of {whole.temporaries / 2**20:.0f} MiB")
    assert whole.temporaries > 4 * 8192 * 129280 * 0.9
    assert tiled.temporaries <= 0.1 * whole.temporaries
    assert tiled.outputs == whole.outputs  # both gradients, in bfloat16
    assert tiled.outputs >= 2 * 7168 * (8192 + 129280)
