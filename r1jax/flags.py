"""The command line: every flag of `python -m r1jax.launch` and of launch/*.py, on absl. Imports no JAX."""

import os
import pathlib
from dataclasses import dataclass

from absl import flags as absl_flags

from r1jax import config, schema
from r1jax.core import urls

_PREFIX = "config."
_BOOL_WORDS = ("true", "false")


@dataclass(frozen=True)
class Arguments:
    """A parsed command line. `overrides` are (dotted key, text) in the order given; a later one wins."""

    spec: str  # NAME[:PRESET]
    overrides: tuple[tuple[str, str], ...]
    workdir: pathlib.Path | str  # a text is a URL
    json: pathlib.Path | str | None  # likewise
    sweep: tuple[str, ...]  # FIELD=v1,v2 axes
    sweep_index: int | None
    coordinator: str | None  # HOST:PORT of process 0 of several, or auto
    num_processes: int | None
    process_id: int | None
    heartbeat_s: float | None
    grace_s: float | None
    plan: str | None  # "" plans the run on `topology`, "search" finds a slice
    topology: str  # a TPU slice such as v5p:4x4x8
    slices: int
    response_tokens: str  # MEAN:P99, "" derives them from the config
    price: float | None  # of a chip's hour
    profile: tuple[int, int] | None  # first update to trace, first one after it
    peak_tflops: float | None
    dry_run: bool
    debug: bool
    help: bool


def parse(argv: list[str], is_here: bool = True) -> Arguments:
    """Returns the arguments in `argv` (without the program's name); raises ValueError with one line for a bad one.

    With `is_here` false they are those of a run on a pod: its folders are not looked for on this machine.
    """
    values = _define()
    overrides, rest = _take_overrides(argv)
    rest = _with_value("--plan", _with_value("--explain", rest))
    known = f"known: {', '.join(_names(values))}, --config.FIELD"
    read(values, rest, known, "every argument is a --flag=value")
    if values.sweep_index is not None and not values.sweep:
        raise ValueError(f"--sweep_index={values.sweep_index} needs at least one --sweep=FIELD=v1,v2")
    _check_plan(values)
    if values.topology is not None and values.plan is None:
        overrides.append(("bench.topology", values.topology))
    if values.explain is not None:
        if values.config.partition(":")[0] != "grade":
            raise ValueError("--explain goes with --config=grade alone")
        overrides.append(("explain", values.explain))
    return Arguments(
        spec=values.config,
        overrides=tuple(overrides),
        workdir=_path("workdir", values.workdir, is_here),
        json=_path("json", values.json, is_here) if values.json is not None else None,
        sweep=tuple(values.sweep),
        sweep_index=values.sweep_index,
        coordinator=values.coordinator,
        num_processes=values.num_processes,
        process_id=values.process_id,
        heartbeat_s=values.heartbeat_s,
        grace_s=values.grace_s,
        plan=values.plan,
        topology=values.topology or "",
        slices=values.slices or 1,
        response_tokens=values.response_tokens or "",
        price=values.price,
        profile=_window(values.profile) if values.profile is not None else None,
        peak_tflops=values.peak_tflops,
        dry_run=values.dry_run,
        debug=values.debug,
        help=values.help or values.h or values.helpfull or values.helpshort,
    )


def read(values: absl_flags.FlagValues, argv: list[str], unknown: str, positional: str) -> None:
    """Reads `argv` (without the program's name) into `values`; raises ValueError with one line for what it cannot read.

    The line ends with `unknown` for a flag that is like no other one, with `positional` for an argument that is no flag.
    """
    try:
        rest = values(["r1jax", *argv])[1:]
    except absl_flags.UnrecognizedFlagError as error:
        near = config.hint(f"--{error.flagname}", _names(values)).rstrip("; ")
        raise ValueError(f"unknown flag --{error.flagname}; {near or unknown}") from None
    except absl_flags.Error as error:
        raise ValueError(str(error)) from None
    if rest:
        raise ValueError(f"unexpected argument '{rest[0]}'; {positional}")


