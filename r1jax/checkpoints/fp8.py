"""FP8 weights in blocks, as DeepSeek publishes them: float8_e4m3fn values, and one float32 factor for each block.

A matrix NAME of M x N has a second tensor NAME_scale_inv of ceil(M / rows) x ceil(N / columns): weight = value *
factor, in spite of its name. The block is config.json's weight_block_size, so the last row and column of blocks may be
cut off (kv_a_proj_with_mqa: 576 rows are 5 blocks of 128). Source: DeepSeek-V3's README_WEIGHTS.md and
inference/kernel.py.
"""

import math
import re

import ml_dtypes
import numpy as np

from r1jax.checkpoints.hf_config import Fields

TYPE = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = np.float32(448.0)  # of float8_e4m3fn
BLOCK = (128, 128)  # rows and columns of a block in the published checkpoints
SCALE = "_scale_inv"

_MATRIX = re.compile(r".*(?<!\.eh)_proj(_with_mqa)?\.weight")
_STRIP = 1 << 22  # matrix elements handled at once
_SMALLEST = np.finfo(np.float32).tiny  # a smaller factor would lose digits


def is_quantised(name: str) -> bool:
    """Returns whether published checkpoints store this tensor in FP8: matrices of attention and feed-forward."""
    return _MATRIX.fullmatch(name) is not None


def block_size(fields: Fields) -> tuple[int, int] | None:
    """Returns config.json's weight_block_size (rows, columns), or None when the checkpoint is not quantised.

    Raises ValueError for any other quantisation than FP8 in blocks.
    """
    quantisation = fields.get("quantization_config")
    if quantisation is None:
        return None
    if not isinstance(quantisation, dict):
        raise ValueError(f"{fields.path}: quantization_config is a {type(quantisation).__name__}, an object is needed")
    for name, only, default in (
        ("quant_method", "fp8", None),
        ("fmt", "e4m3", "e4m3"),
        ("activation_scheme", "dynamic", "dynamic"),
    ):
        if quantisation.get(name, default) != only:
            raise ValueError(
                f"{fields.path}: quantization_config.{name}={quantisation.get(name)!r} is not read, only {only!r} is; "
                "give the weights in bfloat16 instead"
            )
    block = quantisation.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise ValueError(
            f"{fields.path}: quantization_config.weight_block_size={block!r} must be two numbers, rows and columns of "
            "a block; FP8 without blocks is not read"
        )
    return block[0], block[1]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Returns the shape of a matrix's factors."""
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def _strip_blocks(columns: int, block: tuple[int, int]) -> int:
    """Returns how many rows of blocks are handled at once."""
    return max(_STRIP // max(columns * block[0], 1), 1)


def dequantise(values: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Returns the float32 matrix [M, N] of FP8 values [M, N] and their factors [ceil(M / rows), ceil(N / columns)]."""
    (rows, columns), result = values.shape, np.empty(values.shape, np.float32)
    step = _strip_blocks(columns, block)
    for first in range(0, len(scales), step):
        part = slice(first * block[0], min((first + step) * block[0], rows))
        factors = np.repeat(scales[first : first + step].astype(np.float32), block[1], axis=1)[:, :columns]
        factors = np.repeat(factors, block[0], axis=0)[: part.stop - part.start]
        np.multiply(values[part].astype(np.float32), factors, out=result[part])
    return result


def quantise(weights: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (FP8 values, factors) of a float32 matrix; the factors of a block with infinity or NaN are not finite.

    A factor is the block's largest magnitude / 448; a block of zeros has 1. A matrix whose factors were made so and
    that was multiplied out gives the same values and factors again, bit for bit (blocks of zeros that had another
    factor apart): its largest value is 448, and in float32 m / 448 * 448 / 448 equals m / 448.
    """
    (rows, columns), (high, wide) = weights.shape, block
    values, scales = np.empty(weights.shape, TYPE), np.empty(scale_shape(weights.shape, block), np.float32)
    step = _strip_blocks(columns, block)
    for first in range(0, len(scales), step):
        part = slice(first * high, min((first + step) * high, rows))
        strip = np.asarray(weights[part], np.float32)
        whole = (-(-strip.shape[0] // high) * high, scales.shape[1] * wide)
        if strip.shape != whole:
            padded = np.zeros(whole, np.float32)
            padded[: strip.shape[0], :columns] = strip
            strip = padded
        strip = strip.reshape(-1, high, scales.shape[1], wide)
        largest = np.abs(strip).max(axis=(1, 3))
        factors = np.where(largest == 0, np.float32(1), np.maximum(largest / LARGEST, _SMALLEST))
        with np.errstate(invalid="ignore"):
            quotients = strip / factors[:, None, :, None]
        values[part] = quotients.reshape(whole)[: part.stop - part.start, :columns]
        scales[first : first + step] = factors
    return values, scales
