"""The key/value cache. Its layout is private to `CacheSpec` and this module, so that pages can be added later.

Row i of a slot holds position i. The last row is a scratch row that takes the writes of idle slots and of padding. MLA
stores the latent (normalised c_kv and rotated k_rope), GQA stores keys and values. Where the decode kernels read the
cache, rows are padded with zeros to whole registers and the rows of a head are adjacent.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.kernels.tpu import rounded
from r1jax.models import flash
from r1jax.schema import Network

TILE_ROWS = 16  # rows of a TPU's bfloat16 tile


@struct.dataclass
class Cache:
    """Cached rows of all layers.

    MLA: `keys` is [L, S, T + 1, R + rope] and `values` is None. GQA: both are [L, S, T + 1, K, H]. For the kernels the
    last axis may be wider, and GQA's arrays are [L, S, K, T + 1, H] with `row_axis` 3.
    """

    keys: jax.Array
    values: jax.Array | None = None
    row_axis: int = struct.field(pytree_node=False, default=2)

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        return (self.keys,) if self.values is None else (self.keys, self.values)

    @property
    def rows(self) -> int:
        """Usable rows, without the scratch row."""
        return self.keys.shape[self.row_axis] - 1


@dataclass(frozen=True)
class CacheSpec:
    """The shape of a cache of `slots` slots with at least `rows` usable rows each."""

    network: Network
    slots: int
    rows: int
    dtype: Any = jnp.float32

    @property
    def tiled(self) -> bool:
        """Whether rows and widths are padded to whole tiles, as the decode kernels read them.

        Otherwise XLA would choose a layout with slots between rows, and copy the cache for the kernels.
        """
        return flash.chosen(self.network.compute)

    @property
    def row_axis(self) -> int:
        return 3 if self.tiled and not self.network.model.is_mla else 2

    @property
    def row_shape(self) -> tuple[int, ...]:
        c = self.network.model
        width = c.kv_lora_rank + c.qk_rope_head_dim if c.is_mla else c.head_dim
        heads = () if c.is_mla else (c.num_key_value_heads,)
        return (*heads, rounded(width) if self.tiled else width)

    @property
    def shape(self) -> tuple[int, ...]:
        rows = rounded(self.rows + 1, TILE_ROWS) if self.tiled else self.rows + 1
        return self._with_rows(rows, (self.network.model.num_hidden_layers, self.slots, *self.row_shape))

    @property
    def axes(self) -> tuple[str | None, ...]:
        return self._with_rows(None, (None, "slots", *(() if self.network.model.is_mla else ("heads",)), None))

    def _with_rows(self, rows, others: tuple) -> tuple:
        return (*others[: self.row_axis], rows, *others[self.row_axis :])

    def zeros(self) -> Cache:
        keys = jnp.zeros(self.shape, self.dtype)
        values = None if self.network.model.is_mla else jnp.zeros(self.shape, self.dtype)
        return Cache(keys, values, self.row_axis)


def stored(cache: Cache, layer, rows: tuple[jax.Array, ...], positions: jax.Array) -> Cache:
    """Returns the cache with new rows [S, Q, ...] of each of its arrays stored at positions [S, Q] of one layer."""
    keys, *values = (
        _write(array, layer, new, positions, cache.row_axis) for array, new in zip(cache.arrays, rows, strict=True)
    )
    return replace(cache, keys=keys, values=values[0] if values else None)


def loaded(cache: Cache, layer, window: int, like: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Returns `window` rows of each array of one layer, [S, window, ...], in the width and dtype of `like`."""
    return tuple(
        _read(array, layer, window, cache.row_axis)[..., : new.shape[-1]].astype(new.dtype)
        for array, new in zip(cache.arrays, like, strict=True)
    )


def _write(cache: jax.Array, layer, rows: jax.Array, positions: jax.Array, row_axis: int) -> jax.Array:
    """Returns the cache array [L, S, T + 1, ...] with `rows` [S, Q, ...] stored at positions [S, Q] of one layer.

    `row_axis` is the axis of T + 1. Rows narrower than the cache's are padded with zeros.
    """
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, cache.shape[-1] - rows.shape[-1])]).astype(cache.dtype)
    slots = jnp.arange(cache.shape[1])[:, None]
    if row_axis == 2:
        return cache.at[layer, slots, positions].set(rows, mode="promise_in_bounds")
    # Heads are indexed too: for a scatter of [K, H] parts XLA would change the cache's layout, and copy it for the
    # kernel.
    index = layer, slots[..., None], jnp.arange(cache.shape[2]), positions[..., None]
    return cache.at[index].set(rows, mode="promise_in_bounds")


def _read(cache: jax.Array, layer, window: int, row_axis: int) -> jax.Array:
    """Returns the first `window` rows of one layer of a cache array, [S, window, ...]."""
    sizes = (1, *cache.shape[1:row_axis], window, *cache.shape[row_axis + 1 :])
    starts = (layer, *([0] * (cache.ndim - 1)))
    return jnp.moveaxis(jax.lax.dynamic_slice(cache, starts, sizes)[0], row_axis - 1, 1)
