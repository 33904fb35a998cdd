"""Claims about the real presets: their sizes, their config.json, and that a checkpoint's own config.json wins."""

import json

import pytest

from r1jax import config as configs
from r1jax import launch
from r1jax.checkpoints import hf_config, tokenizer
from r1jax.configs import _presets, distill
from r1jax.core import sharding, tree
from r1jax.models import decoder
from r1jax.recipe import common
from r1jax.schema import ModelConfig, replace

# The table of the six students: hidden, ffn, layers, heads, kv, vocabulary, theta, eps; head_dim 128, 131,072 positions.
STUDENTS = {
    "qwen2_5_1_5b": (1536, 8960, 28, 12, 2, 151936, 1e4, 1e-6),
    "qwen2_5_7b": (3584, 18944, 28, 28, 4, 152064, 1e4, 1e-6),
    "qwen2_5_14b": (5120, 13824, 48, 40, 8, 152064, 1e6, 1e-5),
    "qwen2_5_32b": (5120, 27648, 64, 40, 8, 152064, 1e6, 1e-5),
    "llama3_1_8b": (4096, 14336, 32, 32, 8, 128256, 5e5, 1e-5),
    "llama3_3_70b": (8192, 28672, 80, 64, 8, 128256, 5e5, 1e-5),
}
PARAMETERS = {
    "qwen2_5_1_5b": 1_777_088_000,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "llama3_1_8b": 8_030_261_248,
    "llama3_3_70b": 70_553_706_496,
    "v3_671b": 671_026_419_200,  # without the prediction layer
    "v2_lite_16b": 15_706_484_224 + 26 * 64,  # and our selection bias, which a softmax router leaves at 0
    "moonlight_16b": 15_960_110_208,
}
RATES = {
    "qwen2_5_1_5b": 1e-4,
    "qwen2_5_7b": 8e-5,
    "qwen2_5_14b": 7e-5,
    "qwen2_5_32b": 6e-5,
    "llama3_1_8b": 5e-5,
    "llama3_3_70b": 2e-5,
}
LATENT = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, moe_layer_freq=1)
LATENT |= dict(hidden_act="silu", attention_bias=False, tie_word_embeddings=False, initializer_range=0.02)
SMALL_MOE = dict(
    hidden_size=2048, num_hidden_layers=27, first_k_dense_replace=1, moe_intermediate_size=1408, n_routed_experts=64
)
SMALL_MOE |= dict(num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, num_experts_per_tok=6)
SMALL_MOE |= dict(n_group=1, topk_group=1, q_lora_rank=None)


def student_fields(preset: str) -> dict:
    """Returns config.json of a student, from the table."""
    hidden, ffn, layers, heads, kv, vocabulary, theta, eps = STUDENTS[preset]
    fields = dict(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads)
    fields |= dict(num_key_value_heads=kv, vocab_size=vocabulary, rope_theta=theta, rms_norm_eps=eps, hidden_act="silu")
    fields |= dict(max_position_embeddings=131072, tie_word_embeddings=False, torch_dtype="bfloat16")
    if preset.startswith("qwen"):
        window = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=21, attention_dropout=0.0)
        return fields | dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"]) | window
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    scaling |= dict(rope_type="llama3")
    return fields | dict(model_type="llama", attention_bias=False, mlp_bias=False, rope_scaling=scaling)


def yarn(mscale: float) -> dict:
    return dict(
        type="yarn",
        factor=40,
        original_max_position_embeddings=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=mscale,
        mscale_all_dim=mscale,
    )


def moe_fields(preset: str) -> dict:
    """Returns config.json of the two small mixtures of experts, as published."""
    if preset == "v2_lite_16b":
        own = dict(model_type="deepseek_v2", vocab_size=102400, intermediate_size=10944, scoring_func="softmax")
        own |= dict(topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0, rope_theta=10000)
        own |= dict(max_position_embeddings=163840, rms_norm_eps=1e-6, rope_scaling=yarn(0.707))
    else:
        own = dict(model_type="deepseek_v3", vocab_size=163840, intermediate_size=11264, scoring_func="sigmoid")
        own |= dict(topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.446, rope_theta=50000.0)
        own |= dict(max_position_embeddings=8192, rms_norm_eps=1e-5, num_nextn_predict_layers=0)
    return LATENT | SMALL_MOE | own


def read_back(fields: dict, folder, preset: str) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(fields))
    return hf_config.model_config(folder)


def parameters(model: ModelConfig) -> int:
    return tree.count(sharding.abstract(decoder.specs(model), "float32"))


