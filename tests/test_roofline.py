"""The time model: equal to counts by hand at small sizes, and on the right side of published measurements."""

import dataclasses
import json
import math

import jax
import pytest

from r1jax import config
from r1jax.core import sharding
from r1jax.models import decoder, flops
from r1jax.models.flops import Work
from r1jax.plan import chips, lengths, roofline, stage_time
from r1jax.plan.lengths import LengthLaw
from r1jax.plan.roofline import Placed
from r1jax.schema import GRPOConfig, MeshConfig, OptimizerConfig, PackConfig, SamplerConfig
from tests import small

V5P, V6E, V4 = (chips.GENERATIONS[name] for name in ("v5p", "v6e", "v4"))
V3 = config.load("stage1_coldstart:v3_671b")
ADAMW = OptimizerConfig()
GROUPED = small.changed(small.GROUPED, compute_dtype="bfloat16", tie_word_embeddings=False)
MIXTURE = small.changed(small.MIXTURE, compute_dtype="bfloat16")
COLUMNS = {
    "seconds", "round_s", "update_s", "tokens_per_s", "tokens_per_s_chip", "mfu", "hours", "chip_hours", "cost",
}  # fmt: skip


def placed(network, generation=V5P, **mesh) -> Placed:
    return Placed(network, MeshConfig(**mesh), generation)


def work(rows: int, row_tokens: int) -> Work:
    return flops.of_samples([row_tokens] * rows)


def update(network, rows: int = 8, row_tokens: int = 4, optimizer: OptimizerConfig = ADAMW, **mesh):
    """Returns the bound of one micro-batch of full rows."""
    return roofline.update(placed(network, **mesh), rows, row_tokens, 1, work(rows, row_tokens), optimizer)


def count(network, divided: set[str], has: bool) -> int:
    """Returns the number of weights in parameters that have one of the logical axes `divided`, or that have none."""
    specs = jax.tree.leaves(decoder.specs(network.model), is_leaf=sharding.is_spec)
    return sum(math.prod(spec.shape) for spec in specs if bool(divided & set(spec.axes)) == has)


def held(network) -> int:
    return count(network, set(), False)


# Published measurements


def test_the_bound_of_maxtexts_deepseek_v3_is_between_its_operations_and_its_measured_step():
    """AI-Hypercomputer/tpu-recipes, training/v5p/DeepSeek3-671B-MaxText: 512 chips, 6 rows of 8,192 tokens a chip,
    recomputed blocks; 90.668 s a step at 152.415 TFLOP/s a chip, which is 33.2% of 459."""
    measured_s, rows = 90.668, 6 * 512
    of = placed(V3.network, data=2, fsdp=32, expert=8)
    bound = roofline.update(of, 512, 8192, 6, work(rows, 8192), ADAMW)
    assert bound.model_flops / 512 / measured_s == pytest.approx(152.415e12, rel=1e-3)
    operations_s = bound.model_flops / of.peak
    assert operations_s == pytest.approx(30.1, abs=0.05)
    assert operations_s < bound.bound_s < measured_s
    # Its experts are gathered like all its weights, so none are run again for an exchange of tokens.
    gathering = roofline.update(placed(V3.network, data=512), 512, 8192, 6, work(rows, 8192), ADAMW)
    assert round(gathering.compute_s / measured_s, 3) == roofline.EFFICIENCY


def test_the_bound_of_llama_70b_on_eight_v6e_is_faster_than_measured():
    """AI-Hypercomputer/tpu-recipes, inference/trillium/vLLM/Llama3.x: 3,544 tokens a second of 128 requests with 1,024
    tokens in and out, 443 a chip. The efficiency of training predicts 366."""
    of = placed(config.load("distill:llama3_3_70b").network, V6E, tensor=8)
    settings = SamplerConfig(slots=128, max_prompt_tokens=1024, max_new_tokens=1024)
    stage = stage_time.sampled(of, settings, LengthLaw(1024, 1024, 1024), 1024, 128, 1)
    bound = stage.column()["tokens_per_s_chip"]
    assert bound > 443
    assert bound == pytest.approx(804, abs=1)
    assert stage.column(roofline.EFFICIENCY)["tokens_per_s_chip"] == pytest.approx(366, abs=1)
    assert stage.runs["decode"].bound.limit == "hbm"


