"""The decoder on imported weights gives the logits of transformers: small random models of every family, and SmolLM2."""

import copy
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import safetensors, their_logits, torch, transformers

from r1jax.checkpoints import hf, hf_config, tokenizer
from r1jax.core import sharding
from r1jax.models import cache, decoder
from r1jax.schema import AuxiliaryConfig, MeshConfig, Network, replace

LENGTH = 301
TOLERANCE = 5e-5  # of the largest logit: float32 sums in another order come to 6e-6; a wrong layout to more than 0.01

COMMON = dict(vocab_size=67, hidden_size=64, intermediate_size=96, num_hidden_layers=3, max_position_embeddings=512)
GROUPED = COMMON | dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
LATENT = COMMON | dict(
    num_attention_heads=4,
    num_key_value_heads=4,
    initializer_range=0.1,
    kv_lora_rank=32,
    q_lora_rank=48,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    moe_intermediate_size=32,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=8.0,
    original_max_position_embeddings=32,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=1.0,
)
LATENT_V2 = LATENT | dict(q_lora_rank=None, routed_scaling_factor=1.0, norm_topk_prob=False)
LATENT_V2.pop("num_nextn_predict_layers")
# Moonlight-16B: the V3 router without groups, no query low rank, more than one shared expert.
MOONLIGHT = LATENT | dict(q_lora_rank=None, n_group=1, topk_group=1, routed_scaling_factor=2.446)
PLAIN_YARN = {name: value for name, value in YARN.items() if "mscale" not in name}


def build(name: str) -> transformers.PreTrainedModel:
    """Returns one of the small models, every weight random."""
    makers = {
        "llama": lambda: transformers.LlamaConfig(**GROUPED),
        "llama_tied": lambda: transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
        "llama_wide_heads": lambda: transformers.LlamaConfig(**GROUPED, head_dim=24),
        "llama3_scaling": lambda: transformers.LlamaConfig(**GROUPED, rope_parameters=LLAMA3),
        "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
        "qwen2_yarn": lambda: transformers.Qwen2Config(**GROUPED, rope_parameters=PLAIN_YARN),
        "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=24),
        "v2_lite": lambda: transformers.DeepseekV2Config(
            **LATENT_V2 | {"n_group": 1, "topk_group": 1},
            rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        ),
        "v2_grouped": lambda: transformers.DeepseekV2Config(
            **LATENT_V2 | {"q_lora_rank": 48, "routed_scaling_factor": 16.0}, topk_method="group_limited_greedy"
        ),
        "moonlight": lambda: transformers.DeepseekV3Config(**MOONLIGHT),
        "deepseek": lambda: transformers.DeepseekV3Config(**LATENT),
        "deepseek_yarn": lambda: transformers.DeepseekV3Config(**LATENT, rope_parameters=YARN),
        "deepseek_uneven_mscale": lambda: transformers.DeepseekV3Config(
            **LATENT, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}
        ),
        "deepseek_plain_query": lambda: transformers.DeepseekV3Config(**LATENT | {"q_lora_rank": None}),
        "deepseek_half_split": lambda: transformers.DeepseekV3Config(**LATENT, rope_interleave=False),
    }
    torch.manual_seed(0)
    config = makers[name]()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "norm" in key:
                value.add_(0.2 * torch.randn_like(value))
            elif key.endswith(".bias"):
                value.copy_(0.3 * torch.randn_like(value))
            elif key.endswith("e_score_correction_bias"):
                value.copy_(0.5 * torch.rand_like(value))  # positive, so that every picked expert's score is
            elif key.endswith("mlp.gate.weight"):
                value.copy_(0.3 * torch.randn_like(value))
    return model


NAMES = (
    "llama",
    "llama_tied",
    "llama_wide_heads",
    "llama3_scaling",
    "qwen2",
    "qwen2_yarn",
    "qwen3",
    "v2_lite",
    "v2_grouped",
    "moonlight",
    "deepseek",
    "deepseek_yarn",
    "deepseek_uneven_mscale",
    "deepseek_plain_query",
    "deepseek_half_split",
)


def imported(folder) -> tuple[decoder.Params, Network]:
    model = hf_config.model_config(folder)
    return hf.load(folder, model, sharding.make_mesh(MeshConfig()), jnp.float32), Network(model)


def our_logits(params: decoder.Params, tokens: np.ndarray, config: Network) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    @jax.jit
    def run(params, tokens, positions):
        hidden, _, _ = decoder.forward(params, tokens, positions, jnp.ones_like(tokens), config)
        return decoder.logits(params, hidden)

    return np.asarray(run(params, tokens, positions))


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers_at_every_position(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path)
    params, config = imported(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 67, (2, LENGTH)).astype(np.int32)
    theirs, ours = their_logits(model, tokens), our_logits(params, tokens, config)
    errors = np.abs(ours - theirs).max(axis=(0, 2)) / np.abs(theirs).max()
    print(f"{name}: largest difference {errors.max():.2e} of the largest logit, at position {errors.argmax()}")
    assert errors.max() < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "llama3_scaling", "v2_lite", "deepseek_yarn"])
