"""Sizes that the configs share: model shapes, and the batch and length settings that go with them."""

from r1jax.schema import (
    ComputeConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    PackConfig,
    RopeScaling,
    SamplerConfig,
    replace,
)

_COMPUTE = {  # how models are run, those of real size apart
    **dict.fromkeys(("tiny", "tiny_dense"), ComputeConfig(scan_layers=False)),
    "smollm2_135m": ComputeConfig(),
}
# What every model of real size computes with: bfloat16 copies of float32 weights, one compiled block, recomputed backward.
_REAL = ComputeConfig(compute_dtype="bfloat16", remat=True)
# What the config.json of all four Qwen2.5 students says alike.
_QWEN = dict(family="qwen2", head_dim=128, vocab_size=152064, attention_bias=True, max_position_embeddings=131072)
# Of both Llama students; their rope scaling is that of Llama 3.1.
_LLAMA = dict(
    family="llama",
    head_dim=128,
    num_key_value_heads=8,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        "llama3", factor=8.0, original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
    ),
    max_position_embeddings=131072,
)
# Attention dimensions that DeepSeek-V2, V2-Lite, V3 and Moonlight share; head_dim is the query's, nope and rope together.
_LATENT = dict(
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    head_dim=192,
    vocab_size=102400,
)

# What the two 16B mixtures share.
_SMALL_MIXTURE = dict(
    hidden_size=2048,
    num_hidden_layers=27,
    num_attention_heads=16,
    num_key_value_heads=16,
    first_k_dense_replace=1,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
)

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
    # The six distilled students. Their shipped config.json: hidden sizes and rope of the base, the declared context and
    # an untied head of the release. The Math bases (1.5B, 7B) turn at theta 10000, the others at 1e6.
    "qwen2_5_1_5b": ModelConfig(
        **_QWEN | dict(vocab_size=151936),
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    ),
    "qwen2_5_7b": ModelConfig(
        **_QWEN,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "qwen2_5_14b": ModelConfig(
        **_QWEN,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        rope_theta=1000000.0,
        rms_norm_eps=1e-5,
    ),
    "qwen2_5_32b": ModelConfig(
        **_QWEN,
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        rope_theta=1000000.0,
        rms_norm_eps=1e-5,
    ),
    "llama3_1_8b": ModelConfig(
        **_LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
    ),
    "llama3_3_70b": ModelConfig(
        **_LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
    # The released DeepSeek-R1 config.json (V3's own): 671B, 37B of them active.
    "v3_671b": ModelConfig(
        **_LATENT | dict(vocab_size=129280),
        family="deepseek_v3",
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        q_lora_rank=1536,
        first_k_dense_replace=3,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        rope_scaling=RopeScaling(
            "yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
        ),
        max_position_embeddings=163840,
    ),
    # DeepSeek-V2-Lite: the 16B shape of the DeepSeek-V3 repository's inference configs, positions of its config.json.
    "v2_lite_16b": ModelConfig(
        **_LATENT,
        **_SMALL_MIXTURE,
        family="deepseek_v2",
        intermediate_size=10944,
        scoring_func="softmax",
        norm_topk_prob=False,
        rope_scaling=RopeScaling(
            "yarn", factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707
        ),
        max_position_embeddings=163840,
    ),
    # Moonlight-16B-A3B's config.json (DeepSeek-V3 architecture).
    "moonlight_16b": ModelConfig(
        **_LATENT | dict(vocab_size=163840),
        **_SMALL_MIXTURE,
        family="deepseek_v3",
        intermediate_size=11264,
        routed_scaling_factor=2.446,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        max_position_embeddings=8192,
    ),
}
TINY = ("tiny", "tiny_dense")  # models of the tiny world
# The six students of the release, by size.
STUDENTS = ("qwen2_5_1_5b", "qwen2_5_7b", "llama3_1_8b", "qwen2_5_14b", "qwen2_5_32b", "llama3_3_70b")
# Longest prompt and longest output; the paper allows 32,768 tokens of output (P2 D.1).
_LONG = SamplerConfig(
    slots=16,
    steps_per_dispatch=32,
    max_prompt_tokens=2048,
    max_new_tokens=32768,
    prefill_buckets=(256, 512, 1024),
    windows=(4096, 8192, 16384),
)
_SAMPLERS = {
    "tiny": SamplerConfig(slots=128, steps_per_dispatch=8, max_prompt_tokens=16, max_new_tokens=88, windows=(40, 64)),
    "smollm2_135m": SamplerConfig(
        slots=32, steps_per_dispatch=8, max_prompt_tokens=320, max_new_tokens=128, prefill_buckets=(64, 192)
    ),
    **dict.fromkeys(STUDENTS, _LONG),
    "v3_671b": replace(_LONG, slots=512),  # 78,080 bytes of cache a token on a TPU: 1.4 TB in all
    "v2_lite_16b": replace(_LONG, slots=64),  # 34,560 bytes a token: 77 GB
    "moonlight_16b": replace(_LONG, slots=64, max_prompt_tokens=1024, max_new_tokens=7168, prefill_buckets=(256, 512)),
}
_PACKS = {
    "tiny": PackConfig(row_tokens=96, rows_per_micro_batch=32),
    "smollm2_135m": PackConfig(row_tokens=448, rows_per_micro_batch=1),
    "moonlight_16b": PackConfig(row_tokens=8192, rows_per_micro_batch=8),
}
# Devices of 95 GB over which 14 bytes a parameter (float32 masters and moments, bfloat16 copy) leave room to compute.
_MESHES = {
    "qwen2_5_7b": MeshConfig(fsdp=4),
    "llama3_1_8b": MeshConfig(fsdp=4),
    "qwen2_5_14b": MeshConfig(fsdp=8),
    "qwen2_5_32b": MeshConfig(fsdp=16),
    "llama3_3_70b": MeshConfig(fsdp=32),
    "v2_lite_16b": MeshConfig(fsdp=2, expert=4),
    "moonlight_16b": MeshConfig(fsdp=2, expert=4),
    "v3_671b": MeshConfig(data=2, fsdp=32, expert=8),
}


def data(preset: str) -> DataConfig:
    """Returns where the problems of `preset` come from when no file is given: the tiny presets generate theirs."""
    return DataConfig(world="tiny" if preset in TINY else "none")


def model(preset: str) -> ModelConfig:
    """Returns the decoder's shape at `preset`."""
    return _MODELS[preset]


def compute(preset: str) -> ComputeConfig:
    """Returns how the decoder of `preset` is run."""
    return _COMPUTE.get(preset, _REAL)


def sampler(preset: str) -> SamplerConfig:
    """Returns slots and lengths of the rollout engine at `preset`."""
    return _SAMPLERS.get(preset, _SAMPLERS["tiny"])


def pack(preset: str) -> PackConfig:
    """Returns the shape of packed training rows at `preset`: a row holds a whole prompt and response."""
    return _PACKS.get(preset, _PACKS["tiny"])


def mesh(preset: str) -> MeshConfig:
    """Returns the smallest mesh that trains `preset`: one device where it is enough."""
    return _MESHES.get(preset, MeshConfig())


def sft_pack(preset: str) -> PackConfig:
    """Returns the rows of a student's distillation: 32,768 tokens (P2 B.4.3), one row for each device of its mesh."""
    return PackConfig(row_tokens=32768, rows_per_micro_batch=mesh(preset).fsdp)
