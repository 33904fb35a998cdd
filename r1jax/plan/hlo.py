"""Reads the text of a compiled module: collectives with their bytes and mesh axes, kernels, and the use of memory.

The text is that of the partitioned program: every shape is one device's part.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Kinds that may give a device more of an array than it holds.
SPREADING = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|condition|body|true_computation|false_computation|called_computations|branch_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BOUND = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_KERNEL = re.compile(r'op_name="[^"]*?(\w+)\)*/pallas_call"')
_GROUPS = re.compile(
    r"replica_groups=(?:(\{\{.*?\}\}|\{\})|(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)|(mesh\[.*?\]\s*(?:,[^{]*)?\{[^}]*\}))"
)
_BETWEEN_SLICES = re.compile(r' send\(.*_xla_megascale_transfer_type="(\w+)"')
_PAIRS = re.compile(r"source_target_pairs=(\{\{.*?\}\})")


@dataclass(frozen=True)
class ArrayShape:
    """Dtype and dimensions of one array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        if self.dtype in _BITS:
            bits = _BITS[self.dtype]
        else:
            bits = int(re.findall(r"[a-z]+(\d+)", self.dtype)[0])
        return math.prod(self.dims) * bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Collective:
    """One collective of a module.

    `shapes` are its results on one device and `bytes` is their sum. `axes` are the mesh axes that its groups span, ()
    where the groups are not a product of axes. `runs` is how often one call of the program runs it, with a loop of
    unknown length counted once; `in_loop` is whether it is in such a loop.
    """

    name: str
    kind: str
    shapes: tuple[ArrayShape, ...]
    group_size: int
    axes: tuple[str, ...]
    runs: int
    in_loop: bool
    op_name: str  # its origin in the traced program

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)


def shapes(text: str) -> tuple[ArrayShape, ...]:
    """Returns the arrays of an HLO type, those of a tuple one by one; tokens and contexts have no arrays."""
    return tuple(
        ArrayShape(dtype, tuple(int(d) for d in dims.split(",") if d))
        for dtype, dims in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", text))
        if dtype != "token"
    )


def _brace_groups(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",") if n.strip()] for group in re.findall(r"\{([\d, ]*)\}", text)]


def _numbers(csv: str) -> list[int]:
    return [int(n) for n in csv.split(",")]


