"""Run one config, or a sweep over it: `python -m r1jax.launch --config=NAME[:PRESET] [--config.FIELD=VALUE ...]`.

Exit codes: 0 done, 1 an unexpected failure or a failed point of a sweep, 2 something the user can mend, 3 another
process of the run was lost, 75 asked to end by SIGTERM (the same command goes on), 130 interrupted.
"""

import io
import os
import sys
import traceback

from r1jax import config, flags, paths, schema, stage_table, sweep
from r1jax.core import errors, lock, preempt, remote, urls

_USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def execute(arguments: flags.Arguments) -> int:
    """Does what the command line asks and returns the exit code of the process."""
    if arguments.help:
        print(flags.help_text())
        return 0
    resolved = config.load(arguments.spec, arguments.overrides)
    _refuse_unmeasured(resolved.stage, arguments)
    if isinstance(arguments.json, str):
        urls.RemoteFolder(arguments.json)  # raises now what would be raised at the end
    if arguments.sweep:
        if arguments.coordinator or arguments.num_processes:
            raise ValueError("--sweep runs its points in processes of one machine; give it without --coordinator")
        return sweep.run(arguments, resolved)
    stage_table.check(resolved, config.keys(arguments.overrides))
    if arguments.plan is not None:
        return _plan(resolved, arguments)
    if not arguments.dry_run:
        return _run(resolved, arguments)
    print(config.dump(resolved), end="")
    if arguments.json is not None:
        paths.write_json(arguments.json, config.flatten(resolved))
    return 0


def _plan(resolved: schema.Config, arguments: flags.Arguments) -> int:
    """Plans the run and returns 0, or 2 where it does not fit."""
    paths.refuse(resolved, {}, "--plan reads no URL; give a local folder")
    run = stage_table.planner()
    figures = run(
        resolved,
        arguments.spec,
        arguments.overrides,
        arguments.topology,
        slices=arguments.slices,
        search=arguments.plan == "search",
        response_tokens=arguments.response_tokens,
        price=arguments.price,
    )
    if arguments.json is not None:
        paths.write_json(arguments.json, figures)
    return 0 if figures["fits"] else 2


def _refuse_unmeasured(stage: str, arguments: flags.Arguments) -> None:
    """Raises ValueError for a flag that measures updates when the stage makes none."""
    for flag, value in (("profile", arguments.profile), ("peak_tflops", arguments.peak_tflops)):
        if value is not None and stage in stage_table.STAGES and not stage_table.STAGES[stage].updates:
            raise ValueError(f"--{flag} measures updates, and {stage} makes none; leave it out")


def _run(resolved: schema.Config, arguments: flags.Arguments) -> int:
    """Runs the stage, together with the other processes when there are any, and returns the exit code."""
    from r1jax.core import hosts, observe, wandb_log  # bring numpy, which the command line does without

    grace_s = preempt.GRACE_S if arguments.grace_s is None else arguments.grace_s
    preempt.listen(grace_s)
    run = stage_table.function(resolved.stage)
    heartbeat_s = hosts.HEARTBEAT_S if arguments.heartbeat_s is None else arguments.heartbeat_s
    hosts.start(arguments.coordinator, arguments.num_processes, arguments.process_id, heartbeat_s)
    preempt.listen(grace_s)  # joining the others gives the signal to JAX
    if not stage_table.several_processes(resolved.stage):
        hosts.require_one(resolved.stage)
    if hosts.process_count() > 1:
        paths.refuse(resolved, {"workdir": arguments.workdir, "json": arguments.json}, paths.ONE_PROCESS)
        remote.refuse(paths.ONE_PROCESS)  # also what records of earlier stages name
    wandb_log.require(resolved.watch.wandb_project)
    observe.ask(observe.MeasurementRequest(arguments.profile, arguments.peak_tflops))
    with paths.on_this_machine(resolved, arguments.workdir) as (local, workdir):
        figures = run(local, workdir)
    observe.mention_missing_trace()
    if arguments.json is not None and hosts.is_writer():
        paths.write_json(arguments.json, figures)
    hosts.stop()
    return 0


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    debug = "--debug" in argv
    if not debug:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ warnings would bury a one-line error
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a text that cannot be shown ends no run
    try:
        return execute(flags.parse(argv))
    except _USER_ERRORS as error:
        return _failed(error, 2, f"error: {errors.one_line(error)}", debug)
    except KeyboardInterrupt as error:
        return _failed(error, 130, "interrupted", debug=False)
    except preempt.Preempted:
        return _preempted()
    except Exception as error:
        from r1jax.core import watch

        if isinstance(error, watch.PeerLost):
            return _failed(error, watch.LOST_EXIT, f"error: {errors.one_line(error)}", debug)
        code = _failed(error, 1, "", debug=False)
        if code == preempt.PREEMPTED_EXIT:
            return code
        raise


def _preempted() -> int:
    """Prints that the run ends because of a notice and returns the exit code, as `_failed` does."""
    from r1jax.core import hosts

    print("ended as asked; the same command again goes on from here", file=sys.stderr)
    lock.release_all()
    hosts.leave(preempt.PREEMPTED_EXIT)
    return preempt.PREEMPTED_EXIT


def _failed(error: BaseException, code: int, message: str, debug: bool) -> int:
    """Prints why the run failed and returns the exit code.

    In a run of several processes it does not return: it ends this process and lets the others know why. If the failure
    was caused by a lost process, the message names that process instead.
    """
    from r1jax.core import hosts

    if preempt.requested():  # the notice may have ended what failed: another process of the run, or workers
        print(f"error: {remote.shown(errors.one_line(error))}", file=sys.stderr)
        return _preempted()
    hosts.await_verdict(error)
    if debug or (not message and hosts.process_count() > 1):
        traceback.print_exception(error)
    if message:
        print(remote.shown(message), file=sys.stderr)
    lock.release_all()
    hosts.fail(error, code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
