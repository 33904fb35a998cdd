"""The sizes: one entry each, with the settings of all its stages. A stage's own numbers are in configs/NAME.py.

A new size is one entry of SIZES (docs/sizes.md).
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from r1jax.configs import _small
from r1jax.schema import (
    ComputeConfig,
    Config,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    PackConfig,
    RopeScaling,
    SamplerConfig,
    replace,
)

# How every model of real size is computed: bfloat16 copies of float32 weights, one compiled block, recomputed backward.
_REAL = ComputeConfig(compute_dtype="bfloat16", remat=True)
# The fields that the config.json of all four Qwen2.5 students have in common.
_QWEN: dict[str, Any] = dict(
    family="qwen2", head_dim=128, vocab_size=152064, attention_bias=True, max_position_embeddings=131072
)
# Of both Llama students; their rope scaling is that of Llama 3.1.
_LLAMA: dict[str, Any] = dict(
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
# Attention dimensions of DeepSeek-V2, V2-Lite, V3 and Moonlight; head_dim is the query's, nope and rope together.
_LATENT: dict[str, Any] = dict(
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    head_dim=192,
    vocab_size=102400,
)

# Fields that the two 16B mixtures have in common.
_SMALL_MIXTURE: dict[str, Any] = dict(
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

# The paper's longest output (P2 D.1, section 2.3) after a long prompt.
_LONG = SamplerConfig(
    slots=16,
    steps_per_dispatch=32,
    max_prompt_tokens=2048,
    max_new_tokens=32768,
    prefill_buckets=(256, 512, 1024),
    windows=(4096, 8192, 16384),
)
_TINY_SAMPLER = SamplerConfig(
    slots=128, steps_per_dispatch=8, max_prompt_tokens=16, max_new_tokens=88, windows=(40, 64)
)
_TINY_PACK = PackConfig(row_tokens=96, rows_per_micro_batch=32)


@dataclass(frozen=True)
class Size:
    """The settings of a size, for every stage.

    The mesh is the smallest that trains it: devices of 95 GB over which 14 bytes a parameter (float32 masters and
    moments, bfloat16 copy) leave room to compute.
    """

    model: ModelConfig
    student: str  # preset of `distill` and `student_rl` in a graph of this size
    sampler: SamplerConfig = _LONG  # slots, lengths and windows; its max_new_tokens bounds the stages' lengths
    compute: ComputeConfig = _REAL
    mesh: MeshConfig = MeshConfig()
    pack: PackConfig | None = None  # rows of every stage; None: as long as the stage needs, one for each device
    distill_rate: float = 0.0  # initial rate as a student (P2 Table 6); 0: not a student
    export_dtype: Literal["float32", "bfloat16", "fp8"] = "bfloat16"
    world: Literal["none", "tiny"] = "none"  # where problems come from without a file
    # stage -> {field: value} that replace the recipe's
    differs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


SIZES: dict[str, Size] = {
    "tiny": Size(
        model=ModelConfig(
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
        student="tiny",
        sampler=_TINY_SAMPLER,
        compute=ComputeConfig(scan_layers=False),
        pack=_TINY_PACK,
        export_dtype="float32",
        world="tiny",
        differs=_small.TINY,
    ),
    "tiny_dense": Size(
        model=ModelConfig(
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
        student="",
        sampler=_TINY_SAMPLER,
        compute=ComputeConfig(scan_layers=False),
        pack=_TINY_PACK,
        export_dtype="float32",
        world="tiny",
        differs=_small.TINY,
    ),
    # SmolLM2-135M's config.json.
    "smollm2_135m": Size(
        model=ModelConfig(
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
        student="smollm2_135m",
        sampler=SamplerConfig(
            slots=32, steps_per_dispatch=8, max_prompt_tokens=320, max_new_tokens=128, prefill_buckets=(64, 192)
        ),
        compute=ComputeConfig(),
        pack=PackConfig(row_tokens=448, rows_per_micro_batch=1),
        distill_rate=1e-4,
        export_dtype="float32",
        differs=_small.SMOLLM2,
    ),
    # The six distilled students. Their shipped config.json: hidden sizes and rope of the base, the declared context and
    # an untied head of the release. The Math bases (1.5B, 7B) turn at theta 10000, the others at 1e6.
    "qwen2_5_1_5b": Size(
        model=ModelConfig(
            **_QWEN | dict[str, Any](vocab_size=151936),
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
        ),
        student="qwen2_5_1_5b",
        distill_rate=1e-4,
    ),
    "qwen2_5_7b": Size(
        model=ModelConfig(
            **_QWEN,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
        student="qwen2_5_1_5b",
        mesh=MeshConfig(fsdp=4),
        distill_rate=8e-5,
    ),
    "qwen2_5_14b": Size(
        model=ModelConfig(
            **_QWEN,
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=48,
            num_attention_heads=40,
            num_key_value_heads=8,
            rope_theta=1000000.0,
            rms_norm_eps=1e-5,
        ),
        student="qwen2_5_1_5b",
        mesh=MeshConfig(fsdp=8),
        distill_rate=7e-5,
    ),
    "qwen2_5_32b": Size(
        model=ModelConfig(
            **_QWEN,
            hidden_size=5120,
            intermediate_size=27648,
            num_hidden_layers=64,
            num_attention_heads=40,
            num_key_value_heads=8,
            rope_theta=1000000.0,
            rms_norm_eps=1e-5,
        ),
        student="qwen2_5_7b",
        mesh=MeshConfig(fsdp=16),
        distill_rate=6e-5,
    ),
    "llama3_1_8b": Size(
        model=ModelConfig(
            **_LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
        ),
        student="qwen2_5_1_5b",
        mesh=MeshConfig(fsdp=4),
        distill_rate=5e-5,
    ),
    "llama3_3_70b": Size(
        model=ModelConfig(
            **_LLAMA, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
        ),
        student="llama3_1_8b",
        sampler=replace(_LONG, slots=32),
        mesh=MeshConfig(fsdp=32),
        distill_rate=2e-5,
    ),
    # DeepSeek-V2-Lite: the 16B shape of the DeepSeek-V3 repository's inference configs, positions of its config.json.
    "v2_lite_16b": Size(
        model=ModelConfig(
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
        student="qwen2_5_1_5b",
        sampler=replace(_LONG, slots=64),  # 34,560 bytes of cache a token: 77 GB
        mesh=MeshConfig(fsdp=2, expert=4),
    ),
    # Moonlight-16B-A3B's config.json (DeepSeek-V3 architecture).
    "moonlight_16b": Size(
        model=ModelConfig(
            **_LATENT | dict[str, Any](vocab_size=163840),
            **_SMALL_MIXTURE,
            family="deepseek_v3",
            intermediate_size=11264,
            routed_scaling_factor=2.446,
            rms_norm_eps=1e-5,
            rope_theta=50000.0,
            max_position_embeddings=8192,
        ),
        student="qwen2_5_1_5b",
        # Its positions end at 8,192: so do prompt and output together, and rows.
        sampler=replace(_LONG, slots=64, max_prompt_tokens=1024, max_new_tokens=7168, prefill_buckets=(256, 512)),
        mesh=MeshConfig(fsdp=2, expert=4),
        pack=PackConfig(row_tokens=8192, rows_per_micro_batch=8),
    ),
    # The released DeepSeek-R1 config.json (V3's own): 671B, 37B of them active.
    "v3_671b": Size(
        model=ModelConfig(
            **_LATENT | dict[str, Any](vocab_size=129280),
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
        student="qwen2_5_32b",  # the paper sets RL and distillation side by side at 32B (P2 Table 16)
        sampler=replace(_LONG, slots=512),  # 78,080 bytes of cache a token on a TPU: 1.4 TB in all
        mesh=MeshConfig(fsdp=2, expert=8, tensor=4, context=8),  # rows of 67,584 tokens fit as well
        export_dtype="fp8",  # as DeepSeek publishes it
    ),
}

# The sizes that a config may take: PRESETS = _presets.NAME.
EVERY = tuple(SIZES)
TINY = ("tiny", "tiny_dense")  # of the tiny world
POLICIES = tuple(name for name in SIZES if name != "tiny_dense")  # of the chain of stages; tiny_dense is tiny's student
# Of the stages of a student: their `tiny` trains tiny_dense.
STUDENTS = ("tiny", *(name for name, size in SIZES.items() if size.distill_rate))

# On the held-out problems of a stage at a real size: the paper's sampling (P2 D.1), which rejects greedy decoding.
EVALUATION = EvalConfig(samples_per_problem=4, temperature=0.6, top_p=0.95, greedy=False)


def config(stage: str, preset: str, **parts) -> Config:
    """Returns the config of a stage at a size: the recipe's `parts`, and model, compute, mesh and world of the size."""
    size = SIZES[preset]
    fields: dict[str, Any] = dict(
        model=size.model, compute=size.compute, mesh=size.mesh, data=DataConfig(world=size.world)
    )
    return Config(**dict[str, Any](stage=stage, preset=preset) | fields | parts)


