"""Token log-probabilities and entropies from hidden states and the unembedding, without logits in memory.

Logits exist one tile at a time: some tokens by some columns of the vocabulary. The forward pass keeps running sums of
each token's softmax. The backward pass recomputes every tile from three values saved per token (its largest logit, the
logarithm of its sum, its entropy), so neither pass holds [B, T, V]. Source of the running sums: Milakov and
Gimelshein, arXiv 1805.02867.

The tiles are computed by XLA, or on a TPU by the Pallas kernels in `logprob_tile`, block by block.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax.kernels import logprob_tile
from r1jax.kernels.tpu import LANES, LOWEST, SUBLANES, rounded

WHOLE_LOGITS = 2**24  # up to this many logits per device (64 MiB of float32) are computed at once
TILE_TOKENS = 1024
TILE_LOGITS = 2**21  # logits of a tile: 8 MiB of float32, 2,048 columns of 1,024 tokens
# Columns that are gathered for one call of the kernels where D is divided: 56 MiB of bfloat16 at a width of 7,168.
GATHERED_COLUMNS = 4096


@dataclass(frozen=True)
class Layout:
    """How arrays are divided over a mesh: every device computes its own tokens and its own part of the vocabulary."""

    mesh: Mesh
    rows: PartitionSpec  # mesh axes of [B, T]
    vocab: tuple[str, ...] = ()  # mesh axes of V, which they divide evenly
    embed: tuple[str, ...] = ()  # mesh axes of the unembedding's D, likewise; hidden states have D whole

    @property
    def row_axes(self) -> tuple[str, ...]:
        entries = ((entry,) if isinstance(entry, str) else entry for entry in self.rows if entry is not None)
        return tuple(name for entry in entries for name in entry)

    def parts(self, axes: tuple[str, ...]) -> int:
        """Returns into how many parts these mesh axes divide a dimension."""
        return math.prod(self.mesh.shape[name] for name in axes)


@dataclass(frozen=True)
class KernelChoice:
    """The Pallas kernels for a kind of device, in interpret mode where it is not a TPU.

    Without `backward` they compute the forward pass only. The two backward kernels compute every logit twice: five
    products per logit in total, where XLA's tiles, which sum gradients in HBM, need four.
    """

    device_kind: str
    interpret: Any = False
    backward: bool = True


@dataclass(frozen=True)
class Tile:
    """The size of a tile of logits. With Pallas kernels: the slice given to one kernel call, in blocks of its own."""

    tokens: int
    vocab: int
    blocks: logprob_tile.TileBlocks | None = None
    interpret: Any = False


@dataclass(frozen=True)
class Tiles:
    """The tiles of the two passes."""

    forward: Tile
    backward: Tile


def tiles_of(
    tile: Tile, kernel: KernelChoice | None, tokens: int, vocab: int, states: jax.Array, layout: Layout | None = None
) -> Tiles:
    """Returns the tiles for a device's tokens and vocabulary and for hidden states [..., D].

    A pass that XLA computes takes `tile`. A pass that the kernels compute takes all tokens, and all columns or, where
    D is divided, as many as are gathered at a time.
    """
    if kernel is None:
        return Tiles(tile, tile)
    vocab = min(vocab, GATHERED_COLUMNS) if layout is not None and layout.embed else vocab
    blocks = logprob_tile.blocks_for(kernel.device_kind, tokens, states.shape[-1], states.dtype.itemsize)
    by_kernel = Tile(tokens, vocab, blocks, kernel.interpret)
    return Tiles(by_kernel, by_kernel if kernel.backward else tile)


def tile_of(tokens: int, vocab: int, chunk_tokens: int = 0, chunk_vocab: int = 0) -> Tile | None:
    """Returns the tile for a device's tokens and vocabulary; None to compute all logits at once.

    With both chunks 0, up to WHOLE_LOGITS logits are computed at once. A chunk of 0 is otherwise chosen so that tiles
    have about TILE_LOGITS logits, are even in size and have a multiple of 128 columns. Raises ValueError for a
    negative chunk.
    """
    for name, chunk in (("chunk_tokens", chunk_tokens), ("chunk_vocab", chunk_vocab)):
        if chunk < 0:
            raise ValueError(f"token_logprobs: {name}={chunk} is negative; give a size, or 0 to have one chosen")
    if not chunk_tokens and not chunk_vocab and tokens * vocab <= WHOLE_LOGITS:
        return None
    chunk_tokens = chunk_tokens or _even(tokens, min(TILE_TOKENS, max(TILE_LOGITS // (chunk_vocab or 1), 1)), SUBLANES)
    chunk_tokens = min(chunk_tokens, tokens)
    return Tile(chunk_tokens, min(chunk_vocab or _even(vocab, max(TILE_LOGITS // chunk_tokens, 1), LANES), vocab))


def _even(total: int, most: int, multiple: int) -> int:
    """Returns the size of the fewest parts of `total` with at most about `most`, rounded up to a multiple."""
    size = -(-total // -(-total // most))
    return rounded(size, multiple)


def _score(hidden, unembedding_DV, targets, temperature, used: int = 0):
    """Returns (log p(target), entropy) of hidden states [..., D].

    Gathers no logits: over a divided vocabulary it uses only elementwise operations and reductions.
    """
    logits = jnp.einsum("...D,DV->...V", hidden, unembedding_DV, preferred_element_type=jnp.float32)
    logits = _held(logits.astype(jnp.float32) / temperature, 0, used or None)
    norm = jax.nn.logsumexp(logits, axis=-1)
    at_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    picked = jnp.sum(jnp.where(at_target, logits, 0), axis=-1)
    probs_logits = jnp.sum(jnp.exp(logits - norm[..., None]) * logits, axis=-1)
    return picked - norm, norm - probs_logits


@functools.partial(jax.jit, static_argnames=("chunk_tokens", "chunk_vocab", "layout", "kernel", "used"), inline=True)
def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    temperature: jax.Array | float = 1.0,
    chunk_tokens: int = 0,
    chunk_vocab: int = 0,
    layout: Layout | None = None,
    kernel: KernelChoice | None = None,
    used: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Returns (log p(target), entropy), float32 [B, T] in nats, of softmax(hidden @ unembedding / temperature).

    With `used` > 0 the softmax runs over the first `used` columns only, and targets are among these.

    hidden is [B, T, D], unembedding [D, V], targets int32 [B, T], temperature a scalar. At most chunk_tokens *
    chunk_vocab logits exist at once on a device, forward and backward; a chunk of 0 is chosen by `tile_of`. Both
    results have gradients with respect to hidden and unembedding; temperature has none where logits are tiled.
    Products take inputs of either dtype (bfloat16 or float32) and are summed in float32. The unembedding's gradient is
    summed in float32 and rounded once. With `layout` the arrays are divided over its mesh: the vocabulary is never
    gathered, columns whose D is divided are gathered a tile at a time, and only per-token sums and gradients are
    exchanged. With `kernel` the Pallas kernels compute it in blocks of their own sizes, and chunks apply only to a
    backward pass that XLA computes. Raises ValueError for a negative chunk.
    """
    (batch, length), vocab = targets.shape, unembedding.shape[1]
    tokens = batch * length
    if layout is not None:
        tokens, vocab = tokens // layout.parts(layout.row_axes), vocab // layout.parts(layout.vocab)
    tile = tile_of(tokens, vocab, chunk_tokens, chunk_vocab)
    if tile is None and kernel is None:
        if layout is not None:
            place = NamedSharding(layout.mesh, PartitionSpec(None, layout.vocab or None))
            unembedding = jax.lax.with_sharding_constraint(unembedding, place)
        return _score(hidden, unembedding, targets, temperature, used)
    tiles = tiles_of(tile or Tile(tokens, vocab), kernel, tokens, vocab, hidden, layout)
    return _tiled(tiles, layout, used, hidden, unembedding, targets, jnp.asarray(temperature, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tiled(tiles, layout, used, hidden, unembedding, targets, temperature):
    return _forward(tiles, layout, used, hidden, unembedding, targets, temperature)[0]


def _forward(tiles, layout, used, hidden, unembedding, targets, temperature):
    function = functools.partial(forward_part, tiles.forward, layout, used=used)
    if layout is not None:
        rows, states, matrix, scalar = _specs(layout)
        function = jax.shard_map(
            function,
            mesh=layout.mesh,
            in_specs=(states, matrix, rows, scalar),
            out_specs=(rows,) * 4,
            check_vma=False,
        )
    logp, entropy, top, log_sum = function(hidden, unembedding, targets, temperature)
    return (logp, entropy), (hidden, unembedding, targets, temperature, top, log_sum, entropy)


def _backward(tiles, layout, used, saved, gradients):
    function = functools.partial(backward_part, tiles.backward, layout, used=used)
    if layout is not None:
        rows, states, matrix, scalar = _specs(layout)
        function = jax.shard_map(
            function,
            mesh=layout.mesh,
            in_specs=(states, matrix, rows, scalar, *(rows,) * 5),
            out_specs=(states, matrix),
            check_vma=False,
        )
    d_hidden, d_unembedding = function(*saved, *gradients)
    return d_hidden, d_unembedding, None, jnp.zeros_like(saved[3])


_tiled.defvjp(_forward, _backward)


def _specs(layout: Layout) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec, PartitionSpec]:
    """Returns the PartitionSpecs of [B, T], [B, T, D], [D, V] and a scalar."""
    matrix = PartitionSpec(layout.embed or None, layout.vocab or None)
    return layout.rows, PartitionSpec(*layout.rows, None), matrix, PartitionSpec()


def _columns(unembedding, start, size: int, layout):
    """Returns `size` columns, from `start` on, of this device's part of the vocabulary, with D whole."""
    part = _part(unembedding, start, size, axis=1)
    if layout is None or not layout.embed:
        return part
    return jax.lax.all_gather(part, layout.embed, axis=0, tiled=True)


def _summed(d_w, layout):
    """Returns this device's part, along D, of the columns' gradient summed over the devices that hold other tokens."""
    if layout is None:
        return d_w
    if divided := tuple(name for name in layout.embed if name in layout.row_axes):
        assert divided == layout.embed, f"{layout.rows} divide tokens over a part of {layout.embed} only"
        d_w = jax.lax.psum_scatter(d_w, divided, scatter_dimension=0, tiled=True)
    elif layout.embed:
        size = d_w.shape[0] // layout.parts(layout.embed)
        d_w = _part(d_w, jax.lax.axis_index(layout.embed) * size, size)
    rest = tuple(name for name in layout.row_axes if name not in layout.embed)
    return jax.lax.psum(d_w, rest) if rest else d_w


def forward_part(tile, layout, hidden, unembedding, targets, temperature, tiles=None, used=0):
    """Returns log p(target), entropy, largest logit and log of the sum of exp(logit - largest) of a device's tokens.

    With `tiles`, an int32 scalar, only the first `tiles` tiles of tokens are computed and the rest is undefined.
    `used` is as in `token_logprobs`.
    """
    flat_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), _local_targets(targets, unembedding, layout)
    limit = _local_limit(used, unembedding, layout)

    def columns(start, size, sums):
        w_DV = _columns(unembedding, start, size, layout)
        if tile.blocks is not None:
            how = tile.blocks, tile.interpret, _count(tile, tiles), _rest(limit, start)
            return logprob_tile.forward_tile(flat_ND, w_DV, targets_N - start, temperature, sums, *how)

        def some_tokens(first, count, sums):
            top, total, weighted, picked = (_part(value, first, count) for value in sums)
            logits = _held(_logits(_part(flat_ND, first, count), w_DV, temperature), start, limit)
            higher = jnp.maximum(top, logits.max(axis=-1))
            below = logits - higher[:, None]
            exps = jnp.exp(below)
            total, weighted = _moved(total, weighted, top - higher)
            at_target = _at_target(start, logits.shape, _part(targets_N, first, count))
            updated = (
                higher,
                total + exps.sum(axis=-1),
                weighted + (exps * below).sum(axis=-1),
                picked + jnp.where(at_target, logits, 0).sum(axis=-1),
            )
            return tuple(_put(value, new, first) for value, new in zip(sums, updated, strict=True))

        return _over(flat_ND.shape[0], tile.tokens, some_tokens, sums, tiles)

    zeros = jnp.zeros(flat_ND.shape[0], jnp.float32)
    top, total, weighted, picked = _over(
        unembedding.shape[1], tile.vocab, columns, (zeros + LOWEST, zeros, zeros, zeros)
    )
    if layout is not None and layout.vocab:
        highest = jax.lax.pmax(top, layout.vocab)
        total, weighted, picked = jax.lax.psum((*_moved(total, weighted, top - highest), picked), layout.vocab)
        top = highest
    log_sum = jnp.log(total)
    results = (picked - top) - log_sum, log_sum - weighted / total, top, log_sum
    return tuple(value.reshape(targets.shape) for value in results)


