"""Weights of a Hugging Face folder as decoder.Params, streamed tensor by tensor into their shardings."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from r1jax.checkpoints import fp8, hf_hints, hf_names
from r1jax.checkpoints.hf_config import INDEX_FILE, SINGLE_FILE, Fields, read_json, rotary_pairs
from r1jax.checkpoints.hf_names import Array, LeafNames, leaf_path
from r1jax.checkpoints.tensor_file import TYPES, TensorFile
from r1jax.core import sharding
from r1jax.core.checkpoint import shape_problems
from r1jax.core.sharding import ParamSpec
from r1jax.models import decoder
from r1jax.schema import ModelConfig

MOST_PROBLEMS = 6  # tensors named in one error line
_COMPARED_BYTES = 1 << 26  # of each of two tensors that must be equal, at once
_ALIGNMENT = 64  # bytes; XLA's CPU backend takes such an array over without a copy

Ranges = tuple[range, ...]  # of each dimension of a leaf, what one device holds


@dataclass(frozen=True)
class Tensor:
    """One tensor of a folder: its name, its place in our leaf, its shape and stored type.

    The factors of an FP8 matrix have the matrix's place and follow it.
    """

    name: str
    entry: LeafNames
    place: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_scale(self) -> bool:
        return self.name.endswith(fp8.SCALE)


class TensorFiles:
    """The tensors of a folder's safetensors files, or of one file; they are read when asked for."""

    def __init__(self, path: str | Path):
        self._file_of: dict[str, TensorFile] = {}
        self._files: list[TensorFile] = []
        paths, weight_map = ([Path(path)], {}) if Path(path).is_file() else weight_files(Path(path))
        try:
            for path in paths:
                file = TensorFile(path)
                self._files.append(file)
                for name in file.tensors:
                    if name not in self._file_of or weight_map.get(name) == path:
                        self._file_of[name] = file
        except ValueError:
            self.close()
            raise

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def dtype(self, name: str) -> str:
        """Returns the stored type as safetensors writes it, such as BF16."""
        return self._file_of[name].tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of[name].tensors[name].shape

    def read(self, name: str, rows: slice = slice(None)) -> Array:
        """Returns one tensor on the host, or `rows` of its leading dimension, as it is stored."""
        return self._file_of[name].read(name, rows)

    def weights(self, name: str, block: tuple[int, int] | None) -> Array:
        """Returns one tensor on the host; one in FP8 as float32, by the factors of its blocks."""
        value = self.read(name)
        if value.dtype != fp8.TYPE:
            return value
        assert block is not None  # config.json states it, or the model was refused
        return fp8.dequantise(value, self.read(name + fp8.SCALE), block)


def weight_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """Returns the folder's weight files, and {tensor: file} from its index, if there is one.

    An index next to a single file is ignored, as in transformers. Raises ValueError for files that are missing or
    outside the folder.
    """
    weight_map: dict[str, Path] = {}
    if (folder / SINGLE_FILE).exists():
        files = [folder / SINGLE_FILE]
    elif (folder / INDEX_FILE).exists():
        stated = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(stated, dict) or not stated:
            raise ValueError(f"{folder / INDEX_FILE} has no weight_map; copy it again")
        weight_map = {name: folder / _inside(folder, name, file) for name, file in stated.items()}
        files = sorted(set(weight_map.values()))
    else:
        raise ValueError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; save the weights as safetensors there"
        )
    absent = [path.name for path in files if not path.exists()]
    if absent:
        raise ValueError(f"{folder} lacks {len(absent)} of {len(files)} weight files, first {absent[0]}; copy it again")
    return files, weight_map


def _inside(folder: Path, name: str, file: Any) -> str:
    """Returns the file that an index names for a tensor. Raises ValueError when it is not in the folder."""
    if not isinstance(file, str) or not file:
        raise ValueError(f"{folder / INDEX_FILE}: the file of {name} is {file!r}; a file name is needed")
    if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
        raise ValueError(f"{folder / INDEX_FILE}: the file of {name} is {file!r}; weight files lie in the folder")
    return file


