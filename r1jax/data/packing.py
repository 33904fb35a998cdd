"""Packing samples into rows of one length, and back.

Position t of a row predicts token t + 1 of the same sample. What belongs to a token (whether it counts, its advantage,
the log-prob it was drawn with) is therefore stored one position earlier, where it is predicted; the last position of a
sample predicts nothing. What belongs to a token as an input (`inputs`: the experts it was sent to) stays at the token's
own position. Nothing crosses from one sample into the next: segments number the samples of a row from 1, 0 is padding,
and positions restart at 0.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

PREFIXES = "prefixes"  # input of a batch with shared prompts: a second segment that a token attends to, 0 for none


@dataclass(frozen=True, eq=False)
class PackItem:
    """One sample of n tokens; every array is aligned to the token itself (entry i belongs to token i).

    Packing drops entry 0 of every array but `inputs`: nothing predicts the first token.
    Raises ValueError when a length differs or there is no token.
    """

    tokens: np.ndarray  # [n] int32
    loss_mask: np.ndarray  # [n] float32; 1 where the token is a target that counts
    values: Mapping[str, np.ndarray] = field(default_factory=dict)  # name -> [n] float32
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)  # name -> [n, ...]; integers are not below 0
    prefix: int = -1  # the number of the item that this one goes on from, in the same row before it; -1: none

    def __post_init__(self):
        shape = np.shape(self.tokens)
        if len(shape) != 1 or not shape[0]:
            raise ValueError(f"PackItem: tokens of shape {shape}, needs one axis and at least 1 token")
        for name, array in (("loss_mask", self.loss_mask), *self.values.items()):
            if np.shape(array) != shape:
                raise ValueError(f"PackItem: {name} of shape {np.shape(array)}, needs that of tokens {shape}")
        for name, array in self.inputs.items():
            if np.shape(array)[:1] != shape:
                raise ValueError(f"PackItem: {name} of shape {np.shape(array)}, needs one entry of {shape[0]} a token")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Rows ready for a training step; [R, T] arrays, and where each item went."""

    tokens: np.ndarray  # [R, T] int32
    targets: np.ndarray  # [R, T] int32, the next token of the same sample
    positions: np.ndarray  # [R, T] int32, from 0 in each sample
    segments: np.ndarray  # [R, T] int32, 1.. within a row, 0 is padding
    loss_mask: np.ndarray  # [R, T] float32, of the target
    values: dict[str, np.ndarray]  # name -> [R, T] float32, of the target
    slots: list[tuple[int, int, int]]  # item -> (row, start, length)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)  # name -> [R, T, ...] of the token, -1 at padding


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Returns rows of sample indices by best-fit decreasing: longest first, each into the fullest row that holds it.

    Ties go to the earlier sample and the earlier row. Raises ValueError for a sample shorter than 1 or longer than a
    row.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= row_tokens:
            raise ValueError(f"pack: sample {index} has {length} tokens, needs 1 to row_tokens={row_tokens}")
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), rising
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect_left(free, (length, -1))
        if place < len(free):
            room, row = free.pop(place)
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            insort(free, (room - length, row))
    return rows


