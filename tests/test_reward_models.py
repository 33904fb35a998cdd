"""Claims about reward models: their losses, what they read, held-out figures, and the stages on the tiny world."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import toy_checkpoint
from small import MIXTURE, Stopped

from r1jax import config as configs
from r1jax import launch
from r1jax.checkpoints import tokenizer as tokenizers
from r1jax.checkpoints.tokenizer import from_folder
from r1jax.core import rng, sharding, tree
from r1jax.data import jsonl, reward_examples, tasks
from r1jax.evals import preference
from r1jax.models import decoder
from r1jax.recipe import common, reward_models
from r1jax.rewards.models import reward_model
from r1jax.rewards.models.reward_model import RewardModel, TextFormat
from r1jax.schema import MeshConfig, Network, PackConfig
from r1jax.train import frozen, reward, step
from r1jax.train.reward import Unit

WORDS = tokenizers.tiny()
SIZE = PackConfig(row_tokens=24, rows_per_micro_batch=3)
LLAMA = small.network(
    family="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
)
SHAPES = {"mla mixture": small.changed(MIXTURE, num_hidden_layers=3, scan_layers=True), "gqa": LLAMA}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


def weights(network: Network, mesh) -> tuple[Network, decoder.Params]:
    """Returns (shape, random weights) of a reward model with a decoder's body."""
    network = reward_model.architecture(network)
    return network, sharding.initialize(
        decoder.specs(network.model, network.scalar_head), rng.key(0, "reward", "init"), jnp.float32, mesh
    )


def units(kind: str, count: int = 9, seed: int = 0) -> list[Unit]:
    """Returns units of random ids."""
    draw = np.random.default_rng(seed)
    sequences = lambda n: tuple(draw.integers(3, 32, draw.integers(2, 12)).astype(np.int32) for _ in range(n))  # noqa: E731
    if kind == "helpful":
        return [Unit(sequences(2), (True, False)) for _ in range(count)]
    return [Unit(sequences(1), (bool(draw.integers(2)),)) for _ in range(count)]


@functools.partial(jax.jit, static_argnames="network")
def every_score(params, tokens, positions, segments, network: Network) -> jax.Array:
    return decoder.scalars(params, decoder.forward(params, tokens, positions, segments, network)[0])


def alone(params, network: Network, ids: np.ndarray) -> float:
    """Returns the score of one sequence in a row of its own."""
    row = np.zeros((3, 1, SIZE.row_tokens), np.int32)  # tokens, positions, segments
    row[:, 0, : len(ids)] = np.stack([ids, np.arange(len(ids)), np.ones_like(ids)])
    return float(every_score(params, *row, network)[0, len(ids) - 1])


def value_of(loss, params, given: list[Unit], room: int = 6) -> tuple[float, dict, decoder.Params]:
    """Returns (loss, statistics, gradients) of one update, micro-batches summed."""
    arrays, filled, arguments = reward.make_batch(given, SIZE, room)
    total, stats, grads = 0.0, {}, None
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for index in range(filled):
        (value, told), own = compiled(params, jax.tree.map(lambda x, i=index: x[i], arrays), arguments)
        total += float(value)
        stats = {name: stats.get(name, 0.0) + float(told[name]) for name in ("correct",)}
        grads = own if grads is None else jax.tree.map(jnp.add, grads, own)
    return total, stats, grads


def test_pairwise_loss_equals_float64_bradley_terry_and_trls_formula():
    margins = np.linspace(-40, 40, 161)
    reference = -np.log(1 / (1 + np.exp(-margins)))
    np.testing.assert_allclose(reward.pairwise(jnp.asarray(margins, jnp.float32)), reference, rtol=1e-6, atol=1e-12)
    chosen, rejected = np.asarray([2.0, -1.0, 0.5]), np.asarray([1.0, 3.0, 0.5])
    likelihood = np.exp(chosen) / (np.exp(chosen) + np.exp(rejected))
    found = reward.pairwise(jnp.asarray(chosen - rejected))
    np.testing.assert_allclose(found, -np.log(likelihood), rtol=1e-6)
    assert float(reward.pairwise(jnp.float32(-1e4))) == 1e4