def tensors(
    c: ModelConfig, dtype: Any = "bfloat16", block: tuple[int, int] | None = None, interleaved: bool = True
) -> dict[str, Tensor]:
    """Returns every tensor of a checkpoint of the model by name, in the order of the name table, from the specs alone.

    They are of `dtype`, but the selection bias is float32. With a `block`, matrices of attention and feed-forward are
    FP8, each followed by its float32 factors. Tensors that repeat another one (hf_names.copies) are last.
    """
    specs, by_name = leaf_specs(c), {}
    for entry in hf_names.name_table(c, interleaved):
        spec = specs[entry.path]
        shape, kind = entry.hf_shape(spec), np.dtype(spec.dtype or dtype)
        for place in np.ndindex(*spec.shape[: entry.stacked]):
            name = entry.tensor_name(place)
            if block and fp8.is_quantised(name):
                scales = name + fp8.SCALE
                by_name[name] = Tensor(name, entry, place, shape, fp8.TYPE)
                by_name[scales] = Tensor(scales, entry, place, fp8.scale_shape(shape, block), np.dtype(np.float32))
            else:
                by_name[name] = Tensor(name, entry, place, shape, kind)
    for name, original in hf_names.copies(c).items():
        by_name[name] = replace(by_name[original], name=name)
    return by_name


