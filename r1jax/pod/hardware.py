"""How Google Cloud rents TPU slices: accelerator types, runtime versions, hosts, and labels of GKE.

Source: docs.cloud.google.com/tpu/docs, the page of each generation, "TPU software versions" and "Plan TPUs in GKE".
"""

from dataclasses import dataclass

from r1jax.core import slices


@dataclass(frozen=True)
class TpuSeries:
    """A generation of TPUs that can be rented."""

    accelerator: str  # of an accelerator type, before the number
    cores_per_chip: int  # the number in an accelerator type counts cores
    runtime: str  # the image of a TPU VM, "" where only GKE rents this generation
    gke: str  # value of the label cloud.google.com/gke-tpu-accelerator


_NOT_RENTED = {"v4:1x1x1", "v5p:1x1x1"}  # shapes of r1jax.core.slices: these come as whole hosts of four chips
_MOST_CHIPS = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}  # of one slice
SERIES = {
    "v4": TpuSeries("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": TpuSeries("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": TpuSeries("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": TpuSeries("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "tpu7x": TpuSeries("tpu7x", 2, "", "tpu7x"),
}


@dataclass(frozen=True)
class PodSlice(slices.Slice):
    """A slice that can be rented."""

    @property
    def series(self) -> TpuSeries:
        return SERIES[self.generation]

    @property
    def accelerator_type(self) -> str:
        """The name of this many chips, such as v5p-256."""
        return f"{self.series.accelerator}-{self.chips * self.series.cores_per_chip}"

    @property
    def has_default_shape(self) -> bool:
        """Whether the accelerator type means this shape; another arrangement of as many chips is asked for by shape."""
        return self.shape in slices.SHAPES[self.generation]

    @property
    def chips_per_host(self) -> int:
        """Chips that one worker sees: all of a flat slice of up to 8, otherwise 4."""
        return self.chips if self.chips <= (8 if self.shape.count("x") == 1 else 4) else 4

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host


def parse(topology: str) -> PodSlice:
    """Returns the slice of a text such as v5p:4x4x8, the same as --plan takes. Raises ValueError for another text."""
    one = slices.parse(topology)
    shapes = slices.SHAPES[one.generation]
    if one.shape.count("x") != shapes[0].count("x"):
        raise ValueError(f"--topology={topology}: a slice of {one.generation} has a shape such as {shapes[-3]}")
    if not _is_rented(one):
        rented = [shape for shape in shapes if _is_rented(slices.Slice(one.generation, shape))]
        most = _MOST_CHIPS.get(one.generation)
        more = f", and others of up to {most} chips whose sides are multiples of 4, the shortest first" if most else ""
        raise ValueError(f"--topology={topology} is not sold; {one.generation} has {', '.join(rented)}{more}")
    return PodSlice(one.generation, one.shape)


def _is_rented(one: slices.Slice) -> bool:
    if one.chips > _MOST_CHIPS.get(one.generation, one.chips) or one.topology in _NOT_RENTED:
        return False
    sides = [int(side) for side in one.shape.split("x")]
    is_of_cubes = len(sides) == 3 and sides == sorted(sides) and not any(side % 4 for side in sides)
    return is_of_cubes or one.shape in slices.SHAPES[one.generation]
