"""Sizes that the configs share: model shapes, and the batch and length settings that go with them."""

from r1jax.schema import ModelConfig, PackConfig, SamplerConfig

_MODELS = {
    "tiny": ModelConfig(
        family="deepseek_v3",
        vocab_size=196,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=48,
        kv_lora_rank=48,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_group=4,
        topk_group=2,
        max_position_embeddings=512,
        scan_layers=False,
    ),
    "tiny_dense": ModelConfig(
        family="llama",
        vocab_size=196,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        scan_layers=False,
    ),
    # SmolLM2-135M's config.json.
    "smollm2_135m": ModelConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        max_position_embeddings=8192,
    ),
}
_SAMPLERS = {
    "tiny": SamplerConfig(slots=128, steps_per_dispatch=8, max_prompt_tokens=16, max_new_tokens=88, windows=(40, 64)),
    "smollm2_135m": SamplerConfig(
        slots=32, steps_per_dispatch=8, max_prompt_tokens=128, max_new_tokens=64, prefill_buckets=(64,)
    ),
}
_PACKS = {
    "tiny": PackConfig(row_tokens=96, rows_per_micro_batch=32),
    "smollm2_135m": PackConfig(row_tokens=192, rows_per_micro_batch=4),
}


def model(preset: str) -> ModelConfig:
    """Returns the decoder's shape at `preset`."""
    return _MODELS[preset]


def sampler(preset: str) -> SamplerConfig:
    """Returns slots and lengths of the rollout engine at `preset`."""
    return _SAMPLERS.get(preset, _SAMPLERS["tiny"])


def pack(preset: str) -> PackConfig:
    """Returns the shape of packed training rows at `preset`: a row holds a whole prompt and response."""
    return _PACKS.get(preset, _PACKS["tiny"])
