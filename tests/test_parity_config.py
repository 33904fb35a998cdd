"""What a config.json says: variants of five families give transformers' logits within 1e-5 of the largest, or are refused as there.

Each variant is a folder with weights of the shapes that transformers reads from it; both sides load that folder.
"""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from parity import their_logits, torch, transformers

from r1jax.checkpoints import hf, hf_config
from r1jax.core import sharding
from r1jax.models import decoder
from r1jax.schema import ComputeConfig, MeshConfig, Network

TOLERANCE = 1e-5  # of the largest logit
MOVED = 1e-3  # of the largest logit: what a variant that is read as the plain config would be wrong by, at least
LENGTH = 96
TOKENS = np.random.default_rng(1).integers(0, 67, (1, LENGTH)).astype(np.int32)

COMMON = dict(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    rms_norm_eps=1e-4,
    rope_theta=1000.0,
)
LATENT = COMMON | dict(
    num_key_value_heads=4,
    kv_lora_rank=12,
    q_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    moe_intermediate_size=16,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
    norm_topk_prob=True,
)
PLAIN = {
    "llama": COMMON | dict(model_type="llama", num_key_value_heads=2),
    "qwen2": COMMON | dict(model_type="qwen2", num_key_value_heads=2),
    "qwen3": COMMON | dict(model_type="qwen3", num_key_value_heads=2, head_dim=8),
    "deepseek_v3": LATENT | dict(model_type="deepseek_v3"),
    "deepseek_v2": LATENT
    | dict(model_type="deepseek_v2", topk_method="group_limited_greedy", norm_topk_prob=False, n_group=4, topk_group=1),
}
ABSENT = "absent"  # as a value: the field is left out
YARN = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32)
DEEP_YARN = YARN | dict(factor=40, mscale=1.0, mscale_all_dim=1.0)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
DEFAULT = dict(rope_type="default", rope_theta=77.0)

