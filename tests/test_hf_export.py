"""Exported folders without torch: bits, files, config.json, the stage that writes them, and every refusal."""

import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small
from safetensors.numpy import load_file, save_file

from r1jax import config as configs
from r1jax.checkpoints import fp8, hf, hf_config, hf_export, hf_names, tensor_file, tokenizer
from r1jax.checkpoints.tensor_file import TensorFile, TensorWriter
from r1jax.core import sharding, tree
from r1jax.data import templates
from r1jax.data.problems import Message
from r1jax.models import decoder
from r1jax.recipe import common, evaluate, export_hf, stage0_base
from r1jax.schema import Config, DataConfig, MeshConfig, ModelConfig, RopeScaling, replace

DENSE = ModelConfig(
    family="llama",
    vocab_size=200,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
)
LATENT = ModelConfig(
    vocab_size=200,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=7,
    q_lora_rank=6,
    kv_lora_rank=5,
    qk_nope_head_dim=3,
    qk_rope_head_dim=4,
    v_head_dim=7,
    n_routed_experts=4,
    n_shared_experts=2,
    moe_intermediate_size=8,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    rope_scaling=RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0),
)
SOFTMAX = replace(LATENT, family="deepseek_v2", scoring_func="softmax", norm_topk_prob=False, n_group=1, topk_group=1)
MODELS = {
    "llama": DENSE,
    "llama_tied": replace(
        DENSE, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_scaling=RopeScaling("llama3", 8.0, 8192)
    ),
    "qwen2": replace(DENSE, family="qwen2", attention_bias=True, rope_theta=1e6),
    "qwen2_yarn": replace(DENSE, family="qwen2", attention_bias=True, rope_scaling=RopeScaling("yarn", 4.0, 64)),
    "qwen2_tied": replace(DENSE, family="qwen2", attention_bias=True, tie_word_embeddings=True),
    "qwen3": replace(DENSE, family="qwen3", qk_norm=True),
    "deepseek_v3": LATENT,
    "deepseek_v3_mtp": replace(LATENT, num_nextn_predict_layers=1),
    "deepseek_v3_tied_mtp": replace(LATENT, num_nextn_predict_layers=1, tie_word_embeddings=True),
    "deepseek_v2": SOFTMAX,
    "deepseek_v2_groups": replace(SOFTMAX, n_group=2, topk_group=1, q_lora_rank=0),
    "deepseek_plain_query": replace(LATENT, q_lora_rank=0, norm_topk_prob=False, rope_scaling=RopeScaling()),
    "deepseek_dense": replace(
        LATENT, n_routed_experts=0, n_shared_experts=0, n_group=1, first_k_dense_replace=3, rope_scaling=RopeScaling()
    ),
}
MESH = sharding.make_mesh(MeshConfig())


def random_params(model: ModelConfig) -> decoder.Params:
    """Returns parameters that are all random, biases and norms too; a softmax router has no bias."""
    draw = np.random.default_rng(0)

    def leaf(spec: sharding.ParamSpec) -> jnp.ndarray:
        is_absent = model.scoring_func == "softmax" and spec.dtype is not None
        return jnp.asarray(np.zeros(spec.shape) if is_absent else draw.normal(size=spec.shape), jnp.float32)

    return sharding.map_specs(leaf, decoder.specs(model))


def save(folder: pathlib.Path, model: ModelConfig, dtype: str = "float32", **more) -> decoder.Params:
    params = random_params(model)
    hf_export.save(folder, params, model, tokenizer.tiny(), dtype, **more)
    return params


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns every tensor of a folder, as the safetensors library reads them."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


# Weights and config.json


