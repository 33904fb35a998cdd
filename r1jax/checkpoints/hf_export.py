"""Hugging Face folders from our parameters: the importer's name table the other way, streamed tensor by tensor.

Which tensor goes to which file follows from the model's specs, so every file is written in one pass under its final
name, and the host holds one tensor at a time, or 64 MiB of small ones. Of several processes each writes its own files.
"""

import contextlib
import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r1jax.checkpoints import fp8, hf, hf_names
from r1jax.checkpoints.hf import Tensor
from r1jax.checkpoints.tensor_file import TensorWriter
from r1jax.checkpoints.tokenizer import Tokenizer
from r1jax.core import files, hosts, sharding
from r1jax.models import decoder
from r1jax.schema import ModelConfig

ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
DTYPES = ("float32", "bfloat16", "fp8")
EVALUATION_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}  # P2 D.1
_PIECE_BYTES = 1 << 26  # of a leaf, fetched from the devices at once; a larger tensor comes alone


def save(
    folder: Path,
    params: "decoder.Params | Leaves",
    c: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str = "bfloat16",
    card: str = "",
    shard_bytes: int = 5_000_000_000,
    check: Callable[[Path], Any] = lambda folder: None,
    block: tuple[int, int] = fp8.BLOCK,
    end_ids: Sequence[int] = (),
    pad_id: int | None = None,
) -> None:
    """Writes weights, config.json, generation_config.json, tokenizer and README.md; all appear at once, or none.

    `card` is the text of README.md. A file holds at most `shard_bytes` of weights (a larger tensor gets a file to
    itself); with several files there is an index. `check` is called with the temporary folder before it gets its name,
    and may drop the leaves that it was given; when it, or anything else, raises, nothing is left. `block` is that of
    FP8. `end_ids` end a response beside the tokenizer's eos_id, and `pad_id` pads (None: the tokenizer's). Raises
    ValueError when the folder exists or the family cannot hold the model. All processes of a run call this; the folder
    must be one that all see.
    """
    folder, leaves = Path(folder), params if isinstance(params, Leaves) else Leaves(params)
    refuse_existing(folder)
    _check(leaves, c, tokenizer, dtype)
    with _appearing(folder) as temporary:
        write_weights(temporary, tensors(c, dtype, block), leaves.value, shard_bytes, block)
        ids = _token_ids(tokenizer, end_ids, pad_id)
        if hosts.is_writer():
            _write_json(temporary / "config.json", config_fields(c, tokenizer, dtype, block) | ids)
            _write_json(temporary / "generation_config.json", ids | EVALUATION_SAMPLING)
            tokenizer.save(temporary)
            text = card or f"# {folder.name}\n\nTrained with r1jax.\n"
            (temporary / "README.md").write_text(text, encoding="utf-8")
        hosts.barrier(f"the files of {folder}")
        check(temporary)


@contextlib.contextmanager
def _appearing(folder: Path) -> Generator[Path]:
    """Yields a new temporary folder, the same in every process; it becomes `folder` once all come to its end."""
    name = f"the new folder {folder}"
    if hosts.is_writer():
        files.remove_unfinished(folder.parent, folder.name)
        with files.replacing(folder) as temporary:
            temporary.mkdir()
            hosts.broadcast(str(temporary), name)
            yield temporary
            hosts.barrier(name)
    else:
        yield Path(hosts.broadcast(None, name))
        hosts.barrier(name)
    hosts.barrier(f"the end of {name}")


def refuse_existing(folder: Path) -> None:
    """Raises ValueError when there is something at `folder` already."""
    if hosts.decide(Path(folder).exists, name=f"whether {folder} exists"):
        raise ValueError(f"{folder} exists already; name another --config.output or remove it")


def check_dtype(c: ModelConfig, dtype: str) -> None:
    """Raises ValueError for a type that the family is not written in."""
    if dtype not in DTYPES:
        raise ValueError(f"export: dtype {dtype!r} is not written; {', '.join(DTYPES)} are")
    if dtype == "fp8" and c.family != "deepseek_v3":
        raise ValueError(f"export: fp8 is a layout of deepseek_v3, not of {c.family}; choose float32 or bfloat16")


