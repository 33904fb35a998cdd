"""The cases of io_cases.jsonl about import and export: what a Hugging Face folder says, and what an export of it says."""

import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from io_cases import io_case
from safetensors.numpy import save_file

from r1jax.checkpoints import hf, hf_config, hf_export, tokenizer
from r1jax.core import sharding
from r1jax.models import decoder
from r1jax.recipe import common
from r1jax.schema import MeshConfig, ModelConfig, RopeScaling

MESH = sharding.make_mesh(MeshConfig())
DENSE = dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=300, rope_theta=10000.0)
DENSE |= dict(model_type="qwen2", hidden_size=64, intermediate_size=128, num_hidden_layers=2)
MIXTURE = dict(
    model_type="deepseek_v3",
    vocab_size=67,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    q_lora_rank=None,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    moe_intermediate_size=32,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)


def write_config(folder: pathlib.Path, config: dict) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_config(folder: pathlib.Path, config: dict) -> ModelConfig:
    return hf_config.model_config(write_config(folder, config))


def tensors_of(folder: pathlib.Path, config: dict) -> dict[str, np.ndarray]:
    """Returns random float32 tensors with the names and shapes that a config.json asks for, copies too."""
    draw = np.random.default_rng(0)
    tensors = hf.tensors(read_config(folder, config), "float32")
    return {name: draw.normal(size=tensor.shape).astype(np.float32) for name, tensor in tensors.items()}


def write(folder: pathlib.Path, config: dict, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    save_file(tensors, write_config(folder, config) / hf.SINGLE_FILE)
    return folder


def load(folder: pathlib.Path) -> decoder.Params:
    return hf.load(folder, hf_config.model_config(folder), MESH, jnp.float32)


def refused(folder: pathlib.Path) -> str:
    """Returns the one-line error of loading a folder."""
    with pytest.raises(ValueError) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def config_refused(folder: pathlib.Path, config: dict) -> str:
    """Returns the one-line error of reading a config.json."""
    with pytest.raises(ValueError) as error:
        read_config(folder, config)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


# config.json


def test_yarn_in_rope_scaling_counts_beside_a_default_in_rope_parameters(tmp_path):
    case = io_case("yarn-beside-rope-parameters")["input"]["config"]
    read = read_config(tmp_path, case)
    assert read.rope_scaling == RopeScaling("yarn", 4.0, 32768, mscale=0.0)  # qwen2's length where none is stated
    assert read.rope_theta == 10000.0


def test_of_two_scalings_one_counts_whole_or_both_are_named(tmp_path):
    case = io_case("two-llama3-scalings")["input"]["config"]
    message = config_refused(tmp_path, case)  # transformers would compute with theta 10000
    assert "rope_scaling counts before rope_parameters" in message and "rope_theta=500000" in message
    read = read_config(tmp_path, case | {"rope_theta": 500000.0})
    assert read.rope_scaling == RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)
    assert read.rope_theta == 500000.0


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_rope_by_layer_type_is_refused_by_name(tmp_path, spelling):
    case = dict(io_case("rope-parameters-by-layer-type")["input"]["config"])
    by_layer = case.pop("rope_parameters")
    message = config_refused(tmp_path, case | {spelling: by_layer})
    assert f"{spelling}.full_attention is not supported: rotary parameters by layer type" in message
    null = dict.fromkeys(by_layer)
    assert f"{spelling}.full_attention is not supported" in config_refused(tmp_path, case | {spelling: null})


def test_rope_by_layer_type_is_refused_in_llama_too_where_transformers_reads_theta_10000(tmp_path):
    case = io_case("rope-parameters-by-layer-type")["input"]["config"] | {"model_type": "llama"}
    assert "rope_parameters.full_attention is not supported" in config_refused(tmp_path, case)


def test_the_scaling_factor_of_deepseek_v3_is_its_own_where_none_is_stated(tmp_path):
    assert io_case("scaling-factor-not-stated")["area"] == "hf_import"
    assert read_config(tmp_path, MIXTURE).routed_scaling_factor == 2.5
    v2 = MIXTURE | {"model_type": "deepseek_v2"}
    assert read_config(tmp_path, v2).routed_scaling_factor == 1.0
    assert read_config(tmp_path, MIXTURE | {"routed_scaling_factor": 1}).routed_scaling_factor == 1.0