def fitted(config: Config) -> Config:
    """Returns a stage's config with the fields in which its size differs from the recipe (Size.differs)."""
    changed: dict[str, dict[str, Any]] = defaultdict(dict)  # part, "" for the config itself -> {field: value}
    for key, value in SIZES[config.preset].differs.get(config.stage, {}).items():
        part, _, name = key.rpartition(".")
        changed[part][name] = value
    fields = changed.pop("", {})
    parts = {part: replace(getattr(config, part), **values) for part, values in changed.items()}
    return replace(config, **fields, **parts)


def trained_at(preset: str) -> str:
    """Returns the size that a student's stage trains at `preset`: itself, and at `tiny` the tiny world's dense one."""
    return "tiny_dense" if preset == "tiny" else preset


def rollouts(preset: str, max_new_tokens: int, schedule: tuple = ()) -> SamplerConfig:
    """Returns an RL stage's sampler: with the recipe's longest output and schedule if the size has room for them.

    Slots are divided over the devices, and a scheduled length below the longest is a window of the cache.
    """
    settings = SIZES[preset].sampler
    lengths: set[int] = set()
    if settings.max_new_tokens >= _LONG.max_new_tokens:
        lengths = {settings.max_prompt_tokens + int(length) for _, length in schedule if length < max_new_tokens}
        settings = replace(settings, max_new_tokens=max_new_tokens, max_new_tokens_schedule=schedule)
    whole = settings.max_prompt_tokens + settings.max_new_tokens
    windows = tuple(window for window in sorted({*settings.windows, *lengths}) if window < whole)
    return replace(settings, slots=max(settings.slots, SIZES[preset].mesh.slot_devices), windows=windows)


def pack(preset: str, row_tokens: int) -> PackConfig:
    """Returns the packed rows of a stage at `preset`: of `row_tokens`, one for each device, or the size's own."""
    size = SIZES[preset]
    return size.pack or PackConfig(row_tokens=row_tokens, rows_per_micro_batch=size.mesh.row_devices)


def rl_pack(preset: str, sampler: SamplerConfig) -> PackConfig:
    """Returns the rows of an RL stage: one holds a whole prompt and its response."""
    return pack(preset, sampler.max_prompt_tokens + sampler.max_new_tokens)