def _check(leaves: "Leaves", c: ModelConfig, tokenizer: Tokenizer, dtype: str) -> None:
    """Raises ValueError for what the format or the family's published code cannot express."""
    check_dtype(c, dtype)
    if "scalar_head" in leaves.by_path:
        raise ValueError("export: a scalar head has no place in these formats; export the policy instead")
    only: dict[str, Any] = {"attention_bias": c.family == "qwen2", "qk_norm": c.family == "qwen3"}
    if c.is_mla:
        only["scoring_func"] = "softmax" if c.family == "deepseek_v2" else "sigmoid"
    if c.family == "deepseek_v2" and c.n_routed_experts:
        only["norm_topk_prob"] = False
    if c.family != "deepseek_v3":
        only["num_nextn_predict_layers"] = 0
    for name, value in only.items():
        if getattr(c, name) != value:
            raise ValueError(
                f"export: model.{name}={getattr(c, name)} is not what {c.family} computes, which is {name}={value}"
            )
    if tokenizer.vocab_size > c.vocab_size:
        raise ValueError(f"export: the tokenizer has {tokenizer.vocab_size} tokens, the model {c.vocab_size}")
    stored = {entry.path for entry in hf_names.name_table(c)}
    for (path, spec), leaf in zip(hf.leaf_specs(c).items(), leaves.by_path.values(), strict=True):
        if tuple(leaf.shape) != tuple(spec.shape):
            raise ValueError(f"export: {path} is {tuple(leaf.shape)}, but the config says {tuple(spec.shape)}")
        if path not in stored and np.any(sharding.to_host(leaf)):
            raise ValueError(f"export: {path} is not zero, and {c.family} has no tensor for it")


# config.json


def _token_ids(
    tokenizer: Tokenizer, end_ids: Sequence[int] = (), pad_id: int | None = None
) -> dict[str, int | list[int] | None]:
    """Returns the ids of config.json; eos_token_id is a list if several end a response, the tokenizer's among them."""
    ends = list(dict.fromkeys(end_ids))
    ends = ends if tokenizer.eos_id in ends else [tokenizer.eos_id, *ends]
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_id if pad_id is None else pad_id,
    }