def _count(tile, tiles):
    """Returns how many leading tokens are computed, None for all."""
    return None if tiles is None else tiles * tile.tokens


def _moved(total, weighted, shift):
    """Returns the sums of e^x and of x e^x after all x have grown by `shift`, which is at most 0."""
    return total * jnp.exp(shift), (weighted + shift * total) * jnp.exp(shift)


def backward_part(
    tile,
    layout,
    hidden,
    unembedding,
    targets,
    temperature,
    top,
    log_sum,
    entropy,
    d_logp,
    d_entropy,
    tiles=None,
    used=0,
):
    """Returns the gradients of a device's hidden states and of its part of the unembedding.

    `tiles` and `used` are as in `forward_part`.

    With p the softmax and H its entropy, d log p_t / d logit_j = [j = t] - p_j and dH / d logit_j = -p_j (log p_j + H).
    """
    flat_ND, targets_N = hidden.reshape(-1, hidden.shape[-1]), _local_targets(targets, unembedding, layout)
    limit = _local_limit(used, unembedding, layout)
    per_token = [value.reshape(-1) for value in (top, log_sum, entropy, d_logp / temperature, d_entropy / temperature)]

    def columns(start, size, gradients):
        d_flat, d_unembedding = gradients
        w_DV = _columns(unembedding, start, size, layout)
        if tile.blocks is not None:
            tokens = targets_N - start, temperature, per_token[:3], per_token[3:]
            how = _sum_dtypes(tile, layout, hidden, unembedding), tile.blocks, tile.interpret, _count(tile, tiles)
            how = *how, _rest(limit, start)
            d_states, d_w = logprob_tile.backward_tile(flat_ND, w_DV, *tokens, *how)
            d_flat = d_states if size == unembedding.shape[1] else d_flat + d_states
            return d_flat, _put(d_unembedding, _summed(d_w, layout).astype(unembedding.dtype), start, axis=1)

        def some_tokens(first, count, gradients):
            d_flat, d_w = gradients
            top, log_sum, entropy, d_logp, d_entropy = (_part(value, first, count)[:, None] for value in per_token)
            states = _part(flat_ND, first, count)
            log_probs = (_logits(states, w_DV, temperature) - top) - log_sum
            at_target = _at_target(start, log_probs.shape, _part(targets_N, first, count))
            d_logits = jnp.where(at_target, d_logp, 0) - jnp.exp(log_probs) * (
                d_logp + d_entropy * (log_probs + entropy)
            )
            d_logits = _held(d_logits, start, limit, 0.0).astype(hidden.dtype)
            d_states = jnp.einsum("NV,DV->ND", d_logits, w_DV, preferred_element_type=jnp.float32)
            d_w += jnp.einsum("ND,NV->DV", states, d_logits, preferred_element_type=jnp.float32)
            return _put(d_flat, _part(d_flat, first, count) + d_states, first), d_w

        start_w = jnp.zeros((w_DV.shape[0], size), jnp.float32)
        d_flat, d_w = _over(flat_ND.shape[0], tile.tokens, some_tokens, (d_flat, start_w), tiles)
        return d_flat, _put(d_unembedding, _summed(d_w, layout).astype(unembedding.dtype), start, axis=1)

    empty = jnp.zeros(flat_ND.shape, jnp.float32), jnp.zeros_like(unembedding)
    d_flat, d_unembedding = _over(unembedding.shape[1], tile.vocab, columns, empty)
    if layout is not None and layout.vocab:
        d_flat = jax.lax.psum(d_flat, layout.vocab)
    return d_flat.astype(hidden.dtype).reshape(hidden.shape), d_unembedding


