"""Reads libtpu's listing of a kernel's instructions: bundles, units in use, spills. Figures are static; nothing is run.

A bundle holds the instructions that a core issues in one cycle. A kernel's program consists of regions, the straight
pieces between control flow; the bodies of grid steps are the regions that multiply matrices. How often each region
runs is not in these files.
"""

import pathlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

UTILISATION = "-final_hlo-static-per-bundle-utilization.txt"
LISTING = "-final_bundles.txt"
SHORTEST = 100  # bundles of the shortest region that is reported: shorter ones are control code
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:", re.M)
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


@dataclass(frozen=True)
class Region:
    """A piece of a program without control flow that multiplies matrices."""

    bundles: int
    mxu_share: float  # share of the slots for matrix products that are used
    spill_stores: int  # registers written to VMEM because there are too few
    spill_fills: int

    @property
    def spill_share(self) -> float:
        """Spilling stores per bundle, at most 1."""
        return self.spill_stores / self.bundles


@dataclass(frozen=True)
class CompiledKernel:
    """A compiled Pallas kernel."""

    name: str
    bundles: int  # of the whole program
    vmem_bytes: int  # buffers of blocks and scratch; 0 where the module does not record it
    regions: tuple[Region, ...]  # in program order


def kernels(folder: str | pathlib.Path, names: Sequence[str]) -> dict[str, CompiledKernel]:
    """Returns the kernels called `names` in a folder that `compile_program(keep=folder, bundles=True)` has filled.

    Raises ValueError for a kernel that is not in the folder.
    """
    folder, by_name = pathlib.Path(folder), {}
    for name in names:
        places = sorted((folder / "bundles").glob(f"*-{name}*{UTILISATION}"))
        if not places:
            raise ValueError(f"bundles: no kernel {name} in {folder}: the program does not call it")
        prefix = re.sub(r"-\d+$", "", places[0].name.removesuffix(UTILISATION))
        (listing,) = (
            path for path in places[0].parent.glob(f"{prefix}-*{LISTING}") if "schedule-analysis" not in path.name
        )
        by_name[name] = CompiledKernel(name, *_read(places[0].read_text(), listing.read_text(), _vmem(folder, name)))
    return by_name


def _vmem(folder: pathlib.Path, name: str) -> int:
    """Returns the VMEM, in bytes, of the custom call of this name according to the module's text."""
    for path in sorted((folder / "dump").glob("*.after_codegen.txt")):
        for line in path.read_text().splitlines():
            if re.match(rf"\s*(ROOT )?%?{name}[\w.]* = ", line) and (size := _VMEM.search(line)):
                return int(size[1])
    return 0


def _read(utilisation: str, listing: str, vmem: int) -> tuple[int, int, tuple[Region, ...]]:
    lines = utilisation.splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    capacity = dict(zip(units, map(int, lines[2].split()), strict=True))
    rows = [dict(zip(units, map(int, line.split()), strict=True)) for line in lines[4:] if line.strip()]
    marks = [int(match[1], 16) for match in _BUNDLE.finditer(listing) if match[2]]
    regions = []
    for first, end in zip([0, *marks], [*marks, len(rows)], strict=True):
        part = rows[first:end]
        products = sum(row["MATMUL"] for row in part)
        if len(part) >= SHORTEST and products:
            share = products / (capacity["MATMUL"] * len(part))
            spills = [sum(row[unit] for row in part) for unit in ("VSTORE:SPILL", "VLOAD:FILL")]
            regions.append(Region(len(part), share, *spills))
    return len(rows), vmem, tuple(regions)