# Counts by hand


def test_an_update_has_three_forward_passes_of_operations_and_computes_logits_and_scores_again():
    parts = flops.forward(GROUPED, work(8, 4))
    again = parts.head + 0.5 * parts.scores
    assert update(GROUPED).flops == pytest.approx(3 * parts.total + again)
    recomputed = small.changed(GROUPED, remat=True)
    assert update(recomputed).flops == pytest.approx(3 * parts.total + again + parts.total - parts.head)


def test_padding_is_computed_and_needed_by_no_model():
    full, half = (roofline.update(placed(GROUPED), 8, 4, 1, work(rows, 4), ADAMW) for rows in (8, 4))
    assert half.model_flops == full.model_flops / 2
    scores = flops.forward(GROUPED, work(8, 4)).scores
    assert full.flops - half.flops == pytest.approx(3.5 * scores / 2)


def test_more_experts_cost_no_more_operations_than_their_router():
    more = small.changed(MIXTURE, n_routed_experts=8)
    routers = flops.forward(more, work(8, 4)).router - flops.forward(MIXTURE, work(8, 4)).router
    assert update(more).flops - update(MIXTURE).flops == pytest.approx(3 * routers)


def test_the_optimiser_reads_and_writes_masters_and_moments():
    """A float32 master and two moments are read and written, the gradient is read twice; Muon has one moment."""
    two, halves = update(GROUPED), update(GROUPED, optimizer=OptimizerConfig(moment_dtype="bfloat16"))
    assert two.hbm_bytes - halves.hbm_bytes == 8 * held(GROUPED)
    muon = update(GROUPED, optimizer=OptimizerConfig(kind="muon"))
    assert two.hbm_bytes - muon.hbm_bytes == 8 * held(GROUPED)
    assert muon.flops > two.flops


def test_a_decode_step_reads_weights_once_and_the_rows_that_are_seen():
    c, slots = GROUPED.model, 4
    empty, some = (roofline.decode_step(placed(GROUPED), slots, context) for context in (0, 30))
    row = 2 * c.num_key_value_heads * 128 * 2 * c.num_hidden_layers  # widths are padded to 128
    assert some.hbm_bytes - empty.hbm_bytes == 30 * row
    weights = 2 * (held(GROUPED) - c.vocab_size * c.hidden_size)  # the embedding is looked up
    assert weights < empty.hbm_bytes < weights + slots * (row + 8 * c.vocab_size) + 2 * slots * held(GROUPED)
    assert some.flops == flops.forward(GROUPED, Work(slots, 30, slots)).total


def test_few_tokens_read_few_experts():
    wide = small.changed(MIXTURE, n_routed_experts=64)
    expert = 3 * MIXTURE.model.hidden_size * MIXTURE.model.moe_intermediate_size * MIXTURE.model.num_moe_layers
    one, all_64 = (roofline.decode_step(placed(wide), slots, 0).hbm_bytes for slots in (1, 10000))
    base = roofline.decode_step(placed(MIXTURE), 1, 0).hbm_bytes
    routers = 2 * MIXTURE.model.num_moe_layers * (64 - 4) * (MIXTURE.model.hidden_size + 1)
    assert one - base == pytest.approx(routers)
    assert all_64 > 2 * 64 * expert


def test_a_rollout_is_the_sum_of_its_steps():
    of, used = placed(MIXTURE, V6E, expert=2), lengths.occupancy(LengthLaw(9, 30, 20).lengths(12), 4, 5)
    whole = roofline.rollout(of, used)
    steps = zip(used.steps.tolist(), used.context.tolist(), strict=True)
    total = sum((roofline.decode_step(of, 4, rows) * steps for steps, rows in steps), roofline.Bound())
    for name in ("flops", "hbm_bytes", "ici_bytes", "bound_s"):
        assert getattr(whole, name) == pytest.approx(getattr(total, name))


# Collectives


def test_fsdp_gathers_weights_twice_and_scatters_gradients_once():
    """Of 4 devices each receives three quarters of what is divided, in bfloat16; what is not is summed in float32."""
    divided, whole = (count(GROUPED, {"embed"}, has) for has in (True, False))
    summed = 2 * 3 / 4 * whole * 4
    assert update(GROUPED, fsdp=4).ici_bytes == pytest.approx(3 * 3 / 4 * divided * 2 + summed)