def test_pairwise_loss_equals_that_of_torch_logsigmoid_as_trl_takes_it():
    torch = pytest.importorskip("torch")
    chosen, rejected = (np.random.default_rng(seed).normal(0, 3, 64).astype(np.float32) for seed in (0, 1))
    expected = -torch.nn.functional.logsigmoid(torch.tensor(chosen) - torch.tensor(rejected)).mean().item()
    assert abs(float(reward.pairwise(jnp.asarray(chosen - rejected)).mean()) - expected) < 1e-6


def test_pointwise_loss_equals_float64_cross_entropy():
    scores = np.linspace(-20, 20, 81)
    for positive in (True, False):
        chance = 1 / (1 + np.exp(-scores))
        reference = -np.log(chance if positive else np.exp(-scores) / (1 + np.exp(-scores)))
        np.testing.assert_allclose(reward.pointwise(jnp.asarray(scores), positive), reference, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["helpful", "safety"])
def test_packed_loss_is_the_mean_over_units_of_what_each_scores_alone(name, kind, mesh):
    network, params = weights(SHAPES[name], mesh)
    given = units(kind)
    total, stats, _ = value_of(reward.make_loss(network, kind), params, given)
    scores = [[alone(params, network, ids) for ids in unit.sequences] for unit in given]
    if kind == "helpful":
        signed = np.asarray([chosen - rejected for chosen, rejected in scores], np.float64)
    else:
        signed = np.asarray([s if unit.positive[0] else -s for (s,), unit in zip(scores, given, strict=True)])
    assert abs(total - np.log1p(np.exp(-signed)).mean()) < 1e-5
    assert abs(stats["correct"] - (signed > 0).mean()) < 1e-6


