"""Hugging Face folders without torch: config.json, tensor names, layouts, placement and every refusal."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from r1jax.checkpoints import fp8, hf, hf_config, hf_names
from r1jax.checkpoints.tensor_file import TensorFile, TensorWriter
from r1jax.core import sharding
from r1jax.models import decoder
from r1jax.schema import MeshConfig, ModelConfig, RopeScaling, replace

ROOT = pathlib.Path(__file__).resolve().parents[1]

LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 6, "use_sliding_window": False}
DEEPSEEK_V2 = DEEPSEEK | {
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
}
CONFIGS = {
    "llama": LLAMA,
    "llama_tied": LLAMA | {"tie_word_embeddings": True},
    "qwen2": QWEN2,
    "qwen2_tied": QWEN2 | {"tie_word_embeddings": True},
    "qwen3": QWEN3,
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3_mtp": DEEPSEEK,
    "deepseek_v2": DEEPSEEK_V2,
}

# name: shape, written out by hand from the published checkpoints' layout
LLAMA_LAYER = {
    "input_layernorm.weight": (16,),
    "post_attention_layernorm.weight": (16,),
    "self_attn.q_proj.weight": (16, 16),
    "self_attn.k_proj.weight": (8, 16),
    "self_attn.v_proj.weight": (8, 16),
    "self_attn.o_proj.weight": (16, 16),
    "mlp.gate_proj.weight": (24, 16),
    "mlp.up_proj.weight": (24, 16),
    "mlp.down_proj.weight": (16, 24),
}
QWEN2_LAYER = LLAMA_LAYER | {
    "self_attn.q_proj.bias": (16,),
    "self_attn.k_proj.bias": (8,),
    "self_attn.v_proj.bias": (8,),
}
QWEN3_LAYER = LLAMA_LAYER | {
    "self_attn.q_proj.weight": (24, 16),
    "self_attn.k_proj.weight": (12, 16),
    "self_attn.v_proj.weight": (12, 16),
    "self_attn.o_proj.weight": (16, 24),
    "self_attn.q_norm.weight": (6,),
    "self_attn.k_norm.weight": (6,),
}
LATENT_ATTENTION = {
    "input_layernorm.weight": (16,),
    "post_attention_layernorm.weight": (16,),
    "self_attn.q_a_proj.weight": (6, 16),
    "self_attn.q_a_layernorm.weight": (6,),
    "self_attn.q_b_proj.weight": (28, 6),
    "self_attn.kv_a_proj_with_mqa.weight": (9, 16),
    "self_attn.kv_a_layernorm.weight": (5,),
    "self_attn.kv_b_proj.weight": (40, 5),
    "self_attn.o_proj.weight": (16, 28),
}
MIXTURE = {"mlp.gate.weight": (4, 16), "mlp.gate.e_score_correction_bias": (4,)}
for _part in ("gate", "up", "down"):
    for _expert in range(4):
        MIXTURE[f"mlp.experts.{_expert}.{_part}_proj.weight"] = (16, 8) if _part == "down" else (8, 16)
    MIXTURE[f"mlp.shared_experts.{_part}_proj.weight"] = (16, 16)
MTP_LAYER = LATENT_ATTENTION | MIXTURE
MTP_LAYER |= {
    "enorm.weight": (16,),
    "hnorm.weight": (16,),
    "eh_proj.weight": (16, 32),
    "shared_head.norm.weight": (16,),
}
SOFTMAX_MIXTURE = {name: shape for name, shape in MIXTURE.items() if "bias" not in name}
DENSE = {name: shape for name, shape in LLAMA_LAYER.items() if name.startswith("mlp")}
LAYERS = {
    "llama": [LLAMA_LAYER] * 2,
    "llama_tied": [LLAMA_LAYER] * 2,
    "qwen2": [QWEN2_LAYER] * 2,
    "qwen2_tied": [QWEN2_LAYER] * 2,
    "qwen3": [QWEN3_LAYER] * 2,
    "deepseek_v3": [LATENT_ATTENTION | DENSE, LATENT_ATTENTION | MIXTURE, LATENT_ATTENTION | MIXTURE],
    "deepseek_v2": [LATENT_ATTENTION | DENSE, *[LATENT_ATTENTION | SOFTMAX_MIXTURE] * 2],
}
LAYERS["deepseek_v3_mtp"] = [*LAYERS["deepseek_v3"], MTP_LAYER]


def tensors_of(kind: str) -> dict[str, np.ndarray]:
    """Returns random tensors with the names and shapes of a checkpoint."""
    shapes = {"model.embed_tokens.weight": (11, 16), "model.norm.weight": (16,)}
    if not kind.endswith("_tied"):
        shapes["lm_head.weight"] = (11, 16)
    for index, layer in enumerate(LAYERS[kind]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    draw = np.random.default_rng(0)
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if kind == "deepseek_v3_mtp":
        tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"]
    return tensors


def write(folder: pathlib.Path, config: dict, tensors: dict[str, np.ndarray] | None = None) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / hf.SINGLE_FILE)
    return folder


def load(folder: pathlib.Path, dtype=jnp.float32, **changes) -> tuple[decoder.Params, ModelConfig]:
    config = replace(hf_config.model_config(folder), **changes)
    return hf.load(folder, config, sharding.make_mesh(MeshConfig()), dtype), config


def leaves_of(params: decoder.Params) -> dict[str, np.ndarray]:
    return {hf_names.leaf_path(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def exported(params: decoder.Params, config: ModelConfig, interleaved: bool = True) -> dict[str, np.ndarray]:
    """Returns the tensors that the table's inverse transforms make of the parameters."""
    leaves, result = leaves_of(params), {}
    for entry in hf_names.name_table(config, interleaved):
        for place in np.ndindex(leaves[entry.path].shape[: entry.stacked]):
            result[entry.tensor_name(place)] = entry.transform.to_hf(leaves[entry.path][place])
    return result | {name: result[original] for name, original in hf_names.copies(config).items()}


