"""Token log-probabilities over columns of the unembedding as Pallas TPU kernels, forward and backward.

The forward kernel updates the running sums of each token's softmax with some columns; only one block of logits exists,
in VMEM. The backward pass recomputes the logits in two kernels: the gradient of the hidden states is summed over
columns, and that of the columns over tokens, so each stays in VMEM until it is complete and no logits reach HBM. A
token's numbers (its target and its sums) are the first entries of a row of lanes.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from r1jax.kernels.tpu import LANES, LOWEST, dot, doubled

NUMBERS = 8  # places for the numbers of a token
TARGET, TOP, TOTAL, WEIGHTED, PICKED = range(5)  # places in the forward pass, as in `fused_logprob.forward_part`
LOG_SUM, ENTROPY, D_LOGP, D_ENTROPY = range(2, 6)  # places in the backward pass, after TARGET and TOP
NAMES = ("logprob_forward", "logprob_backward_hidden", "logprob_backward_columns")


@dataclass(frozen=True)
class BlockSize:
    """Tokens and columns that a grid step takes, and the tokens of it that are computed at a time."""

    tokens: int
    columns: int
    part: int

    def __post_init__(self):
        if self.part < 1 or self.tokens % self.part:
            raise ValueError(f"logprob_tile: a part of {self.part} tokens does not divide a block of {self.tokens}")


@dataclass(frozen=True)
class TileBlocks:
    """The size of each kernel and the VMEM it may use."""

    forward: BlockSize
    hidden: BlockSize
    columns: BlockSize
    vmem_bytes: int = 60 * 2**20

    @property
    def tokens(self) -> int:
        """Tokens of the largest block: a multiple of every kernel's."""
        return max(size.tokens for size in (self.forward, self.hidden, self.columns))


# By device kind: at a width of 7,168 each kernel computes at least twice the products at which it would be bound by
# HBM.
_V5P = TileBlocks(BlockSize(512, 256, 128), BlockSize(512, 256, 256), BlockSize(512, 256, 256))
_V5E = TileBlocks(BlockSize(1024, 256, 128), BlockSize(512, 256, 256), BlockSize(512, 512, 256), 100 * 2**20)
_V6E = TileBlocks(BlockSize(2048, 256, 128), BlockSize(1024, 256, 256), BlockSize(256, 768, 256), 120 * 2**20)
BLOCKS = {"TPU v5": _V5P, "TPU v5 lite": _V5E, "TPU v6 lite": _V6E}
MARGIN = 1.17  # VMEM that the compiler uses over that of blocks and sums, for transposed operands and spilled values
LEAST = 16  # fewest tokens of a block


def blocks_for(device_kind: str, tokens: int, width: int, itemsize: int = 2) -> TileBlocks:
    """Returns the sizes for a TPU generation and `tokens` hidden states of `width` numbers of `itemsize` bytes.

    Few tokens are one block. Blocks of wide states or long numbers have fewer tokens, so that they fit VMEM.
    """
    preferred, whole = BLOCKS.get(device_kind, _V5P), doubled(LEAST, tokens)
    # Bytes of one number of a sum: its result in two buffers, and float32 as well where that is another type.
    sums = 2 * itemsize + (4 if itemsize < 4 else 0)
    fit = functools.partial(_fit, preferred.vmem_bytes / (MARGIN * width), 2 * itemsize, whole)
    return TileBlocks(
        forward=fit(preferred.forward, 0, 0),
        hidden=fit(preferred.hidden, sums, 0),
        columns=fit(preferred.columns, 0, sums),
        vmem_bytes=preferred.vmem_bytes,
    )


def _fit(room: float, value: int, most: int, size: BlockSize, token_sum: int, column_sum: int) -> BlockSize:
    """Returns the largest size, up to `most` tokens, that fits `room` bytes per element of D.

    Every token and column takes `value` bytes as an input, and token_sum or column_sum bytes where it is summed. What
    is summed shrinks first.
    """
    tokens, columns = min(size.tokens, most), size.columns
    while (value + token_sum) * tokens + (value + column_sum) * columns > room:
        if column_sum and columns > LANES:
            columns = max(columns // 2 // LANES * LANES, LANES)
        elif tokens > LEAST:
            tokens //= 2
        else:
            break
    return BlockSize(tokens, columns, min(size.part, tokens))


def forward_tile(
    states_ND, w_DV, targets_N, temperature, sums, blocks: TileBlocks, interpret=False, count=None, limit=None
):
    """Returns `sums` updated with the logits of these columns, float32 [N] each.

    They are: the largest logit, the sum of exp(logit - largest), that of exp(logit - largest) * (logit - largest), and
    the target's logit. targets_N int32 is the column of each token's target within w_DV, outside its range where the
    target is elsewhere. With `count`, an int32 scalar, whole blocks that cover the first `count` tokens are computed
    and the rest is undefined. With `limit`, an int32 scalar, only the first `limit` columns are in the softmax.
    """
    tokens, width = states_ND.shape
    states, before = _padded(blocks, states_ND), _numbers(blocks, count, _local(targets_N, w_DV), *sums)
    size = blocks.forward
    after = pl.pallas_call(
        functools.partial(_forward, size, w_DV.shape[1], limit is not None),
        grid=_grid(size, states, w_DV, count),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((size.tokens, width), lambda t, v: (t, 0)),
            pl.BlockSpec((width, size.columns), lambda t, v: (0, v)),
            pl.BlockSpec((size.tokens, NUMBERS), lambda t, v: (t, 0)),
        ],
        out_specs=pl.BlockSpec((size.tokens, NUMBERS), lambda t, v: (t, 0)),
        out_shape=jax.ShapeDtypeStruct(before.shape, jnp.float32),
        compiler_params=_params(blocks),
        interpret=interpret,
        name=NAMES[0],
    )(_scalars(temperature, w_DV, limit), states, w_DV, before)
    return tuple(after[:tokens, place] for place in (TOP, TOTAL, WEIGHTED, PICKED))