def _check_plan(values: absl_flags.FlagValues) -> None:
    """Raises ValueError for flags of --plan without it, and for --plan without a topology."""
    if values.plan is None:
        for name in ("slices", "response_tokens", "price"):
            if values[name].value is not None:
                raise ValueError(f"--{name}={values[name].value} goes with --plan alone")
        if values.topology is not None and values.config.partition(":")[0] != "bench_kernels":
            raise ValueError(f"--topology={values.topology} goes with --plan and --config=bench_kernels alone")
        return
    if values.plan not in ("", "search"):
        raise ValueError(f"--plan={values.plan} is unknown; give --plan, or --plan=search to find a slice")
    if values.topology is None:
        raise ValueError("--plan needs --topology=GENERATION:SHAPE, such as v5p:4x4x8, and --plan=search v5p alone")
    for name in ("sweep", "coordinator", "profile", "peak_tflops"):
        if values[name].value:
            raise ValueError(f"--plan runs nothing and takes one config; give it without --{name}")


def _define() -> absl_flags.FlagValues:
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_string(
        "config", "", "NAME[:PRESET]: what to run, and at which size (default: tiny).", flag_values=values
    )
    absl_flags.DEFINE_string("workdir", "runs", "Folder or URL for checkpoints, metrics, reports.", flag_values=values)
    absl_flags.DEFINE_string("json", None, "File for the run's figures, as JSON.", flag_values=values)
    absl_flags.DEFINE_string(
        "plan",
        None,
        "Run nothing: compile for --topology, print memory, time and cost; =search finds the smallest slice.",
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "topology", None, "--plan, bench_kernels: the TPU to compile for, such as v5p:2x2x1.", flag_values=values
    )
    absl_flags.DEFINE_integer(
        "slices", None, "--plan: so many slices of --topology (default 1).", lower_bound=1, flag_values=values
    )
    absl_flags.DEFINE_string(
        "response_tokens", None, "--plan: MEAN:P99 of the responses' lengths in tokens.", flag_values=values
    )
    absl_flags.DEFINE_float(
        "price", None, "--plan: price of a chip's hour, in any currency.", lower_bound=0, flag_values=values
    )
    absl_flags.DEFINE_string(
        "explain",
        None,
        "grade: show how the row of this id is graded, step by step; without an id the first rows.",
        flag_values=values,
    )
    absl_flags.DEFINE_multi_string(
        "sweep", [], "FIELD=v1,v2: one run a value; repeat the flag for a product.", flag_values=values
    )
    absl_flags.DEFINE_integer("sweep_index", None, "Run only this point of the sweep, from 0.", flag_values=values)
    absl_flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0 when several processes share a run; auto lets JAX find it.",
        flag_values=values,
    )
    absl_flags.DEFINE_integer(
        "num_processes", None, "How many processes share the run.", lower_bound=1, flag_values=values
    )
    absl_flags.DEFINE_integer(
        "process_id", None, "Which of them this one is, from 0.", lower_bound=0, flag_values=values
    )
    absl_flags.DEFINE_float(
        "heartbeat_s",
        None,
        "A process silent for so many seconds is lost (default 30).",
        lower_bound=1,
        flag_values=values,
    )
    absl_flags.DEFINE_float(
        "grace_s",
        None,
        "After SIGTERM the run saves and ends within so many seconds (default 30).",
        lower_bound=1,
        flag_values=values,
    )
    absl_flags.DEFINE_string(
        "profile",
        None,
        "START:STOP: write a profiler trace of updates START to STOP - 1 to the stage's folder.",
        flag_values=values,
    )
    absl_flags.DEFINE_float(
        "peak_tflops",
        None,
        "Peak TFLOP/s of one device, for the MFU; default: that of its kind, if it is a TPU's.",
        lower_bound=1e-6,
        flag_values=values,
    )
    absl_flags.DEFINE_boolean("dry_run", False, "Print every resolved field and run nothing.", flag_values=values)
    absl_flags.DEFINE_boolean("debug", False, "Show the traceback of a user error.", flag_values=values)
    for name in ("help", "helpfull", "helpshort"):
        absl_flags.DEFINE_boolean(name, False, "Show this text.", flag_values=values)
    absl_flags.DEFINE_boolean("h", False, "Show this text.", flag_values=values)
    return values


