"""Every config dataclass: frozen, typed, hashable. Each field says its unit and where its default comes from.

Fields of `ModelConfig` carry the names of Hugging Face's config.json, so that the two map one to one.
A `Schedule` is a tuple of (update, value) pairs in rising order, the first at update 0.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

Schedule = tuple[tuple[int, float], ...]
LOSS_PRESETS = (  # GRPOConfig.preset; their values: configs/_losses.py
    *("r1_paper", "deepseekmath", "dapo", "dr_grpo", "gspo", "cispo", "rloo"),
    *("trl_default", "verl_default", "tunix_default"),
)
COLD_START_SOURCES = ("r1_zero", "few_shot", "direct", "people")
REASONING = "reasoning"  # the kind of rows with a rule to check them
KINDS = (  # of rows with a response (P2 B.3.3); a kind with sub-kinds stands for all of them
    *(REASONING, "writing", "question_answering", "self_cognition", "translation"),
    *("software_engineering", "software_engineering/repair", "software_engineering/front_end"),
    "software_engineering/edit",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_at_least(config, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(
            value >= least, f"{type(config).__name__}.{name}={value} must be {'at least 1' if least else '0 or more'}"
        )


def _require_rising(schedule: Schedule, name: str) -> None:
    starts = [start for start, _ in schedule]
    rising = starts == sorted(set(starts)) and (not starts or starts[0] >= 0)
    _require(rising, f"{name}={schedule}: needs (update, value) pairs with rising updates")


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
class ModelConfig:
    """Shape of a decoder: DeepSeek-V3 or V2 (MLA, mixture of experts) or a dense GQA student."""

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
    router_bias_update_rate: float = 0.0  # gamma of the V3 report; 0 in RL (design decision)
    aux_loss_alpha: float = 0.0  # sequence-wise balance loss; V3 trained with 1e-4, config.json's 0.001 is not read
    num_nextn_predict_layers: int = 0  # depth of multi-token prediction: 0 or 1
    mtp_loss_weight: float = 0.0  # lambda; V3 pretraining 0.3, then 0.1; not stated for SFT and RL, so 0
    mtp_hidden: Literal["post_norm", "pre_norm"] = "post_norm"  # which hidden state feeds it: the paper does not say
    attention_bias: bool = False  # QKV bias (Qwen2)
    qk_norm: bool = False  # RMS norm of each query and key head (Qwen3)
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: int = 4096  # tokens
    initializer_range: float = 0.02  # standard deviation of the initial weights
    scalar_head: bool = False  # adds a [hidden_size] value/reward head
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = True  # False unrolls the depth: quicker to run when shallow, slower to compile when deep
    remat: bool = False  # recompute each block in the backward pass
    moe_implementation: Literal["auto", "dense", "blocked", "ragged"] = "auto"
    moe_dispatch: Literal["auto", "gathered", "routed"] = (
        "auto"  # tokens to all of an expert group, or where routed (TPU)
    )
    moe_buffer_factor: float = (
        1.5  # rows a device takes at once, of an even share; a fuller device takes several rounds
    )
    checkpoint: str = (
        ""  # folder with the starting weights: Hugging Face or one of our stages; "" is the stage's default
    )
    remat_policy: Literal["nothing", "dots_no_batch", "dots"] = (
        "nothing"  # what a recomputed block keeps: nothing, its products with weights, or those of attention too
    )
    attention_implementation: Literal["auto", "xla", "flash"] = (
        "auto"  # over whole rows, and MLA's decode steps: XLA's operations or the Pallas kernels (auto: on a TPU)
    )
    logprob_implementation: Literal["auto", "xla", "pallas"] = (
        "auto"  # log-probs: XLA's tiles or the Pallas kernels (auto: on a TPU the kernel forward, XLA backward)
    )
    attention_block: int = (
        0  # XLA, GQA without a cache: tokens of a block of keys, those of other samples skipped; 0: all at once
    )
    vocab_used: int = 0  # leading rows of the vocabulary that are tokens: drawn and normalised over alone; 0: all

    def __post_init__(self):
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"ModelConfig.num_key_value_heads={self.num_key_value_heads} does not divide "
            f"num_attention_heads={self.num_attention_heads}",
        )
        if self.n_routed_experts:
            _require(
                self.n_routed_experts % self.n_group == 0,
                f"ModelConfig.n_group={self.n_group} does not divide n_routed_experts={self.n_routed_experts}",
            )
            _require(
                0 < self.topk_group <= self.n_group,
                f"ModelConfig.topk_group={self.topk_group} must be between 1 and n_group={self.n_group}",
            )
            _require(
                not self.router_bias_update_rate or self.scoring_func == "sigmoid",
                f"ModelConfig.router_bias_update_rate={self.router_bias_update_rate} needs scoring_func=sigmoid: "
                "softmax routers have no selection bias",
            )
            kept = self.n_routed_experts // self.n_group * self.topk_group
            _require(
                self.num_experts_per_tok <= kept,
                f"ModelConfig.num_experts_per_tok={self.num_experts_per_tok} exceeds the {kept} experts of the kept groups",
            )

        _require(
            self.remat or self.remat_policy == "nothing",
            f"ModelConfig.remat_policy={self.remat_policy} needs remat=true: without it every activation is kept",
        )
        _require(self.moe_buffer_factor > 0, f"ModelConfig.moe_buffer_factor={self.moe_buffer_factor} must be above 0")
        _require(
            self.num_nextn_predict_layers in (0, 1),
            f"ModelConfig.num_nextn_predict_layers={self.num_nextn_predict_layers} must be 0 or 1",
        )
        _require(
            0 <= self.vocab_used <= self.vocab_size,
            f"ModelConfig.vocab_used={self.vocab_used} must be between 0 (all) and vocab_size={self.vocab_size}",
        )
        _require(
            not self.mtp_loss_weight or self.num_nextn_predict_layers > 0,
            f"ModelConfig.mtp_loss_weight={self.mtp_loss_weight} needs num_nextn_predict_layers=1",
        )

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


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices used."""

    slice: int = 1  # TPU slices joined by the data-centre network: data parallel
    data: int = 1  # data parallel within a slice
    fsdp: int = 1  # data parallel with sharded weights and optimiser state
    expert: int = 1  # data parallel for the dense layers; experts lie over fsdp and expert together
    tensor: int = 1  # heads, feed-forward width and vocabulary
    context: int = 1  # tokens of a row; attention passes keys around a ring

    def __post_init__(self):
        for axis in dataclasses.fields(self):
            size = getattr(self, axis.name)
            _require(size >= 1, f"MeshConfig.{axis.name}={size} must be at least 1")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.slice, self.data, self.fsdp, self.expert, self.tensor, self.context)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser with a schedule in updates. RL betas and clip are not given in the R1 paper: design decision."""

    kind: Literal["adamw", "muon"] = "adamw"  # muon: matrices inside the layers; AdamW takes all other parameters
    learning_rate: float = 3e-6  # R1 RL, P2 section 3.2.1
    schedule: Literal["constant", "cosine"] = "constant"
    final_fraction: float = 0.1  # cosine ends at learning_rate * final_fraction
    warmup_updates: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False  # moments wait in host memory between updates
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # master weights; bfloat16 freezes at small rates
    max_skipped_updates: int = 10  # a run ends after so many updates in a row without a finite gradient; 0: never
    muon_momentum: float = 0.95  # Muon's mu
    muon_update_rms: float = 0.2  # root mean square of Muon's updates over the rate: about AdamW's (arXiv 2502.16982)

    def __post_init__(self):
        _require(
            self.max_skipped_updates >= 0,
            f"OptimizerConfig.max_skipped_updates={self.max_skipped_updates} must be 0 (no limit) or more",
        )
        _require(0 <= self.muon_momentum < 1, f"OptimizerConfig.muon_momentum={self.muon_momentum} must be in [0, 1)")
        _require(self.muon_update_rms > 0, f"OptimizerConfig.muon_update_rms={self.muon_update_rms} must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """Where problems come from: files of rows (docs/data.md), or the tiny world where no file is given."""

    world: Literal["none", "tiny"] = "none"  # the problems without files: none, or those that the tiny presets generate
    path: str = ""  # files of problems, parted by commas: a part of each is held out, the rest is trained on
    weights: tuple[float, ...] = ()  # of the files in `path`, in what is drawn; () draws every row equally often
    eval_path: str = ""  # files whose rows are all evaluated and never trained on; nothing of `path` is then held out
    general_path: str = ""  # files of task general, beside the rows of that task in `path`
    safety_path: str = ""  # files of task safety, likewise
    columns: tuple[str, ...] = ()  # THEIRS=OURS: what a file calls a field, as in problem=prompt
    task: str = ""  # of rows that name none
    template: Literal["auto", "tiny", "r1_zero", "chat", "plain"] = "auto"
    instruction: str = ""  # text put before every prompt
    think_prefill: bool = False  # end every prompt in `<think>\n`, as R1's chat format does; graded with the response
    max_rows: int = 0  # of each file; 0 reads all
    holdout_fraction: float = 0.1  # of the questions in `path`, by the hash of their text, kept for evaluation
    max_left_out: float = 0.5  # share of the prompts that may be too long for config.sampler.max_prompt_tokens

    def __post_init__(self):
        for name in ("holdout_fraction", "max_left_out"):
            _require(0 <= getattr(self, name) <= 1, f"DataConfig.{name}={getattr(self, name)} must be between 0 and 1")
        for column in self.columns:
            theirs, equals, ours = column.partition("=")
            _require(
                bool(theirs.strip() and equals and ours.strip()),
                f"DataConfig.columns={column}: needs THEIRS=OURS, as in problem=prompt",
            )


@dataclass(frozen=True)
class SamplerConfig:
    """Rollout engine: slots of a JetStream-API engine and the sampling parameters."""

    slots: int = 64  # concurrent decodes
    steps_per_dispatch: int = 8  # K: tokens per device call
    max_prompt_tokens: int = 16
    max_new_tokens: int = 80
    max_new_tokens_schedule: Schedule = ()  # overrides max_new_tokens from each update on; () keeps it
    temperature: float = 1.0
    top_p: float = 1.0  # 1 in RL: truncation biases the ratio
    top_k: int = 0  # 0 is off
    windows: tuple[int, ...] = ()  # cache lengths compiled for decode, rising; () is one, the full length
    prefill_buckets: tuple[int, ...] = ()  # padded prompt lengths; () is one, max_prompt_tokens
    stop_ids: tuple[int, ...] = ()  # tokens that end a response, beside those of tokenizer and checkpoint
    stop_strings: tuple[str, ...] = ()  # texts that end a response at the token which completes one
    stall_deadline_s: float = 600.0  # a dispatch that makes no progress for this long is an error

    def __post_init__(self):
        _require(self.slots > 0, f"SamplerConfig.slots={self.slots} must be at least 1")
        _require(self.temperature >= 0, f"SamplerConfig.temperature={self.temperature} must be 0 (greedy) or more")
        _require(0 < self.top_p <= 1, f"SamplerConfig.top_p={self.top_p} must be in (0, 1]")
        _require(
            min(self.stop_ids, default=0) >= 0, f"SamplerConfig.stop_ids={self.stop_ids}: a token's id is 0 or more"
        )
        _require(all(self.stop_strings), f"SamplerConfig.stop_strings={self.stop_strings}: an empty text ends nothing")
        _require(self.max_new_tokens > 0, f"SamplerConfig.max_new_tokens={self.max_new_tokens} must be at least 1")
        _require_rising(self.max_new_tokens_schedule, "SamplerConfig.max_new_tokens_schedule")
        longest = max((value for _, value in self.max_new_tokens_schedule), default=0)
        _require(
            longest <= self.max_new_tokens,
            f"SamplerConfig.max_new_tokens={self.max_new_tokens} is below max_new_tokens_schedule's {longest:g}: "
            "the cache is made for max_new_tokens",
        )


@dataclass(frozen=True)
class Limits:
    """What a program in the sandbox may use (docs/sandbox.md says how each limit is held)."""

    wall_s: float = 6.0  # from the start of the sandbox
    cpu_s: float = 5.0  # processor time of all its processes together
    memory_bytes: int = 512 << 20  # address space of each process, and resident memory of all together
    processes: int = 16  # processes and threads at a time
    file_bytes: int = 32 << 20  # size of one file
    disk_bytes: int = 64 << 20  # of each of its two private directories, which are memory
    output_bytes: int = 4 << 20  # of each of standard output and standard error


@dataclass(frozen=True)
class SandboxConfig(Limits):
    """Where programs of the model run, and the limits of one test."""

    backend: Literal["auto", "bubblewrap", "unshare"] = "auto"  # auto: bubblewrap where it is found and works


@dataclass(frozen=True)
class RewardConfig:
    """Weights of the summed rule rewards (P2 eq. 4 and 7) and how they are graded."""

    accuracy: float = 1.0
    format: float = 1.0  # magnitude not given in the paper: design decision
    language: float = 0.0  # language consistency; 1 from RL stage 1 on in the paper
    repetition: float = 0.0  # share of repeated n-grams, a part in (-1, 0]; not in the paper
    repetition_ngram: int = 3  # words; open-r1 and TRL
    reward_model: float = 0.0  # what a trained model says, where config.scenarios names one; 1 in the paper's stage 4
    rule: float = 0.0  # of a sample that a reward model scores: what its task's own grader says; told, not rewarded
    extraction: Literal["auto", "boxed", "answer_tag", "whole"] = "auto"  # where the answer stands in a response
    graders: tuple[str, ...] = ()  # of one's own: TASK=PACKAGE.MODULE:FUNCTION or TASK=FILE.py:FUNCTION
    override_graders: bool = False  # they may replace built-in ones
    workers: int = 0  # grader processes; 0 grades plain numbers and rules in this process
    deadline_s: float = 10.0  # per sample, in a worker; an answer not decided by then is wrong if its reference is
    batch_deadline_s: float = 600.0  # for all samples of a rollout
    sandbox: SandboxConfig = SandboxConfig()
    cache_entries: int = 65536  # scores from workers kept by content, the least recently used leaving first; 0: none

    def __post_init__(self):
        for name in ("deadline_s", "batch_deadline_s", "repetition_ngram"):
            _require(getattr(self, name) > 0, f"RewardConfig.{name}={getattr(self, name)} must be above 0")
        for name in ("workers", "cache_entries"):
            _require(getattr(self, name) >= 0, f"RewardConfig.{name}={getattr(self, name)} must be 0 or more")


@dataclass(frozen=True)
class GRPOConfig:
    """Group-relative policy optimisation; the defaults are preset r1_paper (P2 eq. 1-3, section 3.2.1)."""

    group_size: int = 16  # G: samples per prompt
    prompts_per_update: int = 32  # 32 x 16 = 512 outputs per mini-batch
    updates_per_rollout: int = 16  # 8,192 outputs split into 16 mini-batches
    updates: int = 10400  # total policy updates
    clip_ratio: float = 10.0  # epsilon; may exceed 1
    kl_coef: float = 0.001  # beta, k3 estimator in the loss
    kl_coef_schedule: Schedule = ()
    reference_refresh_updates: int = 400  # 0 never refreshes
    rollouts_ahead: int = 0  # disaggregated: rollouts drawn while earlier ones are trained on; the bound on staleness
    offload_reference: bool = False  # the reference waits in host memory between uses
    aggregation: Literal["seq_mean_token_mean", "token_mean", "seq_mean_token_sum", "token_sum"] = "seq_mean_token_mean"
    length_divisor: int = 0  # seq_mean_token_sum divides by this constant (Dr. GRPO); 0 is max_new_tokens
    advantage_epsilon: float = 1e-6  # added to the standard deviation of a group
    truncated: Literal["keep", "mask", "drop"] = (
        "keep"  # keep: scored as they are (accuracy 0, format 0); mask: not trained on; drop: nor in the statistics
    )
    preset: Literal[LOSS_PRESETS] = "r1_paper"  # sets the fields below, kl_coef, clip_ratio and the three above
    advantage: Literal["group_std", "mean", "batch_std", "leave_one_out", "per_reward", "gae"] = (
        "group_std"  # gae: PPO with a critic (config.ppo)
    )
    advantage_ddof: int = 0  # 0: population standard deviation; 1: sample's
    advantage_guard: Literal["add", "max"] = "add"  # std + epsilon, or max(std, epsilon)
    singleton: Literal["zero", "reward"] = "zero"  # advantage of the only scorable sample of a group
    denominator: Literal["all", "trained", "signal"] = (
        "all"  # samples that a mean counts: all, the trained ones, or to train on groups whose rewards differ alone
    )
    ratio: Literal["token", "sequence", "sequence_token"] = "token"
    surrogate: Literal["clip", "cispo", "sapo"] = "clip"
    clip_ratio_high: float = 0.0  # epsilon of the upper bound; 0 is clip_ratio
    dual_clip: float = 0.0  # where A < 0 the objective is at least dual_clip * A; 0 is off
    ratio_cap: float = 0.0  # two-sided clipping: bound of the unclipped ratio; 0 is off
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)  # where A > 0, where A <= 0 (arXiv 2511.20347)
    log_ratio_clamp: float = 0.0  # bound of |log(policy / old policy)|; 0 is off, and then what float32 holds
    kl_estimator: Literal["k1", "k2", "k3", "k3_clamped", "k3_weighted", "k3_straight_through"] = "k3"
    kl_log_ratio_clamp: float = 20.0  # k3: log(reference / policy) of a token counts at most this; 0 is off
    kl_placement: Literal["loss", "reward"] = "loss"  # reward: beta * k1 of its tokens off a sample's reward
    entropy_coef: float = 0.0  # bonus, weighted as the objective is
    old_logp: Literal["rollout", "recomputed"] = (
        "rollout"  # the ratio is to the sampler's log-probs, or to those of the trainer before its first update
    )
    mismatch: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "none"
    mismatch_threshold: float = 2.0  # largest trainer / sampler probability that is not cut
    off_policy_threshold: float = 0.0  # samples of A < 0 further from the policy than this (nats a token) are masked
    routing_replay: bool = False  # update and reference send every token to the experts of its rollout
    replay_check_every: int = 0  # rollouts from one measurement of the mismatch without replay to the next; 0: never
    dynamic_sampling_rounds: int = 0  # more prompts drawn, this often at most, in place of groups whose rewards tie
    overlong_buffer_fraction: float = 0.0  # last part of max_new_tokens over which the reward falls by 1 (DAPO)

    def __post_init__(self):
        for name in ("group_size", "prompts_per_update", "updates_per_rollout", "updates"):
            _require(getattr(self, name) > 0, f"GRPOConfig.{name}={getattr(self, name)} must be at least 1")
        for name in (
            *("rollouts_ahead", "clip_ratio_high", "ratio_cap", "log_ratio_clamp", "kl_coef", "length_divisor"),
            "kl_log_ratio_clamp",
            *("off_policy_threshold", "dynamic_sampling_rounds", "advantage_epsilon", "replay_check_every"),
        ):
            _require(getattr(self, name) >= 0, f"GRPOConfig.{name}={getattr(self, name)} must be 0 or more")
        for name in ("log_ratio_clamp", "kl_log_ratio_clamp"):
            _require(
                getattr(self, name) <= 80,
                f"GRPOConfig.{name}={getattr(self, name)} must be at most 80: float32 cannot hold the exp of more than 88",
            )
        for name in ("clip_ratio", "mismatch_threshold"):
            _require(getattr(self, name) > 0, f"GRPOConfig.{name}={getattr(self, name)} must be above 0")
        _require(
            not self.dual_clip or self.dual_clip > 1,
            f"GRPOConfig.dual_clip={self.dual_clip} must be above 1, or 0 for off",
        )
        _require(self.advantage_ddof in (0, 1), f"GRPOConfig.advantage_ddof={self.advantage_ddof} must be 0 or 1")
        _require(
            min(self.sapo_temperatures) > 0,
            f"GRPOConfig.sapo_temperatures={self.sapo_temperatures} must be above 0",
        )
        _require(
            0 <= self.overlong_buffer_fraction <= 1,
            f"GRPOConfig.overlong_buffer_fraction={self.overlong_buffer_fraction} must be in [0, 1]",
        )
        _require(
            self.mismatch == "none" or self.old_logp == "recomputed",
            f"GRPOConfig.mismatch={self.mismatch} needs old_logp=recomputed: the sampler's own log-probs have no mismatch",
        )
        _require(
            self.routing_replay or not self.replay_check_every,
            f"GRPOConfig.replay_check_every={self.replay_check_every} needs routing_replay=true",
        )
        _require(
            not (self.dynamic_sampling_rounds and self.rollouts_ahead),
            f"GRPOConfig.dynamic_sampling_rounds={self.dynamic_sampling_rounds} needs rollouts_ahead=0: which prompts "
            "the next rollout takes is known only when this one is drawn",
        )
        _require_rising(self.kl_coef_schedule, "GRPOConfig.kl_coef_schedule")
        _require(
            all(value >= 0 for _, value in self.kl_coef_schedule),
            f"GRPOConfig.kl_coef_schedule={self.kl_coef_schedule}: a coefficient is below 0",
        )
        _require(
            self.kl_placement == "loss" or self.advantage in ("gae", "mean", "leave_one_out"),
            f"GRPOConfig.kl_placement=reward with advantage={self.advantage}: the deviation of the rewards would scale the "
            "KL term; use gae, mean or leave_one_out",
        )
        _require(
            self.denominator != "signal" or self.advantage != "gae",
            "GRPOConfig.denominator=signal is of groups; with advantage=gae use trained",
        )

    @property
    def uses_reference(self) -> bool:
        """Whether any update has a KL term."""
        return self.kl_coef > 0 or any(value > 0 for _, value in self.kl_coef_schedule)


@dataclass(frozen=True)
class PPOConfig:
    """What PPO adds to GRPOConfig (grpo.advantage=gae): a critic of the policy's shape and its advantages (P2 A.3)."""

    gae_lambda: float = 1.0  # P2 A.3: 0.95 clearly below GRPO, 1.0 nearly level
    gamma: float = 1.0
    value_clip: float = 0.2  # a value moves by at most this from its old one before its error stops counting; 0 is off
    critic_learning_rate: float = 0.0  # 0 is optimizer.learning_rate

    def __post_init__(self):
        for name in ("gae_lambda", "gamma"):
            _require(0 <= getattr(self, name) <= 1, f"PPOConfig.{name}={getattr(self, name)} must be in [0, 1]")
        for name in ("value_clip", "critic_learning_rate"):
            _require(getattr(self, name) >= 0, f"PPOConfig.{name}={getattr(self, name)} must be 0 or more")


