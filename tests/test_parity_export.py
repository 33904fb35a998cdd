"""Claims about exported folders, checked by transformers: same logits, same tokens as the sampler, same tokenizer."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import config as configs
from r1jax.checkpoints import hf, hf_export, tokenizer
from r1jax.core import sharding, tree
from r1jax.data import tasks
from r1jax.models import decoder
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import RolloutRequest, SamplingLaw
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import MeshConfig, RopeScaling, replace
from r1jax.stages import common, stage0_base

if os.environ.get("CI", "").lower() != "true" and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
    pytest.skip("parity with transformers needs the extra 'parity'", allow_module_level=True)

import torch
import transformers

PRESETS = {"tiny": transformers.DeepseekV3ForCausalLM, "tiny_dense": transformers.LlamaForCausalLM}
PROMPTS = tasks.linear_prompts("test")[::40][:10]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


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
    hidden, _, _ = decoder.forward(params, tokens, places, np.ones_like(tokens), model)
    ours = np.asarray(decoder.logits(params, hidden))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    assert np.abs(ours - expected).max() < 5e-5 * np.abs(expected).max()


def test_transformers_gives_the_samplers_greedy_tokens(exported, mesh):
    preset, model, params, folder, theirs = exported
    words = transformers.AutoTokenizer.from_pretrained(folder)
    own, settings = tokenizer.tiny(), configs.load(f"r1_zero:{preset}").sampler
    sampler = RolloutSampler(Engine(model, replace(settings, slots=4), mesh, (own.eos_id,), own))
    law = SamplingLaw(temperature=0.0, max_new_tokens=40, stop_ids=(own.eos_id,))
    ids = [np.asarray(own.encode(prompt.text), np.int32) for prompt in PROMPTS]
    samples = sampler.generate(
        [RolloutRequest(i, p, np.zeros((1, 2), np.uint32), law) for i, p in enumerate(ids)], params
    )
    for prompt, expected, sample in zip(PROMPTS, ids, samples, strict=True):
        encoded = words(prompt.text, return_tensors="pt", add_special_tokens=False).input_ids
        assert encoded[0].tolist() == expected.tolist()
        with torch.no_grad():
            out = theirs.generate(encoded, do_sample=False, temperature=None, top_p=None, max_new_tokens=40)
        assert out[0, len(expected) :].tolist() == sample.token_ids.tolist()
        assert words.decode(sample.token_ids, skip_special_tokens=False).replace("<eos>", "").strip() == own.decode(
            sample.token_ids
        )


def test_import_of_an_export_is_bit_equal(exported, mesh):
    _, model, params, folder, _ = exported
    shape = hf.model_config(folder, model)
    assert decoder.specs(shape).embedding.shape == decoder.specs(model).embedding.shape
    assert tree.digest(hf.load(folder, shape, mesh, jnp.float32)) == tree.digest(params)


def test_scaled_rope_survives_the_round_trip(tmp_path, mesh):
    for preset, scaling in (
        ("tiny", RopeScaling("yarn", 4.0, 64, mscale=1.0, mscale_all_dim=1.0)),
        ("tiny_dense", RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)),
    ):
        model = replace(configs.load(f"stage0_base:{preset}").model, rope_scaling=scaling)
        params = jax.tree.map(jnp.asarray, common.load_asset(stage0_base.asset_path(preset), model, mesh))
        hf_export.save(tmp_path / preset, params, model, tokenizer.tiny(), "float32")
        assert hf.model_config(tmp_path / preset, model).rope_scaling == scaling
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / preset).eval()
        tokens = np.random.default_rng(1).integers(0, model.vocab_size, (1, 120)).astype(np.int32)
        hidden, _, _ = decoder.forward(params, tokens, np.arange(120)[None], np.ones_like(tokens), model)
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        assert np.abs(np.asarray(decoder.logits(params, hidden)) - expected).max() < 5e-5 * np.abs(expected).max()


def test_an_existing_folder_is_refused_and_a_failed_export_leaves_nothing(tmp_path, mesh, monkeypatch):
    model = configs.load("stage0_base:tiny_dense").model
    params = common.load_asset(stage0_base.asset_path("tiny_dense"), model, mesh)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        hf_export.save(tmp_path / "there", params, model, tokenizer.tiny())
    monkeypatch.setattr(hf_export, "config_fields", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf_export.save(tmp_path / "new", params, model, tokenizer.tiny())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]