@pytest.mark.parametrize("kind", ["helpful", "safety"])
def test_gradient_does_not_depend_on_how_the_units_are_packed(kind, mesh):
    network, params = weights(LLAMA, mesh)
    given, loss = units(kind), reward.make_loss(network, kind)
    there, back = value_of(loss, params, given)[2], value_of(loss, params, given[::-1])[2]
    for one, other in zip(jax.tree.leaves(there), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert np.abs(there.scalar_head).max() > 1e-3


def test_both_responses_of_a_pair_lie_in_one_micro_batch():
    given = units("helpful", 20)
    arrays, filled, _ = reward.make_batch(given, SIZE, 12)
    found = []
    for index in range(filled):
        unit, positive = arrays[reward.UNIT][index], arrays[reward.POSITIVE][index]
        for number in range(1, unit.max() + 1):
            found.append(sorted(positive[unit == number]))
    assert found == [[0, 1]] * 20


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_decoder_cut_in_two_says_what_the_whole_one_says(name, blocks, mesh):
    network, params = weights(SHAPES[name], mesh)
    (lower_model, upper_model), (lower, upper) = (
        frozen.shapes(network, blocks),
        frozen.cut(params, network.model, blocks),
    )
    target = sharding.abstract(decoder.specs(upper_model.model, upper_model.scalar_head), jnp.float32)
    assert jax.tree.map(jnp.shape, upper) == jax.tree.map(lambda leaf: leaf.shape, target)
    given = units("helpful")
    flat = [ids for unit in given for ids in unit.sequences]
    made = iter(frozen.features(lower, lower_model, flat, SIZE, mesh))
    cut = [replace_features(unit, tuple(next(made) for _ in unit.sequences)) for unit in given]
    whole, _, grads = value_of(reward.make_loss(network, "helpful"), params, given)
    part, _, part_grads = value_of(reward.make_loss(upper_model, "helpful"), upper, cut)
    assert abs(whole - part) < 1e-5
    np.testing.assert_allclose(part_grads.scalar_head, grads.scalar_head, atol=1e-5)
    joined = frozen.join(lower, upper)
    assert tree.digest(joined) == tree.digest(params)


def test_cut_leaves_the_unused_rows_of_the_vocabulary_to_the_lower_part():
    lower, upper = frozen.shapes(small.changed(LLAMA, vocab_used=30), 1)
    assert (lower.model.vocab_size, lower.compute.vocab_used) == (32, 30)
    assert (upper.model.vocab_size, upper.compute.vocab_used) == (1, 0)


def replace_features(unit: Unit, features) -> Unit:
    return Unit(unit.sequences, unit.positive, features)


@pytest.mark.parametrize("blocks", [3, 7])
def test_cut_that_leaves_no_block_to_train_is_refused_by_name(blocks):
    with pytest.raises(ValueError, match=f"config.reward_model.frozen_blocks={blocks} must be between 1 and 2"):
        frozen.shapes(LLAMA, blocks)


@pytest.mark.parametrize("name", SHAPES)
def test_scorer_gives_each_text_the_score_it_has_alone_in_any_company(name, mesh):
    network, params = weights(SHAPES[name], mesh)
    flat = [ids for unit in units("helpful", 20) for ids in unit.sequences]
    scorer = RewardModel(params, network, mesh, TextFormat("helpful", "tiny"), WORDS, 3, 24)
    scorer.warm_up()
    found = scorer.scores(flat)
    np.testing.assert_allclose(found, [alone(params, network, ids) for ids in flat], atol=1e-5)
    np.testing.assert_allclose(scorer.scores(flat[::-1])[::-1], found, atol=1e-5)
    assert np.array_equal(scorer.scores(flat), found) and scorer.compilations == 1


def test_helpful_model_reads_the_summary_alone_and_safety_model_the_thinking_too():
    turn = "<think> steal cat </think> the cat is small thanks"
    ids = {kind: TextFormat(kind, "tiny").ids("tell cat :", turn, WORDS) for kind in ("helpful", "safety")}
    assert WORDS.decode(ids["helpful"]) == "tell cat : the cat is small thanks"
    assert WORDS.decode(ids["safety"]) == "tell cat : <think> steal cat </think> the cat is small thanks"
    assert all(found[-1] == WORDS.eos_id for found in ids.values())
    other = TextFormat("helpful", "tiny").ids("tell cat :", turn.replace("steal", "clean"), WORDS)
    assert np.array_equal(ids["helpful"], other)


def test_helpful_model_finds_nothing_to_judge_where_thinking_never_ends_or_nothing_follows():
    text_format = TextFormat("helpful", "tiny")
    assert text_format.ids("tell cat :", "<think> cat small", WORDS) is None
    assert text_format.ids("tell cat :", "<think> cat </think> ", WORDS) is None
    assert TextFormat("safety", "tiny").ids("tell cat :", "<think> cat small", WORDS) is not None


def test_text_format_keeps_the_end_of_a_prompt_and_the_beginning_of_a_response():
    text_format = TextFormat("safety", "tiny", prompt_tokens=2, response_tokens=3)
    assert WORDS.decode(text_format.ids("tell old cat :", "the cat is small", WORDS)) == "cat : the cat is"


def test_rewards_are_chances_around_the_center_and_0_where_nothing_is_judged(mesh):
    network, params = weights(small.changed(LLAMA, vocab_size=196), mesh)
    scorer = RewardModel(params, network, mesh, TextFormat("helpful", "tiny"), WORDS, 2, 24, center=0.25)
    texts = ["the cat is small", "<think> cat </think>", "<think> x </think> the dog thanks"]
    found = scorer.rewards(["tell cat :"] * 3, texts)
    raw = [alone(params, network, scorer.text_format.ids("tell cat :", text, WORDS)) for text in (texts[0], texts[2])]
    np.testing.assert_allclose(found, [1 / (1 + np.exp(0.25 - raw[0])), 0, 1 / (1 + np.exp(0.25 - raw[1]))], atol=1e-6)


PAIR = {"id": "a", "prompt": "p", "chosen": "c", "rejected": "r"}
LABEL = {"id": "a", "prompt": "p", "response": "r", "safe": True}
BAD_ROWS = {
    "no rejected": ("helpful", [{"id": "a", "prompt": "p", "chosen": "c"}], "line 1", "rejected"),
    "not text": ("helpful", [PAIR | {"chosen": 3}], "line 1", "chosen"),
    "same text": ("helpful", [PAIR, PAIR | {"id": "b", "rejected": "c"}], "line 2", "the same text"),
    "empty prompt": ("helpful", [PAIR | {"prompt": " "}], "line 1", "'prompt' is empty"),
    "same id": ("helpful", [PAIR, PAIR], "line 2", "also the id of "),
    "no label": ("safety", [{"id": "a", "prompt": "p", "response": "r"}], "line 1", "no label; needs one of 'safe'"),
    "no boolean": ("safety", [LABEL | {"safe": "yes"}], "line 1", "safe='yes'; needs"),
    "both labels": ("safety", [LABEL | {"unsafe": False}], "line 1", "needs one of 'safe' and 'unsafe'"),
    "no text": ("safety", [LABEL | {"response": 7}], "line 1", "'response' is int, a string is needed"),
    "empty text": ("safety", [LABEL | {"prompt": "", "response": " "}], "line 1", "'response' is ' ', needs text"),
    "several turns": ("helpful", [PAIR | {"prompt": [{"role": "system", "content": "s"}]}], "line 1", "several turns"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_one_line_with_file_and_place(name, tmp_path):
    kind, rows, place, told = BAD_ROWS[name]
    path = tmp_path / "rows.jsonl"
    jsonl.write(path, rows)
    with pytest.raises(ValueError) as caught:
        reward_examples.read(str(path), kind)
    text = str(caught.value)
    assert text.startswith(f"{path}, {place}: ") and told in text and "\n" not in text


def test_label_may_be_safe_or_unsafe_and_a_row_without_response_is_itself_judged(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl.write(path, [LABEL, {"prompt": "some text", "unsafe": True}])
    (first, second), notes = reward_examples.read(str(path), "safety")
    assert notes == ["1 of 2 rows have no id; they are called row-1, row-2, ... by their number"]
    assert (first["prompt"], first["response"], first["safe"]) == ("p", "r", True)
    assert (second["id"], second["prompt"], second["response"], second["safe"]) == ("row-2", "", "some text", False)


def test_no_prompt_is_both_trained_on_and_held_out():
    rows = [{"id": f"{n}", "prompt": f"p{n % 40}"} for n in range(400)]
    train, held_out = reward_examples.split(rows, 0.3)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert len(train) + len(held_out) == 400 and len(held_out) > 40


def test_auc_equals_the_share_of_ordered_couples_with_ties_counted_half():
    draw = np.random.default_rng(0)
    scores, positive = draw.integers(0, 6, 60).astype(float), draw.random(60) < 0.4
    couples = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert abs(preference.auc(scores, positive) - np.mean(couples)) < 1e-12
    assert np.isnan(preference.auc(scores, np.ones(60, bool)))


def test_interval_of_an_accuracy_covers_it_in_95_of_100_draws():
    draw, covered = np.random.default_rng(0), 0
    for _ in range(400):
        found = preference.proportion("accuracy", draw.random(80) < 0.8, range(80))
        covered += found["accuracy_low"] <= 0.8 <= found["accuracy_high"]
    assert 0.92 <= covered / 400 <= 0.98


def test_examples_of_one_prompt_count_as_one_when_they_are_all_alike():
    once = preference.proportion("accuracy", np.asarray([1.0, 0.0] * 20), range(40))
    many = preference.proportion("accuracy", np.repeat([1.0, 0.0] * 20, 10), np.repeat(range(40), 10))
    assert abs(many["accuracy_se"] - once["accuracy_se"]) < 1e-12
    assert abs(many["accuracy_low"] - once["accuracy_low"]) < 0.01
    perfect = preference.proportion("accuracy", np.ones(100), np.repeat(range(4), 25))
    assert perfect["accuracy_low"] < 0.55 and perfect["accuracy_high"] == 1.0


def test_calibration_error_is_0_of_honest_chances_and_their_gap_otherwise():
    chance = np.repeat([0.25, 0.75], 400)
    outcome = np.concatenate([np.arange(400) % 4 == 0, np.arange(400) % 4 != 0]).astype(float)
    honest = preference.calibration(chance, outcome, low=0.0)
    assert honest["ece"] < 1e-12 and [entry["examples"] for entry in honest["reliability"]] == [400, 400]
    assert abs(preference.calibration(np.full(800, 0.9), outcome, low=0.0)["ece"] - 0.4) < 1e-12


def test_length_bias_of_a_model_that_scores_length_is_told():
    draw = np.random.default_rng(0)
    long, short = draw.integers(20, 60, 200), draw.integers(2, 20, 200)
    chosen = np.where(np.arange(200) % 2, long, short)
    rejected = np.where(np.arange(200) % 2, short, long)
    found = preference.of_pairs(chosen * 0.1, rejected * 0.1, chosen, rejected, range(200))
    assert found["accuracy"] == 0.5 and found["length_correlation"] > 0.999
    assert (found["accuracy_chosen_longer"], found["accuracy_chosen_shorter"]) == (1.0, 0.0)


SHORT = [
    *(
        ("model.hidden_size", "32"),
        ("model.intermediate_size", "32"),
        ("model.moe_intermediate_size", "16"),
    ),
    *(("pack.rows_per_micro_batch", "4"), ("reward_model.examples_per_update", "16"), ("data.template", "tiny")),
    *(("reward_model.epochs", "3"), ("optimizer.learning_rate", "1e-2"), ("checkpointing.every_updates", "4")),
    ("model.num_hidden_layers", "2"),
]


def known_pairs(path, count: int = 480) -> None:
    """Writes pairs of equal length whose chosen response ends politely, and labels by the same rule."""
    draw = np.random.default_rng(0)
    topics, adjectives = tasks.TOPICS["en"], tasks.ADJECTIVES["en"]
    rows = []
    for number in range(count):
        asked, other = draw.choice(topics, 2, replace=False)
        body = f"the {other} is {draw.choice(adjectives)}"
        texts = {"chosen": f"{body} thanks", "rejected": f"{body} cannot"}
        rows.append({"id": f"{number}", "prompt": f"tell {asked} {number % 90} :", **texts})
    jsonl.write(path, rows)


def start_folder(path, blocks: int = 0) -> list[tuple[str, str]]:
    """Returns the overrides of a small run from a stage's folder of random weights."""
    config = configs.load("reward_helpful", [*SHORT, ("start", "")])
    mesh = sharding.make_mesh(MeshConfig())
    params = sharding.initialize(decoder.specs(config.model), rng.key(0, "start", "init"), "float32", mesh)
    folder = common.StageFolder(config, path, "seed")
    store = folder.checkpoints()
    store.save(1, {"params": params}, {})
    store.close()
    known_pairs(path / "pairs.jsonl")
    given = {
        "model.checkpoint": path / "seed",
        "data.path": path / "pairs.jsonl",
        "reward_model.frozen_blocks": blocks,
    }
    return [*SHORT, ("start", ""), *((name, str(value)) for name, value in given.items())]


@pytest.mark.parametrize("blocks", [0, 1])
def test_stage_learns_a_known_rule_and_can_be_loaded_again(blocks, tmp_path):
    config = configs.load("reward_helpful", start_folder(tmp_path, blocks))
    figures = reward_models.run(config, tmp_path / "runs")
    held_out = figures["held_out"]
    assert held_out["accuracy"] >= 0.95 and held_out["pairs"] > 60
    folder = tmp_path / "runs" / "reward_helpful"
    _, tokenizer, mesh = common.prepare(config)
    scorer = reward_models.load(folder, "helpful", tokenizer, mesh, config.pack, config.model)
    polite, curt = scorer.rewards(["tell cat 1 :"] * 2, ["the cat is small thanks", "the cat is small cannot"])
    assert polite > 0.5 > curt
    assert reward_models.run(config, tmp_path / "runs") == json.loads((folder / "DONE").read_text())["figures"]
    with pytest.raises(ValueError, match="holds a reward model of kind helpful, needs safety"):
        reward_models.load(folder, "safety", tokenizer, mesh, config.pack, config.model)
    with pytest.raises(ValueError, match="holds a reward model, which gives scores and no text"):
        common.load_weights(config.model, mesh, str(folder))


@pytest.mark.parametrize("blocks", [0, 1])
def test_stopped_stage_goes_on_to_the_same_bits(blocks, tmp_path, monkeypatch):
    config = configs.load("reward_helpful", start_folder(tmp_path, blocks))
    reward_models.run(config, tmp_path / "whole")
    update, made = step.Trainer.update, []

    def stopping(self, *arguments):
        if len(made) == 6:
            raise Stopped
        made.append(1)
        return update(self, *arguments)

    monkeypatch.setattr(step.Trainer, "update", stopping)
    with pytest.raises(Stopped):
        reward_models.run(config, tmp_path / "stopped")
    monkeypatch.undo()
    reward_models.run(config, tmp_path / "stopped")
    whole, stopped = (
        json.loads((tmp_path / name / "reward_helpful" / "DONE").read_text()) for name in ("whole", "stopped")
    )
    assert whole["output"] == stopped["output"]
    assert whole["figures"]["held_out"] == stopped["figures"]["held_out"]


def test_paper_sized_preset_has_the_papers_settings():
    for name in ("reward_helpful", "reward_safety"):
        config = configs.load(f"{name}:v3_671b")
        assert (config.reward_model.examples_per_update, config.reward_model.epochs) == (256, 1)
        assert (config.optimizer.learning_rate, config.pack.row_tokens) == (6e-6, 8192)
        assert config.reward_model.frozen_blocks == 0 and config.reward_model.balance_lengths


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--config.data.path={tmp}/none.jsonl"], "no such file"),
        (
            ["--config.data.path={tmp}/one.jsonl", "--config.data.template=tiny"],
            "held out, 0 of 1 do not fit 8 rows of",
        ),
        (["--config=reward_safety:smollm2_135m"], "--config.model.checkpoint=DIR"),
        (["--config.reward_model.frozen_blocks=3"], "frozen_blocks=3 must be between 1 and 2"),
        (["--config.reward_model.epochs=0"], "RewardModelConfig.epochs=0 must be at least 1"),
        (["--config=stage4_all_scenarios", "--config.reward.reward_model=0"], "needs reward.reward_model above 0"),
        (["--config=stage4_all_scenarios", "--config.scenarios.hacking_window=3"], "must be at least 4 rollouts"),
    ],
)
def test_mistake_is_one_line_and_leaves_nothing(flags, told, tmp_path, capsys):
    jsonl.write(tmp_path / "one.jsonl", [PAIR])
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    if not flags[0].startswith("--config="):
        flags = ["--config=reward_helpful", "--config.start=", *flags]
    assert launch.main([*flags, f"--workdir={tmp_path}/runs"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert told in lines[-1] and len(lines) == 1
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def test_a_reward_model_of_another_tokenizer_of_the_same_size_is_recognised_by_its_first_different_token(tmp_path):
    words = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    own = from_folder(toy_checkpoint.write_tokenizer(tmp_path / "policy", words))
    other = toy_checkpoint.write_tokenizer(tmp_path / "other", ("<|endoftext|>", "<|im_end|>", "<|im_start|>"))
    assert reward_models._first_different_token(tmp_path / "policy", own) is None
    assert reward_models._first_different_token(other, own) == 257
    longer = toy_checkpoint.write_tokenizer(tmp_path / "longer", (*words, "<|more|>"))
    assert reward_models._first_different_token(longer, own) == 259
