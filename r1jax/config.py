"""Load a config by name, override fields by dotted key, expand sweeps, flatten and hash. Imports no JAX.

A config is a module r1jax/configs/NAME.py with a docstring, `PRESETS` (the sizes it takes: a literal tuple of names, or
a group of configs/_presets.py, as `_presets.EVERY`) and `config(preset) -> schema.Config`. Everything a user can get
wrong raises ValueError with one line that names what to type.
"""

import ast
import dataclasses
import decimal
import difflib
import functools
import hashlib
import importlib
import itertools
import json
import math
import pathlib
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from r1jax import schema
from r1jax.core import files

DEFAULT_PRESET = "tiny"
_ALIASES = {"from": "from_stage"}  # `from` is a word of Python
_RESERVED = {"stage": "--config=NAME", "preset": "--config=NAME:PRESET"}
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class ConfigSummary:
    """What `--help` shows of one config: its name, its docstring's first line and the presets it takes."""

    name: str
    summary: str
    presets: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """One point of a sweep: a name usable as a folder, its overrides as (dotted key, text), and its resolved config."""

    slug: str
    overrides: tuple[tuple[str, str], ...]
    config: schema.Config


def entries() -> list[ConfigSummary]:
    """Returns every config in alphabetical order, read from the sources without running them."""
    folders = [pathlib.Path(folder) for folder in importlib.import_module("r1jax.configs").__path__]
    paths = {path.stem: path for folder in folders for path in folder.glob("[!_]*.py")}
    return [_entry(paths[name]) for name in sorted(paths)]


def _entry(path: pathlib.Path) -> ConfigSummary:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    presets = (DEFAULT_PRESET,)
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["PRESETS"]:
            presets = _sizes(node.value)
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    return ConfigSummary(path.stem, summary, presets)


def _sizes(value: ast.expr) -> tuple[str, ...]:
    """Returns the names in a module's PRESETS, which is a literal tuple or MODULE.NAME of r1jax/configs."""
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
        return getattr(importlib.import_module(f"r1jax.configs.{value.value.id}"), value.attr)
    return tuple(ast.literal_eval(value))


def student_of(size: str) -> str:
    """Returns the size of the student in a recipe of `size`, at which its `distill` and `student_rl` run."""
    return importlib.import_module("r1jax.configs._presets").SIZES[size].student


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> schema.Config:
    """Returns the config named by `NAME[:PRESET]` with (dotted key, text) overrides applied; a later one wins."""
    name, colon, preset = spec.partition(":")
    known = {entry.name: entry for entry in entries()}
    if not name:
        raise ValueError(f"--config=NAME[:PRESET] is needed; known: {', '.join(known)}")
    if name not in known:
        raise ValueError(f"no config named '{name}'; {hint(name, known)}known: {', '.join(known)}")
    preset = preset if colon else DEFAULT_PRESET
    presets = known[name].presets
    if preset not in presets:
        raise ValueError(
            f"config '{name}' has no preset '{preset}'; {hint(preset, presets)}known: {', '.join(presets)}"
        )
    base = importlib.import_module(f"r1jax.configs.{name}").config(preset)
    return override(base, overrides)


def override(config: schema.Config, overrides: Iterable[tuple[str, str]]) -> schema.Config:
    """Returns `config` with every (dotted key, text) applied at once, so that cross-field checks see the final values.

    `grpo.preset` sets the fields of the loss (configs/_losses.py), which the other overrides may change again.
    Raises ValueError for an unknown field, a value of another type, or a combination that a config class refuses.
    """
    changes: dict = {}
    for key, text in overrides:
        key = _ALIASES.get(key, key)
        if key in _RESERVED:
            raise ValueError(f"config.{key} is chosen by {_RESERVED[key]}, not by an override")
        annotation = field_type(config, key)
        *parents, leaf = key.split(".")
        inner = functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, changes)
        inner[leaf] = parse(text, annotation, f"config.{key}")
    if preset := changes.get("grpo", {}).get("preset"):
        if config.grpo.advantage == "gae":
            raise ValueError(
                f"config.grpo.preset={preset}: this config is PPO's, which has a critic; use --config=r1_zero"
            )
        changes["grpo"] = importlib.import_module("r1jax.configs._losses").PRESETS[preset] | changes["grpo"]
    return _replace(config, changes)


