"""What a model is: the fields of config.json."""

from dataclasses import dataclass
from typing import Literal

from r1jax.schema.checks import Check, Checked


@dataclass(frozen=True)
class RopeScaling:
    """Position scaling as in config.json's rope_scaling; `none` leaves the frequencies alone."""

    kind: Literal["none", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096  # tokens
    beta_fast: float = 32.0  # YaRN: rotations above which a frequency is kept
    beta_slow: float = 1.0  # YaRN: rotations below which it is divided by factor
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Shape of a decoder: DeepSeek-V3 or V2 (MLA, mixture of experts) or a dense GQA student.

    Fields have the names of Hugging Face's config.json, so that the two map one to one. Only `checkpoint` is not in
    that file: it names the file's folder.
    """

    family: Literal["deepseek_v3", "deepseek_v2", "llama", "qwen2", "qwen3"] = "deepseek_v3"
    vocab_size: int = 128
    hidden_size: int = 96
    intermediate_size: int = 256  # width of a dense SwiGLU layer
    num_hidden_layers: int = 3
    num_attention_heads: int = 2
    num_key_value_heads: int = 2
    head_dim: int = 48  # GQA families only
    q_lora_rank: int = 0  # MLA; 0 means a plain q_proj
    kv_lora_rank: int = 48  # MLA latent width
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    first_k_dense_replace: int = 1  # leading dense layers of a mixture-of-experts model
    n_routed_experts: int = 0  # 0 means a dense model
    n_shared_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    n_group: int = 1
    topk_group: int = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0  # depth of multi-token prediction: 0 or 1
    attention_bias: bool = False  # QKV bias (Qwen2)
    qk_norm: bool = False  # RMS norm of each query and key head (Qwen3)
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: int = 4096  # tokens
    initializer_range: float = 0.02  # standard deviation of the initial weights
    checkpoint: str = (
        ""  # folder with config.json and starting weights, of Hugging Face or of a stage; "" is the stage's default
    )

    checks = (
        Check(
            "num_key_value_heads",
            lambda c: c.num_attention_heads % c.num_key_value_heads == 0,
            "does not divide num_attention_heads={c.num_attention_heads}",
        ),
        Check(
            "n_group",
            lambda c: not c.n_routed_experts or (c.n_group > 0 and c.n_routed_experts % c.n_group == 0),
            "does not divide n_routed_experts={c.n_routed_experts}",
        ),
        Check(
            "topk_group",
            lambda c: not c.n_routed_experts or 0 < c.topk_group <= c.n_group,
            "must be between 1 and n_group={c.n_group}",
        ),
        Check(
            "num_experts_per_tok",
            lambda c: not c.n_routed_experts or c.num_experts_per_tok <= c.kept_experts,
            "exceeds the {c.kept_experts} experts of the kept groups",
        ),
        Check("num_nextn_predict_layers", lambda c: c.num_nextn_predict_layers in (0, 1), "must be 0 or 1"),
    )

    @property
    def kept_experts(self) -> int:
        """Number of experts that a token can choose from: those of its best groups."""
        return self.n_routed_experts // self.n_group * self.topk_group

    @property
    def is_mla(self) -> bool:
        return self.family.startswith("deepseek")

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def num_dense_layers(self) -> int:
        if not self.n_routed_experts:
            return self.num_hidden_layers
        return min(self.first_k_dense_replace, self.num_hidden_layers)