@pytest.mark.parametrize("kind", MODELS)
def test_import_of_an_export_is_bit_equal_with_the_same_config(tmp_path, kind):
    params = save(tmp_path / "out", MODELS[kind])
    read = hf_config.model_config(tmp_path / "out")
    assert tree.digest(hf.load(tmp_path / "out", read, MESH, jnp.float32)) == tree.digest(params)
    unused = {} if read.n_routed_experts else {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
    unused |= {} if kind != "deepseek_dense" else {"routed_scaling_factor": 2.5}
    unused |= {"rope_scaling": replace(read.rope_scaling, mscale=1.0)} if read.rope_scaling.mscale == 1.0 else {}
    assert replace(read, **unused) == replace(MODELS[kind], **{k: v for k, v in unused.items() if k != "rope_scaling"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_export_of_an_import_holds_the_same_tensors_bit_for_bit(tmp_path, kind, dtype):
    model, draw = MODELS[kind], np.random.default_rng(1)
    given = {t.name: draw.normal(size=t.shape).astype(t.dtype) for t in hf_export.tensors(model, dtype)}
    given |= {name: given[original] for name, original in hf_names.copies(model).items()}
    (tmp_path / "in").mkdir()
    save_file(given, tmp_path / "in" / hf.SINGLE_FILE)
    fields = hf_export.config_fields(model, tokenizer.tiny(), dtype)
    (tmp_path / "in" / "config.json").write_text(json.dumps(fields))
    params = hf.load(tmp_path / "in", model, MESH, jnp.dtype(dtype))
    hf_export.save(tmp_path / "out", params, model, tokenizer.tiny(), dtype)
    back = stored(tmp_path / "out")
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].tobytes() == tensor.tobytes(), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == fields


def test_bfloat16_export_rounds_to_the_nearest_but_keeps_the_router_bias_in_float32(tmp_path):
    params = save(tmp_path / "out", LATENT, "bfloat16")
    back = stored(tmp_path / "out")
    rounded = np.asarray(params.embedding).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(back["model.embed_tokens.weight"], rounded)
    bias = back["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, params.sparse.ffw.bias[0])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_stay_below_the_limit_and_the_index_names_every_tensor(tmp_path):
    save(tmp_path / "one", LATENT)
    save(tmp_path / "many", LATENT, shard_bytes=8000)
    whole, index = stored(tmp_path / "one"), json.loads((tmp_path / "many" / hf.INDEX_FILE).read_text())
    assert not (tmp_path / "one" / hf.INDEX_FILE).exists()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    seen = set()
    for file in files:
        tensors = load_file(tmp_path / "many" / file)
        assert sum(t.nbytes for t in tensors.values()) <= 8000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file for name in tensors)
        assert all(tensor.tobytes() == whole[name].tobytes() for name, tensor in tensors.items())
        seen |= tensors.keys()
    assert seen == index["weight_map"].keys() == whole.keys()


def test_host_holds_no_more_than_a_few_tensors_at_a_time(tmp_path):
    model = replace(DENSE, hidden_size=256, intermediate_size=512, num_hidden_layers=12, head_dim=64)
    params = random_params(model)
    largest = max(t.nbytes for t in hf_export.tensors(model, "float32"))
    tracemalloc.start()
    hf_export.save(tmp_path / "out", params, model, tokenizer.tiny(), "float32")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 15 * largest < tree.count(params) * 4  # a second copy of the weights, or one shard of them, would be seen
    assert peak < 4 * largest + 500_000


def test_tokenizer_token_ids_and_card_are_in_the_folder(tmp_path):
    save(tmp_path / "out", DENSE, card="# the card\n")
    own, read = tokenizer.tiny(), tokenizer.from_folder(tmp_path / "out")
    text = "solve 7 x + 5 = 40 :"
    assert read.encode(text) == own.encode(text)
    for file in ("config.json", "generation_config.json"):
        fields = json.loads((tmp_path / "out" / file).read_text())
        ids = [fields[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
        assert ids == [own.bos_id, own.eos_id, own.pad_id]
    assert (tmp_path / "out" / "README.md").read_text() == "# the card\n"


# Refusals


@pytest.mark.parametrize(
    ("model", "dtype", "words"),
    [
        (replace(LATENT, scoring_func="softmax"), "float32", "scoring_func=softmax is not what deepseek_v3 computes"),
        (replace(DENSE, attention_bias=True), "float32", "attention_bias=True is not what llama computes"),
        (replace(DENSE, family="qwen2"), "float32", "attention_bias=False is not what qwen2 computes"),
        (replace(DENSE, vocab_size=50), "float32", "the tokenizer has 196 tokens, the model 50"),
        (replace(DENSE, family="qwen3"), "float32", "qk_norm=False is not what qwen3 computes"),
        (replace(DENSE, qk_norm=True), "float32", "qk_norm=True is not what llama computes"),
        (replace(SOFTMAX, norm_topk_prob=True), "float32", "norm_topk_prob=True is not what deepseek_v2 computes"),
        (replace(SOFTMAX, scoring_func="sigmoid"), "float32", "scoring_func=sigmoid is not what deepseek_v2 computes"),
        (DENSE, "fp8", "fp8 is a layout of deepseek_v3, not of llama"),
        (DENSE, "float16", "dtype 'float16' is not written; float32, bfloat16, fp8 are"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_in_one_line_before_anything_is_written(tmp_path, model, dtype, words):
    with pytest.raises(ValueError) as error:
        save(tmp_path / "out", model, dtype)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_reward_models_weights_are_refused(tmp_path):
    params = random_params(DENSE).replace(scalar_head=jnp.zeros(DENSE.hidden_size))
    with pytest.raises(ValueError, match="a scalar head has no place in these formats"):
        hf_export.save(tmp_path / "out", params, DENSE, tokenizer.tiny(), "float32")
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_shape_than_the_config_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"embedding is \(200, 16\), but the config says \(199, 16\)"):
        hf_export.save(tmp_path / "out", random_params(DENSE), replace(DENSE, vocab_size=199), tokenizer.tiny())


def test_an_existing_folder_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists already; name another --config.output or remove it"):
        save(tmp_path / "out", DENSE)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_check_leaves_nothing_and_an_interrupted_export_does_not_stand_in_the_way(tmp_path):
    seen = []

    def check(folder: pathlib.Path) -> None:
        seen.extend(sorted(path.name for path in folder.iterdir()))
        raise ValueError("no")

    with pytest.raises(ValueError, match="^no$"):
        save(tmp_path / "out", DENSE, check=check)
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < set(seen)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.7.tmp").mkdir()
    (tmp_path / ".out.7.tmp" / "model-00009.safetensors").write_bytes(b"cut short")
    save(tmp_path / "out", DENSE)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "model-00009.safetensors").exists()


# The stage


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Returns (folder of a finished stage that holds the shipped dense base, its config, its parameters)."""
    workdir = tmp_path_factory.mktemp("runs")
    config = configs.load("distill:tiny")
    params = common.load_asset(stage0_base.asset_path("tiny_dense"), config.model, MESH)
    figures = {"student_distilled": {"pass@1": 0.125, "samples": 10.0}}
    return small.finished_stage(config, workdir, params, figures), config, params


def export(student, output: pathlib.Path, *more) -> dict:
    given = [("checkpoint", str(student[0])), ("output", str(output)), *more]
    return export_hf.run(configs.load("export_hf:tiny", given), output.parent)  # a preset of another shape


def test_stage_reads_the_shape_from_the_run_and_returns_what_it_wrote_and_checked(student, tmp_path):
    figures = export(student, tmp_path / "out")
    assert figures == {"parameters": tree.count(student[2]), "tensors": 30, "files": 1, "logit_difference": 0.0}
    assert not tokenizer.tiny().chat_template
    read = tokenizer.from_folder(tmp_path / "out")
    messages = [{"role": "user", "content": "solve 1"}, {"role": "assistant", "content": "2"}]
    assert read.render_chat(messages) == "solve 1"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "stage `distill`, llama architecture" in card
    assert "| pass@1 | 0.125 |" in card and "| optimizer.learning_rate | 0.002 |" in card


def test_stage_in_bfloat16_reports_how_far_rounding_moves_the_logits(student, tmp_path):
    figures = export(student, tmp_path / "out", ("export.dtype", "bfloat16"))
    assert 0 < figures["logit_difference"] < 0.05
    assert (tmp_path / "out" / hf.SINGLE_FILE).stat().st_size < 2.1 * tree.count(student[2])


def test_stage_keeps_nothing_when_a_weight_reads_back_differently(student, tmp_path, monkeypatch):
    honest = TensorWriter.put

    def flipped(self: TensorWriter, name: str, value: np.ndarray) -> None:
        if name == "model.layers.1.mlp.up_proj.weight":
            value = value.copy()
            value[5, 5] = np.nextafter(value[5, 5], np.float32(9))
        honest(self, name, value)

    monkeypatch.setattr(TensorWriter, "put", flipped)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight reads back differently; nothing was kept"
    ):
        export(student, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert export(student, tmp_path / "out", ("export.verify", "false")).keys() == {"parameters", "tensors", "files"}


def test_the_devices_hold_no_trained_weights_any_more_when_the_folder_is_read_back(student, tmp_path, monkeypatch):
    held_bytes, weight_bytes = {}, 4 * tree.count(student[2])
    held = lambda: sum(array.nbytes for array in jax.live_arrays())  # noqa: E731
    put, load, before = TensorWriter.put, hf.load, held()

    def noting_put(*given) -> None:
        held_bytes["written"] = held() - before
        put(*given)

    def noting_load(*given):
        held_bytes["read back"] = held() - before
        return load(*given)

    monkeypatch.setattr(TensorWriter, "put", noting_put)
    monkeypatch.setattr(hf, "load", noting_load)
    export(student, tmp_path / "out")
    assert held_bytes["written"] >= weight_bytes > 10 * held_bytes["read back"]


OTHER_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}}


def test_stage_keeps_nothing_when_config_json_describes_another_model(student, tmp_path, monkeypatch):
    honest = hf_export.config_fields
    monkeypatch.setattr(hf_export, "config_fields", lambda *given: honest(*given) | OTHER_THETA)
    with pytest.raises(ValueError, match="computes other logits; nothing was kept"):
        export(student, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_exported_folder_evaluates_like_the_stage_it_was_made_from(student, tmp_path):
    export(student, tmp_path / "out")
    settings = [("evaluation.max_problems", "16"), ("evaluation.samples_per_problem", "2"), ("sampler.slots", "16")]
    figures = [
        evaluate.run(configs.load("evaluate:tiny_dense", [*settings, ("checkpoint", str(folder))]), tmp_path / "runs")
        for folder in (student[0], tmp_path / "out")
    ]
    for found in figures:
        assert found.pop("seconds") >= 0
    np.testing.assert_equal(*figures)
    assert figures[0]["mean_tokens"] > 5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give --config.checkpoint=STAGE_FOLDER and --config.output=NEW_FOLDER"),
        ({"checkpoint": "absent", "output": "out"}, "no such checkpoint folder"),
        ({"checkpoint": "hugging_face", "output": "out"}, "is a Hugging Face folder already"),
        ({"checkpoint": "bare", "output": "out"}, "has no config.json"),
        ({"checkpoint": "hugging_face", "output": "bare"}, "exists already"),
    ],
)
def test_stage_refuses_folders_that_are_not_what_it_needs(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hugging_face").mkdir()
    (tmp_path / "hugging_face" / "config.json").write_text("{}")
    (tmp_path / "bare" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=words):
        export_hf.run(replace(Config(stage="export_hf"), **given), tmp_path)


def test_a_base_folder_that_has_moved_is_named_again_on_the_command_line(tmp_path):
    fields = {"model.checkpoint": str(tmp_path / "gone"), "model.hidden_size": 32, "data.path": "rows.jsonl"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"gone, which holds its tokenizer.*--config\.model\.checkpoint=DIR"):
        common.read_model(tmp_path, export_hf.stage_config(tmp_path, fields, Config()).model)
    own = export_hf.stage_config(tmp_path, fields, Config(model=ModelConfig(checkpoint=str(tmp_path))))
    assert (own.model.checkpoint, own.model.hidden_size, own.data.path) == (str(tmp_path), 32, "rows.jsonl")


@pytest.mark.parametrize("kind", ["r1_zero", "plain", "tiny"])
def test_chat_template_renders_a_question_as_training_did(kind):
    own, question = tokenizer.tiny(), 'What is "7 \\n 5"?\nThink.'
    turns = [Message("system", "s"), Message("user", question), Message("assistant", "a"), Message("user", "b\nc")]
    for instruction in ("", 'Say "it".'):
        data = DataConfig(path="f", template=kind, instruction=instruction)
        template = export_hf.chat_template("distill", data, own)
        made = tokenizer.Tokenizer(own.backend, own.config, template)
        for asked in (turns[1:2], turns[:2], turns):
            messages = [turn._asdict() for turn in asked]
            assert made.render_chat(messages) == templates.render(asked, kind, instruction)


def test_chat_template_of_the_base_is_kept_when_training_used_it():
    own = tokenizer.Tokenizer(tokenizer.tiny().backend, tokenizer.tiny().config, "<{{ messages }}>")
    assert export_hf.chat_template("distill", DataConfig(path="rows.jsonl"), own) == "<{{ messages }}>"


def test_chat_template_of_the_base_puts_the_instruction_of_the_run_before_the_question():
    base = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    own = tokenizer.Tokenizer(tokenizer.tiny().backend, tokenizer.tiny().config, base)
    data = DataConfig(path="f", template="chat", instruction="Be short.")
    made = tokenizer.Tokenizer(own.backend, own.config, export_hf.chat_template("distill", data, own))
    asked = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    expected = templates.render(asked, "chat", "Be short.", own.render_chat)
    assert made.render_chat([turn._asdict() for turn in asked]) == expected == "<user>a<assistant>b<user>Be short.\nc"


# FP8

PREDICTING = MODELS["deepseek_v3_mtp"]
BLOCK = (4, 3)  # the widths of LATENT are no multiples of it


def fp8_folder(folder: pathlib.Path, params: decoder.Params) -> dict[str, np.ndarray]:
    """Exports in FP8 and returns the tensors of the folder."""
    hf_export.save(folder, params, PREDICTING, tokenizer.tiny(), "fp8", shard_bytes=9000, block=BLOCK)
    with hf.TensorFiles(folder) as files:
        return {name: files.read(name) for name in files}


def test_fp8_export_is_the_published_layout_and_says_so_in_config_json(tmp_path):
    tensors = fp8_folder(tmp_path / "out", random_params(PREDICTING))
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [4, 3],
    }
    assert fields["torch_dtype"] == "bfloat16" and fields["num_nextn_predict_layers"] == 1
    assert {name: (tensor_file.NAMES[value.dtype], value.shape) for name, value in tensors.items()} == {
        name: (tensor_file.NAMES[tensor.dtype], tensor.shape)
        for name, tensor in hf.tensors(PREDICTING, block=BLOCK).items()
    }
    assert tensors["model.layers.3.eh_proj.weight"].dtype == ml_dtypes.bfloat16
    head = tensors["model.layers.3.shared_head.head.weight"]
    assert head.tobytes() == tensors["lm_head.weight"].tobytes()
    index = json.loads((tmp_path / "out" / hf.INDEX_FILE).read_text())["weight_map"]
    assert len(set(index.values())) > 2
    assert all(index[name] == index[name.removesuffix(fp8.SCALE)] for name in index)  # a matrix with its factors


def test_fp8_export_of_an_fp8_import_is_bit_equal_and_so_is_its_import(tmp_path):
    first = fp8_folder(tmp_path / "first", random_params(PREDICTING))
    config = hf_config.model_config(tmp_path / "first")
    read = hf.load(tmp_path / "first", config, MESH, jnp.float32)
    second = fp8_folder(tmp_path / "second", read)
    assert {name: value.tobytes() for name, value in second.items()} == {k: v.tobytes() for k, v in first.items()}
    assert tree.digest(hf.load(tmp_path / "second", config, MESH, jnp.float32)) == tree.digest(read)


def test_fp8_import_is_what_the_export_quantised_multiplied_out(tmp_path):
    params = random_params(PREDICTING)
    fp8_folder(tmp_path / "out", params)
    read = hf_export.Leaves(hf.load(tmp_path / "out", PREDICTING, MESH, jnp.float32))
    before, changed = hf_export.Leaves(params), 0
    for tensor in hf_export.tensors(PREDICTING, "fp8", BLOCK):
        if not tensor.is_scale:
            kept = hf_export.decoded(tensor, hf_export.stored(tensor, before.value(tensor), BLOCK), BLOCK)
            np.testing.assert_array_equal(read.value(tensor), kept, err_msg=tensor.name)
            changed += not np.array_equal(kept, before.value(tensor))
    assert changed > 60


def test_weights_are_fetched_in_pieces_of_any_size_with_the_same_result(tmp_path, monkeypatch):
    params = random_params(PREDICTING)
    whole = fp8_folder(tmp_path / "whole", params)
    monkeypatch.setattr(hf_export, "_PIECE_BYTES", 300)
    pieces = fp8_folder(tmp_path / "pieces", params)
    assert {name: value.tobytes() for name, value in whole.items()} == {k: v.tobytes() for k, v in pieces.items()}


def test_fp8_of_weights_that_are_not_finite_is_refused_by_name_and_leaves_nothing(tmp_path):
    params = random_params(PREDICTING)
    params = params.replace(
        dense=params.dense.replace(ffw=params.dense.ffw.replace(up=params.dense.ffw.up.at[0].set(jnp.nan)))
    )
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds values that are not finite"):
        fp8_folder(tmp_path / "out", params)
    assert list(tmp_path.iterdir()) == []


def test_stage_in_fp8_reports_how_far_quantising_moves_the_logits(tmp_path):
    config = configs.load("r1_zero:tiny")
    params = common.load_asset(stage0_base.asset_path("tiny"), config.model, MESH)
    folder = small.finished_stage(config, tmp_path, params, {})
    given = [("checkpoint", str(folder)), ("output", str(tmp_path / "out")), ("export.dtype", "fp8")]
    figures = export_hf.run(configs.load("export_hf", given), tmp_path)
    assert 0 < figures["logit_difference"] < 0.5  # some random token finds other experts
    with TensorFile(tmp_path / "out" / hf.SINGLE_FILE) as file:
        assert figures["tensors"] == len(file.tensors)
        assert {"F8_E4M3", "F32", "BF16"} == {stored.dtype for stored in file.tensors.values()}


def test_stage_refuses_fp8_of_a_student_before_it_loads_the_weights(student, tmp_path):
    with pytest.raises(ValueError, match="fp8 is a layout of deepseek_v3, not of llama; choose float32 or bfloat16"):
        export(student, tmp_path / "out", ("export.dtype", "fp8"))
    assert list(tmp_path.iterdir()) == []


# Interrupted


def test_an_export_that_is_interrupted_between_two_tensors_leaves_nothing(tmp_path, monkeypatch):
    honest, written = TensorWriter.put, []

    def interrupted(self: TensorWriter, name: str, value: np.ndarray) -> None:
        written.append(name)
        if len(written) == 9:
            raise KeyboardInterrupt
        honest(self, name, value)

    monkeypatch.setattr(TensorWriter, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out", DENSE, shard_bytes=2000)
    assert list(tmp_path.iterdir()) == []


def test_a_selection_bias_that_a_softmax_family_has_no_tensor_for_is_refused(tmp_path):
    params = random_params(SOFTMAX)
    ffw = params.sparse.ffw
    params = params.replace(sparse=params.sparse.replace(ffw=ffw.replace(bias=ffw.bias.at[0, 1].set(0.5))))
    with pytest.raises(ValueError, match=r"sparse\.ffw\.bias is not zero, and deepseek_v2 has no tensor for it"):
        hf_export.save(tmp_path / "out", params, SOFTMAX, tokenizer.tiny(), "float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "method"), [("deepseek_v2", "greedy"), ("deepseek_v2_groups", "group_limited_greedy")]
)
def test_config_json_of_deepseek_v2_names_the_way_experts_are_picked(tmp_path, kind, method):
    save(tmp_path / "out", MODELS[kind])
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["topk_method"], fields["scoring_func"], fields["norm_topk_prob"]) == (method, "softmax", False)
    assert fields["architectures"] == ["DeepseekV2ForCausalLM"]
    assert not [name for name in stored(tmp_path / "out") if "bias" in name]
