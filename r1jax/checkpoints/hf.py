"""Hugging Face folders: config.json as a ModelConfig, safetensors as decoder.Params.

`name_table` pairs every leaf of decoder.Params with the checkpoint's tensors and holds the transforms of both directions.
A projection is stored [out, in] there and [in, heads, width] here. DeepSeek stores rotary dimensions as adjacent pairs;
here they are split in halves, so those rows are reordered on the way.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from r1jax.core import sharding
from r1jax.core.checkpoint import shape_problems
from r1jax.core.sharding import ParamSpec
from r1jax.models import decoder, rope
from r1jax.schema import ModelConfig, RopeScaling

FAMILIES = ("deepseek_v3", "llama", "qwen2")

# How a run computes, not what the weights are: config.json has no say in these.
RUNTIME_FIELDS = (
    "router_bias_update_rate",
    "scalar_head",
    "compute_dtype",
    "scan_layers",
    "remat",
    "moe_implementation",
    "checkpoint",
)

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
READABLE = ("F64", "F32", "F16", "BF16")
MOST_PROBLEMS = 6  # tensors named in one error line

Array = np.ndarray
Change = Callable[[Array], Array]


# config.json


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.parent} is no Hugging Face folder: it has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, an object is needed")
    return value


class _Fields:
    """The fields of one config.json; null counts as absent."""

    def __init__(self, path: Path):
        self.path, self.values = path, _read_json(path)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        if self.get(name) is None:
            raise ValueError(f"{self.path} has no {name}, which model_type {self.get('model_type')} needs")
        return self.values[name]

    def only(self, name: str, allowed: Any, default: Any) -> None:
        """Raises ValueError when the field has another value than the one that the decoder computes."""
        if self.get(name, default) != allowed:
            raise ValueError(f"{self.path}: {name}={self.values[name]!r} is not supported, only {allowed!r} is")


def model_config(folder: str | Path, defaults: ModelConfig) -> ModelConfig:
    """Returns the shape that a folder's config.json describes, with the runtime fields of `defaults`.

    Raises ValueError for an unknown model_type and for a setting that the decoder does not compute.
    """
    fields = _Fields(Path(folder) / "config.json")
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{fields.path}: model_type {family!r} is not known; known are {', '.join(FAMILIES)}")
    fields.only("hidden_act", "silu", "silu")
    heads = fields.need("num_attention_heads")
    hidden = fields.need("hidden_size")
    theta, scaling = _rope(fields)
    shape = dict(
        family=family,
        vocab_size=fields.need("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.need("intermediate_size"),
        num_hidden_layers=fields.need("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=fields.get("num_key_value_heads", heads),
        head_dim=fields.get("head_dim", hidden // heads),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
        rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=fields.get("max_position_embeddings", ModelConfig.max_position_embeddings),
        initializer_range=float(fields.get("initializer_range", 0.02)),
    )
    shape |= _deepseek(fields) if family == "deepseek_v3" else _grouped(fields, family)
    return ModelConfig(**shape, **{name: getattr(defaults, name) for name in RUNTIME_FIELDS})


def _grouped(fields: _Fields, family: str) -> dict[str, Any]:
    """Returns what Llama and Qwen2 add to the common fields."""
    if family == "llama":
        fields.only("attention_bias", False, False)
        fields.only("mlp_bias", False, False)
        return {}
    by_layer = "sliding_attention" in fields.get("layer_types", [])
    by_flag = fields.get("use_sliding_window", False) and fields.get("sliding_window") is not None
    if by_layer or (by_flag and fields.need("num_hidden_layers") > fields.get("max_window_layers", 28)):
        raise ValueError(f"{fields.path}: sliding window attention is not supported; use_sliding_window must be false")
    return {"attention_bias": True}


def _deepseek(fields: _Fields) -> dict[str, Any]:
    """Returns the fields of latent attention and of the mixture of experts."""
    fields.only("attention_bias", False, False)
    fields.only("scoring_func", "sigmoid", "sigmoid")
    fields.only("topk_method", "noaux_tc", "noaux_tc")
    fields.only("moe_layer_freq", 1, 1)
    experts = fields.get("n_routed_experts", 0)
    shape = {name: fields.need(name) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    shape |= dict(
        q_lora_rank=fields.get("q_lora_rank", 0),
        head_dim=shape["qk_nope_head_dim"] + shape["qk_rope_head_dim"],
        n_routed_experts=experts,
        first_k_dense_replace=fields.get("first_k_dense_replace", 0),
    )
    if experts:
        shape |= dict(
            n_shared_experts=fields.get("n_shared_experts", 0),
            num_experts_per_tok=fields.need("num_experts_per_tok"),
            moe_intermediate_size=fields.need("moe_intermediate_size"),
            n_group=fields.get("n_group", 1),
            topk_group=fields.get("topk_group", 1),
            norm_topk_prob=bool(fields.get("norm_topk_prob", True)),
            routed_scaling_factor=float(fields.get("routed_scaling_factor", 1.0)),
        )
    return shape


def _rope(fields: _Fields) -> tuple[float, RopeScaling]:
    """Returns (theta, scaling) from rope_theta and rope_scaling, or from the one dict rope_parameters."""
    values = {**fields.get("rope_scaling", {}), **fields.get("rope_parameters", {})}
    values = {name: value for name, value in values.items() if value is not None}
    theta = float(values.get("rope_theta", fields.get("rope_theta", 10000.0)))
    kind = values.get("rope_type", values.get("type", "default"))
    if fields.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{fields.path}: partial_rotary_factor is not supported, every rotary head must turn whole")
    if kind == "default":
        return theta, RopeScaling()
    if kind not in ("yarn", "llama3"):
        raise ValueError(f"{fields.path}: rope scaling {kind!r} is not supported; default, yarn and llama3 are")
    original = values.get("original_max_position_embeddings", fields.get("max_position_embeddings"))
    if original is None or (kind == "llama3" and "factor" not in values):
        raise ValueError(f"{fields.path}: {kind} scaling needs factor and original_max_position_embeddings")
    names = (
        ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_fast", "beta_slow", "mscale_all_dim")
    )
    mscale = {"mscale": float(values.get("mscale", 0.0))} if kind == "yarn" else {}  # 0: not stated
    scaling = RopeScaling(
        kind=kind,
        factor=float(values.get("factor", fields.get("max_position_embeddings", original) / original)),
        original_max_position_embeddings=int(original),
        **mscale,
        **{name: float(values[name]) for name in names if values.get(name)},
    )
    if kind == "yarn":
        _check_yarn(fields, values, scaling)
    return theta, scaling


def _check_yarn(fields: _Fields, values: dict[str, Any], scaling: RopeScaling) -> None:
    if not values.get("truncate", True):
        raise ValueError(f"{fields.path}: yarn with truncate=false is not supported")
    stated, computed = values.get("attention_factor"), rope.magnitude(scaling)
    if stated is not None and abs(stated - computed) > 1e-6:
        raise ValueError(
            f"{fields.path}: yarn attention_factor={stated} is not supported, only the {computed:.7g} "
            "that follows from factor and mscale"
        )


# Names and transforms


@dataclass(frozen=True)
class Transform:
    """A checkpoint tensor to our layout and back, each the exact inverse of the other."""

    to_ours: Change
    to_hf: Change


@dataclass(frozen=True)
class Entry:
    """One leaf of decoder.Params and the tensors that it is made of.

    `name` holds {layer} for a leaf with a leading layer dimension and {expert} for one with experts behind it.
    """

    path: str  # attribute path in decoder.Params, joined by dots
    name: str
    transform: Transform
    first_layer: int = 0  # checkpoint number of the stack's first layer

    @property
    def stacked(self) -> int:
        """Leading dimensions of the leaf that choose a tensor."""
        return self.name.count("{")

    def tensor_name(self, place: tuple[int, ...]) -> str:
        """Returns the checkpoint's name of the tensor at a place in the leading dimensions."""
        layer, expert = (*place, 0, 0)[:2]
        return self.name.format(layer=self.first_layer + layer, expert=expert)

    def hf_shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """Returns the shape of each of the leaf's tensors in the checkpoint."""
        return self.transform.to_hf(np.broadcast_to(np.False_, spec.shape[self.stacked :])).shape


