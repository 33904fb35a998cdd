"""Hugging Face folders from our parameters: the importer's name table the other way, streamed shard by shard."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from r1jax.checkpoints import hf
from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.models import decoder
from r1jax.schema import ModelConfig

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


def config_fields(c: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Returns config.json of a model: the fields transformers reads for its family."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings")
    fields = {name: getattr(c, name) for name in (*names, "initializer_range")}
    fields |= {"model_type": c.family, "architectures": [ARCHITECTURES[c.family]], "hidden_act": "silu"}
    fields |= {"torch_dtype": dtype, "use_cache": True, "attention_dropout": 0.0}
    fields |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    fields["rope_scaling"] = _rope_scaling(c)
    if c.is_mla:
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "first_k_dense_replace")
        names += ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group")
        names += ("topk_group", "scoring_func", "norm_topk_prob", "routed_scaling_factor")
        fields |= {name: getattr(c, name) for name in names}
        fields |= {"q_lora_rank": c.q_lora_rank or None, "topk_method": "noaux_tc", "moe_layer_freq": 1}
        fields |= {"attention_bias": False, "rope_interleave": True, "num_key_value_heads": c.num_attention_heads}
        fields |= {"num_nextn_predict_layers": 0, "head_dim": c.qk_rope_head_dim}
    else:
        fields |= {"head_dim": c.head_dim}
        fields |= {"attention_bias": False} if c.family == "llama" else {"use_sliding_window": False}
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


def tensors(params: decoder.Params, c: ModelConfig, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, tensor) of the checkpoint, one at a time; the router's selection bias stays float32."""
    leaves = {hf.leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for entry in hf.name_table(c):
        leaf = leaves[entry.path]
        kind = jnp.float32 if entry.path.endswith("ffw.bias") else jnp.dtype(dtype)
        for place in np.ndindex(leaf.shape[: entry.stacked]):
            part = np.asarray(jax.device_get(leaf[place] if place else leaf)).astype(kind)
            yield entry.tensor_name(place), np.ascontiguousarray(entry.transform.to_hf(part))


def save(
    folder: Path,
    params: decoder.Params,
    c: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str = "bfloat16",
    card: str = "",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes weights, config.json, generation_config.json, tokenizer and README.md under a temporary name; renames it.

    At most one shard is held on the host. Raises ValueError when the folder exists or the model has a scalar head.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; name another --config.output or remove it")
    if c.scalar_head:
        raise ValueError("export: a scalar head has no place in these formats; export the policy instead")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_weights(temporary, tensors(params, c, dtype), shard_bytes)
        _write_json(temporary / "config.json", config_fields(c, tokenizer, dtype))
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        _write_json(temporary / "generation_config.json", ids | {"do_sample": True, "temperature": 0.6, "top_p": 0.95})
        tokenizer.save(temporary)
        (temporary / "README.md").write_text(card or f"# {folder.name}\n\nTrained with r1jax.\n")
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_weights(folder: Path, found: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards):05d}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in found:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-00000").rename(folder / hf.SINGLE_FILE)
        return
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index:05d}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(folder / hf.INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False))