@dataclass(frozen=True)
class PackConfig:
    """Shapes of packed training rows; one program serves any number of filled micro-batches."""

    row_tokens: int = 96
    rows_per_micro_batch: int = 32
    shared_prompts: bool = False  # RL: a prompt stands once in a row for all its samples there
    trained_chunk: int = 0  # on one device logits of trained positions alone, so many at a time; 0: of all positions

    def __post_init__(self):
        _require_at_least(self, 1, "row_tokens", "rows_per_micro_batch")
        _require_at_least(self, 0, "trained_chunk")


@dataclass(frozen=True)
class CheckpointConfig:
    every_updates: int = 20
    keep: int = 2

    def __post_init__(self):
        _require_at_least(self, 1, "every_updates", "keep")


@dataclass(frozen=True)
class EvalConfig:
    """k samples per held-out problem; pass@1 is their mean (P2 D.1)."""

    samples_per_problem: int = 5
    max_problems: int = 0  # 0 takes all
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = True  # also one greedy sample per problem
    pass_at: tuple[
        int, ...
    ] = ()  # the k of pass@k, estimated from the samples that pass@1 draws; each at most their number
    consensus_problems: int = 0  # cons@k is measured on this many problems; 0 leaves it out
    consensus_samples: int = 16  # the k of cons@k

    def __post_init__(self):
        _require_at_least(self, 1, "samples_per_problem", "consensus_samples")
        _require_at_least(self, 0, "max_problems", "consensus_problems")
        _require(self.temperature >= 0, f"EvalConfig.temperature={self.temperature} must be 0 (greedy) or more")
        _require(0 < self.top_p <= 1, f"EvalConfig.top_p={self.top_p} must be in (0, 1]")
        for k in self.pass_at:
            _require(
                1 <= k <= self.samples_per_problem,
                f"EvalConfig.pass_at={self.pass_at}: k={k} must be between 1 and "
                f"samples_per_problem={self.samples_per_problem}; raise evaluation.samples_per_problem",
            )