def test_packed_and_padded_documents_equal_transformers_on_each_alone(tmp_path, name):
    model = build(name)
    model.save_pretrained(tmp_path)
    params, config = imported(tmp_path)
    lengths = (90, 41, 7)
    tokens = np.random.default_rng(4).integers(0, 67, (1, 150)).astype(np.int32)
    segments = np.repeat([1, 2, 3, 0], (*lengths, 12))[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 12)])[None].astype(np.int32)

    @jax.jit
    def run(params):
        return decoder.logits(params, decoder.forward(params, tokens, positions, segments, config)[0])

    ours, start = np.asarray(run(params))[0], 0
    for length in lengths:
        theirs = their_logits(model, tokens[:, start : start + length])[0]
        assert np.abs(ours[start : start + length] - theirs).max() < TOLERANCE * np.abs(theirs).max()
        start += length


def negative_biases(model: transformers.PreTrainedModel) -> None:
    """Makes every biased score negative, and far lower in the groups of high numbers."""
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.copy_(torch.linspace(-1.5, -6.0, 8))


def test_negative_biased_scores_give_the_experts_of_transformers_and_not_those_of_a_zero_mask(tmp_path, monkeypatch):
    model = build("deepseek")
    negative_biases(model)
    model.save_pretrained(tmp_path)
    params, config = imported(tmp_path)
    tokens = np.random.default_rng(5).integers(0, 67, (1, 64)).astype(np.int32)
    ours, theirs = our_logits(params, tokens, config), their_logits(model, tokens)
    assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(theirs).max()
    fill = torch.Tensor.masked_fill

    def zero_fill(scores, mask, value):  # as in the checkpoint's own modeling file, and in transformers before 5
        return fill(scores, mask, 0.0 if scores.shape[-1] == 8 and value == float("-inf") else value)

    monkeypatch.setattr(torch.Tensor, "masked_fill", zero_fill)
    zero = their_logits(model, tokens)
    assert np.abs(ours - zero).max() > 100 * TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("state", ["post_norm", "pre_norm"])
def test_the_prediction_module_equals_one_built_from_transformers_layers(tmp_path, state):
    model = build("deepseek_yarn")
    folder = save_with_prediction_layer(model, tmp_path)
    params, config = imported(folder)
    config = replace(config, auxiliary=AuxiliaryConfig(mtp_hidden=state))
    assert config.model.num_nextn_predict_layers == 1
    tokens = np.random.default_rng(6).integers(0, 67, (1, 80)).astype(np.int32)
    positions = np.arange(80, dtype=np.int32)[None]

    @jax.jit
    def run(params):
        ones = jnp.ones_like(tokens)
        hidden, _, auxiliary = decoder.forward(params, tokens, positions, ones, config)
        further, _ = decoder.predict_further(params, hidden, auxiliary, tokens, positions, ones, config)
        return decoder.logits(params, further)

    ours, theirs = np.asarray(run(params))[0, :79], their_prediction(model, folder, tokens, state)
    assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(theirs).max()


def save_with_prediction_layer(model, folder):
    """Returns the model's folder with a fourth layer as DeepSeek stores it, every weight random."""
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(7)
    added = {
        name.replace("layers.2.", "layers.3."): torch.randn(value.shape, generator=draw) * value.std() + value.mean()
        for name, value in tensors.items()
        if name.startswith("model.layers.2.")
    }
    for name in ("enorm", "hnorm", "shared_head.norm"):
        added[f"model.layers.3.{name}.weight"] = 1 + 0.2 * torch.randn(64, generator=draw)
    added["model.layers.3.eh_proj.weight"] = 0.1 * torch.randn(64, 128, generator=draw)
    added["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    added["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    safetensors.torch.save_file(tensors | added, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def their_prediction(model, folder, tokens: np.ndarray, state: str) -> np.ndarray:
    """Returns the logits [T - 1, V] of V3 report eq. 21-23, run by transformers' own layer, norms and rotary table."""
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    seen, ids = {}, torch.from_numpy(tokens).long()
    hook = model.model.norm.register_forward_hook(lambda module, given, made: seen.update(pre=given[0], post=made))
    their_logits(model, tokens)
    hook.remove()
    deeper = folder / "as_a_fourth_layer"
    deeper.mkdir(exist_ok=True)
    fields = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 4}
    (deeper / "config.json").write_text(json.dumps(fields))
    shutil.copy(folder / "model.safetensors", deeper)
    head = transformers.AutoModelForCausalLM.from_pretrained(deeper, dtype=torch.float32).eval()
    head.model.layers = torch.nn.ModuleList([head.model.layers[3]])
    head.model.config.num_hidden_layers = 1
    norms = {name: copy.deepcopy(head.model.norm) for name in ("enorm", "hnorm", "shared_head.norm")}
    with torch.no_grad():
        for name, norm in norms.items():
            norm.weight.copy_(stored[f"model.layers.3.{name}.weight"])
        head.model.norm = norms["shared_head.norm"]
        embedded = norms["enorm"](head.model.embed_tokens(ids[:, 1:]))
        hidden = norms["hnorm"](seen[state.split("_")[0]][:, :-1])
        joined = torch.cat([embedded, hidden], dim=-1) @ stored["model.layers.3.eh_proj.weight"].T
        return head(inputs_embeds=joined, use_cache=False).logits[0].numpy()


def test_a_wrong_rotary_layout_shows_after_position_zero(tmp_path):
    model = build("deepseek_yarn")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"rope_interleave": true', '"rope_interleave": false'))
    params, config = imported(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 67, (1, 16)).astype(np.int32)
    theirs = their_logits(model, tokens)
    errors = np.abs(our_logits(params, tokens, config) - theirs).max(axis=(0, 2)) / np.abs(theirs).max()
    assert errors[0] < TOLERANCE
    assert errors[1:].max() > 100 * TOLERANCE


def test_a_checkpoint_in_shards_gives_the_same_logits(tmp_path):
    model = build("deepseek_yarn")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / hf.INDEX_FILE).exists()
    params, config = imported(tmp_path)
    tokens = np.random.default_rng(2).integers(0, 67, (1, 64)).astype(np.int32)
    theirs = their_logits(model, tokens)
    assert np.abs(our_logits(params, tokens, config) - theirs).max() < TOLERANCE * np.abs(theirs).max()