def test_slices_sum_gradients_over_the_data_centre_network():
    two = update(GROUPED, slice=2)
    assert two.dcn_bytes == held(GROUPED) * 4 and two.ici_bytes == 0
    assert two.ici_s == pytest.approx(two.dcn_bytes / (25e9 / 4))


def test_tokens_travel_to_their_experts_and_back():
    """There and back in each pass; and for the gradient there once more, where their experts are run once more."""
    c, tokens, recomputed = MIXTURE.model, 8 * 4 / 2, small.changed(MIXTURE, remat=True)
    trip = tokens * c.num_experts_per_tok * c.hidden_size * 2 * 0.5 * c.num_moe_layers  # half stay
    summed = 4 * count(MIXTURE, {"experts"}, False)
    once, twice = update(MIXTURE, expert=2), update(recomputed, expert=2)
    assert once.ici_bytes == pytest.approx(5 * trip + summed)
    assert twice.ici_bytes == pytest.approx(7 * trip + summed)
    experts = flops.forward(MIXTURE, work(8, 4)).experts
    assert once.flops == pytest.approx(update(MIXTURE, rows=4).flops + experts / 2)


def test_as_many_trips_of_tokens_are_compiled():
    """The compiler's figures of the 671B update: buffers of 4 trips of a layer are half as large again as they need."""
    plan = json.loads((small.ROOT / "docs/results/plan_v3_671b.json").read_text(encoding="utf-8"))["update"]
    compiled = plan["collectives"]["ragged-all-to-all over fsdp+expert"]
    c = V3.network.model
    trip = 4096 * c.num_experts_per_tok * c.hidden_size * 2
    assert compiled["runs"] == 7 * c.num_moe_layers
    assert compiled["bytes"] == pytest.approx(c.num_moe_layers * trip * (3 + 4 * 1.5), rel=1e-3)


def test_a_group_of_64_is_three_links_away_on_average():
    assert roofline._mean_links(V5P, 64) == pytest.approx(3)  # 4 x 4 x 4, one link a side on average
    assert roofline._mean_links(V5P, 2) == 0.5
    assert roofline._mean_links(V6E, 64) == pytest.approx(4)  # 8 x 8
    assert roofline._mean_links(V4, 128) == pytest.approx(3)  # 64 chips


def test_tensor_sums_activations_and_context_passes_keys_around():
    """Two layers have two sums each; each of two devices sends its half of a sum twice. Keys and values go once, and
    come back as gradients in float32; weights that `context` divides are gathered as those that `fsdp` does."""
    c = GROUPED.model
    whole = count(GROUPED, {"heads", "ffw", "vocab"}, False)
    summed = 2 * c.num_hidden_layers * 32 * c.hidden_size * 2  # one pass
    assert update(GROUPED, tensor=2).ici_bytes == pytest.approx(2 * summed + 4 * whole)
    source = c.num_hidden_layers * 16 * 2 * c.num_key_value_heads * c.head_dim
    ring = source * (2 * 2 + 4)
    gathered, summed = (count(GROUPED, {"embed"}, has) for has in (True, False))
    assert update(GROUPED, context=2).ici_bytes == pytest.approx(ring + 3 * gathered + 4 * summed)


def test_weights_are_divided_as_the_trainer_and_the_sampler_divide_them():
    mesh = jax.sharding.AbstractMesh((1, 2, 32, 8, 1, 1), sharding.AXES)
    of = placed(V3.network, data=2, fsdp=32, expert=8)
    for rules in (sharding.TRAIN, sharding.DECODE):
        leaves = jax.tree.leaves(decoder.specs(V3.network.model), is_leaf=sharding.is_spec)
        parts = [sharding.sharding(mesh, one.axes, one.shape, rules).shard_shape(one.shape) for one in leaves]
        weights = roofline._weights(of, rules)
        assert weights.dense + weights.experts == pytest.approx(sum(map(math.prod, parts)))


def test_a_copy_for_the_sampler_brings_each_device_the_dense_weights():
    copy = roofline.reshard(placed(V3.network, data=2, fsdp=32, expert=8), "float32")
    assert copy.ici_bytes == pytest.approx(33.6e9, rel=0.01)
    assert copy.limit == "ici"


