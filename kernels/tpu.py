"""Shared by the kernels: the sides of a TPU's registers, peak rates of its chips, and products summed in float32."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

LANES, SUBLANES = 128, 8  # sides of a register of 32-bit numbers
LOWEST = -1e30  # below any score or logit


@dataclass(frozen=True)
class Chip:
    """Peak rates of a chip. Source: Google's page on each generation."""

    operations: float  # dense bfloat16 operations per second
    hbm: float  # bytes per second


CHIPS = {  # by JAX's device kind: v4, v5p, v5e, v6e, Ironwood
    "TPU v4": Chip(275e12, 1228e9),  # its page rounds to 1,200 GB/s; from the announcement of v5p
    "TPU v5": Chip(459e12, 2765e9),
    "TPU v5 lite": Chip(197e12, 819e9),
    "TPU v6 lite": Chip(918e12, 1640e9),
    "TPU7x": Chip(2307e12, 7380e9),
}


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Returns the product of two matrices over the named dimension of each, summed in float32."""
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def rounded(size: int, multiple: int = LANES) -> int:
    """Returns the size rounded up to a multiple."""
    return -(-size // multiple) * multiple


def doubled(least: int, size: int) -> int:
    """Returns the smallest least * 2**n that holds the size."""
    while least < size:
        least *= 2
    return least