def _sum_dtypes(tile, layout, hidden, unembedding):
    """Returns the dtypes of the kernels' two gradients: float32 where those of other devices or tiles are added."""
    whole = tile.vocab == unembedding.shape[1] and (layout is None or not layout.vocab)
    return hidden.dtype if whole else jnp.float32, unembedding.dtype if layout is None else jnp.float32


def _local_targets(targets, unembedding, layout):
    """Returns each token's target as a column of this device's part of the vocabulary, [N], or out of its range."""
    flat = targets.reshape(-1)
    if layout is None or not layout.vocab:
        return flat
    return flat - jax.lax.axis_index(layout.vocab) * unembedding.shape[1]


def _local_limit(used: int, unembedding, layout):
    """Returns how many of this device's columns are in the softmax, int32, 0 or less for none; None for all."""
    if not used:
        return None
    divided = layout is not None and layout.vocab
    return used - jax.lax.axis_index(layout.vocab) * unembedding.shape[1] if divided else jnp.int32(used)


def _rest(limit, start):
    return None if limit is None else limit - start


def _held(values, start, limit, instead=LOWEST):
    """Returns values [..., V] of the columns from `start` on, with those from column `limit` on replaced by `instead`.

    Without a limit they are returned unchanged.
    """
    if limit is None:
        return values
    column = start + jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    return jnp.where(column < limit, values, instead)


def _logits(states_ND, w_DV, temperature):
    return (
        jnp.einsum("ND,DV->NV", states_ND, w_DV, preferred_element_type=jnp.float32).astype(jnp.float32) / temperature
    )


def _at_target(start, shape, targets_N):
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, 1) == targets_N[:, None]


def _over(total: int, size: int, body: Callable[[Any, int, Any], Any], carry: Any, parts=None) -> Any:
    """Returns the carry after body(start, size, carry) over parts of `total`, of which the last may be shorter.

    With `parts`, an int32 scalar, only the first `parts` of them are visited, each of the full size.
    """
    if parts is not None:
        return jax.lax.fori_loop(0, parts, lambda index, carry: body(index * size, size, carry), carry)
    whole, rest = divmod(total, size)
    if whole == 1:
        carry = body(0, size, carry)
    elif whole:
        carry = jax.lax.fori_loop(0, whole, lambda index, carry: body(index * size, size, carry), carry)
    return body(whole * size, rest, carry) if rest else carry


def _part(array, start, size: int, axis: int = 0):
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def _put(array, part, start, axis: int = 0):
    return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis)
