"""Datasheet figures of TPU generations. They are what a chip can do at most; nothing here was measured.

Source: Google's pages on each generation (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x). They give the
links between chips (ICI) as bytes a second in both directions together, of which half is one direction, and the
data-centre network (DCN) as bits a second of a chip (v5p, v6e, tpu7x) or of a host's cards (v5e, v6e). v4's page has
neither: its 2,400 Gbps of ICI are from Google's announcement of v5p, which compares the two, and its DCN is taken to be
v5p's. Operations and HBM bytes per second are those of the kernels' table.
"""

from dataclasses import dataclass

from r1jax.kernels.tpu import CHIPS
from r1jax.plan.compile import HBM_GIB


@dataclass(frozen=True)
class Generation:
    """A chip's peak rates and how chips are joined. All rates are of a chip unless they say otherwise."""

    name: str
    kind: str  # JAX's device kind, by which the kernels' table has its rates
    hbm_gib: int  # capacity
    ici: float  # bytes per second that a chip sends over all its links together, and receives at the same time
    links: int  # to neighbours: 4 in a two-dimensional torus, 6 in a three-dimensional one
    dcn: float  # bytes per second that a host sends to other slices, and receives at the same time
    chips_per_host: int
    devices_per_chip: int  # JAX devices in a topology, each with an equal part of the chip's rates and memory

    @property
    def flops(self) -> float:
        """Dense bfloat16 operations per second."""
        return CHIPS[self.kind].operations

    @property
    def hbm(self) -> float:
        """Bytes of HBM per second."""
        return CHIPS[self.kind].hbm

    @property
    def dimensions(self) -> int:
        """Dimensions of the torus of chips."""
        return self.links // 2

    @property
    def device_gib(self) -> float:
        """HBM in GiB that the compiler leaves to programs on one device."""
        return HBM_GIB[self.name]

    def chips(self, devices: int) -> int:
        """Returns the chips that hold so many devices."""
        return -(-devices // self.devices_per_chip)


GENERATIONS = {
    chip.name: chip
    for chip in (
        Generation("v4", "TPU v4", 32, 300e9, 6, 25e9, 4, 2),
        Generation("v5e", "TPU v5 lite", 16, 200e9, 4, 25e9, 8, 1),
        Generation("v5p", "TPU v5", 95, 600e9, 6, 25e9, 4, 1),
        Generation("v6e", "TPU v6 lite", 32, 400e9, 4, 100e9, 8, 1),
        Generation("tpu7x", "TPU7x", 192, 600e9, 6, 50e9, 4, 2),
    )
}


def generation(topology: str) -> Generation:
    """Returns the generation of a topology such as `v5p:8x8x8`. Raises ValueError for an unknown one."""
    name = topology.partition(":")[0]
    if name not in GENERATIONS:
        raise ValueError(f"topology {topology}: no generation {name}; known: {', '.join(GENERATIONS)}")
    return GENERATIONS[name]
