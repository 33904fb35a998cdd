"""Claims about the RL loop: schedules by rollout, reference refresh, mini-batches, journal, one program set."""

import gc
import re

import jax
import numpy as np
import pytest
import wandb
import wandb_rows
from small import rl_training as build
from small import run_until

from r1jax import config as configs
from r1jax.checkpoints import tokenizer
from r1jax.core import files, observe, tree
from r1jax.core.metrics import read, read_timing
from r1jax.models import flops
from r1jax.recipe import parts, policy, prompts, stage_report
from r1jax.report import html
from r1jax.rewards.compose import PART_NAMES
from r1jax.rl import minibatch, schedules
from r1jax.rl import rollout as rollouts
from r1jax.rl.journal import Journal, Rollout
from r1jax.rl.loop import warm_up
from r1jax.rl.settings import length_phases
from r1jax.sampler.sample import RolloutSample
from r1jax.schema import ScenarioConfig, parts_of, replace

WORDS = tokenizer.tiny()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Returns (training, folder, digests, rollouts, batches) of a run of eight updates.

    digests holds (policy, reference) by rollout start, rollouts what was written to the journal by start, batches the
    arrays of each update.
    """
    folder = tmp_path_factory.mktemp("loop")
    training, digests, kept, batches = build(folder), {}, {}, []
    sampling, objective, run = training.source.sampling, training.objective, training.run
    draw, write, update = sampling.draw, training.source.journal.write, objective.update

    def watch_draw(start, *more):
        digests[start] = tree.digest(run.frozen_policy()), tree.digest(run.reference)
        return draw(start, *more)

    def watch_update(run, batch, start):
        batches.append(batch.arrays)
        return update(run, batch, start)

    sampling.draw, objective.update = watch_draw, watch_update
    training.source.journal.write = lambda start, scored: kept.setdefault(start, write(start, scored))
    training.train()
    return training, folder, digests, kept, batches


@pytest.fixture(scope="module")
def finished(watched):
    return watched[:3]


def test_schedules_take_effect_at_the_first_rollout_at_or_after_their_update(finished):
    training, folder, _ = finished
    assert [schedules.max_new_tokens(training.run.config.sampler, start) for start in (0, 3, 6)] == [10, 20, 20]
    assert [float(training.objective.arguments(start).kl_coef) for start in (0, 3, 6)] == [0.5, 0.5, 0.25]
    lengths = {row["update"]: row["length"] for row in read(folder)}
    assert max(lengths[u] for u in (1, 2, 3)) <= 10 < max(lengths[u] for u in (4, 5, 6))


def test_last_rollout_may_be_short(finished):
    training, folder, seen = finished
    assert sorted(seen) == [0, 3, 6]
    assert [row["update"] for row in read(folder)] == list(range(1, 9))
    assert training.run.cursor.draw == 8 * 2


def test_reference_becomes_the_policy_at_the_first_rollout_after_the_interval_and_only_then(finished):
    training, _, seen = finished
    assert seen[0][1] == seen[0][0]
    assert seen[3][1] == seen[0][1] != seen[3][0]
    assert seen[6][1] == seen[6][0]
    assert training.run.cursor.reference_update == 6


def test_first_update_of_a_rollout_has_ratio_one_and_later_ones_do_not(finished):
    _, folder, _ = finished
    rows = read(folder)
    fresh = [row for row in rows if "max_logprob_difference" in row]
    assert [row["update"] for row in fresh] == [1, 4, 7]
    assert max(row["max_logprob_difference"] for row in fresh) < 1e-4
    assert max(row["max_policy_shift"] for row in rows if "max_policy_shift" in row) > 1e-3


def test_every_program_is_compiled_once_and_those_of_the_updates_once_for_each_length_of_rows(finished):
    training, _, _ = finished
    counts = training.run.programs.counts()
    assert set(counts) >= {"update", "reference", "prefill", "insert", "decode"}
    assert {name: count for name, count in counts.items() if count != 1} == {"update": 2, "reference": 2}


def test_rows_and_slots_are_as_long_as_the_lengths_of_the_schedule_need(watched):
    training, _, _, _, batches = watched
    config = training.run.config
    before, after = (settings for _, settings in length_phases(config))
    assert [start for start, _ in length_phases(config)] == [0, 3]
    assert (before.sampler.max_new_tokens, after) == (10, config)
    assert before.pack.row_tokens == config.pack.row_tokens - 10
    lengths = [arrays["tokens"].shape[-1] for arrays in batches]
    assert lengths == [config.pack.row_tokens - 10] * 3 + [config.pack.row_tokens] * 5
    assert training.source.sampling.sampler.engine.rows == config.sampler.max_prompt_tokens + 20


def test_advantages_are_those_of_whole_groups_although_mini_batches_split_them(watched):
    training, _, _, kept, batches = watched
    assert len(batches) == 8
    update, split = 0, 0
    for start, scored in kept.items():
        terms = {"accuracy": 1.0, "format": 0.2, "language": 1.0}
        weights = [terms.get(name, 0.0) for name in PART_NAMES]
        rewards = scored.reward_terms.astype(np.float64) @ np.asarray(weights)
        groups = rewards.reshape(-1, 4)
        centred, deviation = groups - groups.mean(1, keepdims=True), groups.std(1, keepdims=True)
        expected = np.where(deviation > 1e-6, centred / np.maximum(deviation, 1e-6), 0).reshape(-1)
        for chosen in rollouts.mini_batches(scored, start, training.run.config):
            split += any(0 < np.sum(chosen // 4 == group) < 4 for group in range(len(groups)))
            arrays, update = batches[update], update + 1
            found = np.sort(arrays["advantage"][arrays["loss_mask"] > 0])
            lengths = [len(scored.samples[i].token_ids) for i in chosen]
            np.testing.assert_allclose(found, np.sort(np.repeat(expected[chosen], lengths)), rtol=1e-4, atol=1e-5)
    assert update == 8 and split >= 5


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture(scope="module")
def warm(watched, tmp_path_factory):
    """Returns (training whose programs are compiled, its folder, bytes of arrays that it holds)."""
    folder, before = tmp_path_factory.mktemp("warm"), live_bytes()
    training = build(folder)
    training.run.restore(training.objective)
    warm_up(training.run, training.source, training.objective, training.recorder)
    return training, folder, live_bytes() - before


def test_a_run_holds_its_state_its_reference_and_the_slots_and_no_start_weights(warm):
    training, _, held = warm
    arrays = training.run.state, training.run.reference, training.source.sampling.sampler._state
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(training.run.params))
    print(f"{held} bytes are held, {needed} are needed; the weights are {weights}")
    assert needed <= held < needed + weights / 20  # constants of programs


def test_rollout_without_a_scorable_sample_moves_nothing_and_a_program_compiled_later_is_an_error(watched, warm):
    _, _, _, kept, _ = watched
    training, tmp_path, _ = warm
    run, objective, recorder = training.run, training.objective, training.recorder
    before = tree.digest(run.state.params)
    scored = Rollout(kept[0].samples, kept[0].reward_terms, np.zeros(len(kept[0]), bool), 2)
    advantages = objective.advantages(scored, 0)
    recorder.rollout(scored, advantages, {})
    batch = next(minibatch.batches(run, objective, recorder, scored, advantages))
    stats = objective.update(run, batch, 0)
    run.count_update()
    recorder.update(stats)
    assert tree.digest(run.state.params) == before
    (row,) = read(tmp_path)
    assert (row["tokens"], row["grad_norm"], row["loss"], row["unscorable"]) == (0, 0, 0, 24)
    assert all(np.isfinite(value) for value in row.values())

    wider = {name: np.pad(array, ((0, 0), (0, 0), (0, 1))) for name, array in batch.arrays.items()}
    run.scorer(run.reference, wider, batch.num_filled, 1.0)
    with pytest.raises(RuntimeError, match=r"compiled again after warm-up.*'reference': \(1, 2\)"):
        run.count_update()


def test_same_seed_gives_the_same_rows_and_another_seed_other_ones(finished, tmp_path):
    _, folder, _ = finished
    build(tmp_path / "same").train()
    build(tmp_path / "other", seed=1).train()
    assert (tmp_path / "same" / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    assert (tmp_path / "other" / "metrics.jsonl").read_bytes() != (folder / "metrics.jsonl").read_bytes()


def test_timing_rows_have_the_model_flops_of_each_phase_by_true_lengths(watched):
    training, folder, _, kept, _ = watched
    network, rows = training.run.config.network, read_timing(folder)
    samples = [sample for scored in kept.values() for sample in scored.samples]
    trained = flops.of_samples([len(s.prompt_ids) + len(s.token_ids) for s in samples], sum(map(tokens_of, samples)))
    drawn = flops.Work(0, 0, 0)
    for first in range(0, len(samples), 4):  # groups of four share the pass of their prompt
        drawn += flops.of_group(len(samples[first].prompt_ids), map(tokens_of, samples[first : first + 4]))
    sums = {phase: sum(row.get(f"{phase}_flops", 0) for row in rows) for phase in ("update", "reference", "rollout")}
    assert sums == pytest.approx(
        {
            "update": flops.update(network, trained).total,
            "reference": flops.forward(network, trained).total,
            "rollout": flops.forward(network, drawn).total,
        },
        rel=1e-12,
    )
    assert [row["update"] for row in rows if "rollout_flops" in row] == [1, 4, 7]


def tokens_of(sample: RolloutSample) -> int:
    return len(sample.token_ids)


def test_a_traced_run_has_the_same_rows_and_mfu_of_a_peak_that_is_given(finished, tmp_path):
    training, folder, _ = finished
    observe.ask(observe.MeasurementRequest(profile=(4, 6), peak_tflops=0.1))
    try:
        traced = build(tmp_path)
        traced.train()
    finally:
        observe.ask(observe.MeasurementRequest())
    assert tree.digest(traced.run.state) == tree.digest(training.run.state)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    assert len(list(tmp_path.glob("profile/**/*.xplane.pb"))) == 1
    for row in read_timing(tmp_path):
        for phase in ("update", "reference", *(["rollout"] if row["update"] in (1, 4, 7) else [])):
            assert row[f"{phase}_mfu"] == row[f"{phase}_flops"] / (row[f"{phase}_s"] * 0.1e12)


def test_sampler_and_trainer_agree_at_another_temperature(tmp_path):
    build(tmp_path, sampler__temperature=0.7).train()
    assert max(row.get("max_logprob_difference", 0.0) for row in read(tmp_path)) < 1e-4


def sample(draw, index, length=5, experts=False):
    generator = np.random.default_rng(draw * 100 + index)
    return RolloutSample(
        request_id=draw,
        sample_index=index,
        prompt_ids=generator.integers(0, 9, 3).astype(np.int32),
        token_ids=generator.integers(0, 9, length).astype(np.int32),
        logps=generator.normal(size=length).astype(np.float32),
        behaviour_logps=generator.normal(size=length).astype(np.float32),
        finish_reason=("stop", "length")[index % 2],
        weight_version=4,
        routed_experts=generator.integers(0, 8, (3 + length, 2, 2)).astype(np.int16) if experts else None,
    )


@pytest.mark.parametrize("experts", [True, False])
def test_journal_gives_back_the_same_bits(tmp_path, experts):
    samples = [sample(draw, index, 1 + draw + index, experts) for draw in range(3) for index in range(2)]
    parts = np.random.default_rng(0).random((6, len(PART_NAMES))).astype(np.float32)
    written = Rollout(samples, parts, np.asarray([True, False] * 3), 2)
    journal = Journal(tmp_path)
    journal.write(9, written)
    found = journal.read(9)
    assert np.array_equal(found.reward_terms, parts) and np.array_equal(found.scorable, written.scorable)
    for a, b in zip(samples, found.samples, strict=True):
        for name, value in vars(a).items():
            assert np.array_equal(value, getattr(b, name)), name
    assert journal.read(10) is None
    journal.prune(10)
    assert journal.read(9) is None


def test_a_journal_written_before_a_term_existed_is_read_by_name_with_0_for_it(tmp_path):
    samples = [sample(0, index, 2, False) for index in range(4)]
    parts = np.random.default_rng(0).random((4, len(PART_NAMES))).astype(np.float32)
    journal = Journal(tmp_path)
    journal.write(0, Rollout(samples, parts, np.ones(4, bool), 2, dropped_terms=parts[:2], dropped_tokens=9))
    with np.load(tmp_path / "rollout_00000000.npz") as file:
        fields = dict(file)
    known = fields | dict(parts=parts[:, :3], dropped_parts=parts[:2, :3])
    del known["part_names"]  # as files of accuracy, format and language alone have it
    shuffled = fields | dict(
        parts=parts[:, ::-1], dropped_parts=parts[:2, ::-1], part_names=np.asarray(PART_NAMES[::-1])
    )
    older = np.where(np.arange(len(PART_NAMES)) < 3, parts, 0)
    for written, expected in ((known, older), (shuffled, parts)):
        np.savez(tmp_path / "rollout_00000000.npz", **written)
        found = journal.read(0)
        assert np.array_equal(found.reward_terms, expected) and found.reward_terms.dtype == np.float32
        assert np.array_equal(found.dropped_terms, expected[:2]) and found.dropped_tokens == 9


def test_experts_are_recorded_for_routing_replay_alone(watched):
    training, _, _, kept, _ = watched
    assert training.run.config.network.model.num_moe_layers and not training.run.config.grpo.routing_replay
    assert all(sample.routed_experts is None for scored in kept.values() for sample in scored.samples)


def test_a_rollout_in_the_journal_is_used_instead_of_a_new_one(watched, tmp_path):
    """Its record of experts, which runs once made without reading it, changes nothing."""
    _, folder, _, kept, _ = watched
    training = build(tmp_path)
    training.source.sampling.draw = lambda start, *more: pytest.fail(f"rollout {start} was sampled again")
    shape = training.run.config.network.model.num_moe_layers, training.run.config.network.model.num_experts_per_tok
    for start, scored in kept.items():
        recorded = [
            replace(s, routed_experts=np.zeros((len(s.prompt_ids) + len(s.token_ids), *shape), np.int16))
            for s in scored.samples
        ]
        training.source.journal.write(start, replace(scored, samples=recorded))
    training.train()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_stopped_in_the_middle_of_a_rollout_in_bfloat16_a_run_goes_on_from_the_journal_and_ends_bit_equal(tmp_path):
    more = {
        "compute__compute_dtype": "bfloat16",
        "optimizer__moment_dtype": "bfloat16",
        "checkpointing__every_updates": 2,
    }
    whole = build(tmp_path / "whole", **more)
    whole.train()
    stopped = build(tmp_path / "stopped", **more)
    run_until(stopped, 5)
    assert [row["update"] for row in read(tmp_path / "stopped")] == [1, 2, 3, 4, 5]
    # The newest checkpoint needs the second rollout; the one before it, whole until that is written, needs the first.
    journal = sorted(path.name for path in (tmp_path / "stopped" / "journal").iterdir())
    assert journal == ["rollout_00000000.npz", "rollout_00000003.npz"]

    resumed, sampled = build(tmp_path / "stopped", **more), []
    draw = resumed.source.sampling.draw
    resumed.source.sampling.draw = lambda start, *more: sampled.append(start) or draw(start, *more)
    resumed.train()
    assert sampled == [6]  # the checkpoint of update 4 stands inside the rollout of update 3
    assert tree.digest(resumed.run.state) == tree.digest(whole.run.state)
    assert tree.digest(resumed.run.reference) == tree.digest(whole.run.reference)
    assert vars(resumed.run.cursor) == vars(whole.run.cursor)
    for file in ("metrics.jsonl", "rollout_samples.jsonl"):
        rows = [(tmp_path / name / file).read_bytes() for name in ("whole", "stopped")]
        assert rows[0] == rows[1]


def test_samples_of_each_rollout_are_those_of_the_journal(watched):
    _, folder, _, kept, _ = watched
    rows = files.read_jsonl(folder / "rollout_samples.jsonl")
    assert [row["update"] for row in rows] == [start + 1 for start in (0, 3, 6) for _ in range(4)]
    texts = {start: WORDS.decode_batch([one.token_ids for one in scored.samples]) for start, scored in kept.items()}
    for row in rows:
        scored = kept[row["update"] - 1]
        numbers = [n for n, text in enumerate(texts[row["update"] - 1]) if text == row["text"]]
        terms = [dict(zip(PART_NAMES, scored.reward_terms[n].tolist(), strict=True)) for n in numbers]
        assert any(
            row["parts"] == {name: pytest.approx(parts[name], abs=1e-6) for name in row["parts"]} for parts in terms
        )
    assert {"accuracy", "language"} <= set(rows[0]["parts"]) and rows[0]["reward"] >= rows[1]["reward"]


def test_neither_samples_nor_a_report_written_again_and_again_nor_weights_and_biases_change_a_bit(
    finished, tmp_path, monkeypatch
):
    training, folder, _ = finished
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    pages, write = [], html.write_run
    monkeypatch.setattr(html, "write_run", lambda path, *more: (write(path, *more), pages.append(path.read_text())))
    monkeypatch.setattr(stage_report, "BUSY_SHARE", 1.0)
    seen = build(tmp_path / "r1_zero", watch__rollout_samples=0, watch__wandb_project="recipe")
    with stage_report.while_working(tmp_path / "r1_zero", "r1_zero", 0.02, 8):
        seen.train()
    assert tree.digest(seen.run.state) == tree.digest(training.run.state)
    assert (tmp_path / "r1_zero" / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()
    assert not (tmp_path / "r1_zero" / "rollout_samples.jsonl").exists()
    (sent,) = wandb_rows.runs(tmp_path / "r1_zero")
    wandb.teardown()
    rewards = [(row["update"], row["reward"]) for row in read(folder)]
    assert [(row["update"], row["metrics/reward"]) for row in sent["rows"]] == rewards
    statuses = [re.search(r"At work: training(?: \((\w+)\))?, (\d) of 8 updates made", page).groups() for page in pages]
    assert len(pages) > 5 and {"warm_up", "rollout", "update"} & {phase for phase, _ in statuses}
    assert sorted(statuses, key=lambda status: status[1]) == statuses  # the number of updates never falls
    assert "<polyline" in pages[-1] and '<meta http-equiv="refresh" content="1">' in pages[-1]


def test_moments_and_reference_kept_in_host_memory_change_no_bit(watched, tmp_path):
    training = watched[0]
    offloaded = build(tmp_path, grpo__offload_reference=True, optimizer__offload=True)
    offloaded.train()
    moments = [leaf for leaf in jax.tree.leaves(offloaded.run.state.optimizer) if leaf.ndim]
    kept = [*moments, *jax.tree.leaves(offloaded.run.reference)]
    assert {leaf.sharding.memory_kind for leaf in kept} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(offloaded.run.state.params)} == {"device"}
    assert tree.digest(offloaded.run.state) == tree.digest(training.run.state)
    assert tree.digest(offloaded.run.reference) == tree.digest(training.run.reference)


def test_running_a_finished_folder_again_changes_nothing(finished):
    training, folder, _ = finished
    rows = (folder / "metrics.jsonl").read_bytes()
    again = build(folder)
    again.objective.update = again.source.sampling.draw = lambda *arguments: pytest.fail("a finished run went on")
    again.train()
    assert tree.digest(again.run.state) == tree.digest(training.run.state)
    assert (folder / "metrics.jsonl").read_bytes() == rows


def test_mini_batches_cover_every_sample_once_and_mix_groups():
    config = configs.load("r1_zero:tiny", [("grpo.prompts_per_update", "4"), ("grpo.group_size", "8")])
    scored = Rollout([sample(d, i) for d in range(8) for i in range(8)], np.zeros((64, 3)), np.ones(64, bool), 8)
    first, second = rollouts.mini_batches(scored, 0, config)
    assert sorted([*first, *second]) == list(range(64))
    assert len({index // 8 for index in first}) > 4  # outputs, not questions, are shuffled
    assert not np.array_equal(first, rollouts.mini_batches(scored, 2, config)[0])


def test_unscorable_and_masked_samples_are_not_trained_on():
    config = configs.load("r1_zero:tiny", [("grpo.truncated", "mask"), ("pack.row_tokens", "128")])
    scored = Rollout(
        [sample(0, i) for i in range(4)], np.zeros((4, len(PART_NAMES))), np.asarray([True, True, False, True]), 1
    )
    advantages = rollouts.compute_advantages(scored, replace(config, grpo=replace(config.grpo, group_size=4)), 88)
    packed = rollouts.pack_mini_batch(scored, np.arange(4), advantages, config, 88)
    trained = [float(packed.loss_mask[row, begin : begin + length].sum()) for row, begin, length in packed.slots]
    assert trained == [5.0, 0.0, 0.0, 0.0]  # 1 and 3 are truncated, 2 is unscorable


def test_general_and_safety_prompts_enter_at_the_first_rollout_after_their_update_in_exact_shares():
    config = configs.load("stage4_all_scenarios:tiny")
    grpo = replace(config.grpo, updates_per_rollout=16, prompts_per_update=32, updates=1700)
    config = replace(config, grpo=grpo, scenarios=ScenarioConfig(1300, 0.2, 0.3))
    asked = prompts.load(parts_of(parts.PromptParts, config), WORDS)
    phases = rollouts.PromptPhases(
        asked.training, policy.later(parts_of(parts.PromptParts, config), WORDS, asked), config
    )
    boundary = 1312 * 32
    assert {phases.prompt(draw, 1296).problem.task for draw in range(boundary - 500, boundary)} == {"linear"}
    found = [phases.prompt(draw, 1312).problem.task for draw in range(boundary, boundary + 1000)]
    assert [found.count(task) for task in ("linear", "general", "safety")] == [500, 200, 300]
    later = [phases.prompt(boundary + 7, start) for start in (1312, 1328)]
    assert later[0].problem == later[1].problem
    # Drawing again takes more numbers than there are places: the rollout decides, not the number.
    assert {phases.prompt(draw, 1296).problem.task for draw in range(boundary, boundary + 200)} == {"linear"}