# Variants whose weights have the shapes of the plain config, and whose logits differ from its.
MOVING = {
    "llama theta absent": ("llama", dict(rope_theta=ABSENT)),
    "llama eps absent": ("llama", dict(rms_norm_eps=ABSENT)),
    "llama rope_parameters": ("llama", dict(rope_parameters=DEFAULT)),
    "llama rope_parameters, theta null": ("llama", dict(rope_theta=None, rope_parameters=DEFAULT)),
    "llama empty rope_scaling": ("llama", dict(rope_scaling={}, rope_parameters=DEFAULT)),
    "llama theta inside rope_scaling": ("llama", dict(rope_scaling={"rope_theta": 77.0})),
    "llama llama3": ("llama", dict(rope_scaling=LLAMA3)),
    "llama llama3 as type": ("llama", dict(rope_scaling={"type": "llama3"} | LLAMA3)),
    "llama llama3 without its length": (
        "llama",
        dict(max_position_embeddings=64, rope_scaling=LLAMA3 | {"original_max_position_embeddings": ABSENT}),
    ),
    "llama two llama3": (
        "llama",
        dict(rope_scaling=LLAMA3, rope_parameters=LLAMA3 | {"factor": 32.0, "rope_theta": 5e5}),
    ),
    "llama llama3 and a length at the top": (
        "llama",
        dict(rope_scaling=LLAMA3, original_max_position_embeddings=128),
    ),
    "llama tied": ("llama", dict(tie_word_embeddings=True)),
    "qwen2 yarn": ("qwen2", dict(rope_scaling=YARN)),
    "qwen2 yarn beside a default": ("qwen2", dict(rope_scaling=YARN, rope_parameters=DEFAULT)),
    "qwen2 default beside yarn": (
        "qwen2",
        dict(rope_scaling={"type": "default", "rope_theta": 500.0}, rope_parameters=YARN),
    ),
    "qwen2 yarn in rope_parameters": ("qwen2", dict(rope_parameters=YARN | {"rope_theta": 300.0})),
    "qwen2 two types in one dict": ("qwen2", dict(rope_scaling=YARN | {"type": "llama3"})),
    "qwen2 yarn and a length at the top": ("qwen2", dict(rope_scaling=YARN, original_max_position_embeddings=128)),
    "qwen2 yarn without its length": (
        "qwen2",
        dict(max_position_embeddings=ABSENT, rope_scaling={"type": "yarn", "factor": 4.0}),
    ),
    "qwen2 yarn with a factor of null": ("qwen2", dict(rope_scaling=YARN | {"factor": None})),
    "qwen2 yarn with betas": ("qwen2", dict(rope_scaling=YARN | {"beta_fast": 8, "beta_slow": None})),
    "qwen2 yarn with a beta of 0": ("qwen2", dict(rope_scaling=YARN | {"beta_fast": 0, "truncate": True})),
    "qwen3 yarn": ("qwen3", dict(rope_scaling=YARN)),
    "deepseek_v3 yarn": ("deepseek_v3", dict(rope_scaling=DEEP_YARN)),
    "deepseek_v3 yarn beside a default": ("deepseek_v3", dict(rope_scaling=DEEP_YARN, rope_parameters=DEFAULT)),
    "deepseek_v3 yarn and a length at the top": (
        "deepseek_v3",
        dict(rope_scaling=DEEP_YARN, original_max_position_embeddings=128),
    ),
    "deepseek_v3 llama3": ("deepseek_v3", dict(rope_scaling=LLAMA3)),
    "deepseek_v3 factor absent": ("deepseek_v3", dict(routed_scaling_factor=ABSENT)),
    "deepseek_v3 norm_topk_prob false": ("deepseek_v3", dict(norm_topk_prob=False)),
    "deepseek_v3 norm_topk_prob null": ("deepseek_v3", dict(norm_topk_prob=None)),
    "deepseek_v3 groups of two": ("deepseek_v3", dict(n_group=2, topk_group=1)),
    "deepseek_v3 half-split": ("deepseek_v3", dict(rope_interleave=False)),
    "deepseek_v3 rope_interleave null": ("deepseek_v3", dict(rope_interleave=None)),
    "deepseek_v2 yarn": ("deepseek_v2", dict(rope_scaling=DEEP_YARN)),
    "deepseek_v2 factor absent": ("deepseek_v2", dict(routed_scaling_factor=ABSENT)),
    "deepseek_v2 topk_method absent": ("deepseek_v2", dict(topk_method=ABSENT)),
}
# Variants of other shapes, and such that say in other words what the plain config says.
OTHER = {
    "llama": ("llama", {}),
    "llama head_dim absent": ("llama", dict(head_dim=ABSENT)),
    "llama head_dim null": ("llama", dict(head_dim=None)),
    "llama wide heads": ("llama", dict(head_dim=12)),
    "llama kv heads absent": ("llama", dict(num_key_value_heads=ABSENT)),
    "llama kv heads null": ("llama", dict(num_key_value_heads=None)),
    "llama swish": ("llama", dict(hidden_act="swish")),
    "llama rope_parameters without theta": ("llama", dict(rope_parameters={"rope_type": "default"})),
    "qwen2": ("qwen2", {}),
    "qwen2 kv heads null": ("qwen2", dict(num_key_value_heads=None)),
    "qwen2 wide heads": ("qwen2", dict(head_dim=12)),
    "qwen2 sliding window of no layer": ("qwen2", dict(use_sliding_window=True, sliding_window=8)),
    "qwen2 windows that layer_types turn off": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=8, max_window_layers=0, layer_types=["full_attention"] * 2),
    ),
    "qwen2 window of null": ("qwen2", dict(use_sliding_window=True, sliding_window=None, max_window_layers=0)),
    "qwen2 bias denied": ("qwen2", dict(attention_bias=False)),
    "qwen3": ("qwen3", {}),
    "qwen3 head_dim absent": ("qwen3", dict(head_dim=ABSENT)),
    "qwen3 tied": ("qwen3", dict(tie_word_embeddings=True)),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 plain query": ("deepseek_v3", dict(q_lora_rank=None)),
    "deepseek_v3 query low rank absent": ("deepseek_v3", dict(q_lora_rank=ABSENT)),
    "deepseek_v3 dense layers absent": ("deepseek_v3", dict(first_k_dense_replace=ABSENT)),
    "deepseek_v3 experts by another name": ("deepseek_v3", dict(n_routed_experts=ABSENT, num_local_experts=8)),
    "deepseek_v3 shared experts absent": ("deepseek_v3", dict(n_shared_experts=ABSENT)),
    "deepseek_v3 no shared expert": ("deepseek_v3", dict(n_shared_experts=0)),
    "deepseek_v3 no experts": ("deepseek_v3", dict(n_routed_experts=0, first_k_dense_replace=2)),
    "deepseek_v3 kv heads absent": ("deepseek_v3", dict(num_key_value_heads=ABSENT)),
    "deepseek_v3 norm_topk_prob absent": ("deepseek_v3", dict(norm_topk_prob=ABSENT)),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2 dense layers absent": ("deepseek_v2", dict(first_k_dense_replace=ABSENT)),
    "deepseek_v2 shared experts absent": ("deepseek_v2", dict(n_shared_experts=ABSENT)),
    "deepseek_v2 greedy without groups": ("deepseek_v2", dict(topk_method="greedy", n_group=ABSENT, topk_group=ABSENT)),
    "deepseek_v2 rope_interleave": ("deepseek_v2", dict(rope_interleave=False)),
}
# Variants that neither side loads: (family, changes, words of our refusal).
BY_LAYER = {"full_attention": DEFAULT, "sliding_attention": DEFAULT}
REFUSED = {
    "layers as text": ("llama", dict(num_hidden_layers="2"), "num_hidden_layers='2' is of type str"),
    "layers as a float": ("llama", dict(num_hidden_layers=2.0), "num_hidden_layers=2.0 is of type float"),
    "layers as true": ("llama", dict(num_hidden_layers=True), "num_hidden_layers=True is of type bool"),
    "vocabulary as a float": ("llama", dict(vocab_size=67.0), "vocab_size=67.0 is of type float"),
    "tie as text": ("llama", dict(tie_word_embeddings="false"), "tie_word_embeddings='false' is of type str"),
    "tie as a number": ("llama", dict(tie_word_embeddings=1), "tie_word_embeddings=1 is of type int"),
    "tie of null": ("llama", dict(tie_word_embeddings=None), "no tie_word_embeddings: it is null"),
    "eps as text": ("llama", dict(rms_norm_eps="1e-5"), "rms_norm_eps='1e-5' is of type str"),
    "eps of null": ("llama", dict(rms_norm_eps=None), "no rms_norm_eps: it is null"),
    "length of null": ("llama", dict(max_position_embeddings=None), "no max_position_embeddings: it is null"),
    "bias as text": ("llama", dict(attention_bias="false"), "attention_bias='false' is not supported"),
    "theta as text": ("llama", dict(rope_theta="1000"), "rope_theta='1000' is of type str"),
    "theta of null": ("llama", dict(rope_theta=None), "no rope_theta: it is null"),
    "scaling as text": ("llama", dict(rope_scaling="yarn"), "rope_scaling='yarn' is of type str"),
    "factor as text": ("llama", dict(rope_scaling=LLAMA3 | {"factor": "8"}), "rope_scaling.factor='8' is of type str"),
    "llama3 without a bound": (
        "llama",
        dict(rope_scaling=LLAMA3 | {"low_freq_factor": ABSENT}),
        "has no rope_scaling.low_freq_factor",
    ),
    "llama3 with a bound of 0": (
        "llama",
        dict(rope_scaling=LLAMA3 | {"low_freq_factor": 0}),
        "rope_scaling.low_freq_factor=0 must be above 0",
    ),
    "odd heads": ("llama", dict(head_dim=9), "head_dim=9 is odd"),
    "width no multiple": ("llama", dict(hidden_size=30, head_dim=8), "hidden_size=30 is no multiple of"),
    "yarn without a factor": (
        "qwen2",
        dict(rope_scaling={"type": "yarn", "original_max_position_embeddings": 32}),
        "needs factor",
    ),
    "yarn with a length of null": (
        "qwen2",
        dict(rope_scaling=YARN, original_max_position_embeddings=None),
        "no original_max_position_embeddings: it is null",
    ),
    "rope by layer type": ("qwen2", dict(rope_parameters=BY_LAYER), "rope_parameters.full_attention is not supported"),
    "scaling by layer type": ("qwen2", dict(rope_scaling=BY_LAYER), "rope_scaling.full_attention is not supported"),
    "kv heads absent": ("qwen2", dict(num_key_value_heads=ABSENT), "num_key_value_heads=32 (qwen2's number where none"),
    "one layer type for two": ("qwen2", dict(layer_types=["full_attention"]), "layer_types=['full_attention'] must"),
    "window as text": ("qwen2", dict(use_sliding_window="false"), "use_sliding_window='false' is of type str"),
    "head_dim of null": ("qwen3", dict(head_dim=None), "no head_dim: it is null"),
    "experts of null": ("deepseek_v3", dict(n_routed_experts=None), "no n_routed_experts: it is null"),
    "factor of null": ("deepseek_v3", dict(routed_scaling_factor=None), "no routed_scaling_factor: it is null"),
    "groups of null": ("deepseek_v3", dict(n_group=None), "no n_group: it is null"),
    "one expert a group": ("deepseek_v3", dict(n_group=8), "n_group=8 leaves fewer than two"),
    "no experts in sparse layers": ("deepseek_v3", dict(n_routed_experts=0), "n_routed_experts=0, but"),
    "two numbers of experts": ("deepseek_v3", dict(num_local_experts=1), "n_routed_experts=8 and num_local_experts=1"),
    "kv heads of latent attention": ("deepseek_v3", dict(num_key_value_heads=2), "num_key_value_heads=2 is not supp"),
    "groups absent": ("deepseek_v2", dict(n_group=ABSENT), "has no n_group, which model_type deepseek_v2 needs"),
    "method of null": ("deepseek_v2", dict(topk_method=None), "no topk_method: it is null"),
}


