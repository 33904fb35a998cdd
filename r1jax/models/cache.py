"""The key/value cache: what it holds stands behind `CacheSpec`, so that pages can come later.

Row i of a slot holds position i. The last row is scratch: it takes the writes of idle slots and of padding.
MLA stores the 'latent' (normalised c_kv and rotated k_rope), GQA keys and values. Where the decode kernels read them, rows are padded
with zeros to whole registers and those of a head stand together.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.kernels.tpu import rounded
from r1jax.models import flash
from r1jax.schema import Network

TILE_ROWS = 16  # of a TPU's tile of bfloat16


@struct.dataclass
class Cache:
    """Cached rows of all layers. MLA: `keys` is [L, S, T + 1, R + rope] and `values` is None. GQA: both are [L, S, T + 1, K, H].

    For the kernels the last axis may be wider and GQA's are [L, S, K, T + 1, H]: `row_axis` is 3.
    """

    keys: jax.Array
    values: jax.Array | None = None
    row_axis: int = struct.field(pytree_node=False, default=2)

    @property
    def rows(self) -> int:
        """Usable rows, without the scratch row."""
        return self.keys.shape[self.row_axis] - 1


@dataclass(frozen=True)
class CacheSpec:
    """Shape of a cache of `slots` slots with at least `rows` usable rows each."""

    network: Network
    slots: int
    rows: int
    dtype: Any = jnp.float32

    @property
    def tiled(self) -> bool:
        """Whether rows and widths are whole tiles: as the decode kernels read them, or XLA would lay slots between rows."""
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

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one cached position over all layers."""
        per_layer = 1
        for size in self.row_shape:
            per_layer *= size
        count = 1 if self.network.model.is_mla else 2
        return count * per_layer * self.network.model.num_hidden_layers * jnp.dtype(self.dtype).itemsize

    def zeros(self) -> Cache:
        keys = jnp.zeros(self.shape, self.dtype)
        values = None if self.network.model.is_mla else jnp.zeros(self.shape, self.dtype)
        return Cache(keys, values, self.row_axis)


def write(
    cache: jax.Array, layer: jax.Array | int, rows: jax.Array, positions: jax.Array, row_axis: int = 2
) -> jax.Array:
    """Returns cache [L, S, T + 1, ...], the rows on `row_axis`, with rows [S, Q, ...] stored at positions [S, Q] of one layer.

    Rows narrower than the cache's are padded with zeros.
    """
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, cache.shape[-1] - rows.shape[-1])]).astype(cache.dtype)
    slots = jnp.arange(cache.shape[1])[:, None]
    if row_axis == 2:
        return cache.at[layer, slots, positions].set(rows, mode="promise_in_bounds")
    # Heads are indexed too: a scatter of [K, H] parts would have XLA lay out the cache for it, and copy it for the kernel.
    index = layer, slots[..., None], jnp.arange(cache.shape[2]), positions[..., None]
    return cache.at[index].set(rows, mode="promise_in_bounds")


def read(cache: jax.Array, layer: jax.Array | int, window: int, row_axis: int = 2) -> jax.Array:
    """Returns the first `window` rows of one layer, [S, window, ...]."""
    sizes = (1, *cache.shape[1:row_axis], window, *cache.shape[row_axis + 1 :])
    starts = (layer, *([0] * (cache.ndim - 1)))
    return jnp.moveaxis(jax.lax.dynamic_slice(cache, starts, sizes)[0], row_axis - 1, 1)