@dataclass(frozen=True)
class PretrainConfig:
    """Corpus and length of stage0_base on the tiny world."""

    updates: int = 2400
    rows_per_update: int = 32
    corpus_documents: int = 200_000
    drill_fraction: float = 0.3
    fourier_numbers: bool = True  # start the number embeddings from sines of the number

    def __post_init__(self):
        _require_at_least(self, 1, "updates", "rows_per_update", "corpus_documents")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning (P2 B.4.2): cosine 5e-5 to 5e-6, 2-3 epochs, batch 128."""

    epochs: int = 2
    examples_per_update: int = 128  # the last update of a run takes what is left

    def __post_init__(self):
        _require_at_least(self, 1, "epochs", "examples_per_update")


@dataclass(frozen=True)
class DistillConfig:
    """Where a student's examples come from (P2 B.4.3)."""

    examples: str = ""  # rows with prompt and response, or messages (docs/data.md); "" is stage 3 of the working folder
    grade: bool = True  # responses that the grader of their row's task finds wrong are left out


@dataclass(frozen=True)
class ColdStartConfig:
    """How stage 1's examples are made: whose traces, who edits them, who reviews them (P2 B.3.2, P1 section 2.3.1)."""

    prompts: int = 1000
    samples_per_prompt: int = 4
    max_examples: int = 1500
    min_language_consistency: float = 1.0
    max_examples_per_prompt: int = 2
    sources: tuple[str, ...] = ("r1_zero",)  # any of r1_zero, few_shot, direct, people, in the order of their examples
    teacher: str = ""  # r1_zero: folder of the R1-Zero run that is sampled; "" is workdir/r1_zero
    prompted_model: str = ""  # few_shot, direct: Hugging Face folder or a stage's folder; "" is the stage's base
    examples: str = ""  # people: rows with prompt and response; few_shot: long worked examples, "" has two of its own
    editor: Literal["", "judge"] = ""  # judge: config.judge's model rewrites every trace; "": white space is trimmed
    keep_unedited: bool = False  # a trace whose edit cannot be read stays as it was; false leaves it out
    review: str = ""  # JSONL that people fill in with verdicts on the examples; "" is no review

    def __post_init__(self):
        _require_at_least(self, 1, "prompts", "samples_per_prompt", "max_examples", "max_examples_per_prompt")
        unknown = [name for name in self.sources if name not in COLD_START_SOURCES]
        _require(
            bool(self.sources) and not unknown and len(set(self.sources)) == len(self.sources),
            f"ColdStartConfig.sources={self.sources} must be some of {', '.join(COLD_START_SOURCES)}, each once",
        )
        _require(
            "people" not in self.sources or bool(self.examples),
            "ColdStartConfig.sources=people needs their rows: set coldstart.examples=FILE",
        )
        _require(
            not self.examples or bool({"people", "few_shot"} & {*self.sources}),
            f"ColdStartConfig.examples={self.examples} is read for sources=people or few_shot alone",
        )


