"""config.json of a Hugging Face folder as a ModelConfig."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from r1jax.models import rope
from r1jax.schema import ModelConfig, RopeScaling

FAMILIES = ("deepseek_v3", "deepseek_v2", "llama", "qwen2", "qwen3")
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
DEEPSEEK = ("deepseek_v3", "deepseek_v2")

# How a run computes, not what the weights are: config.json has no say in these.
RUNTIME_FIELDS = (
    "router_bias_update_rate",
    "aux_loss_alpha",
    "mtp_loss_weight",
    "mtp_hidden",
    "scalar_head",
    "compute_dtype",
    "scan_layers",
    "remat",
    "remat_policy",
    "attention_implementation",
    "attention_block",
    "logprob_implementation",
    "moe_implementation",
    "moe_dispatch",
    "moe_buffer_factor",
    "checkpoint",
    "vocab_used",
)


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.parent} is no Hugging Face folder: it has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, an object is needed")
    return value


class Fields:
    """The fields of one config.json; null counts as absent."""

    def __init__(self, path: Path):
        self.path, self.values = path, read_json(path)

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
    fields = Fields(Path(folder) / "config.json")
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
    shape |= _deepseek(fields, family) if family in DEEPSEEK else _grouped(fields, family)
    return ModelConfig(**shape, **{name: getattr(defaults, name) for name in RUNTIME_FIELDS})


def _grouped(fields: Fields, family: str) -> dict[str, Any]:
    """Returns what Llama, Qwen2 and Qwen3 add to the common fields."""
    if family == "llama":
        fields.only("attention_bias", False, False)
        fields.only("mlp_bias", False, False)
        return {}
    by_layer = "sliding_attention" in fields.get("layer_types", [])
    by_flag = fields.get("use_sliding_window", False) and fields.get("sliding_window") is not None
    if by_layer or (by_flag and fields.need("num_hidden_layers") > fields.get("max_window_layers", 28)):
        raise ValueError(f"{fields.path}: sliding window attention is not supported; use_sliding_window must be false")
    if family == "qwen3":
        fields.only("attention_bias", False, False)
        return {"qk_norm": True}
    return {"attention_bias": True}


def _deepseek(fields: Fields, family: str) -> dict[str, Any]:
    """Returns the fields of latent attention and of the mixture of experts."""
    fields.only("attention_bias", False, False)
    fields.only("mlp_bias", False, False)
    fields.only("moe_layer_freq", 1, 1)
    if family == "deepseek_v2":
        fields.only("scoring_func", "softmax", "softmax")
        fields.only("norm_topk_prob", False, False)
    else:
        fields.only("scoring_func", "sigmoid", "sigmoid")
        fields.only("topk_method", "noaux_tc", "noaux_tc")
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
            norm_topk_prob=bool(fields.get("norm_topk_prob", family == "deepseek_v3")),
            routed_scaling_factor=float(fields.get("routed_scaling_factor", 1.0)),
        )
        if family == "deepseek_v2":
            method = fields.get("topk_method", "greedy")
            if method not in ("greedy", "group_limited_greedy"):
                raise ValueError(f"{fields.path}: topk_method={method!r} is not known to deepseek_v2")
            shape |= dict(scoring_func="softmax") | (dict(n_group=1, topk_group=1) if method == "greedy" else {})
        shape |= dict(num_nextn_predict_layers=_prediction_layers(fields))
    return shape


def _prediction_layers(fields: Fields) -> int:
    """Returns how many multi-token prediction layers the folder's weights hold; config.json's number without weights.

    A folder saved by transformers states the number of the original and has left the layers out.
    """
    stated = fields.get("num_nextn_predict_layers", 0)
    index, single = (fields.path.parent / name for name in (INDEX_FILE, SINGLE_FILE))
    if index.exists():
        names = read_json(index).get("weight_map") or {}
    elif single.exists():
        try:
            with safe_open(single, framework="numpy") as file:
                names = file.keys()
        except (SafetensorError, OSError):
            return stated  # the reader of the weights says what is wrong with the file
    else:
        return stated
    return stated if f"model.layers.{fields.need('num_hidden_layers')}.eh_proj.weight" in names else 0


def _rope(fields: Fields) -> tuple[float, RopeScaling]:
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


def _check_yarn(fields: Fields, values: dict[str, Any], scaling: RopeScaling) -> None:
    if not values.get("truncate", True):
        raise ValueError(f"{fields.path}: yarn with truncate=false is not supported")
    stated, computed = values.get("attention_factor"), rope.magnitude(scaling)
    if stated is not None and abs(stated - computed) > 1e-6:
        raise ValueError(
            f"{fields.path}: yarn attention_factor={stated} is not supported, only the {computed:.7g} "
            "that follows from factor and mscale"
        )