def stated(fields: dict) -> dict:
    """Returns the fields without those whose value is ABSENT, in objects inside too."""
    kept = {name: value for name, value in fields.items() if value != ABSENT}
    return {name: stated(value) if isinstance(value, dict) else value for name, value in kept.items()}


def write_config(folder: pathlib.Path, family: str, changes: dict) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(stated(PLAIN[family] | changes)))
    return folder


def write_weights(folder: pathlib.Path) -> None:
    """Writes random weights of the shapes that transformers reads from the folder's config.json."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in sorted(model.state_dict().items()):
            noise = torch.randn(value.shape, generator=draw)
            is_norm, is_bias = "norm" in name, name.endswith("e_score_correction_bias")
            value.copy_(1 + 0.2 * noise if is_norm else 0.2 * noise.abs() if is_bias else 0.15 * noise)
    model.save_pretrained(folder / "saved")
    (folder / "saved" / hf.SINGLE_FILE).rename(folder / hf.SINGLE_FILE)


def theirs(folder: pathlib.Path) -> np.ndarray:
    return their_logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), TOKENS)


def ours(folder: pathlib.Path) -> np.ndarray:
    """Returns our logits, operation by operation: variants share the compiled ones."""
    config = hf_config.model_config(folder)
    params = hf.load(folder, config, sharding.make_mesh(MeshConfig()), jnp.float32)
    positions = np.arange(LENGTH, dtype=np.int32)[None]
    hidden = decoder.forward(
        params, TOKENS, positions, np.ones_like(TOKENS), Network(config, ComputeConfig(scan_layers=False))
    )[0]
    return np.asarray(decoder.logits(params, hidden))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Returns a function from a family to (folder, transformers' logits) of its plain config."""

    @functools.cache
    def make(family: str) -> tuple[pathlib.Path, np.ndarray]:
        folder = write_config(tmp_path_factory.mktemp(family), family, {})
        write_weights(folder)
        return folder, theirs(folder)

    return make