def test_a_value_of_another_type_is_refused_with_field_value_and_type(tmp_path):
    words = (("num_hidden_layers='2'", "str"), ("vocab_size=300.0", "float"), ("tie_word_embeddings='false'", "str"))
    for case, (field, kind) in zip(io_case("config-of-another-type")["input"]["configs"], words, strict=True):
        message = config_refused(tmp_path, case)
        assert f"{field} is of type {kind}" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": [64]}, "hidden_size=[64] is of type list"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"num_hidden_layers": -2}, "num_hidden_layers=-2 must be at least 1"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' is of type str"),
        ({"rope_theta": float("inf")}, "rope_theta=inf must be above 0 and finite"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be at least 0 and finite"),
        ({"rope_scaling": {"type": "yarn", "factor": True}}, "rope_scaling.factor=True is of type bool"),
        ({"rope_scaling": {"type": 1, "factor": 2.0}}, "rope_scaling.type=1 is of type int"),
        ({"rope_parameters": [1]}, "rope_parameters=[1] is of type list"),
        ({"transformers_weights": "x.safetensors"}, "transformers_weights='x.safetensors' is not supported"),
    ],
)
def test_siblings_of_another_type_are_refused_in_one_line(tmp_path, change, words):
    assert words in config_refused(tmp_path, DENSE | change)


# Weights


def test_the_stored_head_of_a_tied_config_loads_where_it_is_the_embedding_and_is_refused_where_not(tmp_path):
    config = io_case("stored-head-of-a-tied-config")["input"]["config"]
    tensors = tensors_of(tmp_path / "shape", config)
    embedding = tensors["model.embed_tokens.weight"]
    equal = load(write(tmp_path / "equal", config, tensors | {"lm_head.weight": embedding.copy()}))
    assert equal.unembedding is None
    for head in (embedding + 1e-3 * (np.arange(64) == 63).astype(np.float32), embedding[:-1].copy()):
        message = refused(write(tmp_path / "other", config, tensors | {"lm_head.weight": head}))
        assert "lm_head.weight differs from model.embed_tokens.weight" in message
        assert "tie_word_embeddings" in message and "set it to false" in message
    wide = tensors | {"model.embed_tokens.weight": embedding.astype(np.float16)}
    load(write(tmp_path / "wide", config, wide | {"lm_head.weight": embedding.astype(np.float16).astype(np.float32)}))


def test_a_missing_head_names_the_remedy(tmp_path):
    for number, config in enumerate(io_case("missing-head")["input"]["configs"]):
        tensors = tensors_of(tmp_path / "shape", config)
        del tensors["lm_head.weight"]
        message = refused(write(tmp_path / str(number), config, tensors))
        assert "lm_head.weight is missing" in message
        assert "set tie_word_embeddings to true in config.json" in message
        tied = load(write(tmp_path / f"{number} tied", config | {"tie_word_embeddings": True}, tensors))
        np.testing.assert_array_equal(tied.embedding, tensors["model.embed_tokens.weight"])


def test_a_prediction_layer_that_is_not_asked_for_is_left_aside(tmp_path):
    change = io_case("prediction-layer-not-asked-for")["input"]["config_change"]
    tensors = tensors_of(tmp_path / "shape", MIXTURE)
    assert sum(name.startswith("model.layers.2.") for name in tensors) > 20
    absent = {name: value for name, value in MIXTURE.items() if name not in change}
    for number, config in enumerate((MIXTURE | change, absent)):
        folder = write(tmp_path / str(number), config, tensors)
        assert hf_config.model_config(folder).num_nextn_predict_layers == 0
        np.testing.assert_array_equal(load(folder).unembedding, tensors["lm_head.weight"].T)
    assert load(write(tmp_path / "with", MIXTURE, tensors_with_copies(tensors))).mtp is not None
    more = tensors | {"model.layers.2.mlp.extra.weight": np.ones(3, np.float32)}
    load(write(tmp_path / "more", MIXTURE | change, more))  # whatever it holds
    deeper = {name.replace("layers.1.", "layers.2."): value for name, value in tensors.items() if "layers.1." in name}
    deeper |= {name: value for name, value in tensors.items() if "layers.2." not in name}
    message = refused(write(tmp_path / "deeper", MIXTURE | change, deeper))  # a layer of the model itself
    assert "model.layers.2.input_layernorm.weight is not in the model" in message


