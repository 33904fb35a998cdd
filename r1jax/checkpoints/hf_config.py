"""config.json of a Hugging Face folder as a ModelConfig.

Where a file contradicts itself, or leaves a field out, it is read as transformers 5 reads it; where that would compute
what nobody stated, or something that the decoder does not compute, it is refused.
"""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from r1jax.models import rope
from r1jax.schema import ModelConfig, RopeScaling

FAMILIES = ("deepseek_v3", "deepseek_v2", "llama", "qwen2", "qwen3")
INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
DEEPSEEK = ("deepseek_v3", "deepseek_v2")
THETA = 10000.0  # of a file that states none
ROPE_DICTS = ("rope_scaling", "rope_parameters")  # the first that is not empty counts

# What a field is where config.json leaves it out. Source: the config classes of transformers 5.
ABSENT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "deepseek_v2": {
        "max_position_embeddings": 2048,
        "q_lora_rank": 1536,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": {
        "max_position_embeddings": 4096,
        "q_lora_rank": 1536,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
}
EXPERTS_ALIAS = {"deepseek_v3": "num_local_experts", "deepseek_v2": "num_experts"}  # of n_routed_experts

_NEEDED: Any = object()  # as a default: the field must be stated; as null's meaning: null is refused


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
    """The fields of one config.json, or of an object inside it, by type.

    A field that is absent has the default that is asked for, else the family's (ABSENT); one that is null is refused
    where the meaning of `null` is unclear. Every refusal is a ValueError of one line with file, field, value and type.
    """

    def __init__(self, path: Path, values: dict[str, Any] | None = None, prefix: str = ""):
        self.path, self.prefix = path, prefix
        self.values = read_json(path) if values is None else values
        self.family = self.values.get("model_type") if values is None else None

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field as it is stated, of any type; `default` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def whole(self, name: str, default: Any = _NEEDED, null: Any = _NEEDED, least: int = 1) -> Any:
        """Returns an integer of at least `least`."""
        value, stated = self._value(name, int, "an integer", default, null)
        if stated and value < least:
            raise ValueError(f"{self.path}: {self.prefix}{name}={value} must be at least {least}")
        return value

    def real(self, name: str, default: Any = _NEEDED, null: Any = _NEEDED, zero: bool = False) -> Any:
        """Returns a finite number above 0, or with `zero` of at least 0."""
        value, stated = self._value(name, (int, float), "a number", default, null)
        if not stated:
            return value
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise ValueError(
                f"{self.path}: {self.prefix}{name}={value} must be {'at least' if zero else 'above'} 0 and finite"
            )
        return float(value)

    def flag(self, name: str, default: Any = _NEEDED, null: Any = _NEEDED) -> Any:
        return self._value(name, bool, "true or false", default, null)[0]

    def text(self, name: str, default: Any = _NEEDED, null: Any = _NEEDED) -> Any:
        return self._value(name, str, "a text", default, null)[0]

    def inside(self, name: str) -> "Fields":
        """Returns the fields of an object, of an empty one where it is absent, null or empty."""
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise self._mistyped(name, value, "an object")
        return Fields(self.path, value, f"{name}.")

    def _value(self, name: str, kinds: Any, what: str, default: Any, null: Any) -> tuple[Any, bool]:
        """Returns (a field's value, whether it is stated)."""
        if name not in self.values:
            default = ABSENT.get(self.family, {}).get(name, default) if default is _NEEDED else default
            if default is _NEEDED:
                needs = f"which model_type {self.family} needs" if self.family else f"{what} is needed"
                raise ValueError(f"{self.path} has no {self.prefix}{name}, {needs}")
            return default, False
        value = self.values[name]
        if value is None:
            if null is _NEEDED:
                raise ValueError(f"{self.path} has no {self.prefix}{name}: it is null, {what} is needed")
            return null, False
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise self._mistyped(name, value, what)
        return value, True

    def _mistyped(self, name: str, value: Any, what: str) -> ValueError:
        kind = type(value).__name__
        return ValueError(f"{self.path}: {self.prefix}{name}={value!r} is of type {kind}, {what} is needed")

    def only(self, name: str, *allowed: Any) -> None:
        """Raises ValueError when the field is stated and is none of the values that the decoder computes."""
        value = self.values.get(name, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"{self.path}: {name}={value!r} is not supported, only {allowed[0]!r} is")