# config.json


def test_model_config_takes_the_shape_from_the_folder(tmp_path):
    config = hf_config.model_config(write(tmp_path, LLAMA))
    assert config == ModelConfig(
        family="llama",
        vocab_size=11,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        max_position_embeddings=512,
    )


WEIGHTS = (  # fields of ModelConfig that say what the weights are
    "family vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "tie_word_embeddings rms_norm_eps rope_theta rope_scaling max_position_embeddings initializer_range qk_norm "
    "attention_bias q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts "
    "first_k_dense_replace n_shared_experts num_experts_per_tok moe_intermediate_size n_group topk_group norm_topk_prob "
    "routed_scaling_factor scoring_func num_nextn_predict_layers"
)


def test_every_field_of_the_model_config_is_of_the_weights_but_the_folder_they_are_in():
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    assert sorted(names) == sorted([*WEIGHTS.split(), "checkpoint"])


def test_model_config_reads_every_deepseek_field(tmp_path):
    config = hf_config.model_config(write(tmp_path, DEEPSEEK))
    assert (config.q_lora_rank, config.kv_lora_rank, config.v_head_dim) == (6, 5, 7)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim) == (3, 4)
    assert (config.num_dense_layers, config.num_moe_layers) == (1, 2)
    assert (config.n_routed_experts, config.n_shared_experts, config.num_experts_per_tok) == (4, 2, 2)
    assert (config.n_group, config.topk_group, config.routed_scaling_factor) == (2, 1, 2.5)
    assert config.rope_scaling == RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0)


def test_model_config_reads_null_q_lora_rank_as_a_plain_query_projection(tmp_path):
    assert hf_config.model_config(write(tmp_path, DEEPSEEK | {"q_lora_rank": None})).q_lora_rank == 0


def test_model_config_reads_null_head_dim_and_kv_heads_as_the_usual_ones(tmp_path):
    config = hf_config.model_config(write(tmp_path, LLAMA | {"head_dim": None, "num_key_value_heads": None}))
    assert (config.head_dim, config.num_key_value_heads) == (4, 4)


def test_model_config_gives_qwen2_its_query_key_and_value_biases(tmp_path):
    assert hf_config.model_config(write(tmp_path, QWEN2)).attention_bias


def test_model_config_gives_qwen3_its_head_norms(tmp_path):
    config = hf_config.model_config(write(tmp_path, QWEN3))
    assert (config.qk_norm, config.attention_bias, config.head_dim) == (True, False, 6)


