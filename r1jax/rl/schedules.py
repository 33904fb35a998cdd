"""When things change during RL, counted in policy updates.

One rollout feeds several updates, so a change asked for at update u takes effect at the first rollout that starts at or
after u: pass the update at which a rollout starts. Starts are the multiples of updates_per_rollout below the total.
"""

from r1jax.schema import GRPOConfig, SamplerConfig, Schedule


def value_at(schedule: Schedule, update: int, default: float) -> float:
    """Returns the scheduled value of the rollout that starts at `update`; the default before the first pair.

    Raises ValueError when the updates of the schedule do not rise.
    """
    value, previous = default, -1
    for start, scheduled in schedule:
        if start <= previous:
            raise ValueError(f"value_at: schedule {schedule} has update {start} after {previous}, needs rising updates")
        if start <= update:
            value = scheduled
        previous = start
    return value


def kl_coef(config: GRPOConfig, first_update: int) -> float:
    """Returns beta of the rollout that starts at an update."""
    return value_at(config.kl_coef_schedule, first_update, config.kl_coef)


def max_new_tokens(config: SamplerConfig, first_update: int) -> int:
    """Returns the longest response, in tokens, of the rollout that starts at an update."""
    return int(value_at(config.max_new_tokens_schedule, first_update, config.max_new_tokens))


def rollout_starts(total_updates: int, updates_per_rollout: int) -> range:
    """Returns the update at which each rollout starts; ValueError when a count is not positive."""
    if total_updates < 1 or updates_per_rollout < 1:
        raise ValueError(f"rollout_starts: {total_updates=} {updates_per_rollout=}, needs both at least 1")
    return range(0, total_updates, updates_per_rollout)


def first_start_at_or_after(update: int, updates_per_rollout: int) -> int:
    """Returns the update at which a change asked for at `update` takes effect."""
    return -(-update // updates_per_rollout) * updates_per_rollout


def updates_in_rollout(first_update: int, total_updates: int, updates_per_rollout: int) -> int:
    """Returns how many updates use the rollout that starts at `first_update`; fewer than usual for a short last one.

    Raises ValueError when no rollout starts at that update.
    """
    if first_update not in rollout_starts(total_updates, updates_per_rollout):
        raise ValueError(
            f"updates_in_rollout: start {first_update}, needs a multiple of {updates_per_rollout} in "
            f"[0, {total_updates})"
        )
    return min(updates_per_rollout, total_updates - first_update)


def reference_refresh_due(rollout_start_update: int, last_refresh_update: int, every: int) -> bool:
    """Returns whether the reference is to be replaced by the policy before the rollout that starts at this update.

    A refresh is due at the first rollout at or after each multiple of `every`; several multiples passed at once
    refresh once. `last_refresh_update` is the update of the last refresh, 0 at first (the reference is then the
    initial policy). `every` 0 never refreshes.
    """
    return every > 0 and rollout_start_update // every > last_refresh_update // every