def model_config(folder: str | Path) -> ModelConfig:
    """Returns the shape that a folder's config.json describes.

    Raises ValueError for an unknown model_type, for a field of another type, for fields that contradict each other and
    for a setting that the decoder does not compute.
    """
    fields = Fields(Path(folder) / "config.json")
    if (family := fields.family) not in FAMILIES:
        raise ValueError(f"{fields.path}: model_type {family!r} is not known; known are {', '.join(FAMILIES)}")
    fields.only("hidden_act", "silu", "swish")  # two names of one function
    for name in ("transformers_weights", "per_layer_config"):
        fields.only(name, None)
    shape = dict(
        family=family,
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("hidden_size"),
        intermediate_size=fields.whole("intermediate_size"),
        num_hidden_layers=fields.whole("num_hidden_layers"),
        num_attention_heads=fields.whole("num_attention_heads"),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        rms_norm_eps=fields.real("rms_norm_eps", 1e-6, zero=True),
        max_position_embeddings=fields.whole("max_position_embeddings"),
        initializer_range=fields.real("initializer_range", 0.02, zero=True),
    )
    if family in ("llama", "deepseek_v2") and shape["hidden_size"] % shape["num_attention_heads"]:
        raise ValueError(
            f"{fields.path}: hidden_size={shape['hidden_size']} is no multiple of "
            f"num_attention_heads={shape['num_attention_heads']}"
        )
    shape |= _deepseek(fields, family, shape) if family in DEEPSEEK else _grouped(fields, family, shape)
    turned = "qk_rope_head_dim" if family in DEEPSEEK else "head_dim"
    if shape[turned] % 2:
        raise ValueError(f"{fields.path}: {turned}={shape[turned]} is odd; rotary position embedding turns pairs")
    shape["rope_theta"], shape["rope_scaling"] = _rope(fields, shape["max_position_embeddings"])
    try:
        return ModelConfig(**shape)
    except ValueError as error:
        raise ValueError(f"{fields.path}: {error}") from None


