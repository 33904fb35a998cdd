"""Sends tokens to their experts' devices and back: exact for any load, in rounds of a bounded buffer.

Every device sorts its rows by expert and sends each destination its part (`ragged_all_to_all`). A destination takes at
most `capacity` rows per round, in the order sender, expert. The remaining rows go in the next round, so nothing is
dropped, and the buffer need not hold the worst case (all tokens of the group). The number of rounds follows from the
counts, which all devices have. Everything here runs inside shard_map.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

ROW_MULTIPLE = 8  # buffers have a multiple of this many rows

# (rows [C, D], local expert of each row int32 [C], `count` or more for none; weights) -> rows [C, D]
Run = Callable[[jax.Array, jax.Array, Any], jax.Array]


@struct.dataclass
class Round:
    """Which rows one round moves, from the view of one device; arrays of [P], one entry per device of the group."""

    send_from: jax.Array  # where the rows for each destination start in this device's sorted rows
    send: jax.Array  # number of rows for each destination
    send_to: jax.Array  # where they start in the destination's buffer
    receive: jax.Array  # number of rows from each sender
    received_from: jax.Array  # where they start in the sender's sorted rows
    received_to: jax.Array  # where they start in this device's buffer
    experts: jax.Array  # int32 [C] local expert of each row of this device's buffer, `count` for an empty row


def _plan(counts_PE: jax.Array, me: jax.Array, index: jax.Array, capacity: int) -> Round:
    """Returns the transfers of round `index` as seen by device `me`.

    counts_PE is how many rows every device has for every expert.
    """
    group = counts_PE.shape[0]
    by_owner = counts_PE.reshape(group, group, -1)  # sender, destination, local expert
    pairs = by_owner.sum(axis=-1)
    starts = jnp.cumsum(pairs, axis=1) - pairs  # start of each destination's part in the sender's sorted rows
    queue = jnp.cumsum(pairs, axis=0) - pairs  # start of each sender's part in the destination's queue
    low, high = index * capacity, (index + 1) * capacity
    begin, end = jnp.clip(queue, low, high), jnp.clip(queue + pairs, low, high)
    origin, target = starts + begin - queue, begin - low
    ends = jnp.cumsum(by_owner[:, me].reshape(-1))  # ends of the parts of this device's queue, by sender and expert
    position = low + jnp.arange(capacity)
    count = by_owner.shape[-1]
    experts = jnp.searchsorted(ends, position, side="right") % count
    experts = jnp.where(position < ends[-1], experts, count).astype(jnp.int32)
    sizes = end - begin
    return Round(origin[me], sizes[me], target[me], sizes[:, me], origin[:, me], target[:, me], experts)


def _ragged(rows, size: int, send_from, send, send_to, receive, mesh: Mesh, axes: tuple[str, ...]) -> jax.Array:
    """Returns the rows that arrive, [size, D], 0 where none does."""
    out = jnp.zeros((size, *rows.shape[1:]), rows.dtype)
    if mesh.devices.flat[0].platform == "tpu":
        offsets = (jnp.asarray(a, jnp.int32) for a in (send_from, send, send_to, receive))
        return jax.lax.ragged_all_to_all(rows, out, *offsets, axis_name=axes)
    return _gathered_ragged(rows, size, send_from, send, send_to, axes)


def _gathered_ragged(rows, size: int, send_from, send, send_to, axes: tuple[str, ...]) -> jax.Array:
    """Returns the same as ragged_all_to_all, which only TPUs have: gathers all rows and picks those for this device."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axes)
    me = jax.lax.axis_index(axes)
    rows_PND, origin, count, target = (gather(a) for a in (rows, send_from, send, send_to))
    origin, count, target = origin[:, me], count[:, me], target[:, me]
    position = jnp.arange(size)[:, None]
    inside = (position >= target) & (position < target + count)  # [size, P]
    sender = jnp.argmax(inside, axis=1)
    source = origin[sender] + jnp.arange(size) - target[sender]
    picked = rows_PND[sender, jnp.clip(source, 0, rows.shape[0] - 1)]
    return jnp.where(inside.any(axis=1)[:, None], picked, 0)


def exchange_and_run(
    rows: jax.Array, counts: jax.Array, weights: Any, run: Run, mesh: Mesh, axes: tuple[str, ...], capacity: int
) -> jax.Array:
    """Returns the output of `run` for every row, [N, D].

    Rows are sorted by global expert; `counts` int32 [E] is how many each has. `axes` are the mesh axes of the group of
    P devices: device i holds the E / P experts from i * E / P on, and `weights` are theirs. The gradient recomputes
    each round, so the memory kept between the passes does not grow with the number of rounds.
    """
    counts_PE = jax.lax.all_gather(counts, axes)
    me = jax.lax.axis_index(axes)
    loads = counts_PE.reshape(counts_PE.shape[0], counts_PE.shape[0], -1).sum(axis=(0, 2))
    # All devices of a slice take the same number of rounds, so that they run the same collectives.
    rounds = jax.lax.pmax(-(-loads.max() // capacity), tuple(name for name in mesh.axis_names if name != "slice"))

    def one_round(rows, weights, index, counts_PE, me):
        plan = _plan(counts_PE, me, index, capacity)
        there = _ragged(rows, capacity, plan.send_from, plan.send, plan.send_to, plan.receive, mesh, axes)
        done = run(there, plan.experts, weights)
        return _ragged(done, rows.shape[0], plan.received_to, plan.receive, plan.received_from, plan.send, mesh, axes)

    def repeat(rounds, step, start):
        return jax.lax.while_loop(lambda c: c[0] < rounds, lambda c: (c[0] + 1, step(*c)), (jnp.int32(0), start))[1]

    @jax.custom_vjp
    def all_rounds(rows, weights, rounds, *where):
        return repeat(rounds, lambda i, out: out + one_round(rows, weights, i, *where), jnp.zeros_like(rows))

    def forward(*arguments):
        return all_rounds(*arguments), arguments

    def backward(arguments, grad):
        rows, weights, rounds, *where = arguments

        def step(index, total):
            _, pull = jax.vjp(lambda rows, weights: one_round(rows, weights, index, *where), rows, weights)
            return jax.tree.map(jnp.add, total, pull(grad))

        return (*repeat(rounds, step, jax.tree.map(jnp.zeros_like, (rows, weights))), None, None, None)

    all_rounds.defvjp(forward, backward)
    return all_rounds(rows, weights, rounds, counts_PE, me)
