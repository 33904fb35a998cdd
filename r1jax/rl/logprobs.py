"""Scores packed batches under frozen weights: log-probs of a reference or an old policy, values of a critic."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from r1jax.core import private_jax, sharding, tree
from r1jax.core.sharding import use_mesh
from r1jax.data.packing import PREFIXES
from r1jax.models import decoder, logprobs
from r1jax.schema import Network

ROUTED = "routed_experts"  # in a batch with routing replay: int16 [.., R, T, Lm, k], -1 at padding
FIELDS = ("tokens", "targets", "positions", "segments", ROUTED, PREFIXES)  # what a batch is scored by


def replayed_experts(micro: dict[str, jax.Array]) -> jax.Array | None:
    """Returns the experts recorded in a micro-batch as `decoder.forward` takes them, [Lm, R, T, k]; None without."""
    return jnp.moveaxis(micro[ROUTED], -2, 0) if ROUTED in micro else None


def log_probs(network: Network, params: decoder.Params, hidden, micro: dict, temperature) -> jax.Array:
    """Returns log p(target) of softmax(logits / temperature), float32 [R, T]."""
    matrix, how = decoder.unembedding(params), logprobs.settings(network.compute)
    return logprobs.token_logprobs(hidden, matrix, micro["targets"], temperature, **how)[0]


def values(network: Network, params: decoder.Params, hidden, micro: dict, temperature) -> jax.Array:
    """Returns the scalar head's value before each target is drawn, float32 [R, T]."""
    return decoder.scalars(params, hidden)


class Scorer:
    """Scores batches [M, R, T]; one program for any number of filled micro-batches."""

    def __init__(self, network: Network, mesh: Mesh, offloaded: bool = False, read: Callable = log_probs):
        """`read` takes (network, params, hidden [R, T, D], micro-batch, temperature) and returns [R, T].

        With `offloaded` the weights are kept in host memory and copied to the device for each batch.
        """
        self.network, self.mesh = network, mesh
        placed = sharding.spec_shardings(decoder.specs(network.model, network.scalar_head), mesh)

        @jax.named_scope("score")
        def score(params, batch, num_filled, temperature):
            params = jax.device_put(params, placed) if offloaded else params

            def one(index, out):
                micro = jax.tree.map(lambda x: x[index], batch)
                hidden, _, _ = decoder.forward(
                    params,
                    micro["tokens"],
                    micro["positions"],
                    micro["segments"],
                    network,
                    experts=replayed_experts(micro),
                    prefixes=micro.get(PREFIXES),
                )
                return out.at[index].set(read(network, params, hidden, micro, temperature))

            return jax.lax.fori_loop(0, num_filled, one, jnp.zeros(batch["tokens"].shape, jnp.float32))

        self._score = jax.jit(score, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Any, batch: dict[str, np.ndarray], num_filled: int, temperature: float) -> np.ndarray:
        """Returns the values of `read`, float32 [M, R, T]; 0 in micro-batches that are not filled.

        Tokens go to the experts recorded in the batch, if it has any.
        """
        place = self._batch_sharding(batch)
        arrays = {name: sharding.place(batch[name], place) for name in FIELDS if name in batch}
        with use_mesh(self.mesh):
            return np.asarray(self._score(params, arrays, np.int32(num_filled), np.float32(temperature)))

    def lower(self, params: Any, batch: Mapping[str, Any]) -> jax.stages.Lowered:
        """Returns the program lowered for structs of the weights and of a batch, without arrays."""
        place = self._batch_sharding(batch)
        arrays = {name: tree.structs(batch[name], place) for name in FIELDS if name in batch}
        numbers = tree.structs((np.int32(0), np.float32(0)), sharding.replicated(self.mesh))
        with use_mesh(self.mesh):
            return self._score.lower(params, arrays, *numbers)

    def _batch_sharding(self, batch: Mapping[str, Any]) -> NamedSharding:
        return sharding.sharding(self.mesh, (None, "batch", "sequence"), batch["tokens"].shape)

    @property
    def compilations(self) -> int:
        return private_jax.compilations(self._score)