def keys(overrides: Iterable[tuple[str, str]]) -> list[str]:
    """Returns the dotted keys that overrides set, as the schema names them."""
    return [_ALIASES.get(key, key) for key, _ in overrides]


def with_values(config: schema.Config, values: Mapping[str, typing.Any]) -> schema.Config:
    """Returns `config` with other values at dotted keys, all at once."""
    changes: dict = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, changes)[leaf] = value
    return _replace(config, changes)


def _replace(node, changes: dict):
    values = {
        name: _replace(getattr(node, name), change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return dataclasses.replace(node, **values)


def field_type(config: schema.Config, key: str):
    """Returns the annotation of the field at a dotted key, or raises ValueError with the nearest name."""
    node, annotation, walked = config, type(config), []
    for name in key.split("."):
        if not dataclasses.is_dataclass(node):
            raise ValueError(f"config.{key}: '{'.'.join(walked)}' is {node!r}, which has no fields of its own")
        annotations = _annotations(type(node))
        if name not in annotations:
            raise ValueError(_unknown_field(config, type(node).__name__, annotations, name, key))
        node, annotation = getattr(node, name), annotations[name]
        walked.append(name)
    return annotation


@functools.cache
def _annotations(kind: type[typing.Any]) -> dict[str, typing.Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _unknown_field(config: schema.Config, owner: str, annotations: dict, name: str, key: str) -> str:
    message = f"{owner} has no field '{name}' (in config.{key}); "
    elsewhere = [other for other in flatten(config) if other.rpartition(".")[2] == name]
    if elsewhere:
        return f"{message}did you mean {' or '.join(repr(other) for other in elsewhere)}?"
    near = hint(name, annotations)
    return message + (near.rstrip("; ") if near else f"it has: {', '.join(annotations)}")


def hint(name: str, known: Iterable[str]) -> str:
    """Returns "did you mean 'x'?; " for the known name nearest to `name`, or "" when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?; " if near else ""


def parse(text: str, annotation, where: str):
    """Returns `text` as a value of `annotation`; raises ValueError that names `where` and the expected type."""
    if annotation is str:
        return text
    try:
        value = _typed(_literal(text.strip(), annotation), annotation)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, ArithmeticError):
        raise ValueError(f"{where}={text}: expected {describe(annotation)}") from None
    if annotation == schema.Schedule:
        _check_schedule(value, f"{where}={text}")
    return value


def _check_schedule(schedule: schema.Schedule, where: str) -> None:
    updates = [update for update, _ in schedule]
    if updates and (updates[0] != 0 or any(b <= a for a, b in itertools.pairwise(updates))):
        raise ValueError(f"{where}: the updates of a schedule must begin at 0 and rise, as in ((0,1.0),(10,0.5))")


def _literal(text: str, annotation):
    """Returns the text itself for scalars and, for tuples, the Python literal that it spells."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if text.lower() in ("none", "null") else _literal(text, inner[0])
    if origin is not tuple:
        return text
    if not text:
        return ()
    if str in arguments and not text.startswith(("(", "[", "'", '"')):
        return tuple(part.strip() for part in text.split(","))
    value = ast.literal_eval(text)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _typed(value, annotation):
    """Returns `value` (text, or a parsed literal) converted to `annotation`; raises ValueError or TypeError."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _typed(value, inner[0])
    if origin is typing.Literal:
        choices = {str(choice): choice for choice in arguments}
        return choices[str(value)] if str(value) in choices else _refuse()
    if origin is tuple:
        return _typed_tuple(value, arguments)
    if annotation is bool:
        return _BOOLEANS[str(value).lower()] if str(value).lower() in _BOOLEANS else _refuse()
    if annotation is str:
        return value if isinstance(value, str) else _refuse()
    if isinstance(value, bool):
        _refuse()
    if annotation is int:
        number = decimal.Decimal(str(value))
        return int(number) if number.is_finite() and abs(number) < 10**18 and number == int(number) else _refuse()
    if annotation is float:
        number = float(value)
        return number if math.isfinite(number) else _refuse()
    return _refuse()


def _typed_tuple(value, arguments: tuple):
    if not isinstance(value, tuple | list):
        _refuse()
    kinds = itertools.repeat(arguments[0], len(value)) if arguments[1:] == (...,) else arguments
    return tuple(_typed(part, kind) for part, kind in zip(value, kinds, strict=True))


def _refuse() -> typing.NoReturn:
    raise ValueError


def describe(annotation) -> str:
    """Returns a type as a user would write it: `int`, `Literal['a', 'b']`, `tuple[int, ...]`, `float | None`."""
    if dataclasses.is_dataclass(annotation):
        fields = ", ".join(field.name for field in dataclasses.fields(annotation))
        return f"one of its fields ({fields}) to be set, not {annotation.__name__} as a whole"
    if annotation is bool:
        return "bool (true or false)"
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def flatten(config) -> dict[str, typing.Any]:
    """Returns {dotted key: value} of every leaf, in the order of the schema."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat.update({f"{field.name}.{key}": leaf for key, leaf in flatten(value).items()})
        else:
            flat[field.name] = value
    return flat


def dump(config) -> str:
    """Returns one `key = value` line per leaf, the text of `--dry_run` and of the golden files."""
    return "".join(f"{key} = {_text(value)}\n" for key, value in flatten(config).items())


def _text(value) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def config_hash(config, rewrite: Callable[[str], str] = str) -> str:
    """Returns the sha256 (hex) of every key and value that is not the default; equal for equal configs, in any process.

    A field added later, at its default, leaves the hash as it was. `rewrite` changes the text that is hashed.
    """
    defaults = flatten(type(config)())
    chosen = {key: value for key, value in flatten(config).items() if key not in defaults or value != defaults[key]}
    return hashlib.sha256(rewrite(json.dumps(chosen, sort_keys=True)).encode()).hexdigest()


def sweep(config: schema.Config, axes: Sequence[str], fixed: Iterable[tuple[str, str]] = ()) -> list[Point]:
    """Returns the product of `FIELD=v1,v2` axes as points over `config`, the last axis varying fastest.

    `fixed` are the overrides already in `config`; a field may not be in both. Commas inside brackets do not split.
    Raises ValueError for any point that could not run because of its fields or values.
    """
    taken = {key for key, _ in fixed}
    columns: dict[str, list[str]] = {}
    for axis in axes:
        key, equals, text = axis.partition("=")
        if not equals or not text:
            raise ValueError(f"--sweep={axis}: expected FIELD=VALUE,VALUE, as in optimizer.learning_rate=1e-4,3e-4")
        if key in taken or key in columns:
            raise ValueError(f"--sweep={axis}: config.{key} is given twice")
        columns[key] = _values(config, key, text)
    names = _short_names(list(columns))
    points = []
    for values in itertools.product(*columns.values()):
        overrides = tuple(zip(columns, values, strict=True))
        slug = _slug((names[key], value) for key, value in overrides)
        points.append(Point(slug, overrides, override(config, overrides)))
    return points


def _values(config: schema.Config, key: str, text: str) -> list[str]:
    values = [value.strip() for value in _split(text)]
    parsed = [override(config, [(key, value)]) for value in values]
    if len(set(parsed)) < len(parsed):
        raise ValueError(f"--sweep={key}={text}: a value is given twice")
    return values


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _short_names(keys: list[str]) -> dict[str, str]:
    """Returns the last part of every key, or the whole key where two keys share it."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _slug(pairs: Iterable[tuple[str, str]]) -> str:
    """Returns `name=value,...` as a folder name: other characters become %XX, a long name ends in its hash."""
    quoted = [f"{name}={re.sub(r'[^A-Za-z0-9_.+()-]', _percent, value)}" for name, value in pairs]
    slug = ",".join(quoted)
    return slug if len(slug) <= 120 else f"{slug[:100]}-{hashlib.sha256(slug.encode()).hexdigest()[:12]}"


def _percent(match: re.Match) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode())


def plain(value):
    """Returns `value` as JSON types: numpy scalars and arrays become numbers and lists, NaN and infinities None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def write_json(path: pathlib.Path, value) -> None:
    """Writes `value` as indented JSON (see `plain`), as core.files.replacing does."""
    files.write_text(path, encode_json(value))


def encode_json(value) -> str:
    """Returns `value` as indented JSON (see `plain`)."""
    return json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
