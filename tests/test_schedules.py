import pytest

from r1jax.rl.schedules import (
    first_start_at_or_after,
    reference_refresh_due,
    rollout_starts,
    updates_in_rollout,
    value_at,
)


@pytest.mark.parametrize(("asked", "effective"), [(8200, 8208), (1300, 1312), (400, 400), (0, 0), (1, 16)])
def test_a_change_takes_effect_at_the_first_rollout_that_starts_at_or_after_it(asked, effective):
    schedule = ((0, 1.0), (asked, 2.0)) if asked else ((0, 2.0),)
    starts = rollout_starts(10400, 16)
    assert next(start for start in starts if value_at(schedule, start, 0.0) == 2.0) == effective
    assert first_start_at_or_after(asked, 16) == effective


def test_value_at_is_the_default_without_a_schedule_and_before_its_first_pair():
    assert value_at((), 5, 0.5) == 0.5
    assert [value_at(((10, 3.0), (20, 4.0)), update, 0.5) for update in (9, 10, 19, 20, 99)] == [
        0.5,
        3.0,
        3.0,
        4.0,
        4.0,
    ]


def test_value_at_refuses_updates_that_do_not_rise():
    with pytest.raises(ValueError, match="update 5 after 5"):
        value_at(((0, 1.0), (5, 2.0), (5, 3.0)), 0, 0.0)


def test_10400_updates_of_16_are_650_whole_rollouts():
    starts = rollout_starts(10400, 16)
    assert (len(starts), starts[-1]) == (650, 10384)
    assert {updates_in_rollout(start, 10400, 16) for start in starts} == {16}


@pytest.mark.parametrize(("total", "last_start", "last_count"), [(1700, 1696, 4), (5, 0, 5), (33, 32, 1)])
def test_the_last_rollout_is_short_when_the_total_is_no_multiple(total, last_start, last_count):
    starts = rollout_starts(total, 16)
    assert starts[-1] == last_start and updates_in_rollout(last_start, total, 16) == last_count
    assert sum(updates_in_rollout(start, total, 16) for start in starts) == total


@pytest.mark.parametrize("start", [-16, 8, 10400])
def test_updates_in_rollout_refuses_what_is_no_start(start):
    with pytest.raises(ValueError, match=f"start {start}"):
        updates_in_rollout(start, 10400, 16)


def test_rollout_starts_refuse_counts_below_one():
    with pytest.raises(ValueError, match="total_updates=0"):
        rollout_starts(0, 16)


def refreshes(total: int, per_rollout: int, every: int) -> list[int]:
    last, found = 0, []
    for start in rollout_starts(total, per_rollout):
        if reference_refresh_due(start, last, every):
            found.append(start)
            last = start
    return found


def test_reference_refreshes_every_400_updates_exactly_when_16_divides_400():
    assert refreshes(10400, 16, 400) == list(range(400, 10400, 400))


def test_reference_refreshes_at_the_first_start_after_each_multiple_otherwise():
    assert refreshes(420, 16, 100) == [112, 208, 304, 400]


def test_reference_refreshes_once_when_a_rollout_passes_several_multiples_and_never_for_zero():
    assert refreshes(64, 16, 5) == [16, 32, 48]
    assert refreshes(64, 16, 0) == []