@dataclass(frozen=True)
class ScenarioConfig:
    """Stage 4's general and safety prompts: only from one update on, as in the paper's last 400 of 1,700."""

    from_update: int = -1  # -1: never; takes effect at the first rollout that starts at or after it
    general_fraction: float = 0.2  # of the prompts from then on
    safety_fraction: float = 0.2
    helpful_model: str = ""  # reward model of the general prompts: a stage of the working folder, or a stage's folder
    safety_model: str = ""  # that of the safety prompts; "": their task's own grader rewards them
    hacking_window: int = 10  # rollouts over which the reward model's reward is held against what can be verified
    hacking_errors: float = 3.0  # trends, in standard errors, from which the two part ways and a warning is given

    def __post_init__(self):
        _require(
            self.hacking_window >= 4, f"ScenarioConfig.hacking_window={self.hacking_window} must be at least 4 rollouts"
        )
        _require(self.hacking_errors > 0, f"ScenarioConfig.hacking_errors={self.hacking_errors} must be above 0")


@dataclass(frozen=True)
class RewardModelConfig:
    """A trained reward model: the decoder it starts from with a scalar head (P2 section 3.1 and appendix B.3).

    The paper's: 256 examples an update, a rate of 6e-6, one epoch, at most 8,192 tokens (config.pack.row_tokens).
    """

    epochs: int = 1
    examples_per_update: int = 256  # pairs, or labelled responses
    balance_lengths: bool = True  # pairs: as many with a longer chosen response as with a longer rejected one
    frozen_blocks: int = 0  # embedding and so many first blocks stay as they are; what they make is computed once
    prompt_tokens: int = 0  # of a prompt so many last tokens are read; 0 is all
    response_tokens: int = 0  # of a response so many first tokens are read; 0 is all
    samples_per_prompt: int = 32  # tiny world: responses drawn of each prompt from the start and from the base
    pairs_per_prompt: int = 64  # tiny world: at most

    def __post_init__(self):
        for name in ("epochs", "examples_per_update", "samples_per_prompt", "pairs_per_prompt"):
            _require(getattr(self, name) > 0, f"RewardModelConfig.{name}={getattr(self, name)} must be at least 1")
        for name in ("frozen_blocks", "prompt_tokens", "response_tokens"):
            _require(getattr(self, name) >= 0, f"RewardModelConfig.{name}={getattr(self, name)} must be 0 or more")


