"""The update benchmark: its figures, its refusals, and that its forms and options compute the same update."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import config as configs
from r1jax.bench import update as bench_update
from r1jax.kernels.fused_logprob import token_logprobs
from r1jax.kernels.packed_attention import needed_blocks, packed_attention
from r1jax.kernels.trained_logprob import trained_logprobs
from r1jax.models import decoder
from r1jax.rl import losses
from r1jax.schema import Config, PackConfig, parts_of, replace

SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
LENGTHS = dict(samples=8, prompt_tokens=6, median_tokens=5, p99_tokens=30, longest_tokens=24)


def small_config(**bench) -> Config:
    config = configs.load("bench_update")
    return replace(
        config,
        model=replace(config.model, **SHAPE, head_dim=8, vocab_size=196),
        compute=replace(config.compute, attention_block=8),
        bench=replace(config.bench, **LENGTHS | dict(repeats=1, split_updates=0) | bench),
        pack=PackConfig(row_tokens=40, rows_per_micro_batch=2, trained_chunk=16),
        grpo=replace(config.grpo, group_size=4, prompts_per_update=2),
    )


def plain(config: Config) -> Config:
    """Returns the config without the two options and without recomputation."""
    compute = replace(config.compute, attention_block=0, remat=False)
    return replace(config, compute=compute, pack=replace(config.pack, trained_chunk=0))


def drawn(config: Config) -> dict:
    return bench_update.draw(parts_of(bench_update.UpdateParts, config))


def in_this_process(folder, action, *arguments, what):
    config, samples = bench_update.pickle.loads((folder / "config.pickle").read_bytes()), folder / "samples.npz"
    settings = parts_of(bench_update.UpdateParts, config)
    if action == "prepare":
        return bench_update.prepare_figures(settings, samples) | {"peak_flops_per_s": 1e11}
    return bench_update.update_figures(settings, dict(np.load(samples)), *arguments)


def test_figures_stand_under_their_keys_and_every_form_makes_the_same_update(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_update, "_in_own_process", in_this_process)
    monkeypatch.setattr(bench_update, "matmul_peak", lambda: 1e11)
    config = plain(small_config(losses=("sft",)))
    found = bench_update.run(config, tmp_path)
    trained = drawn(config)["lengths"].sum()
    packed, padded = (found["systems"]["r1jax"]["sft"][form] for form in ("packed", "padded"))
    for figures in (packed, padded):
        assert figures["tokens_per_s"] == pytest.approx(trained / figures["seconds"][0])
        assert figures["peak_rss_bytes"] > 1e7 and 0 < figures["utilisation"]
    assert packed["loss"] == pytest.approx(padded["loss"], abs=1e-5)
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-5)
    assert packed["rows"] < padded["rows"] == config.bench.samples
    assert found["ratios"]["packed"]["r1jax.sft.padded"] == padded["seconds"][0] / packed["seconds"][0]


def gradients(config: Config, form: str):
    given = drawn(config)
    shape = given["response_ids"].shape
    generator = np.random.default_rng(0)
    given |= {
        name: generator.normal(-5, 0.1, shape).astype(np.float32) for name in ("behaviour_logps", "reference_logps")
    }
    network, _, params = bench_update.start_weights(config.stage, config.seed, config.network)
    arrays, filled, size = bench_update.arrays_of(
        bench_update.items_of(given, config.grpo, config.bench, "grpo"), config.pack, config.bench.prompt_tokens, form
    )
    loss = losses.make_loss(network, config.grpo, trained_chunk=size.trained_chunk)
    arguments = losses.arguments(config.grpo, config.grpo.kl_coef, 1.0)
    value = jax.jit(jax.value_and_grad(lambda params, micro: loss(params, micro, arguments)[0]))
    parts = [value(params, {name: array[i] for name, array in arrays.items()}) for i in range(filled)]
    return jax.tree.map(lambda *leaves: sum(leaves), *parts)


def test_packed_rows_padded_rows_and_plain_rows_have_the_same_loss_and_gradient():
    config = small_config()
    wanted = gradients(plain(config), "packed")
    for other in (gradients(config, form) for form in ("packed", "shared", "padded")):
        for found, expected in zip(jax.tree.leaves(other), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5 * max(float(jnp.abs(expected).max()), 1.0))


def test_draws_follow_the_law_and_depend_on_the_seed_alone():
    config = small_config(samples=4000, p99_tokens=50, longest_tokens=10_000)
    samples = drawn(config)
    lengths = samples["lengths"]
    assert np.median(lengths) == pytest.approx(5, abs=1) and np.percentile(lengths, 99) == pytest.approx(50, rel=0.15)
    np.testing.assert_array_equal(drawn(config)["response_ids"], samples["response_ids"])
    assert not np.array_equal(drawn(replace(config, seed=1))["lengths"], lengths)


def test_useful_operations_of_a_hand_counted_model():
    network = small_config().network
    weights = 32 * (4 * 8 + 2 * 2 * 8) + 4 * 8 * 32 + 3 * 32 * 48 + 3 * 32  # attention, feed-forward, three norms
    expected = 6 * (weights * 15 + 196 * 32 * 7) + 6 * (4 * 8) * (10**2 + 5**2)
    assert bench_update.useful_flops(network, np.asarray([10, 5]), 7) == expected


def test_peers_are_left_out_with_a_line_and_a_wrong_interpreter_is_one_line(capsys):
    config = small_config()
    assert {system.name for system in bench_update.systems_of(config.model, config.bench)} == {"r1jax"}
    assert "config.bench.trl_python is empty, so trl.grpo.padded is left out" in capsys.readouterr().err
    config = small_config(trl_python="/nowhere/python")
    config = replace(config, model=replace(config.model, checkpoint="somewhere"))
    with pytest.raises(ValueError, match="config.bench.trl_python=/nowhere/python is no interpreter"):
        bench_update.systems_of(config.model, config.bench)
    config = small_config(losses=("dpo",))
    with pytest.raises(ValueError, match="neither grpo nor sft"):
        bench_update.systems_of(config.model, config.bench)


SEGMENTS = np.zeros((2, 50), np.int32)
SEGMENTS[0, :12], SEGMENTS[0, 12:40], SEGMENTS[0, 40:47] = 1, 2, 3
SEGMENTS[1, :30], SEGMENTS[1, 30:33] = 1, 2


@pytest.mark.parametrize("block", [8, 16, 64])
def test_attention_in_blocks_equals_attention_over_whole_rows(block):
    generator = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)  # noqa: E731
    q, k, v, seen_of = draw(2, 50, 2, 3, 8), draw(2, 50, 2, 8), draw(2, 50, 2, 4), draw(2, 50, 2, 3, 4)
    valid = (SEGMENTS > 0)[:, :, None, None, None]

    def whole(q, k, v):
        seen = np.tri(50, dtype=bool) & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
        scores = jnp.where(seen[:, None, None], 0.3 * jnp.einsum("BTKGH,BSKH->BKGTS", q, k), -jnp.inf)
        return jnp.einsum("BKGTS,BSKV->BTKGV", jax.nn.softmax(scores, axis=-1), v)

    def blocked(q, k, v):
        return packed_attention(q, k, v, jnp.asarray(SEGMENTS), 0.3, block)

    np.testing.assert_allclose(valid * blocked(q, k, v), valid * whole(q, k, v), atol=1e-6)
    pull = lambda f: jax.jit(jax.grad(lambda *a: jnp.sum(valid * seen_of * f(*a)), (0, 1, 2)))(q, k, v)  # noqa: E731
    for found, expected in zip(pull(blocked), pull(whole), strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-6)


def needed(*arguments):
    order, counts = needed_blocks(*arguments)
    return [row[:count].tolist() for row, count in zip(np.asarray(order), np.asarray(counts), strict=True)]


def test_blocks_of_other_samples_are_passed_over_and_those_of_a_shared_prompt_are_not():
    segments = jnp.asarray([[1] * 8 + [2] * 10 + [3] * 6 + [0] * 8])
    assert needed(segments, 8) == [[], [], [1], []]  # the sample of block 2 began in block 1
    whole = jnp.concatenate([segments, jnp.ones((1, 32), jnp.int32)])
    assert needed(whole, 8) == [[], [0], [0, 1], [0, 1, 2]]
    prefixes = jnp.asarray([[0] * 18 + [1] * 6 + [0] * 8])  # the third sample goes on from the first
    assert needed(segments, 8, prefixes) == [[], [], [0, 1], []]


@pytest.mark.parametrize("chunk", [7, 16, 200])
@pytest.mark.parametrize("trained", [0.0, 0.4, 1.0])
def test_trained_positions_alone_have_the_log_probs_and_gradients_of_all(chunk, trained):
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.normal(size=(2, 50, 8)), jnp.float32)
    matrix = jnp.asarray(generator.normal(size=(8, 30)), jnp.float32)
    targets = jnp.asarray(generator.integers(0, 30, (2, 50)))
    mask = jnp.asarray(generator.random((2, 50)) < trained, jnp.float32)

    def value(score):
        def loss(hidden, matrix):
            logp, entropy = score(hidden, matrix)
            return jnp.sum(mask * (logp * jnp.cos(jnp.arange(50)) + 0.3 * entropy))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(hidden, matrix)

    found = value(lambda h, u: trained_logprobs(h, u, targets, mask, 0.7, chunk))
    expected = value(lambda h, u: token_logprobs(h, u, targets, 0.7))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_sizes_below_one_are_refused_with_one_line():
    array = jnp.zeros((1, 4, 1, 1, 2))
    with pytest.raises(ValueError, match="block=0 must be at least 1"):
        packed_attention(array, array[:, :, 0], array[:, :, 0], jnp.ones((1, 4), jnp.int32), 1.0, 0)
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        trained_logprobs(
            jnp.zeros((1, 4, 2)), jnp.zeros((2, 3)), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4)), 1.0, 0
        )


def test_blocked_attention_of_the_decoder_leaves_hidden_states_of_samples_as_they_are():
    config = small_config()
    _, _, params = bench_update.start_weights(config.stage, config.seed, config.network)
    segments = jnp.asarray([[1] * 11 + [2] * 7 + [0] * 4])
    positions = jnp.asarray([[*range(11), *range(7), *[0] * 4]])
    tokens = jnp.arange(22)[None] + 3
    hidden = {}
    for block in (0, 4):
        network = replace(config.network, compute=replace(config.compute, attention_block=block))
        hidden[block] = decoder.forward(params, tokens, positions, segments, network)[0]
    np.testing.assert_allclose(hidden[4][:, :18], hidden[0][:, :18], atol=1e-5)
