"""Run one config, or a sweep over it: `python -m r1jax.launch --config=NAME[:PRESET] [--config.FIELD=VALUE ...]`.

Exit codes: 0 done, 1 an unexpected failure or a failed point of a sweep, 2 something the user can mend, 130 interrupted.
"""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable

from r1jax import config, flags, sweep

_USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def stage_function(name: str) -> Callable:
    """Returns `r1jax.stages.NAME.run`; raises ValueError when there is no such stage."""
    module = f"r1jax.stages.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        raise ValueError(f"no stage named '{name}' in r1jax/stages")
    return importlib.import_module(module).run


def execute(arguments: flags.Arguments) -> int:
    """Does what the command line asks and returns the exit code of the process."""
    if arguments.help:
        print(flags.help_text())
        return 0
    resolved = config.load(arguments.spec, arguments.overrides)
    if arguments.sweep:
        return sweep.run(arguments, resolved)
    if arguments.dry_run:
        print(config.dump(resolved), end="")
        figures = config.flatten(resolved)
    else:
        figures = stage_function(resolved.stage)(resolved, arguments.workdir)
    if arguments.json is not None:
        config.write_json(arguments.json, figures)
    return 0


def main(argv: list[str]) -> int:
    """Runs the command line `argv` (without the program's name) and returns the exit code."""
    debug = "--debug" in argv
    if not debug:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ warnings would bury a one-line error
    try:
        return execute(flags.parse(argv))
    except _USER_ERRORS as error:
        if debug:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {(error.strerror or type(error).__name__).lower()}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
