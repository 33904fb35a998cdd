"""A decoder split after some of its blocks: the lower part's outputs are computed once, the upper part is trained."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1jax.core import sharding
from r1jax.core.sharding import use_mesh
from r1jax.data.packing import batches
from r1jax.models import decoder
from r1jax.schema import ModelConfig, Network, PackConfig, replace


def shapes(network: Network, blocks: int) -> tuple[Network, Network]:
    """Returns (network of the first `blocks` blocks, network of the rest, whose input is features instead of tokens).

    Raises ValueError unless each part has at least one block.
    """
    model = network.model
    layers, dense = model.num_hidden_layers, model.num_dense_layers
    if not 0 < blocks < layers:
        raise ValueError(
            f"config.reward_model.frozen_blocks={blocks} must be between 1 and {layers - 1}, or 0 for none"
        )
    lower = replace(model, num_hidden_layers=blocks, first_k_dense_replace=min(dense, blocks), tie_word_embeddings=True)
    upper = replace(
        model, num_hidden_layers=layers - blocks, first_k_dense_replace=max(dense - blocks, 0), vocab_size=1
    )
    computed = replace(network.compute, vocab_used=0)  # the upper part's one row stands for no token
    return replace(network, model=lower, scalar_head=False), replace(network, model=upper, compute=computed)


def cut(params: decoder.Params, model: ModelConfig, blocks: int) -> tuple[decoder.Params, decoder.Params]:
    """Returns the weights of a reward model as (lower part, upper part); the norm and the head belong to the upper."""
    dense = min(model.num_dense_layers, blocks)
    parts = [(params.dense, dense), (params.sparse, blocks - dense)]
    lower, upper = zip(*(_cut_stack(stack, place) for stack, place in parts), strict=True)
    return (
        dataclasses.replace(params, dense=lower[0], sparse=lower[1], scalar_head=None),
        dataclasses.replace(params, dense=upper[0], sparse=upper[1], embedding=params.embedding[:1]),
    )


def join(lower: decoder.Params, upper: decoder.Params) -> decoder.Params:
    """Returns the two parts as one decoder again."""
    dense, sparse = (_join_stacks(getattr(lower, name), getattr(upper, name)) for name in ("dense", "sparse"))
    return dataclasses.replace(upper, embedding=lower.embedding, dense=dense, sparse=sparse)


def _cut_stack(stack, place: int):
    """Returns the first `place` layers of a stack and the others, each None where it is empty."""
    layers = 0 if stack is None else stack.attention_norm.shape[0]
    parts = [(0, place), (place, layers)]
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], stack) if a < b else None for a, b in parts]


def _join_stacks(lower, upper):
    if lower is None or upper is None:
        return upper if lower is None else lower
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), lower, upper)


def features(
    params: decoder.Params,
    network: Network,
    sequences: Sequence[np.ndarray],
    size: PackConfig,
    mesh: Mesh,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[np.ndarray]:
    """Returns the lower part's output for each sequence of ids, [n, D] in the model's compute dtype.

    `on_progress(done)` is called after each batch with the number of sequences done.
    """
    place = sharding.sharding(mesh, ("batch", "sequence"), (size.rows_per_micro_batch, size.row_tokens))

    @jax.jit
    def run(params, tokens, positions, segments):
        return decoder.forward(params, tokens, positions, segments, network)[2].before_norm

    outputs: list[np.ndarray] = [np.empty(0)] * len(sequences)
    done = 0
    for members, batch in batches(sequences, size.row_tokens, size.rows_per_micro_batch):
        arrays = [sharding.place(array, place) for array in (batch.tokens, batch.positions, batch.segments)]
        with use_mesh(mesh):
            hidden = sharding.to_host(run(params, *arrays))
        for index, (row, start, length) in zip(members, batch.slots, strict=True):
            outputs[index] = hidden[row, start : start + length].copy()
        done += len(members)
        on_progress(done)
    return outputs