def _grouped(fields: Fields, family: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Returns what Llama, Qwen2 and Qwen3 add to the common fields."""
    heads = shape["num_attention_heads"]
    usual = shape["hidden_size"] // heads
    kv_heads = fields.whole("num_key_value_heads", heads if family == "llama" else _NEEDED, null=heads)
    if heads % kv_heads:
        absent = "" if "num_key_value_heads" in fields.values else f" ({family}'s number where none is stated)"
        raise ValueError(
            f"{fields.path}: num_key_value_heads={kv_heads}{absent} does not divide num_attention_heads={heads}"
        )
    added: dict[str, Any] = dict(num_key_value_heads=kv_heads)
    if family == "qwen3":
        added["head_dim"] = fields.whole("head_dim")
    else:
        added["head_dim"] = fields.whole("head_dim", usual, null=usual)
    if family != "qwen2":
        fields.only("attention_bias", False)
    if family == "llama":
        fields.only("mlp_bias", False)
        return added
    _check_windows(fields, shape["num_hidden_layers"])
    return added | ({"qk_norm": True} if family == "qwen3" else {"attention_bias": True})


def _check_windows(fields: Fields, layers: int) -> None:
    """Raises ValueError when a layer sees a sliding window: by layer_types where they are stated, else by the flags."""
    kinds = fields.get("layer_types")
    flag = fields.flag("use_sliding_window", False)
    slides = flag and "sliding_window" not in fields.values or fields.get("sliding_window") is not None
    if kinds is None:
        by_layer = flag and slides and layers > fields.whole("max_window_layers", 28, least=0)
    elif not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(f"{fields.path}: layer_types={kinds!r} must be a list of num_hidden_layers={layers} names")
    else:
        by_layer = any(kind != "full_attention" for kind in kinds)
    if by_layer:
        raise ValueError(f"{fields.path}: sliding window attention is not supported; use_sliding_window must be false")


def _deepseek(fields: Fields, family: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of latent attention and of the mixture of experts."""
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    _check_router(fields, family)
    heads = shape["num_attention_heads"]
    added = {
        name: fields.whole(name) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    }
    if fields.whole("num_key_value_heads", heads, null=heads) != heads:
        raise ValueError(
            f"{fields.path}: num_key_value_heads={fields.values['num_key_value_heads']} is not supported: latent "
            f"attention has num_attention_heads={heads} of them"
        )
    turned = added["qk_rope_head_dim"]
    if family == "deepseek_v3" and fields.whole("head_dim", turned, null=turned) != turned:
        raise ValueError(
            f"{fields.path}: head_dim={fields.values['head_dim']} is not supported: qk_rope_head_dim={turned} of each "
            "head are turned"
        )
    experts = _experts(fields, family)
    added |= dict(
        q_lora_rank=fields.whole("q_lora_rank", null=0),
        head_dim=added["qk_nope_head_dim"] + turned,
        num_key_value_heads=heads,
        n_routed_experts=experts,
        first_k_dense_replace=fields.whole("first_k_dense_replace", least=0),
    )
    if experts:
        added |= _mixture(fields, family, experts)
    elif added["first_k_dense_replace"] < shape["num_hidden_layers"]:
        raise ValueError(
            f"{fields.path}: n_routed_experts=0, but first_k_dense_replace={added['first_k_dense_replace']} leaves "
            f"layers with experts among num_hidden_layers={shape['num_hidden_layers']}"
        )
    return added


def _check_router(fields: Fields, family: str) -> None:
    """Raises ValueError for a router of another kind than the family's."""
    v2 = family == "deepseek_v2"
    allowed: dict[str, Any] = {"moe_layer_freq": 1, "scoring_func": "softmax" if v2 else "sigmoid"}
    allowed |= {"norm_topk_prob": False} if v2 else {"topk_method": "noaux_tc"}
    for name, value in allowed.items():
        fields.only(name, value, None)


def _experts(fields: Fields, family: str) -> int:
    """Returns n_routed_experts, which transformers also calls by a second name.

    Raises ValueError when the two differ.
    """
    alias = EXPERTS_ALIAS[family]
    other = fields.whole(alias, None, least=0)
    experts = fields.whole("n_routed_experts", _NEEDED if other is None else other, least=0)
    if other not in (None, experts):
        raise ValueError(f"{fields.path}: n_routed_experts={experts} and {alias}={other} are one number; remove one")
    return experts


def _mixture(fields: Fields, family: str, experts: int) -> dict[str, Any]:
    """Returns the fields of the experts and of the router."""
    mixture = dict(
        n_shared_experts=fields.whole("n_shared_experts", least=0),
        num_experts_per_tok=fields.whole("num_experts_per_tok"),
        moe_intermediate_size=fields.whole("moe_intermediate_size"),
        norm_topk_prob=fields.flag("norm_topk_prob", null=False),
        routed_scaling_factor=fields.real("routed_scaling_factor", zero=True),
        num_nextn_predict_layers=_prediction_layers(fields),
    )
    limited = family == "deepseek_v3"
    if family == "deepseek_v2":
        mixture["scoring_func"], method = "softmax", fields.text("topk_method")
        if method not in ("greedy", "group_limited_greedy"):
            raise ValueError(f"{fields.path}: topk_method={method!r} is not known to deepseek_v2")
        limited = method == "group_limited_greedy"
    groups = fields.whole("n_group") if limited else 1
    mixture |= dict(n_group=groups, topk_group=fields.whole("topk_group") if limited else 1)
    if family == "deepseek_v3" and experts < 2 * groups:
        raise ValueError(
            f"{fields.path}: n_group={groups} leaves fewer than two of n_routed_experts={experts} to a group, whose "
            "score is that of its best two"
        )
    return mixture


def token_ids(folder: Path) -> tuple[list[int], int | None]:
    """Returns (the ids that end a response, the padding id or None) as a folder states them.

    The ends are those of generation_config.json, then of config.json; the padding id is the first that is stated there.
    """
    ends: list[int] = []
    pad = None
    for path in (folder / "generation_config.json", folder / "config.json"):
        if not path.exists():
            continue
        fields = Fields(path)
        stated = fields.get("eos_token_id", [])
        stated = stated if isinstance(stated, list) else [stated]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in stated):
            raise ValueError(
                f"{path}: eos_token_id={fields.get('eos_token_id')!r} must be an integer or a list of such"
            )
        ends += [number for number in stated if number >= 0 and number not in ends]
        other = fields.whole("pad_token_id", None, None, least=-1)  # -1: none
        pad = other if pad is None and other != -1 else pad
    return ends, pad


def rotary_pairs(fields: Fields) -> bool:
    """Returns whether rotary rows are stored as adjacent pairs: rope_interleave, which only deepseek_v3 has."""
    return fields.family != "deepseek_v3" or fields.flag("rope_interleave", True, null=False)


def _prediction_layers(fields: Fields) -> int:
    """Returns how many multi-token prediction layers are read: config.json's number, where the weights hold the layer.

    A folder saved by transformers states the number of the original and has left the layers out.
    """
    stated = fields.whole("num_nextn_predict_layers", fields.whole("num_mtp_layers", 0, 0, least=0), 0, least=0)
    names = stored_names(fields.path.parent)
    if names is None:
        return stated
    return stated if f"model.layers.{fields.whole('num_hidden_layers')}.eh_proj.weight" in names else 0