def test_a_prompt_is_computed_by_every_device_that_holds_rows():
    alone, eight = (roofline.prefill(placed(GROUPED, **mesh), 5, 8) for mesh in ({}, {"fsdp": 8}))
    assert alone.flops == eight.flops
    assert roofline.prefill(placed(GROUPED, tensor=2), 5, 8).flops == alone.flops / 2


# Stages

RL = {
    "settings": SamplerConfig(slots=8, max_prompt_tokens=8, max_new_tokens=40),
    "grpo": GRPOConfig(prompts_per_update=2, group_size=4, updates_per_rollout=3, updates=30),
    "pack": PackConfig(row_tokens=64, rows_per_micro_batch=4),
    "optimizer": ADAMW,
    "law": LengthLaw(10, 50, 40),
    "prompt_tokens": 6,
}


def test_a_stage_is_the_sum_of_its_programs():
    stage = stage_time.reinforced(placed(MIXTURE, expert=4), **RL)
    figures = json.loads(json.dumps(stage.figures(efficiency=0.5, price=4.0)))
    assert {name: run["runs"] for name, run in figures["programs"].items()} == {
        "prefill": 6, "decode": 1, "reshard": 1, "scoring": 1, "update": 3,
    }  # fmt: skip
    bound, expected = figures["bound"], figures["expected"]
    assert set(bound) == set(expected) == COLUMNS
    assert bound["round_s"] == pytest.approx(sum(run["bound_s"] * run["runs"] for run in figures["programs"].values()))
    assert bound["update_s"] == bound["round_s"] / 3
    assert expected["hours"] == pytest.approx(2 * bound["hours"])
    assert bound["hours"] == bound["round_s"] * 10 / 3600
    assert bound["cost"] == pytest.approx(bound["hours"] * 4 * 4.0)
    assert bound["mfu"] == pytest.approx(2 * expected["mfu"])
    assert figures["rollout"]["samples"] == 24 and figures["rollout"]["mean_tokens"] == pytest.approx(10, abs=0.5)


def test_two_sets_of_devices_work_at_once_where_rollouts_are_drawn_ahead():
    trainer, sampler = placed(MIXTURE, expert=4), placed(MIXTURE, expert=2)
    in_turn = stage_time.reinforced(trainer, **RL, sampler=sampler)
    grpo = dataclasses.replace(RL["grpo"], rollouts_ahead=1)
    at_once = stage_time.reinforced(trainer, **RL | {"grpo": grpo}, sampler=sampler)
    sides = [sum(run.round.bound_s for run in in_turn.runs.values() if run.sampling == side) for side in (True, False)]
    assert in_turn.round_s() == pytest.approx(sum(sides)) and at_once.round_s() == max(sides)
    assert at_once.chips == 6


def test_a_critic_scores_and_learns_too_and_without_a_kl_term_no_reference_does():
    grpo = dataclasses.replace(RL["grpo"], advantage="gae", kl_coef=0.0)
    runs = stage_time.reinforced(placed(MIXTURE), **RL | {"grpo": grpo}).runs
    assert set(runs) == {"prefill", "decode", "reshard", "update", "critic_scoring", "critic_update"}
    assert runs["critic_update"].bound.flops < runs["update"].bound.flops  # its head gives one number


def test_fine_tuning_is_its_updates():
    stage = stage_time.fine_tuned(placed(GROUPED), RL["pack"], ADAMW, LengthLaw(30, 64, 64), examples=16, updates=7)
    assert stage.column()["hours"] == pytest.approx(7 * stage.runs["update"].bound.bound_s / 3600)
    assert stage.tokens == pytest.approx(16 * 30, rel=0.05)


def test_lengths_that_fit_no_row_or_bucket_are_refused():
    with pytest.raises(ValueError, match="prompts of 9 tokens exceed config.sampler.max_prompt_tokens=8"):
        stage_time.reinforced(placed(GROUPED), **RL | {"prompt_tokens": 9})
    with pytest.raises(ValueError, match="needs 1 to row_tokens=32"):
        stage_time.reinforced(placed(GROUPED), **RL | {"pack": PackConfig(row_tokens=32)})
