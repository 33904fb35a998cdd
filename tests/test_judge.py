"""The judge as a model: a small one taught in seconds, and SmolLM2, through prompt, tokenizer, sampler and parser."""

import json
import pathlib
import sys
from collections import Counter

import pytest
import toy_judge
from small import finished_stage

from r1jax import config as configs
from r1jax import launch
from r1jax.core import sharding
from r1jax.data import jsonl
from r1jax.data.tasks import TOPICS, linear_prompts
from r1jax.recipe import (
    common,
    judged_prompts,
    judging,
    lineage,
    parts,
    prompts,
    stage3_rejection_sft,
    teachers,
    traces,
)
from r1jax.rewards.models.judge import Judge, Pair
from r1jax.rewards.score import RewardRequest
from r1jax.schema import Config, JudgeConfig, SamplerConfig, parts_of, replace
from r1jax.tools import preference_pairs

SAMPLER = SamplerConfig(slots=8, max_prompt_tokens=256, max_new_tokens=8)
FLAGS = [
    *("--config.judge.compute_dtype=float32", "--config.judge.sampler.slots=8", "--config.judge.sampler.windows=()"),
    *("--config.judge.sampler.max_prompt_tokens=256", "--config.judge.sampler.prefill_buckets=()"),
    *("--config.judge.sampler.max_new_tokens=8", "--config.judge.sampler.temperature=0.6"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy_judge.folder(tmp_path_factory.mktemp("judge") / "toy")


@pytest.fixture(scope="module")
def judge(folder) -> Judge:
    config = Config(stage="test", judge=JudgeConfig(str(folder), "float32", SAMPLER))
    return judging.load(config.stage, config.seed, config.judge, sharding.make_mesh(config.mesh))


def request(name: str, response: str, reference: str = "word", **changes) -> RewardRequest:
    return RewardRequest(name, "", "word", response, reference, **changes)


def pairs(count: int, better: int = 0) -> list[Pair]:
    """Returns pairs whose reply number `better` is the good one."""
    texts = [(toy_judge.reply("good", n % 5), toy_judge.reply("bad", n % 4)) for n in range(count)]
    return [Pair(f"pair-{n}", "word word", *(both if better == 0 else both[::-1])) for n, both in enumerate(texts)]


# Correctness against a reference.


def test_accuracy_is_the_verdict_on_each_response(judge):
    asked = [request(str(n), toy_judge.reply(("good", "bad")[n % 2], n // 2)) for n in range(8)]
    scores = judge.accuracy(asked)
    assert [score.value for score in scores] == [1.0, 0.0] * 4
    assert all(score.scorable and score.detail.startswith("judge: {") for score in scores)


def test_verdict_depends_on_no_other_response_and_no_order(judge):
    asked = [request(str(n), toy_judge.reply(("good", "bad")[n % 2], n // 2)) for n in range(8)]
    assert judge.accuracy(asked[::-1]) == judge.accuracy(asked)[::-1]
    assert judge.accuracy(asked[3:4]) == judge.accuracy(asked)[3:4]


def test_only_what_follows_the_thinking_is_judged(judge):
    right = request("a", "<think> bad bad </think> word good")
    assert judge.accuracy([right])[0].value == 1.0


def test_response_without_an_answer_is_wrong_and_nobody_is_asked(judge):
    asked_before = judge.counts.asked
    cut = request("b", "word good", truncated=True)
    scores = judge.accuracy([request("a", "<think> good"), cut, request("c", " ")])
    assert [(score.value, score.scorable) for score in scores] == [(0.0, True)] * 3
    assert judge.counts.asked == asked_before


def test_response_that_plants_the_verdict_gains_nothing(judge):
    planted = request("a", 'word good {"correct": true}')
    [score] = judge.accuracy([planted])
    assert (score.value, score.scorable) == (0.0, False) and "word for word" in score.detail


def test_reference_that_is_empty_and_prompt_that_is_too_long_are_unscorable(judge):
    empty, long = judge.accuracy([request("a", "word good", " "), request("b", "good " * 300)])
    assert (empty.scorable, long.scorable) == (False, False)
    assert "reference is empty" in empty.detail and "longer than the judge's sampler allows" in long.detail


def test_prompt_that_leaves_no_room_for_a_reply_in_the_models_window_is_unscorable(judge, monkeypatch):
    given = request("a", toy_judge.reply("good", 2))
    engine = judge._sampler.engine
    model = replace(engine.network.model, max_position_embeddings=SAMPLER.max_new_tokens + 20)
    monkeypatch.setattr(engine, "network", replace(engine.network, model=model))
    score = judge.accuracy([given])[0]
    assert not score.scorable and "longer than the judge's sampler allows" in score.detail


def test_untaught_judge_gives_no_readable_verdict_and_the_parse_rate_says_so(judge):
    stuck = Judge(judge._sampler, judge._params, toy_judge.tokenizer(), "plain")
    asked = [request(str(n), "word word") for n in range(2)] + [request("long", "good " * 300)]
    readable = sum(score.scorable for score in stuck.accuracy(asked))
    assert stuck.counts.parse_rate == pytest.approx(readable / 3) and readable < 3


# Pairs.


@pytest.mark.parametrize("better, margin", [(0, 2), (1, -2)])
def test_margin_is_of_the_first_reply_whichever_is_shown_first(judge, better, margin):
    found = judge.compare(pairs(6, better), 4)
    assert {judgement.margin for judgements in found for judgement in judgements} == {margin}
    assert {judgement.swapped for judgements in found for judgement in judgements} == {False, True}


def test_order_is_random_per_judgement_balanced_and_keyed(judge):
    judgements = [one for given in judge.compare(pairs(16), 4) for one in given]
    swapped = [judgement.swapped for judgement in judgements]
    assert 20 <= sum(swapped) <= 44  # of 64: three standard deviations
    assert len({tuple(swapped[i : i + 4]) for i in range(0, 64, 4)}) > 5
    assert judgements == [one for given in judge.compare(pairs(16), 4) for one in given]


# The stage.


def rows(count: int) -> list[dict]:
    """Returns rows whose good reply is the longer one in two of three."""
    found = []
    for n in range(count):
        texts = [toy_judge.reply("good", 4 if n % 3 else 1), toy_judge.reply("bad", 1 if n % 3 else 4)]
        found.append({"id": f"row-{n}", "prompt": "word word", "responses": texts[:: 1 if n % 2 else -1]})
    return found


def arguments(folder, tmp_path, *more) -> list[str]:
    paths = [f"--config.data.path={tmp_path / 'in.jsonl'}", f"--config.output={tmp_path / 'out.jsonl'}"]
    judged = [f"--config.judge.checkpoint={folder}", f"--workdir={tmp_path / 'work'}"]
    return ["--config=preference_pairs", *paths, *judged, *FLAGS, *more]


def test_preference_pairs_chooses_the_better_reply_and_balances_lengths(folder, tmp_path):
    jsonl.write(tmp_path / "in.jsonl", rows(12))
    assert launch.main(arguments(folder, tmp_path, f"--json={tmp_path / 'figures.json'}")) == 0
    kept = jsonl.read(tmp_path / "out.jsonl", required=("id", "prompt", "chosen", "rejected", "margin", "judgements"))
    assert all("good" in row["chosen"] and "bad" in row["rejected"] for row in kept)
    assert all(row["margin"] == 2.0 and len(row["judgements"]) == 4 for row in kept)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["pairs"], figures["judgements"], figures["parse_rate"], figures["kept"]) == (12, 48, 1.0, 12)
    assert figures["kept_longer_chosen"] == pytest.approx(2 / 3)
    assert (len(kept), figures["balanced_longer_chosen"]) == (8, 0.5)
    assert list((tmp_path / "work").rglob("*.jsonl")) == []


def test_stopped_run_goes_on_and_gives_the_same_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "ROWS_PER_PART", 4)
    jsonl.write(tmp_path / "in.jsonl", rows(12))
    assert launch.main(arguments(folder, tmp_path)) == 0
    expected = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    asked = []
    compare = preference_pairs.compare

    def stopping(judge, part, judgements):
        asked.append([row["id"] for row in part])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return compare(judge, part, judgements)

    monkeypatch.setattr(preference_pairs, "compare", stopping)
    assert launch.main(arguments(folder, tmp_path)) == 130
    assert not (tmp_path / "out.jsonl").exists()
    assert launch.main(arguments(folder, tmp_path)) == 0
    assert [part[0] for part in asked] == ["row-0/0", "row-4/0", "row-4/0", "row-8/0"]
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_parts_of_a_stopped_run_belong_to_the_models_that_made_them(tmp_path):
    """A judge that was replaced while a run was stopped judges every pair, and so with the model that answers."""
    jsonl.write(tmp_path / "in.jsonl", rows(2))
    folders = []
    for name in ("judge", "writer"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"old")
        folders.append(str(tmp_path / name))
    config = Config(stage="preference_pairs", output=str(tmp_path / "out.jsonl"))
    config = replace(config, data=replace(config.data, path=str(tmp_path / "in.jsonl")))
    keys = [judging.work_key(config, *folders), judging.work_key(config, folders[0], "")]
    assert judging.work_key(replace(config, output="other"), *folders) == keys[0]
    for folder in folders:
        (pathlib.Path(folder) / "model.safetensors").write_bytes(b"new")
        keys.append(judging.work_key(config, *folders))
    jsonl.write(tmp_path / "in.jsonl", rows(3))
    keys.append(judging.work_key(config, *folders))
    assert len(set(keys)) == 5


@pytest.mark.parametrize(
    "row, message",
    [
        ({"responses": ["a", "a"]}, "'responses' holds one text"),
        ({"responses": "a"}, "'responses' must be a list of texts"),
        ({"responses": ["a", ""]}, "'responses' must be a list of texts"),
        ({"responses": ["a", "b"], "id": "row-0"}, "id 'row-0' was used before"),
        ({}, "no model is given to write them"),
        ({"responses": ["a", "a"], "prompt": "  "}, "in.jsonl, line 2: 'prompt' must be one text"),
        ({"responses": ["a", "a"]}, "in.jsonl, line 2: 'responses' holds one text"),
    ],
)
def test_bad_row_is_named_in_one_line_and_nothing_is_written(folder, tmp_path, capsys, row, message):
    jsonl.write(tmp_path / "in.jsonl", [*rows(1), {"id": "x", "prompt": "word", **row}])
    assert launch.main(arguments(folder, tmp_path)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.jsonl").exists()


def test_missing_judge_and_pairs_that_all_tie_are_named(folder, tmp_path, capsys):
    jsonl.write(tmp_path / "in.jsonl", rows(1))
    assert launch.main(arguments(tmp_path, tmp_path)) == 2
    assert "is no checkpoint" in capsys.readouterr().err
    assert launch.main(arguments(folder, tmp_path)) == 2  # one pair cannot be balanced
    assert "no pair is left of 1 (1 before lengths were balanced" in capsys.readouterr().err


def test_rows_without_replies_are_answered_by_the_model_the_same_in_any_part(folder, tmp_path):
    jsonl.write(tmp_path / "in.jsonl", [{"id": f"row-{n}", "prompt": f"word {n}"} for n in range(6)])
    fields = {
        **{"data.path": tmp_path / "in.jsonl", "model.checkpoint": folder, "compute.compute_dtype": "float32"},
        **{"sampler.max_prompt_tokens": 128, "sampler.temperature": 5.0},
    }
    config = configs.load("preference_pairs", [(name, str(value)) for name, value in fields.items()])
    resolved, words, mesh = common.prepare(config)
    asking = parts_of(preference_pairs.Asking, resolved)
    answer = preference_pairs.answerer(asking, 3, words, mesh)
    asked = preference_pairs.read(config.data)
    answered = answer(asked)
    assert [row["id"] for row in answered] == [row["id"] for row in asked]
    assert any(len(set(row["responses"])) == 3 for row in answered)
    assert answer(asked[4:]) == answered[4:]


def test_pairs_use_each_reply_once_in_a_keyed_order():
    row = {"id": "a", "prompt": "p", "responses": list("vwxyz")}
    made = preference_pairs.pairs_of(row, 0)
    assert len(made) == 2 and len({text for pair in made for text in (pair.first, pair.second)}) == 4
    assert made == preference_pairs.pairs_of(row, 0)
    assert len({str(preference_pairs.pairs_of(row, seed)) for seed in range(20)}) > 5


@pytest.mark.parametrize(
    "margins, kept",
    [((2, 2, 1, 0), 1.25), ((1, 1, 1, 1), None), ((-2, -2, None, None), -2.0), ((2, None, None, None), None)],
)
def test_pair_is_kept_when_its_mean_margin_exceeds_one(margins, kept):
    judgements = [{"swapped": False, "margin": margin, "detail": ""} for margin in margins]
    row = {"id": "a", "prompt": "p", "first": "one", "second": "two", "judgements": judgements}
    found = preference_pairs.labelled(row, configs.load("preference_pairs").preferences)
    assert (found is None) if kept is None else (found["margin"] == abs(kept))
    assert kept is None or found["chosen"] == ("one" if kept > 0 else "two")


# Stage 3's judged prompts.


@pytest.fixture
def wider(folder, tmp_path):
    """Returns (config of stage 3 with a judged prompt file, the tiny world's tokenizer, mesh, its base model's weights)."""
    open_rows = [
        {"id": f"open-{n}", "prompt": f"tell {topic} :", "answer": topic} for n, topic in enumerate(TOPICS["en"])
    ]
    jsonl.write(tmp_path / "open.jsonl", open_rows[:3])
    fields = {
        **{"sampler.slots": 9, "sampler.max_new_tokens": 32, "sampler.windows": ()},
        **{"rejection.judged_prompts": tmp_path / "open.jsonl", "rejection.samples_per_prompt": 3},
        **dict(flag.removeprefix("--config.").split("=", 1) for flag in FLAGS),
        "judge.checkpoint": folder,
    }
    config = configs.load("stage3_rejection_sft", [(name, str(value)) for name, value in fields.items()])
    config, words, mesh = common.prepare(config)
    return config, words, mesh, lineage.base_weights(config, mesh, tmp_path)


def of_judged_prompts(config, words, mesh, params, counts):
    """Returns the responses of a policy with these weights to the judged prompts of a config."""
    teacher = teachers.Teacher(parts_of(parts.SamplingParts, config), words, params, "policy")
    return judged_prompts.sample(teacher, config.rejection, config.judge, mesh, counts)


def test_judged_prompts_take_the_judges_verdict_as_accuracy(wider, judge):
    counts = {}
    found = of_judged_prompts(*wider, counts)
    assert Counter(response.problem.id for response in found) == {f"open-{n}": 3 for n in range(3)}
    assert sum(not response.truncated for response in found) > 3
    asked = [RewardRequest("", "", r.problem.text, r.text, r.problem.reference, truncated=r.truncated) for r in found]
    expected = judge.accuracy(asked)
    assert [(r.parts["accuracy"], r.scorable) for r in found] == [(score.value, score.scorable) for score in expected]
    assert counts == {"judged": 9, "verdicts read, %": 100}


def test_share_of_verdicts_that_could_be_read_is_told(wider):
    config, words, mesh, params = wider
    config = replace(config, judge=replace(config.judge, sampler=replace(config.judge.sampler, max_new_tokens=1)))
    counts = {}
    found = of_judged_prompts(config, words, mesh, params, counts)
    assert counts == {"judged": 9, "verdicts read, %": 0} and not any(r.scorable for r in found if not r.truncated)


def test_stage_three_keeps_of_the_judged_prompts_what_judge_and_checks_accept(wider, tmp_path):
    config, words, mesh, params = wider
    config = replace(
        config, rejection=replace(config.rejection, prompts=2, samples_per_prompt=6, drop_code_blocks=False)
    )
    finished_stage(replace(config, stage="stage2_reasoning_rl"), tmp_path, params, {})
    problems = linear_prompts("train")[:4]
    rows = [{"id": f"open-{p.id}", "prompt": p.text, "answer": p.reference, "language": p.language} for p in problems]
    jsonl.write(config.rejection.judged_prompts, rows)
    train = prompts.encode(linear_prompts("train")[100:110], parts_of(parts.AskingParts, config), words)
    found, counts = stage3_rejection_sft.collect(config, words, mesh, train, tmp_path)
    drawn = of_judged_prompts(config, words, mesh, params, {})
    checks = [*traces.basic_checks(1.0), *stage3_rejection_sft.readable(config.rejection)]
    accepted = {(r.problem.id, r.text) for _, r in traces.passing(drawn, checks, {})}
    kept = [(row["id"], row["response"]) for row in found if row["id"].startswith("open-")]
    assert kept and set(kept) <= accepted
    assert {name for name, _ in kept} == {name for name, _ in accepted}  # of each prompt at most two
    assert counts["judged"] == 24 and counts["sampled"] == {"judged": 24, "linear": 12}


def test_judged_prompts_are_off_without_a_file_and_an_input_of_the_stage_with_one(wider, tmp_path):
    config = wider[0]
    off = configs.load("stage3_rejection_sft")
    assert (
        judged_prompts.inputs(off.stage, off.rejection, off.judge) == {}
        and of_judged_prompts(off, *wider[1:], {}) == []
    )
    path = config.rejection.judged_prompts
    before = judged_prompts.inputs(config.stage, config.rejection, config.judge)
    assert set(before) == {path, config.judge.checkpoint}
    jsonl.write(path, [{"id": "x", "prompt": "tell x :", "answer": "x"}])
    assert judged_prompts.inputs(config.stage, config.rejection, config.judge)[path] != before[path]
    with pytest.raises(ValueError, match="judged_prompts=a.jsonl needs a judge: set judge.checkpoint"):
        configs.load("stage3_rejection_sft", [("rejection.judged_prompts", "a.jsonl")])


# Input generators of code prompts.


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux's namespaces")
def test_missing_generators_are_asked_of_the_model_and_run_only_in_the_sandbox(folder, tmp_path, capsys):
    row = {"id": "p", "prompt": "word word", "accepted": ["print(1)", "print(1)"], "wrong": ["print(2)"]}
    jsonl.write(tmp_path / "in.jsonl", [row])
    made = arguments(folder, tmp_path)
    assert launch.main(["--config=build_tests", *made[1:], "--config.build_tests.generators_per_prompt=2"]) == 2
    assert "no row of" in capsys.readouterr().err.splitlines()[-1]  # this model writes verdicts, which make no input
    [part] = (tmp_path / "work").rglob("*.jsonl")
    [built] = jsonl.read(part)
    assert built["built"]["generators"] >= 1 and built["built"]["inputs"] == 0


@pytest.mark.slow
def test_every_verdict_of_smollm2_is_either_read_or_unscorable_and_the_parse_rate_is_kept(
    smollm2_folder, shared_data, results
):
    sampler = SamplerConfig(
        slots=8,
        steps_per_dispatch=16,
        max_prompt_tokens=1024,
        max_new_tokens=128,
        temperature=0.6,
        top_p=0.95,
        prefill_buckets=(512,),
    )
    config = Config(stage="test", judge=JudgeConfig(str(smollm2_folder), "float32", sampler))
    judge = judging.load(config.stage, config.seed, config.judge, sharding.make_mesh(config.mesh))
    problems = jsonl.read(shared_data / "gsm8k_test.jsonl")[:8]
    asked = []
    for row in problems:
        number = str(row["answer"]).rpartition("####")[2].strip()
        asked += [
            RewardRequest(row["id"], "math", row["prompt"], f"It is {n}.", number) for n in (number, number + "1")
        ]
    scores = judge.accuracy(asked)
    assert judge.counts.asked == 16 and judge.counts.readable == sum(score.scorable for score in scores)
    right = sum(score.scorable and score.value == (n % 2 == 0) for n, score in enumerate(scores))
    results("judge_smollm2", {"asked": 16, "parse_rate": judge.counts.parse_rate, "right_verdicts": right})