def _names(values: absl_flags.FlagValues) -> list[str]:
    return [f"--{name}" for name in values if name not in ("h", "helpfull", "helpshort")]


def _path(flag: str, text: str, is_here: bool) -> pathlib.Path | str:
    """Returns the path, or a URL as text.

    Raises ValueError now when nothing could be written to a path at the end of a long run.
    """
    if not text:
        raise ValueError(f"--{flag}= is empty; give a path")
    if not is_here:
        if urls.is_url(text):
            raise ValueError(f"--{flag}={text}: r1jax writes to paths, not to URLs, on a pod; mount the bucket there")
        return pathlib.Path(urls.plain(text))
    if urls.is_url(text):
        return text
    path = pathlib.Path(urls.plain(text)).expanduser()
    if flag == "json" and path.is_dir():
        raise ValueError(f"--json={text} is a folder; give a file")
    folder = path.absolute().parent if flag == "json" else path.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"--{flag}={text}: {folder} is a file; give a path in a folder")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--{flag}={text}: {folder} cannot be written to")
    return path


def _window(text: str) -> tuple[int, int]:
    """Returns the updates START and STOP of --profile."""
    first, _, end = text.partition(":")
    if not (first.isascii() and first.isdigit() and end.isascii() and end.isdigit() and 1 <= int(first) < int(end)):
        raise ValueError(
            f"--profile={text}: needs START:STOP with 1 <= START < STOP, as --profile=3:5 for a trace of updates 3 and 4"
        )
    return int(first), int(end)


def _take_overrides(argv: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns the `--config.KEY=VALUE`, `--config.KEY VALUE` and bare `--config.BOOL` in argv, and what is left."""
    overrides, rest, pending = [], [], list(argv)
    while pending:
        argument = pending.pop(0)
        name = argument.removeprefix("-").removeprefix("-")
        if not argument.startswith("-") or not name.startswith(_PREFIX):
            rest.append(argument)
            continue
        key, equals, text = name.removeprefix(_PREFIX).partition("=")
        if not equals:
            text = _following_value(key, pending)
        overrides.append((key, text))
    return overrides, rest


def _with_value(flag: str, arguments: list[str]) -> list[str]:
    """Returns the arguments with an empty value for `flag` where it has none: at the end, or before another flag."""
    names = (flag, flag[1:])
    return [
        f"{argument}=" if argument in names and after.startswith("-") else argument
        for argument, after in zip(arguments, [*arguments[1:], "-"], strict=False)
    ]


def _following_value(key: str, pending: list[str]) -> str:
    """Removes and returns the value after a `--config.KEY` that has no `=`; a bool without a value is true."""
    is_bool = config.field_type(schema.Config(), key) is bool
    if pending and (pending[0].lower() in _BOOL_WORDS if is_bool else not pending[0].startswith("--")):
        return pending.pop(0)
    if not is_bool:
        raise ValueError(f"--config.{key} needs a value: --config.{key}=VALUE")
    return "true"


def flag_lines(values: absl_flags.FlagValues, more: dict[str, str]) -> list[str]:
    """Returns one line a flag, and one for each of `more`, by name."""
    texts = {name: (values[name[2:]].help or "").partition("\n")[0].rstrip(";") for name in _names(values)} | more
    width = max(len(name) for name in texts)
    return ["flags:", *(f"  {name:{width}}  {texts[name]}" for name in sorted(texts))]


def help_text() -> str:
    """Returns the usage, the flags, and one line a config with the presets it takes."""
    field = {"--config.FIELD=VALUE": "Set one field, by its dotted name; --dry_run lists them all."}
    lines = ["usage: python -m r1jax.launch --config=NAME[:PRESET] [flags]", "", *flag_lines(_define(), field)]
    entries = config.entries()
    width = max((len(entry.name) for entry in entries), default=0)
    lines += ["", "configs:"]
    lines += [f"  {entry.name:{width}}  {entry.summary} [{', '.join(entry.presets)}]" for entry in entries]
    return "\n".join(lines)