def stored_names(folder: Path) -> set[str] | None:
    """Returns the names of a folder's tensors; None where there are no weights, or not such as can be read.

    The one file counts before the index, as in transformers.
    """
    index, single = (folder / name for name in (INDEX_FILE, SINGLE_FILE))
    if single.exists():
        try:
            with safe_open(single, framework="numpy") as file:
                return set(file.keys())
        except (SafetensorError, OSError):
            return None  # the reader of the weights reports what is wrong with the file
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        return set(weight_map) if isinstance(weight_map, dict) else set()
    return None


# Rotary position embedding


def _rope(fields: Fields, longest: int) -> tuple[float, RopeScaling]:
    """Returns (theta, scaling). `longest` is max_position_embeddings.

    All fields are read from rope_scaling, or all from rope_parameters where that is empty; the two are never mixed.
    theta may also be a field of config.json itself.
    """
    scaling, parameters = (fields.inside(name) for name in ROPE_DICTS)
    chosen = scaling if scaling.values else parameters
    _check_flat(fields, chosen)
    theta = _theta(fields, chosen, parameters)
    for where in (fields, chosen):
        if where.real("partial_rotary_factor", 1.0, 1.0) != 1.0:
            raise ValueError(
                f"{fields.path}: partial_rotary_factor is not supported, every rotary head must turn whole"
            )
    kind = chosen.text("rope_type", chosen.text("type", "default"))
    if kind == "default":
        return theta, RopeScaling()
    if kind not in ("yarn", "llama3"):
        raise ValueError(f"{fields.path}: rope scaling {kind!r} is not supported; default, yarn and llama3 are")
    if "factor" not in chosen.values:
        raise ValueError(f"{fields.path}: {kind} scaling needs factor, and {chosen.prefix}factor is not stated")
    # Stated at the top, the original length counts before the one beside the factor.
    where = fields if "original_max_position_embeddings" in fields.values else chosen
    original = where.whole("original_max_position_embeddings", longest)
    return theta, _yarn(fields, chosen, original, longest) if kind == "yarn" else _llama3(fields, chosen, original)


def _check_flat(fields: Fields, chosen: Fields) -> None:
    """Raises ValueError for parameters that differ from layer to layer."""
    names = [name for name, value in chosen.values.items() if isinstance(value, dict) or name.endswith("_attention")]
    if names:
        raise ValueError(
            f"{fields.path}: {chosen.prefix}{names[0]} is not supported: rotary parameters by layer type; all layers "
            f"must share one {chosen.prefix[:-1]}"
        )


def _theta(fields: Fields, chosen: Fields, parameters: Fields) -> float:
    """Returns theta: of the dict that counts, else of the top level, else THETA.

    Raises ValueError where the last would throw away what the other dict states.
    """
    if "rope_theta" in chosen.values:
        return chosen.real("rope_theta")
    if "rope_theta" in fields.values:
        return fields.real("rope_theta")
    other = parameters.real("rope_theta", THETA, THETA)
    if other != THETA:
        raise ValueError(
            f"{fields.path}: rope_scaling counts before rope_parameters, and leaves rope_theta={other:g} of "
            f"rope_parameters for {THETA:g}; state rope_theta in rope_scaling"
        )
    return THETA


def _llama3(fields: Fields, chosen: Fields, original: int) -> RopeScaling:
    low, high = (chosen.real(name) for name in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ValueError(f"{fields.path}: {chosen.prefix}high_freq_factor={high} must be above low_freq_factor={low}")
    if fields.family in DEEPSEEK and chosen.get("mscale_all_dim"):
        raise ValueError(f"{fields.path}: {chosen.prefix}mscale_all_dim is supported with yarn only, not with llama3")
    return RopeScaling("llama3", chosen.real("factor"), original, low_freq_factor=low, high_freq_factor=high)


def _yarn(fields: Fields, chosen: Fields, original: int, longest: int) -> RopeScaling:
    mscales = {name: chosen.real(name, 0.0, 0.0, zero=True) for name in ("mscale", "mscale_all_dim")}  # 0: not stated
    usual = RopeScaling()
    betas = {  # 0 counts as not stated
        name: chosen.real(name, 0.0, 0.0, zero=True) or getattr(usual, name) for name in ("beta_fast", "beta_slow")
    }
    scaling = RopeScaling("yarn", chosen.real("factor", null=longest / original), original, **betas, **mscales)
    if not chosen.flag("truncate", True, null=False):
        raise ValueError(f"{fields.path}: yarn with truncate=false is not supported")
    stated, computed = chosen.real("attention_factor", None, None, zero=True), rope.magnitude(scaling)
    if stated is not None and abs(stated - computed) > 1e-6:
        raise ValueError(
            f"{fields.path}: yarn attention_factor={stated} is not supported, only the {computed:.7g} "
            "that follows from factor and mscale"
        )
    return scaling
