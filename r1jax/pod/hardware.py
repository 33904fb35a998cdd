"""TPU slices as Google Cloud names them: accelerator types, runtime versions, hosts, and labels of GKE.

Source: docs.cloud.google.com/tpu/docs, the page of each generation, "TPU software versions" and "Plan TPUs in GKE".
"""

import math
from dataclasses import dataclass

_CUBES = (
    *("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
    *("16x16x16", "16x16x24"),
)
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


@dataclass(frozen=True)
class TpuSeries:
    """A generation of TPUs that can be rented."""

    name: str
    shapes: tuple[str, ...]  # those that are sold under an accelerator type, smallest first
    accelerator: str  # of an accelerator type, before the number
    cores_per_chip: int  # the number in an accelerator type counts cores
    runtime: str  # the image of a TPU VM, "" where only GKE rents this generation
    gke: str  # value of the label cloud.google.com/gke-tpu-accelerator


SERIES = {
    one.name: one
    for one in (
        TpuSeries("v4", _CUBES, "v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
        TpuSeries("v5e", _SQUARES, "v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
        TpuSeries("v5p", _CUBES, "v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
        TpuSeries("v6e", _SQUARES, "v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
        TpuSeries("tpu7x", _CUBES, "tpu7x", 2, "", "tpu7x"),
    )
}


@dataclass(frozen=True)
class PodSlice:
    """One slice, such as v5p:4x4x8."""

    series: TpuSeries
    shape: str

    @property
    def chips(self) -> int:
        return math.prod(int(side) for side in self.shape.split("x"))

    @property
    def accelerator_type(self) -> str:
        """The name of this many chips, such as v5p-256."""
        return f"{self.series.accelerator}-{self.chips * self.series.cores_per_chip}"

    @property
    def has_default_shape(self) -> bool:
        """Whether the accelerator type means this shape; another arrangement of as many chips is asked for by shape."""
        return self.shape in self.series.shapes

    @property
    def chips_per_host(self) -> int:
        """Chips that one worker sees: all of a flat slice of up to 8, otherwise 4."""
        return self.chips if self.chips <= (8 if self.shape.count("x") == 1 else 4) else 4

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host


def parse(topology: str) -> PodSlice:
    """Returns the slice of a text such as v5p:4x4x8, the same as --plan takes. Raises ValueError for another text."""
    name, _, shape = topology.partition(":")
    sides = shape.split("x")
    if name not in SERIES or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(
            f"--topology={topology} is no slice; give a generation ({', '.join(SERIES)}) and a shape, such as v5p:4x4x8"
        )
    series = SERIES[name]
    if len(sides) != series.shapes[0].count("x") + 1:
        raise ValueError(f"--topology={topology}: a slice of {name} has a shape such as {series.shapes[-3]}")
    if shape not in series.shapes and len(sides) == 2:
        raise ValueError(f"--topology={topology} is not sold; {name} has {', '.join(series.shapes)}")
    return PodSlice(series, shape)