def backward_tile(
    states_ND,
    w_DV,
    targets_N,
    temperature,
    saved,
    gradients,
    dtypes,
    blocks: TileBlocks,
    interpret=False,
    count=None,
    limit=None,
):
    """Returns the gradients of the hidden states through these columns, [N, D], and of the columns, [D, V].

    Both are summed in float32 and rounded once to the two `dtypes`. `saved` are [N] each, over all columns: the
    largest logit, the log of the sum of exp(logit - largest), and the entropy. `gradients` are those of log p(target)
    and of the entropy, [N], divided by the temperature. targets_N, `count` and `limit` are as in `forward_tile`:
    gradients of states past `count` are undefined, those of columns past `limit` are 0.
    """
    (tokens, width), vocab = states_ND.shape, w_DV.shape[1]
    states, numbers = _padded(blocks, states_ND), _numbers(blocks, count, _local(targets_N, w_DV), *saved, *gradients)
    arrays = (_scalars(temperature, w_DV, limit), states, w_DV, numbers)

    def call(name, kernel, size, sums_tokens: bool, dtype):
        """Calls a kernel that sums over tokens for each block of columns, or the reverse, along the last grid axis."""
        at_token, at_column = (lambda t, v: (t, 0)), (lambda t, v: (0, v))
        grid, block, place, whole = _grid(size, states, w_DV, count), (size.tokens, width), at_token, states
        if sums_tokens:
            at_token, at_column = (lambda v, t: (t, 0)), (lambda v, t: (0, v))
            grid, block, place, whole = grid[::-1], (width, size.columns), at_column, w_DV
        return pl.pallas_call(
            functools.partial(kernel, size, vocab, limit is not None),
            grid=grid,
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec((size.tokens, width), at_token),
                pl.BlockSpec((width, size.columns), at_column),
                pl.BlockSpec((size.tokens, NUMBERS), at_token),
            ],
            out_specs=pl.BlockSpec(block, place),
            out_shape=jax.ShapeDtypeStruct(whole.shape, dtype),
            scratch_shapes=[] if dtype == jnp.float32 else [pltpu.VMEM(block, jnp.float32)],
            compiler_params=_params(blocks),
            interpret=interpret,
            name=name,
        )(*arrays)

    d_states = call(NAMES[1], _hidden, blocks.hidden, False, dtypes[0])
    return d_states[:tokens], call(NAMES[2], _columns, blocks.columns, True, dtypes[1])


def _params(blocks: TileBlocks):
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_bytes)


def _scalars(temperature, w_DV, limit):
    """Returns [1 / temperature], followed by the limit on columns where there is one; it is exact below 2**24."""
    inverse = jnp.reshape(1 / jnp.asarray(temperature, jnp.float32), 1)
    if limit is None:
        return inverse
    return jnp.append(inverse, jnp.clip(limit, 0, w_DV.shape[1]).astype(jnp.float32))


def _padded(blocks: TileBlocks, array):
    """Returns the array [N, ...] with its tokens padded to whole blocks."""
    return jnp.pad(array, ((0, -array.shape[0] % blocks.tokens), (0, 0)))


def _local(targets_N, w_DV):
    """Returns targets within these columns, -1 where elsewhere: in no block, even one that ends past the columns."""
    return jnp.where(targets_N < w_DV.shape[1], targets_N, -1)


def _numbers(blocks: TileBlocks, count, targets_N, *numbers):
    """Returns float32 [N, NUMBERS], tokens padded to whole blocks, 0 past `count`; a target below 2**24 is exact."""
    columns = jnp.stack([targets_N.astype(jnp.float32), *numbers], axis=1)
    if count is not None:
        columns = jnp.where(jnp.arange(columns.shape[0])[:, None] < count, columns, 0)
    return jnp.pad(_padded(blocks, columns), ((0, 0), (0, NUMBERS - columns.shape[1])))


def _grid(size: BlockSize, states, w_DV, count):
    """Returns how many blocks of tokens and of columns there are."""
    tokens = states.shape[0] // size.tokens
    if count is not None:  # at least one block: otherwise a sum over tokens would not be written
        tokens = jnp.maximum(pl.cdiv(count, size.tokens), 1)
    return tokens, pl.cdiv(w_DV.shape[1], size.columns)