def tensors_with_copies(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    copies = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
    return tensors | {f"model.layers.2.{name}.weight": tensors[original] for name, original in copies.items()}


@pytest.mark.parametrize("ending", ["_scale_inv", "_scale"])
def test_left_over_factors_say_where_they_come_from(tmp_path, ending):
    change = io_case("left-over-factors")["input"]["config_change"]
    tensors = {
        name: value.astype(ml_dtypes.bfloat16) for name, value in tensors_of(tmp_path / "shape", MIXTURE).items()
    }
    tensors = tensors_with_copies(tensors)
    load(write(tmp_path / "cast", MIXTURE | change, tensors))
    factors = f"model.layers.0.self_attn.o_proj.weight{ending}"
    message = refused(write(tmp_path / "left", MIXTURE | change, tensors | {factors: np.ones((1, 1), np.float32)}))
    assert f"1 tensors such as {factors} are factors of FP8 matrices, which are not FP8 here" in message
    assert "remove the factors from the folder" in message


@pytest.mark.parametrize("file", ["../x.safetensors", "ABSOLUTE", "sub/../../x.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, file):
    named = io_case("index-that-leaves-the-folder")["input"]["weight_map"]
    tensors = tensors_of(tmp_path / "shape", DENSE)
    folder = write_config(tmp_path / "model", DENSE)
    (folder / "sub").mkdir()
    save_file(tensors, tmp_path / "x.safetensors")
    file = str(tmp_path / "x.safetensors") if file == "ABSOLUTE" else file
    (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
    message = refused(folder)
    assert f"is {file!r}; weight files lie in the folder" in message
    (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": named | {"model.norm.weight": 7}}))
    assert "the file of model.norm.weight is 7; a file name is needed" in refused(folder)


def test_an_index_may_name_files_in_a_folder_inside(tmp_path):
    tensors = tensors_of(tmp_path / "shape", DENSE)
    folder, names = write_config(tmp_path / "model", DENSE), sorted(tensors)
    (folder / "sub").mkdir()
    for file, part in (("sub/x.safetensors", names[::2]), ("x.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = dict.fromkeys(names[::2], "sub/x.safetensors") | dict.fromkeys(names[1::2], "x.safetensors")
    (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(load(folder).final_norm, tensors["model.norm.weight"])


def test_the_single_file_counts_before_an_index_as_in_transformers(tmp_path):
    tensors = tensors_of(tmp_path / "shape", DENSE)
    folder = write(tmp_path / "model", DENSE, tensors)
    save_file({name: value + 1 for name, value in tensors.items()}, folder / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    np.testing.assert_array_equal(load(folder).final_norm, tensors["model.norm.weight"])
    write(folder, DENSE, {"model.norm.weight": tensors["model.norm.weight"]})
    assert f"{hf.INDEX_FILE} was left aside, as by transformers" in refused(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "language_model.", "policy.module."])
def test_a_prefix_of_all_names_is_named(tmp_path, prefix):
    assert "_orig_mod." in io_case("compiled-model-prefix")["input"]["names"]
    tensors = {prefix + name: value for name, value in tensors_of(tmp_path / "shape", MIXTURE).items()}
    message = refused(write(tmp_path / "model", MIXTURE, tensors))
    assert f"all names begin with {prefix}; save the model without it" in message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("model.", "", "no name begins with model.: this is the body of a model"),
        ("model.layers.1.", "model.layers.1._orig_mod.", "names hold _orig_mod., first model.layers.1._orig_mod."),
        ("model.", "model.language_model.", "names begin with model.language_model. where model. must stand"),
        ("q_proj.weight", "q_proj.lora_A.weight", "lora_A.weight belongs to an adapter; merge the adapter"),
    ],
)
def test_names_that_differ_throughout_are_told_in_one_clause(tmp_path, old, new, words):
    tensors = {name.replace(old, new): value for name, value in tensors_of(tmp_path / "shape", DENSE).items()}
    assert words in refused(write(tmp_path / "model", DENSE, tensors))


def test_fused_experts_are_named(tmp_path):
    fused = io_case("fused-experts")["input"]["tensors"]
    tensors = {name: v for name, v in tensors_of(tmp_path / "shape", MIXTURE).items() if ".experts." not in name}
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in fused.items()}
    message = refused(write(tmp_path / "model", MIXTURE, tensors))
    assert "fused experts are not read" in message and "model.layers.1.mlp.experts." in message


# Export


def spoken(folder: pathlib.Path, more: dict) -> tokenizer.Tokenizer:
    """Writes and reads a tokenizer of 256 words and three special tokens; `more` is of its tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(256)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])  # 256, 257, 258
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"} | more))
    return tokenizer.from_folder(folder)


def test_an_exported_tokenizer_has_a_class_that_older_readers_know(tmp_path):
    given = io_case("export-tokenizer-class")["input"]["tokenizer_config"]
    more = {"extra_special_tokens": ["<|im_start|>"], "local_files_only": False, "model_max_length": 8192}
    words = spoken(tmp_path / "in", given | more)
    (tmp_path / "out").mkdir()
    words.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not written.keys() & {"backend", "is_local", "local_files_only", "extra_special_tokens"}
    assert (written["additional_special_tokens"], written["model_max_length"]) == (["<|im_start|>"], 8192)
    assert words.config["tokenizer_class"] == "TokenizersBackend"  # the tokenizer itself is as it was
    again = tokenizer.from_folder(tmp_path / "out")
    assert again.encode("w3 <|im_end|> w4") == words.encode("w3 <|im_end|> w4") == [3, 258, 4]


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizerFast"])
def test_an_older_tokenizer_class_is_kept(tmp_path, kind):
    named = {"image_token": "<|im_start|>"}
    words = spoken(tmp_path / "in", {"tokenizer_class": kind, "extra_special_tokens": named})
    (tmp_path / "out").mkdir()
    words.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (written["tokenizer_class"], written["extra_special_tokens"]) == (kind, named)


def written_ids(folder: pathlib.Path) -> list[tuple]:
    files = (json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json"))
    return [(fields["eos_token_id"], fields["pad_token_id"]) for fields in files]


def test_an_export_keeps_the_end_tokens_and_the_padding_of_its_base(tmp_path):
    case = io_case("export-keeps-end-tokens")["input"]
    words = spoken(tmp_path / "base", case["tokenizer_config"])
    tensors = tensors_of(tmp_path / "shape", DENSE)
    write(tmp_path / "base", DENSE | {"eos_token_id": 258}, tensors)
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(case["generation_config"]))
    ends, pad = hf_config.token_ids(tmp_path / "base")
    assert (ends, pad) == ([258, 256], 256)
    model, params = hf_config.model_config(tmp_path / "base"), load(tmp_path / "base")
    hf_export.save(tmp_path / "out", params, model, words, "float32", end_ids=ends, pad_id=pad)
    assert written_ids(tmp_path / "out") == [([258, 256], 256)] * 2
    assert common.token_ids(tokenizer.from_folder(tmp_path / "out")) == (ends, pad)  # what an export of it would state


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, ([], None)),
        ({"eos_token_id": 258}, None, ([258], None)),
        ({"eos_token_id": [258, 257], "pad_token_id": 0}, {"eos_token_id": 256}, ([256, 258, 257], 0)),
        ({"eos_token_id": None, "pad_token_id": -1}, {"eos_token_id": [258, -1], "pad_token_id": None}, ([258], None)),
        ({"pad_token_id": 3}, {"pad_token_id": 0}, ([], 0)),
    ],
)
def test_end_and_padding_ids_are_those_of_both_files(tmp_path, config, generation, expected):
    write_config(tmp_path, DENSE | config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert hf_config.token_ids(tmp_path) == expected


@pytest.mark.parametrize("eos", ["258", [258, "256"], [True], {"id": 258}])
def test_end_ids_of_another_type_are_refused(tmp_path, eos):
    write_config(tmp_path, DENSE | {"eos_token_id": eos})
    with pytest.raises(ValueError, match="eos_token_id=.* must be an integer or a list of such"):
        hf_config.token_ids(tmp_path)


def test_an_end_that_the_tokenizer_names_is_in_the_list_once_and_a_single_one_is_a_number(tmp_path):
    words = spoken(tmp_path / "words", {})
    model = hf_config.model_config(write_config(tmp_path / "shape", DENSE))
    params = sharding.initialize(decoder.specs(model), jnp.zeros(2, jnp.uint32), "float32", MESH)
    for number, (ends, expected) in enumerate(
        (((), 258), ((258,), 258), ((256,), [258, 256]), ((256, 258), [256, 258]))
    ):
        hf_export.save(tmp_path / str(number), params, model, words, "float32", end_ids=ends)
        assert written_ids(tmp_path / str(number)) == [(expected, 258)] * 2


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling("yarn", 8.0, 64), RopeScaling("llama3", 8.0, 64)])
def test_an_export_states_the_rotary_parameters_in_both_spellings(tmp_path, scaling):
    model = ModelConfig(family="llama", rope_theta=5e5, rope_scaling=scaling)
    fields = hf_export.config_fields(model, tokenizer.tiny(), "float32")
    new, old = fields["rope_parameters"], fields["rope_scaling"]
    assert new["rope_theta"] == fields["rope_theta"] == 5e5
    if scaling.kind == "none":
        assert (old, new["rope_type"]) == (None, "default")
    else:
        assert {name: value for name, value in new.items() if name != "rope_theta"} == {
            name: value for name, value in old.items() if name != "type"
        }
        assert old["type"] == old["rope_type"] == scaling.kind
    for left_out in ("rope_parameters", "rope_scaling"):
        partly = {name: value for name, value in fields.items() if name != left_out}
        read = read_config(tmp_path, partly if left_out == "rope_parameters" else partly | {"rope_theta": 7.0})
        assert (read.rope_theta, read.rope_scaling) == (5e5, scaling)
