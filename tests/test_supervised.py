"""Claims about which examples an epoch trains on: all of them, in updates that the lengths of epochs do not cut."""

import numpy as np
import pytest

from r1jax.data.hashing import hash64
from r1jax.data.prompts import keyed_permutation
from r1jax.schema import SFTConfig
from r1jax.train.epochs import examples_of_updates


@pytest.mark.parametrize(
    ("count", "epochs", "size", "sizes"),
    [
        (12, 1, 7, [7, 5]),
        (12, 2, 7, [7, 7, 7, 3]),
        (12, 2, 5, [5, 5, 5, 5, 4]),
        (12, 3, 4, [4] * 9),
        (3, 2, 128, [3, 3]),
        (1, 1, 1, [1]),
    ],
)
def test_every_example_is_trained_once_an_epoch_and_the_last_update_takes_the_rest(count, epochs, size, sizes):
    updates = examples_of_updates(count, epochs, size, "distill", 0)
    assert [len(chosen) for chosen in updates] == sizes
    stream = np.concatenate(updates).reshape(epochs, count)
    assert all(sorted(epoch) == list(range(count)) for epoch in stream)


def test_updates_that_divide_an_epoch_are_those_of_each_epochs_own_order():
    updates = examples_of_updates(12, 2, 4, "stage1_coldstart", 3)
    orders = [keyed_permutation(12, hash64("stage1_coldstart", 3, "shuffle", epoch)) for epoch in range(2)]
    expected = [order[start : start + 4] for order in orders for start in (0, 4, 8)]
    assert np.array_equal(updates, expected)


@pytest.mark.parametrize("field", ["epochs", "examples_per_update"])
def test_no_epoch_and_no_example_an_update_are_refused(field):
    with pytest.raises(ValueError, match=f"SFTConfig.{field}=0 must be at least 1"):
        SFTConfig(**{field: 0})