@dataclass(frozen=True)
class RejectionConfig:
    """Stage 3's examples: several samples a prompt, correct ones kept, filtered, mixed with general data (P2 B.3.3)."""

    prompts: int = 1200
    samples_per_prompt: int = 4
    temperature: float = 1.0
    max_examples_per_prompt: int = 2
    min_language_consistency: float = 1.0
    max_paragraph_words: int = 200  # a longer paragraph in the thinking drops the trace; no threshold in the paper
    drop_code_blocks: bool = True
    general_fraction: float = 0.25  # of the mixed set: about 200k of 800k
    general_path: str = (
        ""  # files of general rows with a response, parted by commas, beside those of task general in data.*
    )
    kinds: tuple[str, ...] = ()  # KIND=WEIGHT: how general rows mix, as in writing=2; () takes them as they stand
    editor: Literal["", "judge"] = ""  # judge: config.judge's model writes thoughts for general rows that have none
    judged_prompts: str = ""  # rows {id, prompt, answer} without a rule verifier, accepted by config.judge; "" is none

    def __post_init__(self):
        _require_at_least(self, 1, "prompts", "samples_per_prompt", "max_examples_per_prompt")
        _require(
            0 <= self.general_fraction < 1,
            f"RejectionConfig.general_fraction={self.general_fraction} must be in [0, 1): a set of general rows alone has "
            "no traces",
        )
        self.kind_weights()

    def kind_weights(self) -> dict[str, float]:
        """Returns {kind: weight} of `kinds`. Raises ValueError for an unknown kind and a weight that is not above 0."""
        found: dict[str, float] = {}
        for entry in self.kinds:
            kind, _, text = entry.partition("=")
            weight = float(text) if text.replace(".", "", 1).isdecimal() else 0.0
            _require(
                kind in KINDS and weight > 0 and kind not in found,
                f"RejectionConfig.kinds={entry}: needs KIND=WEIGHT above 0, each kind once; kinds: {', '.join(KINDS)}",
            )
            found[kind] = weight
        return found