def _same(w: Array) -> Array:
    return w


def _transposed(w: Array) -> Array:
    return w.T


SAME, LINEAR = Transform(_same, _same), Transform(_transposed, _transposed)


def _into_heads(heads: int, width: int, order: Array | None = None) -> Transform:
    """[N * H, D] <-> [D, N, H]; `order` rearranges the rows of each head."""
    order = np.arange(width) if order is None else order
    back = np.argsort(order)
    return Transform(
        lambda w: w.reshape(heads, width, -1)[:, order].transpose(2, 0, 1),
        lambda w: w.transpose(1, 2, 0)[:, back].reshape(heads * width, -1),
    )


def _out_of_heads(heads: int, width: int) -> Transform:
    """[D, N * H] <-> [N, H, D]."""
    return Transform(lambda w: w.T.reshape(heads, width, -1), lambda w: w.reshape(heads * width, -1).T)


def _head_bias(heads: int, width: int) -> Transform:
    """[N * H] <-> [N, H]."""
    return Transform(lambda b: b.reshape(heads, width), lambda b: b.reshape(heads * width))


def half_split(before: int, rotary: int, interleaved: bool = True) -> Array:
    """Returns the row order of a half-split layout: `before` plain rows, then even and odd rotary rows.

    Source: the rotary rows of DeepSeek-V3's released modeling code, which turns (2j, 2j + 1) as one pair.
    """
    rows = np.arange(before + rotary)
    if not interleaved:
        return rows
    return np.concatenate([rows[:before], rows[before::2], rows[before + 1 :: 2]])


