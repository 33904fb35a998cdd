"""Claims about exported folders, checked by transformers: same logits, same tokens as the sampler, same tokenizer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from parity import their_logits, torch, transformers

from r1jax import config as configs
from r1jax import launch
from r1jax.checkpoints import hf, hf_config, hf_export, hf_names, tokenizer
from r1jax.core import sharding, tree
from r1jax.data import tasks
from r1jax.models import decoder
from r1jax.recipe import common, stage0_base
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import RolloutRequest, SamplingParams
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import MeshConfig, Network, RopeScaling, replace

PRESETS = {"tiny": transformers.DeepseekV3ForCausalLM, "tiny_dense": transformers.LlamaForCausalLM}
PROMPTS = tasks.linear_prompts("test")[::40][:10]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


def random_params(model):
    """Returns parameters that are all random, biases too; the router's is positive, so that how dropped groups are masked plays no part."""
    draw = np.random.default_rng(0)

    def leaf(path, spec):
        value = 0.1 * draw.normal(size=spec.shape)
        name = hf_names.leaf_path(path)
        value = value + 1.0 if name.endswith("norm") else np.abs(value) if name.endswith("ffw.bias") else value
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, decoder.specs(model), is_leaf=sharding.is_spec)


@pytest.fixture(scope="module", params=PRESETS)
def exported(request, tmp_path_factory, mesh):
    """Returns (preset, model config, params, folder, transformers' model)."""
    model = configs.load(f"stage0_base:{request.param}").model
    params = common.load_asset(stage0_base.asset_path(request.param), model, mesh)
    folder = tmp_path_factory.mktemp("export") / request.param
    hf_export.save(folder, params, model, tokenizer.tiny(), "float32", shard_bytes=400_000)
    return request.param, model, params, folder, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_transformers_loads_the_export_as_its_own_family_with_the_same_logits(exported):
    preset, model, params, folder, theirs = exported
    assert isinstance(theirs, PRESETS[preset])
    assert (folder / hf.INDEX_FILE).exists()  # several shards
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, 60)).astype(np.int32)
    places = np.tile(np.arange(60, dtype=np.int32), (2, 1))
    hidden, _, _ = decoder.forward(params, tokens, places, np.ones_like(tokens), Network(model))
    ours = np.asarray(decoder.logits(params, hidden))
    expected = their_logits(theirs, tokens)
    assert np.abs(ours - expected).max() < 5e-5 * np.abs(expected).max()


def test_transformers_gives_the_samplers_greedy_tokens(exported, mesh):
    preset, model, params, folder, theirs = exported
    words = transformers.AutoTokenizer.from_pretrained(folder)
    own, settings = tokenizer.tiny(), configs.load(f"r1_zero:{preset}").sampler
    sampler = RolloutSampler(Engine(Network(model), replace(settings, slots=10), mesh, (own.eos_id,), own))
    sampling = SamplingParams(temperature=0.0, max_new_tokens=80, stop_ids=(own.eos_id,))
    texts = [prompt.text for prompt in PROMPTS]
    ids = [np.asarray(own.encode(text), np.int32) for text in texts]
    samples = sampler.generate(
        [RolloutRequest(i, p, np.zeros((1, 2), np.uint32), sampling) for i, p in enumerate(ids)], params
    )
    assert isinstance(words, transformers.PreTrainedTokenizerFast)
    batch = words(texts, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left")
    with torch.no_grad():
        out = theirs.generate(**batch, do_sample=False, temperature=None, top_p=None, max_new_tokens=80)
    given = batch.input_ids.shape[1]
    for expected, mask, row, sample in zip(ids, batch.attention_mask, out.tolist(), samples, strict=True):
        assert row[given - int(mask.sum()) : given] == expected.tolist()
        length = len(sample.token_ids)
        assert row[given : given + length] == sample.token_ids.tolist()
        assert set(row[given + length :]) <= {own.pad_id}
        text = words.decode(sample.token_ids, skip_special_tokens=False).replace("<eos>", "").strip()
        assert text == own.decode(sample.token_ids)
    assert sum(not sample.truncated for sample in samples) >= 5  # ended by themselves, not by the limit


def test_import_of_an_export_is_bit_equal(exported, mesh):
    _, model, params, folder, _ = exported
    shape = hf_config.model_config(folder)
    assert decoder.specs(shape).embedding.shape == decoder.specs(model).embedding.shape
    assert tree.digest(hf.load(folder, shape, mesh, jnp.float32)) == tree.digest(params)


def test_scaled_rope_and_the_other_families_give_the_same_logits(tmp_path, mesh):
    tiny, dense = (
        replace(configs.load(f"stage0_base:{preset}").model, num_hidden_layers=2, initializer_range=0.1)
        for preset in PRESETS
    )
    models = {
        "yarn": replace(tiny, rope_scaling=RopeScaling("yarn", 4.0, 64, mscale=1.0, mscale_all_dim=1.0)),
        "llama3": replace(dense, rope_scaling=RopeScaling("llama3", 8.0, 64)),
        "qwen2": replace(dense, family="qwen2", attention_bias=True),
        "tied": replace(dense, tie_word_embeddings=True),
        "plain_query": replace(tiny, q_lora_rank=0, norm_topk_prob=False, routed_scaling_factor=2.5),
    }
    tokens = np.random.default_rng(1).integers(0, tiny.vocab_size, (1, 80)).astype(np.int32)
    for name, model in models.items():
        params = random_params(model)
        hf_export.save(tmp_path / name, params, model, tokenizer.tiny(), "float32")
        assert hf_config.model_config(tmp_path / name).rope_scaling == model.rope_scaling
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        hidden, _, _ = decoder.forward(params, tokens, np.arange(80)[None], np.ones_like(tokens), Network(model))
        expected = their_logits(theirs, tokens)
        ours = np.asarray(decoder.logits(params, hidden))
        assert np.abs(ours - expected).max() < 5e-5 * np.abs(expected).max(), name


def test_export_of_a_stage_is_verified_and_leaves_the_shared_tokenizer_alone(tmp_path, mesh):
    config = configs.load("student_rl:tiny")
    params = common.load_asset(stage0_base.asset_path("tiny_dense"), config.model, mesh)
    folder = small.finished_stage(config, tmp_path, params, {})
    given = [f"--config.checkpoint={folder}", f"--config.output={tmp_path / 'out'}", f"--workdir={tmp_path}"]
    assert launch.main(["--config=export_hf", *given, f"--json={tmp_path / 'figures.json'}"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["parameters"], figures["logit_difference"]) == (tree.count(params), 0.0)
    assert not tokenizer.tiny().chat_template
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = words.apply_chat_template([{"role": "user", "content": PROMPTS[0].text}], add_generation_prompt=True)
    assert list(asked["input_ids"] if hasattr(asked, "keys") else asked) == tokenizer.tiny().encode(PROMPTS[0].text)