def test_model_config_of_deepseek_v2_has_groups_only_where_they_limit_the_choice(tmp_path):
    limited = hf_config.model_config(write(tmp_path, DEEPSEEK_V2))
    greedy = hf_config.model_config(write(tmp_path, DEEPSEEK_V2 | {"topk_method": "greedy"}))
    assert (limited.n_group, limited.topk_group, greedy.n_group, greedy.topk_group) == (2, 1, 1, 1)
    assert limited.scoring_func == greedy.scoring_func == "softmax"
    assert not limited.norm_topk_prob


def test_model_config_counts_a_prediction_layer_only_where_the_weights_hold_it(tmp_path):
    whole, without = tensors_of("deepseek_v3_mtp"), tensors_of("deepseek_v3")
    folders = [write(tmp_path / name, DEEPSEEK, tensors) for name, tensors in (("with", whole), ("without", without))]
    for name, tensors in (("sharded", whole), ("sharded without", without)):
        folders.append(write(tmp_path / name, DEEPSEEK))
        split_in_two(folders[-1], tensors)
    found = [hf_config.model_config(folder).num_nextn_predict_layers for folder in folders]
    assert found == [1, 0, 1, 0]


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 7e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_theta": 7e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 7e5, **LLAMA3}},
    ],
    ids=["type", "rope_type", "rope_parameters"],
)
def test_model_config_reads_all_three_ways_to_write_rope_scaling(tmp_path, fields):
    config = hf_config.model_config(write(tmp_path, LLAMA | fields))
    assert config.rope_theta == 7e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=2.0)


def test_model_config_derives_a_yarn_factor_of_null_from_the_lengths(tmp_path):
    scaling = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}
    config = hf_config.model_config(write(tmp_path, QWEN2 | {"rope_scaling": scaling}))
    assert config.rope_scaling.factor == 4.0


def test_model_config_leaves_frequencies_alone_without_scaling(tmp_path):
    config = hf_config.model_config(write(tmp_path, LLAMA | {"rope_parameters": {"rope_type": "default"}}))
    assert config.rope_scaling == RopeScaling()


