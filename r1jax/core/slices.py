"""TPU slices: a generation, and the shape in which its chips are joined. Imports no JAX."""

import math
from dataclasses import dataclass

_CUBES = (
    *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    *("16x16x16", "16x16x24"),
)
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# The shapes that are sold, smallest first. Source: docs.cloud.google.com/tpu/docs, the page of each generation.
SHAPES = {"v4": _CUBES, "v5p": _CUBES, "tpu7x": _CUBES, "v5e": _SQUARES, "v6e": _SQUARES}


@dataclass(frozen=True)
class Slice:
    """A TPU slice such as v5p:4x4x8."""

    generation: str
    shape: str

    @property
    def topology(self) -> str:
        return f"{self.generation}:{self.shape}"

    @property
    def chips(self) -> int:
        return math.prod(int(side) for side in self.shape.split("x"))


def parse(topology: str) -> Slice:
    """Returns the slice of a text such as v5p:8x8x16. Raises ValueError for another text."""
    generation, _, shape = topology.partition(":")
    sides = shape.split("x")
    if generation not in SHAPES or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(
            f"--topology={topology} is no slice; give a generation ({', '.join(SHAPES)}) and a shape, such as v5p:4x4x8"
        )
    return Slice(generation, shape)


def smallest(generation: str) -> str:
    """Returns the smallest shape of a generation. Raises ValueError for an unknown one."""
    return SHAPES[generation][0] if generation in SHAPES else parse(generation).shape


def larger(one: Slice) -> list[Slice]:
    """Returns the slices of the same generation with more chips, smallest first."""
    every = (Slice(one.generation, shape) for shape in SHAPES[one.generation])
    return [other for other in every if other.chips > one.chips]