@dataclass(frozen=True)
class JudgeConfig:
    """A model that judges, beside the policy: pairs of replies, answers against a reference (P2 B.2, B.3.3)."""

    checkpoint: str = ""  # Hugging Face folder of the judge; "" is none
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    sampler: SamplerConfig = (
        SamplerConfig(  # the parameters are those of the paper's evaluations (P2 D.1); B.2 gives none
            slots=32,
            max_prompt_tokens=8192,
            max_new_tokens=4096,
            temperature=0.6,
            top_p=0.95,
            prefill_buckets=(512, 1024, 2048, 4096),
            windows=(2048, 4096, 8192),
        )
    )


@dataclass(frozen=True)
class PreferenceConfig:
    """How preference_pairs labels two replies by a judge and which pairs it keeps (P2 B.2)."""

    judgements: int = 4  # of a pair, each drawn on its own, A and B in a random order
    min_margin: float = 1.0  # kept is what the mean of the readable margins, -2 to 2, exceeds
    min_readable: int = 2  # readable judgements without which a pair is left out; not in the paper
    balance_lengths: bool = True  # as often as not the longer reply is the chosen one
    responses_per_prompt: int = 2  # drawn from config.model where a row brings none

    def __post_init__(self):
        for name in ("judgements", "min_readable"):
            _require(getattr(self, name) > 0, f"PreferenceConfig.{name}={getattr(self, name)} must be at least 1")
        _require(
            self.min_readable <= self.judgements,
            f"PreferenceConfig.min_readable={self.min_readable} exceeds judgements={self.judgements}",
        )
        _require(0 <= self.min_margin < 2, f"PreferenceConfig.min_margin={self.min_margin} must be in [0, 2)")
        _require(
            self.responses_per_prompt >= 2,
            f"PreferenceConfig.responses_per_prompt={self.responses_per_prompt} must be at least 2",
        )