def _column(first, shape):
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) + first


def _at_target(numbers_ref, part, first, shape):
    return _column(first, shape) == numbers_ref[part, TARGET : TARGET + 1].astype(jnp.int32)


def _counted(vocab: int, limited: bool, scalars):
    """Returns how many columns are in the softmax: `vocab`, or the limit where there is one."""
    return scalars[1].astype(jnp.int32) if limited else vocab


def _edge(vocab, size: BlockSize, block, work):
    """Runs work(edge) for a block, where `edge` is whether some of its columns are past the vocabulary.

    Blocks without such columns skip the check. Where the vocabulary's size is known only on the device, blocks that are
    wholly past it are skipped.
    """
    if isinstance(vocab, int) and vocab % size.columns == 0:
        return work(False)
    last = vocab // size.columns
    pl.when(block < last)(lambda: work(False))
    pl.when(block == last)(lambda: work(True))


def _forward(size, vocab, limited, scalars, states_ref, w_ref, before_ref, after_ref):
    block = pl.program_id(1)
    first, vocab = block * size.columns, _counted(vocab, limited, scalars)

    @pl.when(block == 0)
    def _():
        after_ref[...] = before_ref[...]

    def work(edge: bool):
        for start in range(0, size.tokens, size.part):
            part = pl.ds(start, size.part)
            logits = dot(states_ref[part, :], w_ref[...], (1, 0)) * scalars[0]
            if edge:
                logits = jnp.where(_column(first, logits.shape) < vocab, logits, LOWEST)
            top, total, weighted, picked = (
                after_ref[part, place : place + 1] for place in (TOP, TOTAL, WEIGHTED, PICKED)
            )
            higher = jnp.maximum(top, logits.max(axis=1, keepdims=True))
            below, shift = logits - higher, top - higher
            exps, shrink = jnp.exp(below), jnp.exp(shift)
            hit = _at_target(before_ref, part, first, logits.shape)
            new = (
                higher,
                total * shrink + exps.sum(axis=1, keepdims=True),
                (weighted + shift * total) * shrink + (exps * below).sum(axis=1, keepdims=True),
                picked + jnp.where(hit, logits, 0).sum(axis=1, keepdims=True),
            )
            for place, value in zip((TOP, TOTAL, WEIGHTED, PICKED), new, strict=True):
                after_ref[part, place : place + 1] = value

    _edge(vocab, size, block, work)


def _d_logits(edge, vocab, first, part, scalars, states_ref, w, numbers_ref):
    """Returns the gradient of a part's logits, in the dtype of the hidden states.

    With p the softmax and H its entropy, d log p_t / d logit_j = [j = t] - p_j and dH / d logit_j = -p_j (log p_j + H).
    """
    top, log_sum, entropy, d_logp, d_entropy = (
        numbers_ref[part, place : place + 1] for place in (TOP, LOG_SUM, ENTROPY, D_LOGP, D_ENTROPY)
    )
    log_probs = (dot(states_ref[part, :], w, (1, 0)) * scalars[0] - top) - log_sum
    hot = jnp.where(_at_target(numbers_ref, part, first, log_probs.shape), d_logp, 0)
    d_logits = hot - jnp.exp(log_probs) * (d_logp + d_entropy * (log_probs + entropy))
    if edge:
        d_logits = jnp.where(_column(first, d_logits.shape) < vocab, d_logits, 0)
    return d_logits.astype(states_ref.dtype)


def _hidden(size, vocab, limited, scalars, states_ref, w_ref, numbers_ref, *refs):
    block, sums = pl.program_id(1), refs[-1]
    first, vocab = block * size.columns, _counted(vocab, limited, scalars)
    _cleared(sums)

    def work(edge: bool):
        w = jnp.where(_column(first, w_ref.shape) < vocab, w_ref[...], 0) if edge else w_ref[...]
        for start in range(0, size.tokens, size.part):
            part = pl.ds(start, size.part)
            d_logits = _d_logits(edge, vocab, first, part, scalars, states_ref, w, numbers_ref)
            sums[part, :] += dot(d_logits, w, (1, 1))

    _edge(vocab, size, block, work)
    _rounded(refs)


def _columns(size, vocab, limited, scalars, states_ref, w_ref, numbers_ref, *refs):
    sums = refs[-1]
    _cleared(sums)
    first = pl.program_id(0) * size.columns
    for start in range(0, size.tokens, size.part):
        part = pl.ds(start, size.part)
        d_logits = _d_logits(
            limited, _counted(vocab, limited, scalars), first, part, scalars, states_ref, w_ref[...], numbers_ref
        )
        sums[...] += dot(states_ref[part, :], d_logits, (0, 0))
    _rounded(refs)


def _cleared(sums):
    @pl.when(pl.program_id(1) == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)


def _rounded(refs):
    """Writes the sums, rounded to the result's dtype, at the last inner step, unless they are the result themselves."""
    if len(refs) > 1:

        @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
        def _():
            refs[0][...] = refs[1][...].astype(refs[0].dtype)
