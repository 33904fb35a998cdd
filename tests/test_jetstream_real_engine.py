"""Claims about r1jax's engine under JetStream's own Driver."""

import functools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from r1jax.checkpoints import tokenizer
from r1jax.core import rng, sharding
from r1jax.models import decoder
from r1jax.sampler import jetstream, serve
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import RolloutRequest, SamplingParams
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import MeshConfig, SamplerConfig, replace

pytestmark = pytest.mark.skipif(not jetstream.AVAILABLE, reason="google-jetstream 0.2.2 is not installed")

WORDS = tokenizer.tiny()
LATENT_MOE = small.network(
    vocab_size=WORDS.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    n_shared_experts=1,
    moe_intermediate_size=16,
    initializer_range=0.5,
)
GROUPED_DENSE = small.network(
    family="llama",
    vocab_size=WORDS.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.5,
)
MAX_NEW = 12
SAMPLER = SamplerConfig(slots=6, steps_per_dispatch=4, max_prompt_tokens=11, max_new_tokens=MAX_NEW)
STOP_IDS = (5, 17)


@functools.cache
def build(network):
    """Returns (engine, random float32 parameters); the engine holds no state but its compiled programs."""
    mesh = sharding.make_mesh(MeshConfig())
    params = sharding.initialize(decoder.specs(network.model), rng.key(0, "test", "init"), jnp.float32, mesh)
    return Engine(network, SAMPLER, mesh, STOP_IDS, tokenizer=WORDS), params


def random_prompts(count):
    generator = np.random.default_rng(2)
    return [
        generator.integers(0, WORDS.vocab_size, size=generator.integers(1, 12)).astype(np.int32) for _ in range(count)
    ]


def scheduled(engine, params, prompts, max_new_tokens=MAX_NEW):
    sampling = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens, stop_ids=STOP_IDS)
    keys = np.zeros((1, 2), np.uint32)
    requests = [RolloutRequest(index, prompt, keys, sampling) for index, prompt in enumerate(prompts)]
    return RolloutSampler(engine).generate(requests, params)


def without_stop(sample):
    ids = sample.token_ids.tolist()
    return ids[:-1] if sample.finish_reason == "stop" else ids


def test_our_engine_is_a_jetstream_engine():
    assert jetstream.Engine.__module__ == "jetstream.engine.engine_api"
    assert issubclass(Engine, jetstream.Engine)
    assert not Engine.__abstractmethods__


def test_the_rollout_sampler_gives_the_same_tokens_where_jetstream_is_not_installed():
    program = (
        "import sys; sys.modules['jetstream'] = None; sys.path.insert(0, 'tests')\n"
        "from test_jetstream_real_engine import *\n"
        "samples = scheduled(*build(GROUPED_DENSE), random_prompts(4))\n"
        "print(jetstream.AVAILABLE, [without_stop(sample) for sample in samples])\n"
    )
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = [without_stop(sample) for sample in scheduled(*build(GROUPED_DENSE), random_prompts(4))]
    assert done.stdout == f"False {expected}\n"


@pytest.mark.parametrize("network", [LATENT_MOE, GROUPED_DENSE], ids=["latent_moe", "grouped_dense"])
def test_driver_greedy_tokens_equal_the_rollout_samplers_for_forty_prompts(network):
    engine, params = build(network)
    prompts = random_prompts(40)
    samples = scheduled(engine, params, prompts)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    assert len({tuple(sample.token_ids.tolist()) for sample in samples}) > 20  # the prompts matter
    assert serve.generate_many(engine, params, prompts, MAX_NEW, deadline_s=60) == [without_stop(s) for s in samples]


def test_driver_returns_at_most_the_engines_own_budget():
    engine, params = build(GROUPED_DENSE)
    prompts = random_prompts(8)
    expected = [without_stop(sample) for sample in scheduled(engine, params, prompts)]
    assert serve.generate_many(engine, params, prompts, 10 * MAX_NEW, deadline_s=60) == expected


def test_driver_follows_new_weights_without_compiling_again():
    engine, params = build(GROUPED_DENSE)
    other = jax.tree.map(lambda leaf: leaf * 1.5, params)
    prompts = random_prompts(6)
    expected = [[without_stop(s) for s in scheduled(engine, weights, prompts)] for weights in (params, other)]
    assert expected[0] != expected[1]
    with serve.SafeDriver(engine, params) as driver:
        assert driver.generate_many(prompts, MAX_NEW, 60) == expected[0]
        compiled = engine.compilations()
        driver.set_params(other)
        assert driver.generate_many(prompts, MAX_NEW, 60) == expected[1]
        assert engine.compilations() == compiled


def test_driver_refuses_a_prompt_longer_than_the_engines():
    engine, params = build(GROUPED_DENSE)
    with pytest.raises(ValueError, match="prompt of 12 tokens must have 1 to 11"):
        serve.generate_many(engine, params, [[1] * 12], 4)


def test_text_prompts_are_served_with_the_training_tokenizer():
    engine, params = build(GROUPED_DENSE)
    text = WORDS.decode(range(20, 26))
    ids = np.asarray(WORDS.encode(text), np.int32)
    assert ids.tolist() == list(range(20, 26))
    request_text = []

    class Channel(serve._Collector):
        def add_result(self, samples):
            super().add_result(samples)
            request_text.extend(samples[0].text)

    channel = Channel()
    request = jetstream.orchestrator().ActiveRequest(max_tokens=8, return_channel=channel, prefill_content=text)
    with serve.SafeDriver(engine, params) as driver:
        driver.place_request_on_prefill_queue(request)
        assert channel.done.wait(60)
    expected = without_stop(scheduled(engine, params, [ids], 8)[0])
    assert channel.token_ids == expected
    assert "".join(request_text) == WORDS.decode(expected)


def test_the_driver_ends_at_a_stop_string_as_the_rollout_sampler_does():
    engine, params = build(GROUPED_DENSE)
    prompts = random_prompts(12)
    free = scheduled(engine, params, prompts)
    text = WORDS.decode(max((sample.token_ids for sample in free), key=len)[2:4])
    engine = Engine(GROUPED_DENSE, replace(SAMPLER, stop_strings=(text,)), engine.mesh, STOP_IDS, tokenizer=WORDS)
    samples = scheduled(engine, params, prompts)
    cut = [len(sample.token_ids) < len(whole.token_ids) for sample, whole in zip(samples, free, strict=True)]
    expected = [s.token_ids.tolist() if ended else without_stop(s) for s, ended in zip(samples, cut, strict=True)]
    assert any(cut) and not all(cut)
    assert serve.generate_many(engine, params, prompts, MAX_NEW, deadline_s=60) == expected
