"""Datasheet figures: as published, and in agreement with the compiler's memory."""

import pytest

from r1jax.plan import chips

PUBLISHED = {"v4": (275, 1228), "v5e": (197, 819), "v5p": (459, 2765), "v6e": (918, 1640), "tpu7x": (2307, 7380)}


@pytest.mark.parametrize("name", chips.GENERATIONS)
def test_a_generation_has_the_published_teraflops_and_gigabytes_a_second(name):
    chip = chips.GENERATIONS[name]
    assert (chip.flops / 1e12, chip.hbm / 1e9) == PUBLISHED[name]


@pytest.mark.parametrize("chip", chips.GENERATIONS.values(), ids=chips.GENERATIONS)
def test_the_compiler_leaves_programs_most_of_the_memory(chip):
    """v5p's page gives 95 of 96 GiB, and the compiler leaves a little more than that."""
    assert 0.94 < chip.device_gib * chip.devices_per_chip / chip.hbm_gib < 1.01


@pytest.mark.parametrize("chip", chips.GENERATIONS.values(), ids=chips.GENERATIONS)
def test_a_link_carries_50_or_100_gigabytes_a_second(chip):
    assert chip.ici / chip.links in (50e9, 100e9)
    assert chip.dimensions == (2 if chip.name in ("v5e", "v6e") else 3)


def test_devices_are_counted_into_chips():
    assert [chips.GENERATIONS[name].chips(8) for name in ("v4", "v5p", "tpu7x")] == [4, 8, 4]


def test_a_topology_names_its_generation():
    assert chips.generation("v5p:8x8x8") is chips.GENERATIONS["v5p"]
    with pytest.raises(ValueError, match="no generation v9; known: v4, v5e, v5p, v6e, tpu7x"):
        chips.generation("v9:2x2")
