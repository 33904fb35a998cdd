"""The meshes that a model can be divided over on a slice."""

import math
from collections.abc import Iterator

from r1jax.schema import MeshConfig, ModelConfig


def divisions(model: ModelConfig, devices: int, row_tokens: int) -> Iterator[MeshConfig]:
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