@pytest.mark.parametrize("name", [*MOVING, *OTHER])
def test_a_variant_has_the_logits_of_transformers(tmp_path, plain, name):
    family, changes = (MOVING | OTHER)[name]
    folder = write_config(tmp_path / "variant", family, changes)
    write_weights(folder)
    expected = theirs(folder)
    error = np.abs(ours(folder) - expected).max() / np.abs(expected).max()
    print(f"{name}: largest difference {error:.2e} of the largest logit")
    assert error < TOLERANCE
    if name in MOVING:
        base = plain(family)[1]
        assert np.abs(base - expected).max() > MOVED * np.abs(expected).max()


@pytest.mark.parametrize("name", REFUSED)
def test_a_variant_that_transformers_refuses_is_refused_in_one_line(tmp_path, plain, name):
    family, changes, words = REFUSED[name]
    folder = write_config(tmp_path / "variant", family, changes)
    (folder / hf.SINGLE_FILE).symlink_to(plain(family)[0] / hf.SINGLE_FILE)
    with pytest.raises(Exception):  # noqa: B017  (of many kinds, from a strict field to a shape in the forward pass)
        theirs(folder)
    with pytest.raises(ValueError) as error:
        ours(folder)
    assert words in str(error.value) and "config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family", PLAIN)
def test_the_defaults_of_absent_fields_are_those_of_transformers(family):
    config = transformers.AutoConfig.for_model(family)
    for name, value in hf_config.ABSENT[family].items():
        assert getattr(config, name) == value, name
    assert config.rope_parameters["rope_theta"] == hf_config.THETA
    assert (config.rms_norm_eps, config.initializer_range, config.tie_word_embeddings) == (1e-6, 0.02, False)