def _iota_groups(text: str) -> np.ndarray:
    """Returns the groups of `[groups,size]<=[dims]T(permutation)`."""
    ((shape, dims, order),) = re.findall(r"^\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    ids = ids.transpose(_numbers(order)) if order else ids
    return ids.reshape(_numbers(shape)[0], -1)


def _mesh_groups(text: str) -> np.ndarray:
    """Returns the groups of `mesh['x'=2,'y'=4] {'y'}`: devices that differ only in the axes in braces.

    `device_ids=([4,2]T(1,0))` before the axes gives the devices in another order than 0, 1, 2, ... A part of an axis is
    written `'y':(before)size`: it is the middle factor of an axis of size before * size * after.
    """
    ((declared, used),) = re.findall(r"^mesh\[(.*?)\](.*)$", text, re.S)
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", declared)}
    count = math.prod(sizes.values())
    ids = np.arange(count)
    if order := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", used):
        dims, permutation = (_numbers(csv) if csv else None for csv in order.groups())
        ids = ids.reshape(dims).transpose(permutation).reshape(-1)
    used = used[used.rindex("{") :]
    parts = [
        (name, (int(before), int(size)) if size else None)
        for name, before, size in re.findall(r"'?([A-Za-z_][\w.\-]*)'?(?::\((\d+)\)(\d+))?", used)
    ]
    dims, chosen = [], []
    for axis, size in sizes.items():
        cuts = {1, size}
        spans = []
        for name, part in parts:
            if name == axis:
                low, high = (1, size) if part is None else (part[0], part[0] * part[1])
                cuts |= {low, high}
                spans.append((low, high))
        edges = sorted(cuts)
        for low, high in itertools.pairwise(edges):
            if any(a <= low and high <= b for a, b in spans):
                chosen.append(len(dims))
            dims.append(high // low)
    rest = [index for index in range(len(dims)) if index not in chosen]
    size = math.prod(dims[index] for index in chosen)
    return ids.reshape(dims or [1]).transpose(rest + chosen).reshape(-1, size)


def groups(line: str, devices: int) -> list[list[int]]:
    """Returns the groups of device numbers in a collective's line; one group of all devices where it has none."""
    if pairs := _PAIRS.search(line):
        return _cycles(_brace_groups(pairs.group(1)), devices)
    match = _GROUPS.search(line)
    if match is None:
        return [list(range(devices))]
    braces, iota, mesh = match.groups()
    if mesh:
        return _mesh_groups(mesh).tolist()
    if iota:
        return _iota_groups(iota).tolist()
    return _brace_groups(braces[1:-1]) or [list(range(devices))]


def _cycles(pairs: list[list[int]], devices: int) -> list[list[int]]:
    """Returns the groups of devices that a permutation's (source, target) pairs connect."""
    root = list(range(devices))

    def top(device: int) -> int:
        while root[device] != device:
            root[device] = device = root[root[device]]
        return device

    for source, target in pairs:
        root[top(source)] = top(target)
    joined: dict[int, list[int]] = {}
    for device in range(devices):
        joined.setdefault(top(device), []).append(device)
    return [group for group in joined.values() if len(group) > 1]


def spanned(device_groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes of `mesh` (name -> size, devices numbered in row-major order) that the groups span.

    The result is () where a group is not a product of whole axes.
    """
    sizes = list(mesh.values())
    group = np.asarray(device_groups[0]) if device_groups else np.zeros(1, int)
    places = np.stack(np.unravel_index(group, sizes)) if sizes else np.zeros((0, 1))
    axes = tuple(name for name, row in zip(mesh, places, strict=True) if len(np.unique(row)) > 1)
    return axes if math.prod(mesh[name] for name in axes) == len(group) else ()


@dataclass
class _Computation:
    lines: list[str]
    calls: list[tuple[str, str]]  # computation, condition of the loop whose body it is or ""


def _computations(text: str) -> tuple[dict[str, _Computation], str]:
    """Returns the module's computations by name and the name of its entry."""
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header.group(2), _Computation([], []))
            entry = header.group(2) if header.group(1) else entry
        elif current is not None and line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            current.lines.append(line)
            if loop := _WHILE.search(line):
                current.calls.append((loop.group(2), loop.group(1)))
                continue
            for several, one in _CALLED.findall(line):
                current.calls += [(name.strip().lstrip("%"), "") for name in (several or one).split(",")]
    return computations, entry


def _trips(condition: _Computation) -> int | None:
    """Returns N of a loop that runs while its counter is below a constant N (those of scan do), else None."""
    text = "\n".join(condition.lines)
    below, bounds = _BELOW.search(text), dict(_BOUND.findall(text))
    return int(bounds[below.group(1)]) if below and below.group(1) in bounds else None


def _runs(computations: dict[str, _Computation], entry: str) -> dict[str, tuple[int, bool]]:
    """Returns how often each computation runs, and whether it is in a loop of unknown length."""
    total: dict[str, tuple[int, bool]] = {}

    def visit(name: str, times: int, unknown: bool) -> None:
        if name not in computations:
            return
        before, looped = total.get(name, (0, False))
        total[name] = (before + times, looped or unknown)
        for callee, condition in computations[name].calls:
            trips = _trips(computations[condition]) if condition in computations else 1
            visit(callee, times * (1 if trips is None else trips), unknown or trips is None)

    visit(entry, 1, False)
    return total


def collectives(text: str, mesh: Mapping[str, int]) -> tuple[Collective, ...]:
    """Returns every collective of a module, in the order of its text; an asynchronous one is counted at its start.

    `mesh` is name -> size. Transfers between slices over the data-centre network are assigned to its first axis.
    """
    computations, entry = _computations(text)
    out = []
    for name, (runs, in_loop) in _runs(computations, entry).items():
        for line in computations[name].lines:
            if (parsed := _collective(line, mesh)) is not None:
                op_name = _OP_NAME.search(line)
                out.append(Collective(*parsed, runs, in_loop, op_name.group(1) if op_name else ""))
    return tuple(out)


def kernels(text: str) -> dict[str, int]:
    """Returns the Pallas kernels that a module calls, by name, and how often they run per call of the module."""
    computations, entry = _computations(text)
    out: dict[str, int] = {}
    for name, (runs, _) in _runs(computations, entry).items():
        for line in computations[name].lines:
            if 'custom_call_target="tpu_custom_call"' in line and (kernel := _KERNEL.search(line)):
                out[kernel[1]] = out.get(kernel[1], 0) + runs
    return out


def _collective(line: str, mesh: Mapping[str, int]):
    """Returns (name, kind, shapes, group size, axes) of a line that is a collective, None for any other."""
    matched = _INSTRUCTION.match(line)
    if not matched:
        return None
    name, result, opcode = matched.groups()
    if sent := _BETWEEN_SLICES.search(line):
        first = next(iter(mesh))
        return name, sent.group(1).lower().replace("_", "-"), shapes(result)[:1], mesh[first], (first,)
    kind = opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    parts = groups(line, math.prod(mesh.values()))
    size = max((len(part) for part in parts), default=1)
    return name, kind, _results(shapes(result), opcode), size, spanned(parts, mesh)


def _results(both: tuple[ArrayShape, ...], opcode: str) -> tuple[ArrayShape, ...]:
    """Returns the results only: the `-start` of a gather or permutation also lists its operands and contexts."""
    if not opcode.endswith("-start") or opcode == "all-reduce-start":
        return both
    arrays = tuple(shape for shape in both if shape.dims)
    return arrays[len(arrays) // 2 :] or both


def _wider(part: tuple[int, ...], whole: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Returns every shape between a device's part of an array and the whole, without the part itself."""
    choices = [
        [d for d in range(small, large + 1, small) if large % d == 0] for small, large in zip(part, whole, strict=True)
    ]
    return (dims for dims in itertools.product(*choices) if dims != part)


def _sorted(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(d for d in dims if d != 1))


def gathered(
    collectives: Iterable[Collective], weights: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[Collective]:
    """Returns the collectives whose result is more of a weight than a device holds.

    `weights` are (a device's part, the whole) of each. The order of dimensions, and dimensions of size 1, are ignored,
    so a transposed weight is recognised, and so is one gathered over only some of its axes. A weight that was reshaped
    before it was gathered is not recognised.
    """
    wanted = {_sorted(dims) for part, whole in weights for dims in _wider(part, whole)}
    held = {_sorted(part) for part, _ in weights}
    more = wanted - held
    spreading = (one for one in collectives if one.kind in SPREADING)
    return [one for one in spreading if any(_sorted(shape.dims) in more for shape in one.shapes)]


@dataclass(frozen=True)
class Memory:
    """HBM of one device in bytes."""

    arguments: int  # parameters of the program: weights, state, batch
    outputs: int  # results, aliased ones included
    aliased: int  # of these, the ones written over donated arguments
    temporaries: int  # everything else
    constants: int

    @property
    def total(self) -> int:
        """Bytes that are needed while the program runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.constants


_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*)$", re.M)


def memory(buffer_assignment: str) -> Memory:
    """Returns the HBM figures of a buffer assignment's text.

    Space 0 is HBM. Other spaces (`color 1` is VMEM) and thread-local entries, which exist inside a fusion, are left
    out.
    """
    totals = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "constants"), 0)
    for size, rest in _ALLOCATION.findall(buffer_assignment):
        size = int(size)
        if "thread-local" in rest or re.search(r"color [1-9]", rest):
            continue
        result = "maybe-live-out" in rest
        if ", parameter " in rest:
            totals["arguments"] += size
            totals["aliased"] += size * result
            totals["outputs"] += size * result
        elif result:
            totals["outputs"] += size
        elif "constant" in rest:
            totals["constants"] += size
        else:
            totals["temporaries"] += size
    return Memory(**totals)