def spread(packed: list[list[int]], lengths: Sequence[int], rows: int, shards: int) -> list[list[int]]:
    """Returns the rows in an order that gives every device about the same number of tokens in every micro-batch.

    A micro-batch is `rows` neighbouring rows, of which each of `shards` devices takes a run of rows / shards. The rows
    of a micro-batch go, fullest first, to the device with the fewest tokens that has a place; where a micro-batch has
    too few, empty rows fill the gaps. No row changes its micro-batch, and with one shard nothing changes at all.
    """
    if shards == 1:
        return packed
    tokens = [sum(lengths[index] for index in row) for row in packed]
    out: list[list[int]] = []
    for first in range(0, len(packed), rows):
        devices: list[list[list[int]]] = [[] for _ in range(shards)]
        loads = [0] * shards
        for number in sorted(range(first, min(first + rows, len(packed))), key=lambda number: -tokens[number]):
            open_ones = [d for d in range(shards) if len(devices[d]) < rows // shards]
            device = min(open_ones, key=lambda d: (loads[d], len(devices[d])))
            devices[device].append(packed[number])
            loads[device] += tokens[number]
        for device in devices:
            out += device + [[]] * (rows // shards - len(device))
    return out


def rows_needed(lengths: Sequence[int], row_tokens: int) -> int:
    """Returns how many rows `pack` fills; ValueError as there."""
    return len(pack(lengths, row_tokens))


def _settled(packed: list[list[int]], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Returns the rows that a caller chose. Raises ValueError unless they hold each item once and every row fits."""
    if sorted(index for row in packed for index in row) != list(range(len(lengths))):
        raise ValueError(f"pack_batch: the given rows do not hold each of {len(lengths)} items once")
    for number, row in enumerate(packed):
        if (filled := sum(lengths[index] for index in row)) > row_tokens:
            raise ValueError(f"pack_batch: given row {number} holds {filled} tokens, row_tokens={row_tokens}")
    return packed


def _slots(packed: list[list[int]], lengths: Sequence[int]) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """Returns (row, start, length) per sample, and each sample's number in its row from 1."""
    slots: list[tuple[int, int, int]] = [(0, 0, 0)] * len(lengths)
    numbers = np.zeros(len(lengths), np.int32)
    for row, indices in enumerate(packed):
        start = 0
        for number, index in enumerate(indices, 1):
            slots[index] = (row, start, lengths[index])
            numbers[index] = number
            start += lengths[index]
    return slots, numbers


def _first_positions(items: Sequence[PackItem]) -> np.ndarray:
    """Returns the position of each item's first token: 0, or where its prefix ends."""
    return np.asarray([len(items[item.prefix].tokens) if item.prefix >= 0 else 0 for item in items], np.int64)


def share_prompts(
    items: Sequence[PackItem], prompt_tokens: Sequence[int], row_tokens: int
) -> tuple[list[PackItem], list[list[int]]]:
    """Returns (items, rows of their numbers) in which equal prompts (the first `prompt_tokens` of items) occur once.

    An item keeps the last token of its prompt and what follows: that token predicts the first one of the response, so
    each sample needs it for itself. The rest of the prompt is a prefix, an item with a number from len(items) on,
    before its samples in a row. Samples of one prompt that do not fit one row have a prefix in each; a prompt of one
    token has none. Rows as in `pack`. Raises ValueError for an item longer than a row.
    """
    owners: dict[bytes, list[int]] = {}
    for index, (item, size) in enumerate(zip(items, prompt_tokens, strict=True)):
        owners.setdefault(np.asarray(item.tokens[:size]).tobytes(), []).append(index)
    out, prefixes, clusters = list(items), [], []
    for members in owners.values():
        size = prompt_tokens[members[0]] - 1
        if size < 1:
            clusters += [[index] for index in members]
            continue
        for row in pack([len(items[index].tokens) - size for index in members], row_tokens - size):
            sharing = [members[place] for place in row]
            number = len(items) + len(prefixes)
            for index in sharing:
                out[index] = _cut(items[index], slice(size, None), number)
            clusters.append([number, *sharing])
            prefixes.append(_cut(items[sharing[0]], slice(0, size)))
    out += prefixes
    rows = pack([sum(len(out[index].tokens) for index in cluster) for cluster in clusters], row_tokens)
    return out, [[index for cluster in row for index in clusters[cluster]] for row in rows]


def _cut(item: PackItem, part: slice, prefix: int = -1) -> PackItem:
    values, inputs = ({name: array[part] for name, array in of.items()} for of in (item.values, item.inputs))
    return PackItem(item.tokens[part], item.loss_mask[part], values, inputs, prefix)


def pack_batch(
    items: Sequence[PackItem], row_tokens: int, rows: int, packed: list[list[int]] | None = None
) -> PackedBatch:
    """Returns the items in exactly `rows` rows of `row_tokens` tokens, the rest padding (0 everywhere, -1 in `inputs`).

    `packed` lists the items of each row; by default `pack` decides.

    Raises ValueError when an item is longer than a row, more rows are needed, or items differ in the names of values
    or inputs.
    """
    lengths = [len(item.tokens) for item in items]
    packed = pack(lengths, row_tokens) if packed is None else _settled(packed, lengths, row_tokens)
    if len(packed) > rows:
        raise ValueError(
            f"pack_batch: {len(items)} samples need {len(packed)} rows of {row_tokens} tokens, given {rows}"
        )
    names = list(items[0].values) if items else []
    for index, item in enumerate(items):
        if item.values.keys() != set(names):
            raise ValueError(f"pack_batch: sample {index} has values {sorted(item.values)}, needs {sorted(names)}")
        if item.inputs.keys() != items[0].inputs.keys():
            raise ValueError(
                f"pack_batch: sample {index} has inputs {sorted(item.inputs)}, needs {sorted(items[0].inputs)}"
            )
    slots, numbers = _slots(packed, lengths)
    size = np.asarray(lengths, np.int64)
    ends = np.cumsum(size)
    within = np.arange(size.sum()) - np.repeat(ends - size, size)  # position of each token in its sample
    first = np.asarray([row * row_tokens + start for row, start, _ in slots], np.int64)
    where = np.repeat(first, size) + within  # place of each token in the flat rows

    def scatter(flat: np.ndarray, dtype, fill: int = 0) -> np.ndarray:
        out = np.full((rows * row_tokens, *flat.shape[1:]), fill, dtype)
        out[where] = flat
        return out.reshape(rows, row_tokens, *flat.shape[1:])

    def join(arrays: list[np.ndarray], dtype) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)

    def predicted(flat: np.ndarray) -> np.ndarray:
        moved = np.zeros_like(flat)
        moved[:-1] = flat[1:]
        moved[ends - 1] = 0
        return moved

    tokens = join([item.tokens for item in items], np.int32)
    mask = join([item.loss_mask for item in items], np.float32)
    values = {name: join([item.values[name] for item in items], np.float32) for name in names}
    inputs = {
        name: np.concatenate([item.inputs[name] for item in items]) for name in (items[0].inputs if items else ())
    }
    inputs = {name: scatter(flat, flat.dtype, fill=-1) for name, flat in inputs.items()}
    if any(item.prefix >= 0 for item in items):
        before = np.asarray([numbers[item.prefix] if item.prefix >= 0 else 0 for item in items], np.int32)
        inputs[PREFIXES] = scatter(np.repeat(before, size), np.int32)
    return PackedBatch(
        tokens=scatter(tokens, np.int32),
        targets=scatter(predicted(tokens), np.int32),
        positions=scatter(within + np.repeat(_first_positions(items), size), np.int32),
        segments=scatter(np.repeat(numbers, size), np.int32),
        loss_mask=scatter(predicted(mask), np.float32),
        values={name: scatter(predicted(flat), np.float32) for name, flat in values.items()},
        slots=slots,
        inputs=inputs,
    )


def unpack(array: np.ndarray, batch: PackedBatch) -> list[np.ndarray]:
    """Returns per item, in order, the entries of an [R, T, ...] array for its tokens[1:], each [length - 1, ...]."""
    array = np.asarray(array)
    if array.shape[:2] != batch.tokens.shape:
        raise ValueError(f"unpack: array of shape {array.shape}, needs {batch.tokens.shape} in front")
    return [array[row, start : start + length - 1] for row, start, length in batch.slots]


def batches(sequences: Sequence[np.ndarray], row_tokens: int, rows: int) -> Iterator[tuple[list[int], PackedBatch]]:
    """Yields (indices of sequences, their batch of `rows` rows with nothing to train on) until all were packed."""
    packed = pack([len(ids) for ids in sequences], row_tokens)
    for first in range(0, len(packed), rows):
        members = [index for row in packed[first : first + rows] for index in row]
        items = [PackItem(sequences[index], np.zeros(len(sequences[index]), np.float32)) for index in members]
        places = {index: place for place, index in enumerate(members)}
        local = [[places[index] for index in row] for row in packed[first : first + rows]]
        yield members, pack_batch(items, row_tokens, rows, local)