def _attention_rows(c: ModelConfig, interleaved: bool) -> Iterator[tuple[str, str, Transform]]:
    if c.is_mla:
        n, nope, turned, latent = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
        order = half_split(latent, turned, interleaved)
        back = np.argsort(order)
        if c.q_lora_rank:
            yield "q_a", "q_a_proj.weight", LINEAR
            yield "q_a_norm", "q_a_layernorm.weight", SAME
        query = _into_heads(n, nope + turned, half_split(nope, turned, interleaved))
        yield "q_b", "q_b_proj.weight" if c.q_lora_rank else "q_proj.weight", query
        yield "kv_a", "kv_a_proj_with_mqa.weight", Transform(lambda w: w[order].T, lambda w: w.T[back])
        yield "kv_a_norm", "kv_a_layernorm.weight", SAME
        yield "kv_b", "kv_b_proj.weight", _into_heads(n, nope + c.v_head_dim)
        yield "out", "o_proj.weight", _out_of_heads(n, c.v_head_dim)
        return
    for ours, theirs, heads in (
        ("query", "q_proj", c.num_attention_heads),
        ("key", "k_proj", c.num_key_value_heads),
        ("value", "v_proj", c.num_key_value_heads),
    ):
        yield ours, f"{theirs}.weight", _into_heads(heads, c.head_dim)
        if c.attention_bias:
            yield f"{ours}_bias", f"{theirs}.bias", _head_bias(heads, c.head_dim)
    yield "out", "o_proj.weight", _out_of_heads(c.num_attention_heads, c.head_dim)


def _swiglu_rows(ours: str, theirs: str) -> Iterator[tuple[str, str, Transform]]:
    for part in ("gate", "up", "down"):
        yield f"{ours}{part}", f"{theirs}{part}_proj.weight", LINEAR


def _block_rows(c: ModelConfig, sparse: bool, interleaved: bool) -> Iterator[tuple[str, str, Transform]]:
    """Yields (path in the block, name in the layer, transform)."""
    yield "attention_norm", "input_layernorm.weight", SAME
    yield "ffw_norm", "post_attention_layernorm.weight", SAME
    for ours, theirs, transform in _attention_rows(c, interleaved):
        yield f"attention.{ours}", f"self_attn.{theirs}", transform
    if not sparse:
        yield from _swiglu_rows("ffw.", "mlp.")
        return
    yield "ffw.router", "mlp.gate.weight", LINEAR
    yield "ffw.bias", "mlp.gate.e_score_correction_bias", SAME
    yield from _swiglu_rows("ffw.", "mlp.experts.{expert}.")
    if c.n_shared_experts:
        yield from _swiglu_rows("ffw.shared.", "mlp.shared_experts.")


def name_table(c: ModelConfig, interleaved: bool = True) -> tuple[Entry, ...]:
    """Returns an Entry for every leaf of decoder.Params except the scalar head, which no such checkpoint holds.

    `interleaved` says whether a DeepSeek checkpoint stores rotary dimensions as adjacent pairs (config.json's
    rope_interleave, true unless stated); the other families are half-split always.
    """
    entries = [Entry("embedding", "model.embed_tokens.weight", SAME)]
    stacks = (("dense", c.num_dense_layers, 0), ("sparse", c.num_moe_layers, c.num_dense_layers))
    for stack, layers, first in stacks:
        if layers:
            for ours, theirs, transform in _block_rows(c, stack == "sparse", interleaved):
                entries.append(Entry(f"{stack}.{ours}", "model.layers.{layer}." + theirs, transform, first))
    entries.append(Entry("final_norm", "model.norm.weight", SAME))
    if not c.tie_word_embeddings:
        entries.append(Entry("unembedding", "lm_head.weight", LINEAR))
    return tuple(entries)


def leaf_path(path: tuple) -> str:
    """Returns the dotted attribute path of a leaf, from a key path of jax.tree_util."""
    return ".".join(part.name for part in path)


# Weights


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
        weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
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
    fields, files = _Fields(folder / "config.json"), TensorFiles(folder)
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


def _skipped(name: str, fields: _Fields, config: ModelConfig) -> bool:
    """Returns whether a tensor is known to have no place in the decoder."""
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
        return True
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is None or config.family != "deepseek_v3":
        return False
    extra = fields.get("num_nextn_predict_layers", fields.get("num_mtp_layers", 1))
    return config.num_hidden_layers <= int(layer[1]) < config.num_hidden_layers + extra


def _check(folder: Path, files: TensorFiles, pairs: list, fields: _Fields, config: ModelConfig) -> None:
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
