"""The RL loop over four parts: a source of rollouts, an objective, the state of the run and a recorder."""

from r1jax.core import hosts, preempt
from r1jax.models import decoder
from r1jax.rl.journal import Rollout
from r1jax.rl.minibatch import batches, blank_arrays, with_values
from r1jax.rl.objective import Batch, Objective
from r1jax.rl.recorder import Recorder
from r1jax.rl.source import JournalledSource
from r1jax.rl.state import RunState


def train(run: RunState, source: JournalledSource, objective: Objective, recorder: Recorder) -> decoder.Params:
    """Trains to the last update, resuming from the newest checkpoint, and returns the float32 weights.

    Raises Preempted, after a checkpoint, when the process was asked to end: between two updates, or in a rollout, which
    is then drawn again.
    """
    run.restore(objective)
    recorder.begin()
    warm_up(run, source, objective, recorder)
    trace = recorder.trace.running(run.cursor.update)
    with run.stores_closed(), hosts.in_step(), source, trace, run.saved_when_preempted(objective):
        between_updates(run, source, recorder)
        while not run.finished:
            with preempt.deferred():
                first_update = run.begin_rollout()
            if run.compiled != run.settings:
                compile_updates(run, objective, recorder)
            rollout = source.rollout(first_update)
            rollout = source.store(first_update, with_values(run, objective, recorder, rollout))
            advantages = objective.advantages(rollout, first_update)
            recorder.rollout(rollout, advantages, source.staleness(first_update, rollout))
            for batch in batches(run, objective, recorder, rollout, advantages):
                with preempt.deferred():
                    update(run, source, objective, recorder, rollout, batch)
                hosts.raise_if_preempted("the end of an update", run.cursor.update)
                between_updates(run, source, recorder)
    source.prune(run.cursor.rollout_start)
    recorder.phase("done")
    recorder.close()
    return run.params


def update(
    run: RunState,
    source: JournalledSource,
    objective: Objective,
    recorder: Recorder,
    rollout: Rollout,
    batch: Batch,
) -> None:
    """Makes one update on a batch of the rollout, records it, and saves where a checkpoint is due."""
    recorder.phase("update")
    stats = recorder.timed("update", objective.update, run, batch, run.cursor.rollout_start)
    recorder.timer.add(update_flops=objective.flops(run, batch))
    run.count_update()
    recorder.update(stats | batch.figures)
    if batch.last:
        run.finish_rollout(rollout.draws)
    if run.checkpoint_due():
        recorder.phase("checkpoint")
        source.prune(recorder.timed("checkpoint", run.save, objective))


def between_updates(run: RunState, source: JournalledSource, recorder: Recorder) -> None:
    """Evaluates where that is due, and begins the next update in the trace."""
    evaluate(run, source, recorder)
    if not run.finished:
        recorder.trace.begin(run.cursor.update + 1)


def evaluate(run: RunState, source: JournalledSource, recorder: Recorder) -> None:
    """Measures the weights on held-out problems where that is due, and keeps them if they are the best so far."""
    if run.evaluations.is_due(run.cursor.update):
        recorder.phase("evaluation")
        run.evaluations.make(run.cursor.update, source.evaluate, run.params, run.store, recorder.log)


def warm_up(run: RunState, source: JournalledSource, objective: Objective, recorder: Recorder) -> None:
    """Compiles every program of the rollout that is next, on data that changes nothing."""
    compile_updates(run, objective, recorder)
    source.warm_up()


def compile_updates(run: RunState, objective: Objective, recorder: Recorder) -> None:
    """Compiles every program of the updates for rows of the current rollout; a later compilation is then an error."""
    recorder.phase("warm_up")
    objective.warm_up(run, blank_arrays(run.settings, objective.fields))
    run.compiled = run.settings
    run.programs.freeze()
