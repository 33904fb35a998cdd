"""The paths of a command: where they are URLs, local ones take their place while the stage runs. Imports no JAX.

Whoever adds a field that names a file or folder adds it here. What a run writes down has the URLs (`core.remote`).
"""

import contextlib
import re
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from r1jax import config, schema
from r1jax.core import files, remote, urls

# Fields that name files or folders to be read; of those in LISTS several, separated by commas, each perhaps with :SPLIT.
LISTS = ("data.path", "data.eval_path", "data.general_path", "data.safety_path")
READ = (
    *LISTS,
    *("checkpoint", "inputs", "model.checkpoint", "judge.checkpoint", "coldstart.teacher", "coldstart.prompted_model"),
    *("scenarios.helpful_model", "scenarios.safety_model", "distill.examples", "coldstart.examples"),
    *("rejection.general_path", "rejection.judged_prompts", "bench.code_files"),
)
WRITTEN = ("output",)
HERE_ALONE = ("coldstart.review",)  # a file that people change while no run is at work
SETTINGS = ("set", "variants")  # hold FIELD=VALUE of stages
ONE_PROCESS = (
    "several processes need one folder that all see; mount the bucket (gcsfuse, s3fs) and give the mount's path"
)
_SETTING = re.compile(r"(?P<key>[\w.]+)=(?P<value>\S+(?:(?<=,)\s+(?![\w.]+=)\S+)*)")


@contextlib.contextmanager
def on_this_machine(asked: schema.Config, workdir: Path | str) -> Generator[tuple[schema.Config, Path]]:
    """Yields (config, working folder) with local paths in place of URLs.

    What is to be read is fetched first. At the end of the block what was written is copied to its URL: the working
    folder in any case, other outputs where nothing was raised. Raises RemoteError, in one line, for a URL that nothing
    can be read from or written to, and for one of a field that takes none.
    """
    for key in HERE_ALONE:
        if urls.is_url(value := config.flatten(asked)[key]):
            raise urls.RemoteError(f"config.{key}={value}: is read and written on this machine alone; give a path")
    fields = config.flatten(asked)
    asked = config.with_values(asked, {key: urls.plain(fields[key]) for key in (*WRITTEN, *HERE_ALONE)})
    target = asked.output if urls.is_url(asked.output) else ""
    if target and urls.RemoteFolder(target).kind() == "folder":
        raise urls.RemoteError(f"{target} exists already; name another --config.output or remove it")
    with contextlib.ExitStack() as stack:
        stack.callback(remote.forget)
        if isinstance(workdir, Path):
            folder = workdir
        elif asked.list:  # looks at the folder alone, also while a run is at work there
            folder = remote.records(workdir, required=True)
        else:
            folder = stack.enter_context(remote.work_folder(workdir))
        local = changed(asked, remote.looked_at if asked.list else remote.local)
        if target:
            output = stack.enter_context(remote.output(target))
            local = schema.replace(local, output=str(output))
        yield local, folder


def changed(asked: schema.Config, change: Callable[[str], str]) -> schema.Config:
    """Returns a config with `change` made to every path that is read."""
    values: dict[str, Any] = {}
    for key, value in config.flatten(asked).items():
        if key in SETTINGS:
            new = tuple(_SETTING.sub(lambda match: _of_setting(match, change), entry) for entry in value)
        elif key in READ:
            new = (
                tuple(_one(key, part, change) for part in value)
                if isinstance(value, tuple)
                else _one(key, value, change)
            )
        else:
            continue
        if new != value:
            values[key] = new
    return config.with_values(asked, values)


def _of_setting(match: re.Match, change: Callable[[str], str]) -> str:
    key = next((key for key in READ if match["key"] == key or match["key"].endswith(f".{key}")), "")
    return f"{match['key']}={_one(key, match['value'], change)}" if key else match[0]


def _one(key: str, value: str, change: Callable[[str], str]) -> str:
    """Returns the value of a field with `change` made to each path in it."""
    if key not in LISTS:
        return change(value) if value else value
    return ",".join(_with_split(part.strip(), change) for part in value.split(",")) if "://" in value else value


def _with_split(path: str, change: Callable[[str], str]) -> str:
    """Returns a path after `change`, which the :SPLIT behind a URL has no part in."""
    place, slash, name = path.rpartition("/")
    name, colon, split = name.partition(":") if urls.is_url(path) else (name, "", "")
    return f"{change(f'{place}{slash}{name}')}{colon}{split}"


def refuse(asked: schema.Config, named: Mapping[str, Path | str | None], why: str) -> None:
    """Raises ValueError if a path of the config, or one of {flag: path}, is a URL; `why` says why none can be one."""
    seen = [f"--{flag}={value}" for flag, value in named.items() if isinstance(value, str)]

    def look(value: str) -> str:
        if urls.is_url(value):
            seen.append(value)
        return value

    changed(asked, look)
    if urls.is_url(asked.output):
        seen.append(asked.output)
    if seen:
        raise ValueError(f"{seen[0]}: {why}")


def write_json(place: Path | str, value: object) -> None:
    """Writes a value as JSON to a path or, where it is a text, to a URL."""
    text = remote.shown(config.encode_json(value))
    if isinstance(place, str):
        remote.write(place, text.encode())
    else:
        files.write_text(place, text)
