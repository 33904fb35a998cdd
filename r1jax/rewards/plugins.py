"""Plug-in graders, which a config names by dotted path or by file: parsing, loading and checking them."""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from r1jax.core import errors

FIELD = "config.reward.graders"
FORM = "TASK=PACKAGE.MODULE:FUNCTION or TASK=FILE.py:FUNCTION"


@functools.cache
def parse(entries: Sequence[str]) -> Mapping[str, str]:
    """Returns {task: target} of `TASK=TARGET` entries; a target is MODULE:FUNCTION or FILE.py:FUNCTION.

    Raises ValueError for another form, or a task that is named twice.
    """
    targets: dict[str, str] = {}
    for entry in entries:
        task, _, target = entry.partition("=")
        place, _, function = target.rpartition(":")
        if not (task.strip() and place and function.isidentifier()):
            raise ValueError(f"{FIELD}: {entry!r} is not {FORM}")
        if task in targets:
            raise ValueError(f"{FIELD}: task {task!r} is given twice, as {targets[task]!r} and as {target!r}")
        targets[task] = target
    return targets


@functools.cache
def load(target: str) -> Callable:
    """Returns the function of a target. Raises ImportError, or whatever its module raises, when it cannot be loaded."""
    place, _, name = target.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    if not hasattr(module, name):
        raise ImportError(f"{place} has no function {name!r}")
    return getattr(module, name)


def check(entries: Sequence[str], built_in: Mapping[str, str], override: bool) -> None:
    """Raises ValueError unless every entry names a function that can be called as a grader, `f(request, config)`.

    An entry may replace the grader of a `built_in` task only with `override`. The modules are imported in this process.
    """
    for task, target in parse(entries).items():
        entry = f"{FIELD}: {f'{task}={target}'!r}"
        if task in built_in and not override:
            raise ValueError(
                f"{entry} would replace the built-in grader of {task!r}; give the task another name, or set "
                "config.reward.override_graders=true"
            )
        try:
            function = load(target)
        except Exception as error:  # the module is the user's: it may raise anything
            raise ValueError(f"{entry} cannot be loaded ({errors.named(error)})") from error
        try:
            inspect.signature(function).bind(None, None)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{entry} is no grader ({error}); it is called as f(request, config)") from None


def _module_of_file(path: Path) -> ModuleType:
    """Returns the module of a file, registered under a unique name so that it hides no other module."""
    if not path.is_file():
        raise ImportError(f"there is no file {path}")
    name = f"r1jax_grader_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
