"""Hugging Face folders from our parameters: the importer's name table the other way, streamed tensor by tensor.

Which tensor goes to which file follows from the model's specs, so every file is written in one pass under its final
name, and the host holds one tensor at a time.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r1jax.checkpoints import hf, hf_names
from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import sharding
from r1jax.models import decoder
from r1jax.schema import ModelConfig

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
TYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}  # as the header of a safetensors file writes them
EVALUATION_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}  # P2 D.1


@dataclass(frozen=True)
class Tensor:
    """One tensor of the folder: its name, where it stands in our leaf, shape and stored type (float32, bfloat16)."""

    name: str
    entry: hf_names.Entry
    place: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save(
    folder: Path,
    params: decoder.Params,
    c: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str = "bfloat16",
    card: str = "",
    shard_bytes: int = 5_000_000_000,
    check: Callable[[Path], Any] = lambda folder: None,
) -> None:
    """Writes weights, config.json, generation_config.json, tokenizer and README.md under a temporary name; renames it.

    `card` is the text of README.md. A file holds at most `shard_bytes` of weights (a larger tensor stands alone); with
    several files there is an index. `check` is called with the temporary folder before it gets its name; when it, or
    anything else, raises, nothing stays. Raises ValueError when the folder exists or the family cannot hold the model.
    """
    folder = Path(folder)
    refuse_existing(folder)
    _check(params, c, tokenizer, dtype)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_weights(temporary, params, tensors(c, dtype), shard_bytes)
        _write_json(temporary / "config.json", config_fields(c, tokenizer, dtype))
        _write_json(temporary / "generation_config.json", _token_ids(tokenizer) | EVALUATION_SAMPLING)
        tokenizer.save(temporary)
        (temporary / "README.md").write_text(card or f"# {folder.name}\n\nTrained with r1jax.\n", encoding="utf-8")
        check(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(folder: Path) -> None:
    """Raises ValueError when there is something at `folder` already."""
    if Path(folder).exists():
        raise ValueError(f"{folder} exists already; name another --config.output or remove it")


def _check(params: decoder.Params, c: ModelConfig, tokenizer: Tokenizer, dtype: str) -> None:
    """Raises ValueError for what the format or the family's published code cannot express."""
    if dtype not in TYPE_NAMES:
        raise ValueError(f"export: dtype {dtype!r} is not written; {' and '.join(TYPE_NAMES)} are")
    if jax.process_count() > 1:
        raise ValueError(f"export: one process is needed, not {jax.process_count()}; run export_hf on a single host")
    if c.scalar_head:
        raise ValueError("export: a scalar head has no place in these formats; export the policy instead")
    if c.is_mla and c.scoring_func != "sigmoid":
        raise ValueError(f"export: {c.family} has sigmoid router scores only, not model.scoring_func={c.scoring_func}")
    if c.attention_bias != (c.family == "qwen2"):
        raise ValueError(f"export: model.attention_bias={c.attention_bias} is not what {c.family} computes")
    if tokenizer.vocab_size > c.vocab_size:
        raise ValueError(f"export: the tokenizer has {tokenizer.vocab_size} tokens, the model {c.vocab_size}")
    for (path, spec), leaf in zip(_specs(c).items(), jax.tree.leaves(params), strict=True):
        if tuple(leaf.shape) != tuple(spec.shape):
            raise ValueError(f"export: {path} is {tuple(leaf.shape)}, but the config says {tuple(spec.shape)}")


# config.json


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}


def config_fields(c: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Returns config.json of a model: the fields transformers reads for its family."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings")
    fields = {name: getattr(c, name) for name in (*names, "initializer_range")}
    fields |= {"model_type": c.family, "architectures": [ARCHITECTURES[c.family]], "hidden_act": "silu"}
    fields |= {"torch_dtype": dtype, "use_cache": True, "attention_dropout": 0.0}
    fields |= _token_ids(tokenizer)
    fields["rope_scaling"] = _rope_scaling(c)
    if c.is_mla:
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        names += ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group")
        names += ("topk_group", "scoring_func", "norm_topk_prob", "routed_scaling_factor")
        fields |= {name: getattr(c, name) for name in names}
        fields |= {"q_lora_rank": c.q_lora_rank or None, "topk_method": "noaux_tc", "moe_layer_freq": 1}
        fields |= {"attention_bias": False, "rope_interleave": True, "num_key_value_heads": c.num_attention_heads}
        fields |= {"num_nextn_predict_layers": 0, "head_dim": c.qk_rope_head_dim}
        fields |= {"first_k_dense_replace": c.num_dense_layers}
    else:
        fields |= {"head_dim": c.head_dim}
        fields |= {"attention_bias": False, "mlp_bias": False} if c.family == "llama" else {"use_sliding_window": False}
    return fields


def _rope_scaling(c: ModelConfig) -> dict[str, Any] | None:
    s = c.rope_scaling
    if s.kind == "none":
        return None
    fields: dict[str, Any] = {"rope_type": s.kind, "type": s.kind, "factor": s.factor}
    fields["original_max_position_embeddings"] = s.original_max_position_embeddings
    if s.kind == "yarn":
        fields |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        fields |= {name: getattr(s, name) for name in ("mscale", "mscale_all_dim") if getattr(s, name)}
    else:
        fields |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    return fields


# Weights


def _specs(c: ModelConfig) -> dict[str, sharding.ParamSpec]:
    leaves = jax.tree_util.tree_leaves_with_path(decoder.specs(c), is_leaf=sharding.is_spec)
    return {hf_names.leaf_path(path): spec for path, spec in leaves}


def stored_dtypes(c: ModelConfig, dtype: str) -> dict[str, np.dtype]:
    """Returns {leaf path: type on disk}: `dtype`, and float32 for the router's selection bias."""
    return {path: np.dtype(spec.dtype or dtype) for path, spec in _specs(c).items()}


def tensors(c: ModelConfig, dtype: str) -> list[Tensor]:
    """Returns every tensor of the folder in the order of the name table, from the specs alone."""
    specs, kinds, found = _specs(c), stored_dtypes(c, dtype), []
    for entry in hf_names.name_table(c):
        spec = specs[entry.path]
        shape = entry.hf_shape(spec)
        for place in np.ndindex(*spec.shape[: entry.stacked]):
            found.append(Tensor(entry.tensor_name(place), entry, place, shape, kinds[entry.path]))
    return found


def _write_weights(folder: Path, params: decoder.Params, found: Sequence[Tensor], shard_bytes: int) -> None:
    leaves = {hf_names.leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in found:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        _write_file(folder / hf.SINGLE_FILE, leaves, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, leaves, shard)
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(tensor.nbytes for tensor in found)
    _write_json(folder / hf.INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(path: Path, leaves: dict[str, jax.Array], shard: Sequence[Tensor]) -> None:
    """Writes one safetensors file: header length (8 bytes, little endian), JSON header, the tensors back to back."""
    shard = sorted(shard, key=lambda tensor: -tensor.dtype.itemsize)  # wide types first, so that all are aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": TYPE_NAMES[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            file.write(_value(leaves[tensor.entry.path], tensor).reshape(-1).view(np.uint8))


def _value(leaf: jax.Array, tensor: Tensor) -> np.ndarray:
    """Returns one tensor on the host as it is stored, contiguous."""
    part = np.asarray(jax.device_get(leaf[tensor.place] if tensor.place else leaf))
    return np.ascontiguousarray(tensor.entry.transform.to_hf(part.astype(tensor.dtype)))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
