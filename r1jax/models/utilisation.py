"""Model FLOPs utilisation (MFU): the model's operations over what the devices could have done in the same time."""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from r1jax.core import observe
from r1jax.kernels.tpu import CHIPS


def peak(mesh: Mesh) -> float | None:
    """Returns the FLOP/s that the devices of a mesh can reach together, None for a kind whose peak is not known.

    It is that of bfloat16 whatever the config computes in, or --peak_tflops a device.
    """
    each = observe.peak_tflops()
    if each is not None:
        return each * 1e12 * mesh.size
    device = mesh.devices.flat[0]
    chip = CHIPS.get(device.device_kind)
    return None if chip is None else chip.operations / devices_of_chip(device, jax.devices()) * mesh.size


def devices_of_chip(device, devices) -> int:
    """Returns how many of the devices are on the chip of `device`: 2 of a TPU7x, and of a v4 without megacore."""
    place = lambda one: (getattr(one, "slice_index", None), tuple(one.coords))  # noqa: E731
    return sum(place(other) == place(device) for other in devices)


def with_mfu(timing: Mapping[str, float], peaks: Mapping[str, float | None]) -> dict[str, float]:
    """Returns a row of timing with PHASE_mfu for each phase that has PHASE_flops, PHASE_s and a known peak."""
    row = dict(timing)
    for phase, peak_flops in peaks.items():
        if peak_flops and f"{phase}_flops" in row and row.get(f"{phase}_s"):
            row[f"{phase}_mfu"] = row[f"{phase}_flops"] / (row[f"{phase}_s"] * peak_flops)
    return row