def leaf_specs(c: ModelConfig) -> dict[str, ParamSpec]:
    """Returns {leaf path: spec} of decoder.Params, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(decoder.specs(c), is_leaf=sharding.is_spec)
    return {leaf_path(path): spec for path, spec in leaves}


def load(folder: str | Path, config: ModelConfig, mesh: Mesh, dtype: Any) -> decoder.Params:
    """Returns the weights as `dtype`, each leaf placed with its spec's sharding.

    `folder` is a Hugging Face folder, or one safetensors file beside its config.json. FP8 in blocks is multiplied out
    in float32. Leaves are built one after the other, and of each only what this process's devices hold; beside that
    the host holds one tensor. Rotary buffers, prediction layers that the config leaves out and the head of a tied
    model are skipped; repeated tensors, such a head too, are compared with what they repeat. A softmax
    router's bias, which checkpoints do not have, is zero. Raises ValueError when files are missing or cut
    short, tensors do not fit the config, or a type is not read.
    """
    source = Path(folder)
    fields = Fields((source.parent if source.is_file() else source) / "config.json")
    interleaved, block = rotary_pairs(fields), fp8.block_size(fields)
    table = {entry.path: entry for entry in hf_names.name_table(config, interleaved)}
    with TensorFiles(source) as files:
        _check(source, files, fields, config, block)
        leaves = []
        for path, spec in leaf_specs(config).items():
            target, kind = sharding.sharding(mesh, spec.axes, spec.shape), np.dtype(spec.dtype or dtype)
            leaves.append(_leaf(files, table.get(path), spec.shape, target, kind, block))
    return jax.tree.unflatten(jax.tree.structure(decoder.specs(config), is_leaf=sharding.is_spec), leaves)


def _leaf(files: TensorFiles, entry: LeafNames | None, shape, target: jax.sharding.Sharding, kind, block) -> jax.Array:
    """Returns one leaf, read tensor by tensor into the parts that this process holds; zeros without an entry."""

    def ranges(index: tuple[slice, ...] | None) -> Ranges:
        assert index is not None  # devices of this process hold a part
        return tuple(range(*cut.indices(size)) for cut, size in zip(index, shape, strict=True))

    held = {ranges(index) for index in target.addressable_devices_indices_map(shape).values()}
    parts = {cuts: _empty([len(cut) for cut in cuts], kind) for cuts in held}
    if entry is None:
        for part in parts.values():
            part[...] = 0
    else:
        _fill(files, entry, parts, block)
    return jax.make_array_from_callback(shape, target, lambda index: parts[ranges(index)]).block_until_ready()


def _empty(shape: list[int], kind: np.dtype) -> Array:
    size = int(np.prod(shape)) * kind.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


def _fill(files: TensorFiles, entry: LeafNames, parts: dict[Ranges, Array], block: tuple[int, int] | None) -> None:
    """Copies every tensor of a leaf that some part needs into all of the parts that hold a piece of it."""
    lead = entry.stacked
    places = sorted({place for ranges in parts for place in itertools.product(*ranges[:lead])})
    for place in places:
        tensor = entry.transform.to_ours(files.weights(entry.tensor_name(place), block))
        for ranges, part in parts.items():
            if all(i in r for i, r in zip(place, ranges, strict=False)):
                inner = tuple(slice(r.start, r.stop) for r in ranges[lead:])
                part[tuple(i - r.start for i, r in zip(place, ranges, strict=False))] = tensor[inner]


def _skipped(name: str, files: TensorFiles, config: ModelConfig) -> bool:
    """Returns whether a tensor is known to have no place in the decoder."""
    if name.endswith("rotary_emb.inv_freq") or 0 in files.shape(name):
        return True
    if name == hf_hints.HEAD:
        return config.tie_word_embeddings
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None or config.family != "deepseek_v3":
        return False
    number, read = int(layer[1]), config.num_hidden_layers + config.num_nextn_predict_layers
    return number >= read and f"model.layers.{number}.eh_proj.weight" in files


def _check(source: Path, files: TensorFiles, fields: Fields, config: ModelConfig, block) -> None:
    """Raises ValueError when the stored tensors are not exactly those that the model is made of."""
    if why := hf_hints.misnamed(list(files)) or hf_hints.fused(list(files)):
        raise ValueError(f"{source}: {why}")
    stored = {name: files.shape(name) for name in files if not _skipped(name, files, config)}
    small = {name: None for name in stored if files.dtype(name) == "F8_E4M3"}
    if small and block is None:
        raise ValueError(
            f"{source}: {next(iter(small))} is FP8, but config.json has no quantization_config, which must "
            "state weight_block_size"
        )
    repeats = hf_names.copies(config)
    expected = tensors(config, block=block, interleaved=rotary_pairs(fields))
    shapes = {}
    for name, tensor in expected.items():
        original = name.removesuffix(fp8.SCALE)
        if (name in repeats and name not in stored) or (original != name and original not in small):
            continue  # a copy may be left out, and a matrix that is not in FP8 has no factors
        shapes[name] = tensor.shape
    if problems := shape_problems(stored, shapes, MOST_PROBLEMS):
        stated = fields.get("tie_word_embeddings")
        tie = "it is not stated" if stated is None else f"it is {str(stated).lower()}"
        beside = INDEX_FILE if all((source / name).exists() for name in (INDEX_FILE, SINGLE_FILE)) else ""
        problems += hf_hints.remedies(stored, shapes, tie, beside)
        raise ValueError(f"{source} does not fit the model of its config.json ({config.family}): {problems}")
    for name in stored:
        kind, may_be_small = files.dtype(name), expected[name].dtype == fp8.TYPE
        if kind not in TYPES or (kind == "F8_E4M3" and not may_be_small):
            raise ValueError(
                f"{source}: {name} is {kind}; it must be float32, float16 or bfloat16"
                + (", or FP8 as F8_E4M3 in blocks" if may_be_small else "")
            )
    _check_repeats(source, files, config, {name: repeats[name] for name in repeats if name in stored})


def _check_repeats(source: Path, files: TensorFiles, config: ModelConfig, repeats: dict[str, str]) -> None:
    """Raises ValueError when a tensor differs from the one that is used in its place."""
    for name, original in repeats.items():
        if not _equal(files, name, original):
            raise ValueError(f"{source}: {name} differs from {original}, which the model uses in its place")
    embedding = "model.embed_tokens.weight"
    if config.tie_word_embeddings and hf_hints.HEAD in files and not _equal(files, hf_hints.HEAD, embedding):
        raise ValueError(
            f"{source}: {hf_hints.HEAD} differs from {embedding}, but config.json's tie_word_embeddings=true makes "
            f"them one; set it to false to use both, or remove {hf_hints.HEAD}"
        )


def _equal(files: TensorFiles, name: str, original: str) -> bool:
    """Returns whether two tensors have the same shape and values."""
    if (shape := files.shape(name)) != files.shape(original):
        return False
    step = max(_COMPARED_BYTES // max(8 * int(np.prod(shape[1:])), 1), 1)
    for start in range(0, shape[0], step):
        one, other = (files.read(tensor, slice(start, start + step)) for tensor in (name, original))
        if one.tobytes() != other.tobytes() and not np.array_equal(one.astype("f8"), other.astype("f8")):
            return False
    return True