@pytest.mark.parametrize("preset", PARAMETERS)
def test_preset_has_the_published_number_of_parameters(preset):
    assert parameters(replace(_presets.SIZES[preset].model, num_nextn_predict_layers=0)) == PARAMETERS[preset]


def test_the_tied_base_of_the_smallest_student_has_one_embedding_less():
    assert parameters(replace(_presets.SIZES["qwen2_5_1_5b"].model, tie_word_embeddings=True)) == 1_543_714_304


def test_the_prediction_layer_of_the_671b_model_adds_what_the_checkpoint_stores_beside_its_copies():
    whole = parameters(_presets.SIZES["v3_671b"].model)
    assert whole - PARAMETERS["v3_671b"] == 13_463_426_304 - 2 * 926_679_040


@pytest.mark.parametrize("preset", STUDENTS)
def test_student_preset_equals_the_config_json_of_the_release(preset, tmp_path):
    assert read_back(student_fields(preset), tmp_path, preset) == _presets.SIZES[preset].model


@pytest.mark.parametrize("preset", ["v2_lite_16b", "moonlight_16b"])
def test_mixture_preset_equals_the_published_config_json(preset, tmp_path):
    assert read_back(moe_fields(preset), tmp_path, preset) == _presets.SIZES[preset].model


def test_v3_preset_equals_the_released_config_json(shared_data):
    model = _presets.SIZES["v3_671b"].model
    assert hf_config.model_config(shared_data / "deepseek_r1") == model


@pytest.mark.parametrize("preset", PARAMETERS)
def test_real_presets_scan_recompute_and_use_bfloat16(preset):
    compute = _presets.SIZES[preset].compute
    assert (compute.scan_layers, compute.remat, compute.compute_dtype) == (True, True, "bfloat16")


@pytest.mark.parametrize("preset", RATES)
def test_distillation_resolves_with_the_papers_settings(preset):
    loaded = configs.load(f"distill:{preset}")
    optimizer = loaded.optimizer
    assert (optimizer.learning_rate, optimizer.schedule, optimizer.final_fraction) == (RATES[preset], "cosine", 0.1)
    assert (loaded.sft.examples_per_update, loaded.sft.epochs) == (64, 2)
    assert loaded.pack.row_tokens == loaded.sampler.max_new_tokens == 32768
    assert loaded.pack.rows_per_micro_batch % loaded.mesh.fsdp == 0
    assert loaded.model == _presets.SIZES[preset].model and loaded.stage == "distill"


def test_distillation_has_the_two_small_students_and_the_six_of_the_release():
    assert distill.PRESETS == ("tiny", "smollm2_135m", *RATES) and set(RATES) == set(STUDENTS)


def test_dry_run_prints_a_students_fields(capsys):
    assert launch.main(["--config=distill:llama3_3_70b", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "model.hidden_size = 8192" in lines and "optimizer.learning_rate = 2e-05" in lines


def test_unknown_student_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"did you mean 'qwen2_5_7b'\?"):
        configs.load("distill:qwen25_7b")


def test_a_checkpoints_own_config_json_wins_over_the_preset(tmp_path):
    fields = student_fields("qwen2_5_1_5b") | dict(
        tie_word_embeddings=True, num_hidden_layers=2, rope_theta=300000.0, max_position_embeddings=4096, vocab_size=512
    )
    (tmp_path / "config.json").write_text(json.dumps(fields))
    tokenizer.tiny().save(tmp_path)
    given = [
        ("model.checkpoint", str(tmp_path)),
        ("model.num_hidden_layers", "7"),
        ("compute.compute_dtype", "float32"),
    ]
    resolved, _, _ = common.prepare(configs.load("distill:qwen2_5_1_5b", given))
    model = resolved.model
    assert (model.tie_word_embeddings, model.num_hidden_layers, model.rope_theta) == (True, 2, 300000.0)
    assert (model.max_position_embeddings, model.vocab_size) == (4096, 512)
    # How a run computes is not the checkpoint's to say.
    compute = resolved.compute
    assert (compute.compute_dtype, compute.remat, model.checkpoint) == ("float32", True, str(tmp_path))
    file = tmp_path / "model.safetensors"  # one file beside its config.json stands for the folder
    file.write_bytes((8).to_bytes(8, "little") + b"{}      ")
    given[0] = ("model.checkpoint", str(file))
    alone, words, _ = common.prepare(configs.load("evaluate:qwen2_5_1_5b", given))
    assert alone.model == replace(model, checkpoint=str(file)) and words.eos_id == tokenizer.tiny().eos_id