# SmolLM2-135M: real weights, so that layers, scales and the tokenizer are what a user loads.

PROMPTS = (
    "The capital of France is",
    "import numpy as np\n\nx = np.",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "Photosynthesis is the process by which plants",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "def add(a, b):\n    return",
    "Water boils at 100 degrees Celsius, and it freezes at",
    "Question: What is 12 + 30?\nAnswer:",
    "Once upon a time, in a small village by the sea, there lived an old",
)
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    """Returns (our parameters, our config, our tokenizer, transformers' model)."""
    params, config = imported(smollm2_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()
    return params, config, tokenizer.from_folder(smollm2_folder), model


def padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens, positions and segments of prompts padded on the right."""
    width = max(map(len, rows))
    tokens, segments = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], segments[index, : len(row)] = row, 1
    return tokens, np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape), segments


def test_smollm2_prompt_logits_equal_transformers(smollm2):
    params, config, ours, model = smollm2
    rows = [ours.encode(prompt) for prompt in PROMPTS]
    tokens, positions, segments = padded(rows)

    @jax.jit
    def run(params):
        return decoder.logits(params, decoder.forward(params, tokens, positions, segments, config)[0])

    logits = np.asarray(run(params))
    for index, row in enumerate(rows):
        theirs = their_logits(model, np.asarray([row]))[0]
        error = np.abs(logits[index, : len(row)] - theirs).max() / np.abs(theirs).max()
        print(f"prompt {index}: largest difference {error:.2e} of the largest logit")
        assert error < TOLERANCE
        assert logits[index, : len(row)].argmax(-1).tolist() == theirs.argmax(-1).tolist()


def greedy(params: decoder.Params, rows: list[list[int]], config: Network) -> list[list[int]]:
    """Returns NEW_TOKENS greedy tokens a prompt: one prefill, then one token at a time from the cache."""
    tokens, positions, segments = padded(rows)
    lengths = np.asarray([len(row) for row in rows])
    kv = cache.CacheSpec(config, slots=len(rows), rows=tokens.shape[1] + NEW_TOKENS).zeros()

    @jax.jit
    def run(params, kv):
        hidden, kv, _ = decoder.forward(params, tokens, positions, segments, config, kv)
        last = hidden[jnp.arange(len(rows)), lengths - 1]

        def step(carry, offset):
            token, kv = carry
            place = (lengths + offset)[:, None]
            hidden, kv, _ = decoder.forward(params, token[:, None], place, jnp.ones_like(place), config, kv)
            following = decoder.logits(params, hidden[:, 0]).argmax(-1).astype(jnp.int32)
            return (following, kv), token

        first = decoder.logits(params, last).argmax(-1).astype(jnp.int32)
        return jax.lax.scan(step, (first, kv), jnp.arange(NEW_TOKENS))[1]

    return np.asarray(run(params, kv)).T.tolist()


def test_smollm2_greedy_tokens_through_the_cache_equal_transformers(smollm2):
    params, config, ours, model = smollm2
    rows = [ours.encode(prompt) for prompt in PROMPTS]
    found = greedy(params, rows, config)
    for row, tokens in zip(rows, found, strict=True):
        # Token by token, transformers' choice after our tokens so far: equal everywhere is equal greedy decoding.
        theirs = their_logits(model, np.asarray([row + tokens]))[0, len(row) - 1 : -1].argmax(-1)
        assert tokens == theirs.tolist()