@dataclass(frozen=True)
class BuildTestsConfig:
    """How build_tests makes the tests of code prompts (P2 B.3.2, which gives no numbers)."""

    generators_per_prompt: int = 4  # that config.judge writes where a row has none
    inputs_per_kind: int = 2  # of each kind of input, by each generator
    min_tests: int = 10  # kept even where fewer break all that can be broken
    max_input_characters: int = 200_000  # a longer input is left out
    workers: int = 2  # programs that run at a time

    def __post_init__(self):
        for name, value in vars(self).items():
            _require(value > 0, f"BuildTestsConfig.{name}={value} must be at least 1")


@dataclass(frozen=True)
class GateConfig:
    """What a stage's result must reach on held-out problems; below it the graph stops. 0 is no gate."""

    pass_at_1: float = 0.0
    language_consistency: float = 0.0


@dataclass(frozen=True)
class ExportConfig:
    """How export_hf writes."""

    dtype: Literal["float32", "bfloat16", "fp8"] = "float32"  # fp8: DeepSeek's published layout, deepseek_v3 only
    verify: bool = True  # read the folder back and compare weights and logits


@dataclass(frozen=True)
class BenchConfig:
    """What bench_update measures: samples of random tokens, responses of log-normal length, and who updates on them; and
    the TPU that bench_kernels compiles for."""

    samples: int = 64
    prompt_tokens: int = 64
    median_tokens: int = 48  # of a response
    p99_tokens: int = 512  # 99th percentile of the lengths' law
    longest_tokens: int = 576  # longer draws are cut to this
    code_files: tuple[str, ...] = ()  # bench_code: JSONL of id, prompt, tests, solution
    mutants_per_row: int = 1  # bench_code: mistakes made in each solution
    repeats: int = 3  # rounds in which every system runs once, in turn
    losses: tuple[str, ...] = ("grpo", "sft")
    threads: int = 2  # processors that every system is held to
    peer_micro_batch: int = 8  # samples of a peer's micro-batch
    trl_python: str = ""  # interpreter with torch, transformers and trl; "" leaves TRL and transformers out
    tunix_python: str = ""  # interpreter with google-tunix; "" leaves Tunix out
    tunix_micro_batch: int = 2  # Tunix holds the logits of all positions
    topology: str = "v5p:1x1x1"  # bench_kernels: one chip of a generation, as libtpu names it
    split_updates: int = 2  # GRPO steps of a run that tells the shares of a step, the first not counted; 0: none


