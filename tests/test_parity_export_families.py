"""Exports of DeepSeek-V2, Qwen3 and of a model with a prediction layer have the same logits in transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import their_logits, transformers

from r1jax.checkpoints import hf_export, hf_names, tokenizer
from r1jax.core import sharding
from r1jax.models import decoder
from r1jax.schema import ModelConfig, Network, RopeScaling, replace

TOLERANCE = 5e-5  # of the largest logit
LATENT = ModelConfig(
    vocab_size=200,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    routed_scaling_factor=1.5,
)
SOFTMAX = replace(LATENT, family="deepseek_v2", scoring_func="softmax", norm_topk_prob=False)
YARN = RopeScaling("yarn", 4.0, 32, mscale=0.7, mscale_all_dim=0.7)
GROUPED = ModelConfig(
    vocab_size=200,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
)
MODELS = {
    "deepseek_v2": (SOFTMAX, transformers.DeepseekV2ForCausalLM),
    "deepseek_v2_groups": (
        replace(SOFTMAX, n_group=4, topk_group=2, q_lora_rank=0),
        transformers.DeepseekV2ForCausalLM,
    ),
    "deepseek_v2_yarn": (replace(SOFTMAX, rope_scaling=YARN), transformers.DeepseekV2ForCausalLM),
    "deepseek_v3_mtp": (
        replace(LATENT, num_nextn_predict_layers=1, n_group=4, topk_group=2),
        transformers.DeepseekV3ForCausalLM,
    ),
    "qwen3": (replace(GROUPED, family="qwen3", qk_norm=True), transformers.Qwen3ForCausalLM),
    "qwen3_tied": (
        replace(GROUPED, family="qwen3", qk_norm=True, tie_word_embeddings=True),
        transformers.Qwen3ForCausalLM,
    ),
}


def random_params(model: ModelConfig) -> decoder.Params:
    """Returns random parameters; the router's bias is positive, and zero for softmax scores, which have none."""
    draw = np.random.default_rng(0)

    def leaf(path, spec):
        name, value = hf_names.leaf_path(path), 0.2 * draw.normal(size=spec.shape)
        if name.endswith("ffw.bias"):
            value = np.abs(value) * (model.scoring_func == "sigmoid")
        return jnp.asarray(value + name.endswith("norm"), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, decoder.specs(model), is_leaf=sharding.is_spec)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_the_export_as_its_own_family_with_the_same_logits(tmp_path, name):
    model, family = MODELS[name]
    params = random_params(model)
    hf_export.save(tmp_path / "out", params, model, tokenizer.tiny(), "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(theirs, family)
    tokens = np.random.default_rng(1).integers(0, 200, (2, 70)).astype(np.int32)
    places = np.tile(np.arange(70, dtype=np.int32), (2, 1))
    ours = np.asarray(
        decoder.logits(params, decoder.forward(params, tokens, places, np.ones_like(tokens), Network(model))[0])
    )
    expected = their_logits(theirs, tokens)
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    print(f"{name}: largest difference {error:.2e} of the largest logit")
    assert error < TOLERANCE
