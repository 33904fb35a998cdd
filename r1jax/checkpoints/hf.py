"""Weights of a Hugging Face folder as decoder.Params, streamed tensor by tensor into their shardings."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from r1jax.checkpoints.hf_config import Fields, read_json
from r1jax.checkpoints.hf_names import Array, Entry, leaf_path, name_table
from r1jax.core import sharding
from r1jax.core.checkpoint import shape_problems
from r1jax.core.sharding import ParamSpec
from r1jax.models import decoder
from r1jax.schema import ModelConfig

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
READABLE = ("F64", "F32", "F16", "BF16")
MOST_PROBLEMS = 6  # tensors named in one error line


class TensorFiles:
    """The safetensors files of a folder; tensors are read when asked for."""

    def __init__(self, folder: Path):
        self._file_of = {}
        for path in _weight_files(folder):
            try:
                file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is cut short or no safetensors file ({error}); copy it again") from None
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def dtype(self, name: str) -> str:
        """Returns the stored type as safetensors writes it, such as BF16."""
        return self._file_of[name].get_slice(name).get_dtype()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def read(self, name: str) -> Array:
        """Returns one tensor on the host; bfloat16 as the type that JAX's ml_dtypes adds to NumPy."""
        return self._file_of[name].get_tensor(name)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_FILE).exists():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX_FILE} has no weight_map; copy it again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    elif (folder / SINGLE_FILE).exists():
        files = [folder / SINGLE_FILE]
    else:
        raise ValueError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; save the weights as safetensors there"
        )
    absent = [path.name for path in files if not path.exists()]
    if absent:
        raise ValueError(f"{folder} lacks {len(absent)} of {len(files)} weight files, first {absent[0]}; copy it again")
    return files


def load(folder: str | Path, config: ModelConfig, mesh: Mesh, dtype: Any) -> decoder.Params:
    """Returns the folder's weights as `dtype`, each leaf placed with its spec's sharding.

    Leaves are built one after the other, and of each only what this process's devices hold, so the host holds at most
    one stacked leaf. Rotary buffers, multi-token prediction layers and the head of a tied model are skipped. A scalar
    head, which checkpoints do not have, starts at zero. Raises ValueError when files are missing or cut short, tensors
    do not fit the config, or the weights are FP8.
    """
    folder = Path(folder)
    fields, files = Fields(folder / "config.json"), TensorFiles(folder)
    specs = decoder.specs(config)
    leaves, structure = jax.tree_util.tree_flatten_with_path(specs, is_leaf=sharding.is_spec)
    table = {entry.path: entry for entry in name_table(config, bool(fields.get("rope_interleave", True)))}
    spec_of = {leaf_path(path): spec for path, spec in leaves}
    _check(folder, files, [(table[path], spec) for path, spec in spec_of.items() if path in table], fields, config)

    def place(path: str, spec: ParamSpec) -> jax.Array:
        target, kind = sharding.sharding(mesh, spec.axes, spec.shape), np.dtype(spec.dtype or dtype)
        parts: dict[tuple, Array] = {}

        def part(index: tuple[slice, ...]) -> Array:
            ranges = tuple(range(*cut.indices(size)) for cut, size in zip(index, spec.shape, strict=True))
            if ranges not in parts:
                entry = table.get(path)
                parts[ranges] = _part(files, entry, ranges, kind) if entry else np.zeros([len(r) for r in ranges], kind)
            return parts[ranges]

        return jax.make_array_from_callback(spec.shape, target, part).block_until_ready()

    return jax.tree.unflatten(structure, [place(path, spec) for path, spec in spec_of.items()])


def _part(files: TensorFiles, entry: Entry, ranges: tuple[range, ...], dtype: np.dtype) -> Array:
    """Returns the part of one leaf that `ranges` cut out, read tensor by tensor."""
    lead, rest = ranges[: entry.stacked], tuple(slice(r.start, r.stop) for r in ranges[entry.stacked :])
    result = np.empty([len(r) for r in ranges], dtype)
    for place in itertools.product(*lead):
        tensor = entry.transform.to_ours(files.read(entry.tensor_name(place)))
        result[tuple(i - r.start for i, r in zip(place, lead, strict=True))] = tensor[rest].astype(dtype)
    return result


def _skipped(name: str, fields: Fields, config: ModelConfig) -> bool:
    """Returns whether a tensor is known to have no place in the decoder."""
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None or config.family != "deepseek_v3":
        return False
    extra = fields.get("num_nextn_predict_layers", fields.get("num_mtp_layers", 1))
    return config.num_hidden_layers <= int(layer[1]) < config.num_hidden_layers + extra


def _check(folder: Path, files: TensorFiles, pairs: list, fields: Fields, config: ModelConfig) -> None:
    """Raises ValueError when the stored tensors are not exactly those that the leaves are made of."""
    stored = {name: files.shape(name) for name in files if not _skipped(name, fields, config)}
    if any(name.endswith("weight_scale_inv") or files.dtype(name).startswith("F8") for name in stored):
        raise ValueError(
            f"{folder}: FP8 checkpoints are not read yet; convert the weights to bfloat16 first "
            "(DeepSeek's inference/fp8_cast_bf16.py does)"
        )
    wanted = {}
    for entry, spec in pairs:
        shape = entry.hf_shape(spec)
        for place in itertools.product(*(range(size) for size in spec.shape[: entry.stacked])):
            wanted[entry.tensor_name(place)] = shape
    if problems := shape_problems(stored, wanted, MOST_PROBLEMS):
        raise ValueError(f"{folder} does not fit the model: {problems}")
    odd = [name for name in stored if files.dtype(name) not in READABLE]
    if odd:
        raise ValueError(
            f"{folder}: {odd[0]} is {files.dtype(odd[0])}; the weights must be float32, float16 or bfloat16"
        )