def config_fields(
    c: ModelConfig, tokenizer: Tokenizer, dtype: str, block: tuple[int, int] = fp8.BLOCK
) -> dict[str, Any]:
    """Returns config.json of a model: the fields transformers reads for its family."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings")
    fields = {name: getattr(c, name) for name in (*names, "initializer_range")}
    fields |= {"model_type": c.family, "architectures": [ARCHITECTURES[c.family]], "hidden_act": "silu"}
    fields |= {"torch_dtype": "bfloat16" if dtype == "fp8" else dtype, "use_cache": True, "attention_dropout": 0.0}
    fields |= _token_ids(tokenizer)
    fields |= _rope(c)
    if dtype == "fp8":
        quantisation = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        fields["quantization_config"] = quantisation | {"weight_block_size": list(block)}
    return fields | (_latent_fields(c) if c.is_mla else _grouped_fields(c))


def _latent_fields(c: ModelConfig) -> dict[str, Any]:
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    names += ("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group")
    names += ("topk_group", "scoring_func", "norm_topk_prob", "routed_scaling_factor")
    fields = {name: getattr(c, name) for name in names}
    fields |= {"q_lora_rank": c.q_lora_rank or None, "moe_layer_freq": 1, "attention_bias": False}
    fields |= {"num_key_value_heads": c.num_attention_heads, "head_dim": c.qk_rope_head_dim}
    fields["first_k_dense_replace"] = c.num_dense_layers
    if c.family == "deepseek_v2":
        return fields | {"topk_method": "greedy" if c.n_group == 1 else "group_limited_greedy"}
    fields |= {"topk_method": "noaux_tc", "rope_interleave": True}
    return fields | {"num_nextn_predict_layers": c.num_nextn_predict_layers}


def _grouped_fields(c: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {"head_dim": c.head_dim}
    if c.family == "llama":
        return fields | {"attention_bias": False, "mlp_bias": False}
    if c.family == "qwen3":
        fields["attention_bias"] = False
    return fields | {"use_sliding_window": False}


def _rope(c: ModelConfig) -> dict[str, Any]:
    """Returns rope_scaling, which transformers 4 reads with rope_theta, and rope_parameters, of which 5 has both."""
    s = c.rope_scaling
    if s.kind == "none":
        return {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}}
    fields: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    fields["original_max_position_embeddings"] = s.original_max_position_embeddings
    if s.kind == "yarn":
        fields |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        fields |= {name: getattr(s, name) for name in ("mscale", "mscale_all_dim") if getattr(s, name)}
    else:
        fields |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    return {"rope_scaling": fields | {"type": s.kind}, "rope_parameters": fields | {"rope_theta": c.rope_theta}}


# Weights


def tensors(c: ModelConfig, dtype: str, block: tuple[int, int] = fp8.BLOCK) -> list[Tensor]:
    """Returns every tensor of the folder; with `fp8` those that are not in FP8 are bfloat16."""
    small = dtype == "fp8"
    return list(hf.tensors(c, "bfloat16" if small else dtype, block if small else None).values())


class Leaves:
    """Tensors of parameters on the host. Small ones are fetched many at a time: a transfer costs more than they do."""

    def __init__(self, params: decoder.Params):
        self.by_path = {hf_names.leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        self._key: tuple = ()
        self._piece = np.zeros(0)

    def drop(self) -> None:
        """Gives up the parameters, whose memory is free where nothing else holds them."""
        self.by_path, self._key, self._piece = {}, (), np.zeros(0)

    def value(self, tensor: Tensor) -> np.ndarray:
        """Returns a tensor in the layout of the folder and in the type of its leaf; for factors, their matrix.

        Where the parameters are divided between processes, all must ask for the same tensor.
        """
        leaf, stacked = self.by_path[tensor.entry.path], tensor.entry.stacked
        depth = 0  # leading dimensions that choose a piece
        while depth < stacked and math.prod(leaf.shape[depth:]) * leaf.dtype.itemsize > _PIECE_BYTES:
            depth += 1
        key = (tensor.entry.path, *tensor.place[:depth])
        if key != self._key:
            self._piece, self._key = np.zeros(0), key
            self._piece = sharding.to_host(leaf, tensor.place[:depth])
        return tensor.entry.transform.to_hf(self._piece[tensor.place[depth:]])


def stored(tensor: Tensor, value: np.ndarray, block: tuple[int, int] = fp8.BLOCK) -> dict[str, np.ndarray]:
    """Returns {name: array} of a tensor as it is written; of an FP8 matrix also its factors.

    Raises ValueError when a value that becomes FP8 is not finite.
    """
    if tensor.dtype != fp8.TYPE:
        return {tensor.name: value.astype(tensor.dtype, order="C")}
    values, scales = fp8.quantise(np.asarray(value, np.float32), block)
    if not np.isfinite(scales).all():
        raise ValueError(f"export: {tensor.name} holds values that are not finite; FP8 cannot be made of them")
    return {tensor.name: values, tensor.name + fp8.SCALE: scales}


def decoded(tensor: Tensor, parts: dict[str, np.ndarray], block: tuple[int, int] = fp8.BLOCK) -> np.ndarray:
    """Returns the float32 values that an importer must read where `parts`, as `stored` returns them, were written."""
    if tensor.dtype == fp8.TYPE:
        return fp8.dequantise(parts[tensor.name], parts[tensor.name + fp8.SCALE], block)
    return parts[tensor.name].astype(np.float32)


def write_weights(
    folder: Path,
    all_tensors: Sequence[Tensor],
    value: Callable[[Tensor], np.ndarray],
    shard_bytes: int,
    block: tuple[int, int] = fp8.BLOCK,
) -> None:
    """Writes the tensors, whose values `value` returns, to files of at most `shard_bytes`, with an index if several.

    Of several processes each writes the files whose number modulo the processes is its own, and process 0 the index.
    All ask for every value, in order.
    """
    shards = _shards(all_tensors, shard_bytes)
    count, weight_map = len(shards), {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else hf.SINGLE_FILE
        weight_map |= {tensor.name: file for tensor in shard}
        matrices = [tensor for tensor in shard if not tensor.is_scale]
        if (number - 1) % hosts.process_count() != hosts.process_index():
            for tensor in matrices:
                value(tensor)
            continue
        with TensorWriter(folder / file, [(tensor.name, tensor.dtype, tensor.shape) for tensor in shard]) as writer:
            for tensor in matrices:
                for name, array in stored(tensor, value(tensor), block).items():
                    writer.put(name, array)
    if count > 1 and hosts.is_writer():
        total = sum(tensor.nbytes for tensor in all_tensors)
        _write_json(folder / hf.INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(all_tensors: Sequence[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Returns the tensors by file; a matrix and its factors share one."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for unit in _units(all_tensors):
        nbytes = sum(tensor.nbytes for tensor in unit)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].extend(unit)
        size += nbytes
    return shards


def _units(all_tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    unit: list[Tensor] = []
    for tensor in all_tensors:
        if unit and not tensor.is_scale:
            yield unit
            unit = []
        unit.append(tensor)
    if unit:
        yield unit


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
