"""The key/value cache: what it holds stands behind `CacheSpec`, so that pages can come later.

Row i of a slot holds position i. The last row is scratch: it takes the writes of idle slots and of padding.
MLA stores the 'latent' (normalised c_kv and rotated k_rope), where the decode kernel reads it padded with zeros to whole
registers; GQA stores keys and values.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.kernels.tpu import rounded
from r1jax.models import flash
from r1jax.schema import ModelConfig

TILE_ROWS = 16  # of a TPU's tile of bfloat16


@struct.dataclass
class Cache:
    """Cached rows of all layers. MLA: `keys` is [L, S, T + 1, R + rope or wider] and `values` is None. GQA: [L, S, T + 1, K, H]."""

    keys: jax.Array
    values: jax.Array | None = None

    @property
    def rows(self) -> int:
        """Usable rows, without the scratch row."""
        return self.keys.shape[2] - 1


@dataclass(frozen=True)
class CacheSpec:
    """Shape of a cache of `slots` slots with at least `rows` usable rows each."""

    config: ModelConfig
    slots: int
    rows: int
    dtype: Any = jnp.float32

    @property
    def tiled(self) -> bool:
        """Whether rows and widths are whole tiles: as the decode kernel reads them, or XLA would lay slots between rows."""
        return self.config.is_mla and flash.chosen(self.config)

    @property
    def row_shape(self) -> tuple[int, ...]:
        if self.config.is_mla:
            width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
            return (rounded(width) if self.tiled else width,)
        return (self.config.num_key_value_heads, self.config.head_dim)

    @property
    def shape(self) -> tuple[int, ...]:
        rows = rounded(self.rows + 1, TILE_ROWS) if self.tiled else self.rows + 1
        return (self.config.num_hidden_layers, self.slots, rows, *self.row_shape)

    @property
    def axes(self) -> tuple[str | None, ...]:
        return (None, "slots", None, None) if self.config.is_mla else (None, "slots", None, "heads", None)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one cached position over all layers."""
        per_layer = 1
        for size in self.row_shape:
            per_layer *= size
        count = 1 if self.config.is_mla else 2
        return count * per_layer * self.config.num_hidden_layers * jnp.dtype(self.dtype).itemsize

    def zeros(self) -> Cache:
        keys = jnp.zeros(self.shape, self.dtype)
        return Cache(keys, None if self.config.is_mla else jnp.zeros(self.shape, self.dtype))


def write(cache: jax.Array, layer: jax.Array | int, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns cache [L, S, T + 1, ...] with rows [S, Q, ...] stored at positions [S, Q] of one layer.

    Rows narrower than the cache's are padded with zeros.
    """
    rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, cache.shape[-1] - rows.shape[-1])])
    slots = jnp.arange(cache.shape[1])[:, None]
    return cache.at[layer, slots, positions].set(rows.astype(cache.dtype), mode="promise_in_bounds")


def read(cache: jax.Array, layer: jax.Array | int, window: int) -> jax.Array:
    """Returns the first `window` rows of one layer, [S, window, ...]."""
    sizes = (1, cache.shape[1], window, *cache.shape[3:])
    starts = (layer, *([0] * (cache.ndim - 1)))
    return jax.lax.dynamic_slice(cache, starts, sizes)[0]
