"""The slices of each TPU generation, and the meshes that a model can be divided over on one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from r1jax.plan.chips import GENERATIONS
from r1jax.schema import MeshConfig, ModelConfig

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

    @property
    def devices(self) -> int:
        """JAX devices: a chip of v4 and tpu7x is two."""
        return self.chips * GENERATIONS[self.generation].devices_per_chip


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


def meshes(model: ModelConfig, devices: int, row_tokens: int) -> Iterator[MeshConfig]:
    """Yields the meshes of so many devices that divide a model evenly.

    `tensor` divides heads, width and vocabulary, `context` the tokens of a row; experts are divided over fsdp and
    expert together, and what is left is `data`.
    """
    for tensor in _powers(min(devices, 8)):
        if model.num_attention_heads % tensor or model.num_key_value_heads % tensor or model.vocab_size % tensor:
            continue
        for context in _powers(min(devices // tensor, 8)):
            if row_tokens % (context * 128) and context > 1:
                continue
            rest = devices // (tensor * context)
            if rest * tensor * context == devices:
                yield from _divided(model, rest, tensor, context)


def _divided(model: ModelConfig, rest: int, tensor: int, context: int) -> Iterator[MeshConfig]:
    """Yields the way to divide `rest` devices over data, fsdp and expert: as few copies of the weights as can be."""
    if not model.n_routed_experts:
        yield MeshConfig(fsdp=rest, tensor=tensor, context=context)
        return
    group = math.gcd(rest, model.n_routed_experts)  # devices that hold different experts
    expert = min(group, 8)
    if rest % group == 0 and group % expert == 0:
        yield MeshConfig(data=rest // group, fsdp=group // expert, expert=expert, tensor=tensor, context=context)


def _powers(most: int) -> Iterator[int]:
    """Yields 1, 2, 4 and so on up to `most`."""
    value = 1
    while value <= most:
        yield value
        value *= 2