@dataclass(frozen=True)
class Config:
    """One stage run. `stage` picks the function; a stage reads only the parts it uses."""

    stage: str = ""
    preset: str = "tiny"
    seed: int = 0
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    mode: Literal["colocated", "disaggregated"] = (
        "colocated"  # RL: trainer and sampler share devices, or have their own
    )
    sampler_mesh: MeshConfig = MeshConfig()  # disaggregated: the sampler's, on the devices after those of `mesh`
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    sampler: SamplerConfig = SamplerConfig()
    reward: RewardConfig = RewardConfig()
    grpo: GRPOConfig = GRPOConfig()
    pack: PackConfig = PackConfig()
    checkpointing: CheckpointConfig = CheckpointConfig()
    evaluation: EvalConfig = EvalConfig()
    pretrain: PretrainConfig = PretrainConfig()
    sft: SFTConfig = SFTConfig()
    distill: DistillConfig = DistillConfig()
    coldstart: ColdStartConfig = ColdStartConfig()
    rejection: RejectionConfig = RejectionConfig()
    scenarios: ScenarioConfig = ScenarioConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    gate: GateConfig = GateConfig()
    export: ExportConfig = ExportConfig()
    start: str = ""  # stage of the working folder whose result this one starts from; "" is the base model
    inputs: str = ""  # working folder that holds the stages this one reads; "" is its own
    variants: tuple[str, ...] = ()  # ablation: "NAME STAGE FIELD=VALUE ..." each
    seeds: tuple[int, ...] = ()  # ablation: each variant once a seed, on that seed's own stages; () is seed alone
    input_preset: str = ""  # preset of the stages it reads, when a missing one is made; "" is its own
    only: tuple[str, ...] = ()  # graph: run these stages alone
    from_stage: str = ""  # graph, --config.from=STAGE: run this stage and all that depend on it again
    list: bool = False  # graph: print which stages are done, stale or missing, and run nothing
    set: tuple[str, ...] = ()  # graph: STAGE.FIELD=VALUE overrides of single stages
    checkpoint: str = ""  # evaluate, export: the stage folder or Hugging Face folder to read
    output: str = ""  # grade: the JSONL to write
    explain: str | None = (
        None  # grade, --explain[=ID]: show how this row is graded, "" the first rows, and write nothing
    )
    rebuild_base: bool = False  # quickstart, r1_zero: pretrain the tiny base instead of using the shipped one
    ppo: PPOConfig = PPOConfig()
    bench: BenchConfig = BenchConfig()
    judge: JudgeConfig = JudgeConfig()
    preferences: PreferenceConfig = PreferenceConfig()
    build_tests: BuildTestsConfig = BuildTestsConfig()

    def __post_init__(self):
        _require(
            self.mode == "disaggregated" or not self.grpo.rollouts_ahead,
            f"Config.grpo.rollouts_ahead={self.grpo.rollouts_ahead} needs mode=disaggregated: one set of devices cannot "
            "sample and train at once",
        )
        _require(
            bool(self.judge.checkpoint) or not self.rejection.judged_prompts,
            f"Config.rejection.judged_prompts={self.rejection.judged_prompts} needs a judge: set judge.checkpoint",
        )
        for name in ("coldstart", "rejection"):
            _require(
                bool(self.judge.checkpoint) or not getattr(self, name).editor,
                f"Config.{name}.editor={getattr(self, name).editor} needs a model: set judge.checkpoint",
            )
        for name in ("helpful_model", "safety_model"):
            _require(
                not getattr(self.scenarios, name) or self.reward.reward_model > 0,
                f"Config.scenarios.{name}={getattr(self.scenarios, name)} needs reward.reward_model above 0",
            )
        if self.pack.shared_prompts:
            alone = {
                "mesh.context=1": self.mesh.context == 1,
                "model.mtp_loss_weight=0": not self.model.mtp_loss_weight,
                "model.aux_loss_alpha=0": not self.model.aux_loss_alpha,
                "grpo.advantage other than gae": self.grpo.advantage != "gae",
            }
            for wanted, given in alone.items():
                _require(given, f"Config.pack.shared_prompts=true needs {wanted}")
        _require(
            not (self.grpo.routing_replay and self.grpo.advantage == "gae"),
            "Config.grpo.routing_replay=true does not go with PPO (grpo.advantage=gae): a critic has routers of its own",
        )
        if self.grpo.routing_replay and not self.model.checkpoint:  # whose shape is read later
            self.require_mixture()

    def require_mixture(self) -> None:
        """Raises ValueError when routing replay is asked of a model without routers."""
        _require(
            not self.grpo.routing_replay or self.model.num_moe_layers > 0,
            "Config.grpo.routing_replay=true needs a model with mixture-of-experts layers "
            f"(model.n_routed_experts={self.model.n_routed_experts}); set it to false",
        )


def replace(config, **changes):
    """`dataclasses.replace`, re-exported so that configs need one import."""
    return dataclasses.replace(config, **changes)


__all__ = [name for name, value in list(globals().items()) if dataclasses.is_dataclass(value)] + [
    "Schedule",
    "replace",
    "field",
]