@pytest.mark.parametrize(
    ("base", "fields", "words"),
    [
        (
            LLAMA,
            {"model_type": "mistral"},
            "'mistral' is not known; known are deepseek_v3, deepseek_v2, llama, qwen2, qwen3",
        ),
        (LLAMA, {"model_type": None}, "known are deepseek_v3, deepseek_v2, llama, qwen2, qwen3"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (LLAMA, {"attention_bias": True}, "attention_bias=True is not supported"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias=True is not supported"),
        (LLAMA, {"hidden_size": None}, "has no hidden_size"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
        (LLAMA, {"rope_scaling": {"type": "llama3"}}, "needs factor"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 128}}, "needs factor"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 2.0}}, "attention_factor=2.0"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate=false"),
        (QWEN2, {"use_sliding_window": True}, "sliding window"),
        (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        (DEEPSEEK, {"attention_bias": True}, "attention_bias=True is not supported"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        (DEEPSEEK, {"topk_method": "greedy"}, "topk_method='greedy'"),
        (DEEPSEEK, {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        (DEEPSEEK, {"kv_lora_rank": None}, "has no kv_lora_rank"),
        (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        (QWEN3, {"attention_bias": True}, "attention_bias=True is not supported"),
    ],
)
def test_model_config_refuses_what_the_decoder_does_not_compute_in_one_line(tmp_path, base, fields, words):
    with pytest.raises(ValueError) as error:
        hf_config.model_config(write(tmp_path, base | fields))
    assert words in str(error.value)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_model_config_accepts_a_sliding_window_that_no_layer_uses(tmp_path):
    fields = {"use_sliding_window": True, "max_window_layers": 2}
    assert hf_config.model_config(write(tmp_path, QWEN2 | fields)).num_hidden_layers == 2


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[]", "an object is needed")])
def test_model_config_names_a_file_that_is_no_json_object(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        hf_config.model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_model_config_says_that_a_folder_has_no_config(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        hf_config.model_config(tmp_path)


# Weights


@pytest.mark.parametrize("kind", CONFIGS)
def test_load_then_export_is_bit_equal_to_the_checkpoint(tmp_path, kind):
    tensors = tensors_of(kind)
    params, config = load(write(tmp_path, CONFIGS[kind], tensors))
    back = exported(params, config)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_load_puts_layers_and_experts_at_their_places(tmp_path):
    tensors = tensors_of("deepseek_v3")
    leaves = leaves_of(load(write(tmp_path, DEEPSEEK, tensors))[0])
    expert = tensors["model.layers.2.mlp.experts.3.down_proj.weight"]
    np.testing.assert_array_equal(leaves["sparse.ffw.down"][1, 3], expert.T)
    np.testing.assert_array_equal(leaves["dense.ffw.up"][0], tensors["model.layers.0.mlp.up_proj.weight"].T)
    bias = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    np.testing.assert_array_equal(leaves["sparse.ffw.bias"][0], bias)


def test_load_splits_the_pairs_of_rotary_rows_in_halves(tmp_path):
    tensors = tensors_of("deepseek_v3")
    leaves = leaves_of(load(write(tmp_path, DEEPSEEK, tensors))[0])
    query = tensors["model.layers.0.self_attn.q_b_proj.weight"]  # 4 heads of 3 plain and 4 rotary rows
    head = query[7:14]
    np.testing.assert_array_equal(leaves["dense.attention.q_b"][0, :, 1], head[[0, 1, 2, 3, 5, 4, 6]].T)
    key = tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]  # 5 latent and 4 rotary rows
    np.testing.assert_array_equal(leaves["dense.attention.kv_a"][0], key[[0, 1, 2, 3, 4, 5, 7, 6, 8]].T)


def test_load_keeps_rotary_rows_that_are_stored_half_split(tmp_path):
    tensors = tensors_of("deepseek_v3")
    leaves = leaves_of(load(write(tmp_path, DEEPSEEK | {"rope_interleave": False}, tensors))[0])
    key = tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    np.testing.assert_array_equal(leaves["dense.attention.kv_a"][0], key.T)


def test_load_reads_a_plain_query_projection_when_there_is_no_query_low_rank(tmp_path):
    tensors = {name: value for name, value in tensors_of("deepseek_v3").items() if ".q_" not in name}
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = np.full((28, 16), layer, np.float32)
    params, _ = load(write(tmp_path, DEEPSEEK | {"q_lora_rank": None}, tensors))
    assert params.sparse.attention.q_a is None
    assert params.sparse.attention.q_b.shape == (2, 16, 4, 7)
    assert float(params.sparse.attention.q_b[1].min()) == 2.0


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_load_widens_half_precision_exactly(tmp_path, stored):
    tensors = {name: value.astype(stored) for name, value in tensors_of("llama").items()}
    params, config = load(write(tmp_path, LLAMA, tensors))
    for name, value in exported(params, config).items():
        np.testing.assert_array_equal(value, tensors[name].astype(np.float32), err_msg=name)


def test_load_rounds_to_the_asked_dtype_but_keeps_the_router_bias_in_float32(tmp_path):
    tensors = tensors_of("deepseek_v3")
    params, _ = load(write(tmp_path, DEEPSEEK, tensors), jnp.bfloat16)
    assert params.embedding.dtype == jnp.bfloat16
    embedding = tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params.embedding), embedding)
    assert params.sparse.ffw.bias.dtype == jnp.float32


def split_in_two(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_load_reads_a_sharded_checkpoint_as_the_single_file(tmp_path):
    tensors = tensors_of("deepseek_v3")
    single = leaves_of(load(write(tmp_path / "single", DEEPSEEK, tensors))[0])
    folder = write(tmp_path / "sharded", DEEPSEEK)
    split_in_two(folder, tensors)
    for path, leaf in leaves_of(load(folder)[0]).items():
        np.testing.assert_array_equal(leaf, single[path], err_msg=path)


def test_load_skips_rotary_buffers_prediction_layers_and_a_tied_head(tmp_path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "model.layers.3.eh_proj.weight": np.ones((16, 32), np.float32),
        "lm_head.weight": tensors_of("deepseek_v3")["model.embed_tokens.weight"],
    }
    folder = write(tmp_path, DEEPSEEK | {"tie_word_embeddings": True}, tensors_of("deepseek_v3") | extra)
    params, config = load(folder, num_nextn_predict_layers=0)
    assert params.unembedding is None
    assert not exported(params, config).keys() & extra.keys()


SHARDED = """
import pathlib, sys
import jax.numpy as jnp, numpy as np, jax
from r1jax.checkpoints import hf, hf_config, tensor_file
from r1jax.core import sharding
from r1jax.schema import MeshConfig, ModelConfig
folder = pathlib.Path(sys.argv[1])
config = hf_config.model_config(folder)
one = hf.load(folder, config, sharding.make_mesh(MeshConfig()), jnp.float32)
mesh, seen, honest = sharding.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2)), [], tensor_file.TensorFile.read
tensor_file.TensorFile.read = lambda file, name, rows=slice(None): seen.append(name) or honest(file, name, rows)
many = hf.load(folder, config, mesh, jnp.float32)
split = 0
for path, spec in hf.leaf_specs(config).items():
    a, b = (eval(f"params.{path}", {"params": params}) for params in (one, many))
    assert np.array_equal(a, b), path
    assert b.sharding == sharding.sharding(mesh, spec.axes, spec.shape), path
    split += b.addressable_shards[0].data.shape != b.shape
print(split, len(seen), len(set(seen)))
"""


def test_load_places_each_leaf_with_its_sharding_over_eight_devices(tmp_path):
    folder = write(tmp_path, DEEPSEEK, tensors_of("deepseek_v3"))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SHARDED, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    split, reads, tensors = map(int, done.stdout.split())
    assert split > 10
    assert reads == tensors == len(tensors_of("deepseek_v3"))  # once for all devices


# Refusals


def refused(folder: pathlib.Path) -> str:
    """Returns the one-line error of loading a folder."""
    with pytest.raises(ValueError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_load_reports_missing_extra_and_misshaped_tensors_together(tmp_path):
    tensors = tensors_of("llama")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.extra.weight"] = np.ones(3, np.float32)
    tensors["model.norm.weight"] = np.ones(15, np.float32)
    message = refused(write(tmp_path, LLAMA, tensors))
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "model.layers.0.mlp.extra.weight is not in the model" in message
    assert "model.norm.weight is (15,), the model needs (16,)" in message


def test_load_counts_the_problems_beyond_the_first_few(tmp_path):
    tensors = {name: value for name, value in tensors_of("llama").items() if "layers" not in name}
    assert "and 12 more" in refused(write(tmp_path, LLAMA, tensors))  # 18 tensors of two layers, 6 of them named


def test_load_refuses_layers_beyond_the_config_of_a_dense_family(tmp_path):
    tensors = tensors_of("llama") | {"model.layers.2.mlp.up_proj.weight": np.ones((24, 16), np.float32)}
    message = refused(write(tmp_path, LLAMA, tensors))
    assert "model.layers.2.mlp.up_proj.weight is not in the model" in message


@pytest.mark.parametrize("stored", [np.int32, ml_dtypes.float8_e5m2])
def test_load_refuses_other_types(tmp_path, stored):
    tensors, name = tensors_of("llama"), "model.layers.1.mlp.up_proj.weight"
    kind = {np.int32: "I32", ml_dtypes.float8_e5m2: "F8_E5M2"}[stored]
    assert f"{name} is {kind}; it must be float32" in refused(
        write(tmp_path, LLAMA, tensors | {name: tensors[name].astype(stored)})
    )


def test_load_names_a_truncated_file(tmp_path):
    folder = write(tmp_path, LLAMA, tensors_of("llama"))
    path = folder / hf.SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-8])
    message = refused(folder)
    assert str(path) in message and "cut short" in message


def test_load_names_a_shard_that_is_absent(tmp_path):
    folder = write(tmp_path, LLAMA)
    split_in_two(folder, tensors_of("llama"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "lacks 1 of 2 weight files, first model-00002-of-00002.safetensors" in refused(folder)


def test_load_says_that_a_folder_has_no_weights(tmp_path):
    assert "holds neither model.safetensors nor" in refused(write(tmp_path, LLAMA))


def test_load_refuses_an_index_without_a_weight_map(tmp_path):
    folder = write(tmp_path, LLAMA)
    (folder / hf.INDEX_FILE).write_text("{}")
    assert "has no weight_map" in refused(folder)


def test_load_names_the_family_whose_tensors_the_folder_lacks(tmp_path):
    message = refused(write(tmp_path, QWEN2, tensors_of("llama")))
    assert "does not fit the model of its config.json (qwen2)" in message
    assert "model.layers.0.self_attn.q_proj.bias is missing" in message


# One file, repeated tensors, prediction layers


def test_load_reads_one_file_by_its_path(tmp_path):
    folder = write(tmp_path, LLAMA, tensors_of("llama"))
    whole, config = load(folder)
    (folder / hf.SINGLE_FILE).rename(folder / "weights.safetensors")
    params = hf.load(folder / "weights.safetensors", config, sharding.make_mesh(MeshConfig()), jnp.float32)
    for path, leaf in leaves_of(params).items():
        np.testing.assert_array_equal(leaf, leaves_of(whole)[path], err_msg=path)


def test_load_uses_the_file_that_the_index_names_for_a_tensor_in_two_of_them(tmp_path):
    tensors, name = tensors_of("llama"), "model.norm.weight"
    for right in (0, 1):
        folder = write(tmp_path / str(right), LLAMA)
        files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        save_file(tensors | {name: tensors[name] * (right == 0)}, folder / files[0])
        save_file({name: tensors[name] * (right == 1)}, folder / files[1])
        weight_map = dict.fromkeys(tensors, files[0]) | {name: files[right], "unused": files[1]}
        (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        np.testing.assert_array_equal(load(folder)[0].final_norm, tensors[name])


def test_load_needs_no_copies_but_refuses_copies_that_differ(tmp_path):
    tensors = tensors_of("deepseek_v3_mtp")
    copy, original = "model.layers.3.shared_head.head.weight", "lm_head.weight"
    whole = leaves_of(load(write(tmp_path / "whole", DEEPSEEK, tensors))[0])
    without = {name: value for name, value in tensors.items() if name != copy}
    for path, leaf in leaves_of(load(write(tmp_path / "without", DEEPSEEK, without))[0]).items():
        np.testing.assert_array_equal(leaf, whole[path], err_msg=path)
    changed = tensors | {copy: np.where(np.arange(16) == 9, 0, tensors[copy]).astype(np.float32)}
    message = refused(write(tmp_path / "changed", DEEPSEEK, changed))
    assert f"{copy} differs from {original}" in message


def test_load_compares_copies_piece_by_piece_and_by_value(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "_COMPARED_BYTES", 8 * 16 * 4)  # 4 of 11 rows
    tensors = tensors_of("deepseek_v3_mtp")
    tensors |= {name: tensors[name].astype(np.float16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    copy = "model.layers.3.embed_tokens.weight"
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].astype(np.float32)
    tensors[copy] = tensors["model.embed_tokens.weight"].astype(np.float32)
    load(write(tmp_path / "equal", DEEPSEEK, tensors))
    tensors[copy] = tensors[copy].copy()
    tensors[copy][10, 15] += 1
    assert f"{copy} differs from model.embed_tokens.weight" in refused(write(tmp_path / "changed", DEEPSEEK, tensors))


def test_load_reports_a_prediction_layer_that_is_not_whole(tmp_path):
    tensors = tensors_of("deepseek_v3_mtp")
    del tensors["model.layers.3.hnorm.weight"]
    assert "model.layers.3.hnorm.weight is missing" in refused(write(tmp_path, DEEPSEEK, tensors))


def test_load_reads_each_tensor_once_and_once_more_to_compare_copies(tmp_path, monkeypatch):
    folder = write(tmp_path, DEEPSEEK, tensors_of("deepseek_v3_mtp"))
    config, seen = hf_config.model_config(folder), []
    honest = TensorFile.read
    monkeypatch.setattr(
        TensorFile, "read", lambda file, name, rows=slice(None): seen.append(name) or honest(file, name, rows)
    )
    hf.load(folder, config, sharding.make_mesh(MeshConfig()), jnp.float32)
    copies = hf_names.copies(config)
    twice = [*copies, *copies.values()]  # compared once, and the originals are also weights
    assert sorted(seen) == sorted([*twice, *(name for name in tensors_of("deepseek_v3_mtp") if name not in copies)])


# FP8

BLOCK = (4, 3)
QUANTISED = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}}
KEY = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"  # 9 x 16: 3 x 6 blocks, the last ones cut off


def in_fp8(kind: str = "deepseek_v3_mtp") -> dict[str, np.ndarray]:
    """Returns a checkpoint whose matrices are FP8 with random factors."""
    draw, result = np.random.default_rng(3), {}
    for name, value in tensors_of(kind).items():
        result[name] = value
        if fp8.is_quantised(name):
            result[name] = value.astype(ml_dtypes.float8_e4m3fn)
            shape = [-(-size // cut) for size, cut in zip(value.shape, BLOCK, strict=True)]
            result[name + "_scale_inv"] = draw.uniform(0.5, 2, shape).astype(np.float32)
    return result


def write_fp8(folder: pathlib.Path, tensors: dict[str, np.ndarray], config: dict = DEEPSEEK) -> pathlib.Path:
    """Writes an FP8 checkpoint in two files, the factors in another one than their matrices."""
    write(folder, config | QUANTISED)
    weight_map = {name: f"model-0000{1 + name.endswith('_inv')}-of-00002.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        here = {name: value for name, value in tensors.items() if weight_map[name] == file}
        with TensorWriter(folder / file, [(name, value.dtype, value.shape) for name, value in here.items()]) as writer:
            for name, value in here.items():
                writer.put(name, value)
    (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("kind", ["deepseek_v3_mtp", "qwen3"])
def test_load_multiplies_fp8_out_in_float32_before_it_moves_rows(tmp_path, kind):
    tensors = in_fp8(kind)
    back = exported(*load(write_fp8(tmp_path, tensors, CONFIGS[kind])))
    for name, value in back.items():
        expected = tensors[name].astype(np.float32)
        if name + "_scale_inv" in tensors:
            for row, column in np.ndindex(expected.shape):
                expected[row, column] *= tensors[name + "_scale_inv"][row // BLOCK[0], column // BLOCK[1]]
        np.testing.assert_array_equal(value, expected, err_msg=name)


def test_load_of_fp8_rounds_once_to_the_asked_dtype(tmp_path):
    folder = write_fp8(tmp_path, in_fp8())
    wide, small = load(folder)[0], load(folder, jnp.bfloat16)[0]
    expected = np.asarray(wide.sparse.ffw.down).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(small.sparse.ffw.down), expected)


def test_load_reads_matrices_that_an_fp8_checkpoint_left_wide(tmp_path):
    tensors = in_fp8()
    tensors[KEY] = tensors[KEY].astype(np.float32)
    del tensors[KEY + "_scale_inv"]
    back = exported(*load(write_fp8(tmp_path, tensors)))
    np.testing.assert_array_equal(back[KEY], tensors[KEY])


def test_load_reports_wrong_factors_with_the_other_problems(tmp_path):
    tensors = in_fp8()
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    tensors[KEY + "_scale_inv"] = np.ones((2, 6), np.float32)
    tensors["model.norm.weight_scale_inv"] = np.ones((1, 1), np.float32)
    tensors["model.layers.0.mlp.gate_proj.weight"] = tensors["model.layers.0.mlp.gate_proj.weight"].astype(np.float32)
    message = refused(write_fp8(tmp_path, tensors))
    assert "model.layers.0.mlp.up_proj.weight_scale_inv is missing" in message
    assert "model.norm.weight_scale_inv is not in the model" in message
    assert "model.layers.0.mlp.gate_proj.weight_scale_inv is not in the model" in message
    assert f"{KEY}_scale_inv is (2, 6), the model needs (3, 6)" in message


def test_load_refuses_fp8_where_the_layout_has_none_and_without_a_block_size(tmp_path):
    tensors = in_fp8()
    norm = tensors | {"model.norm.weight": np.ones(16, ml_dtypes.float8_e4m3fn)}
    assert "model.norm.weight is F8_E4M3; it must be float32" in refused(write_fp8(tmp_path / "norm", norm))
    folder = write_fp8(tmp_path / "bare", tensors)
    (folder / "config.json").write_text(json.dumps(DEEPSEEK))
    message = refused(folder)
    assert "is FP8, but config.json has no quantization_config" in message and "weight_block_size" in message


def test_load_refuses_another_quantisation_before_it_reads_a_weight(tmp_path):
    folder = write(tmp_path, LLAMA | {"quantization_config": {"quant_method": "awq"}}, tensors_of("llama"))
    assert "quant_method='awq' is not read, only 'fp8' is" in refused(folder)
