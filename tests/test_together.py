"""Claims about stages in several processes: they leave what one process leaves, byte for byte."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_judge
from code_problems import PROBLEMS
from test_build_tests import FLAGS
from test_distill_jsonl import solved

from r1jax.checkpoints import hf_export
from r1jax.core import checkpoint, hosts, rng, sharding
from r1jax.data import jsonl, tasks
from r1jax.data.problems import Problem
from r1jax.models import decoder
from r1jax.recipe import common
from r1jax.rewards.score import Score
from r1jax.rl import rollout
from r1jax.rl.rollout import EncodedPrompt
from r1jax.sampler.sample import RolloutSample
from r1jax.schema import MeshConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEADLINE_S = 900.0
TIMES = ("seconds", "split", "mfu", "wall_s")  # figures that no two runs share
# Of the processes of a CPU run only the first has a compilation cache, so compiling is made cheap for all. On a
# busy machine a device may wait for another one for longer than XLA's 40 s.
CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
CHEAP += " --xla_cpu_collective_call_terminate_timeout_seconds=600"

MODEL = {"model.hidden_size": 32, "model.intermediate_size": 32, "model.num_hidden_layers": 2}
MODEL |= {"model.num_attention_heads": 2, "model.num_key_value_heads": 2, "mesh.fsdp": 2}
BASE = MODEL | {
    "pretrain.updates": 2,
    "pretrain.rows_per_update": 4,
    "pretrain.corpus_documents": 60,
    "pack.rows_per_micro_batch": 4,
    "output": "{run}/base.safetensors",
}
STUDENT = {
    "mesh.fsdp": 2,
    "model.checkpoint": "{run}/stage0_base",
    "data.world": "none",
    "distill.examples": "{given}/rows.jsonl",
    "pack.rows_per_micro_batch": 4,
    "sft.epochs": 1,
    "sft.examples_per_update": 4,
}
PAIRED = {
    "mesh.fsdp": 2,
    "start": "",
    "model.checkpoint": "{run}/stage0_base",
    "data.path": "{given}/pairs.jsonl",
    "data.holdout_fraction": 0.4,
    "reward_model.frozen_blocks": 1,
    "reward_model.epochs": 1,
    "reward_model.balance_lengths": False,
    "pack.rows_per_micro_batch": 4,
}
CRITIC = {
    "mesh.fsdp": 2,
    "model.checkpoint": "{run}/stage0_base",
    "sampler.windows": (),
    "sampler.slots": 8,
    "sampler.max_new_tokens": 16,
    "grpo.updates": 1,
    "grpo.updates_per_rollout": 1,
    "grpo.prompts_per_update": 4,
    "grpo.group_size": 4,
    "pack.rows_per_micro_batch": 8,
    "pack.row_tokens": 40,
    "reward.language": 1.0,  # random text earns some of it, so that there is a signal
    "data.path": "{given}/rows.jsonl",
    "data.template": "tiny",
    "data.holdout_fraction": 0.0,  # no evaluation, whose two samplers would be compiled too
}
EXPORT = {"mesh.fsdp": 2, "checkpoint": "{run}/distill", "output": "{run}/exported/student", "export.dtype": "bfloat16"}
JUDGED = {
    "mesh.fsdp": 2,
    "data.path": "{given}/replies.jsonl",
    "output": "{run}/judged.jsonl",
    "judge.checkpoint": "{given}/judge",
    "judge.compute_dtype": "float32",
    "judge.sampler.slots": 8,
    "judge.sampler.windows": (),
    "judge.sampler.prefill_buckets": (),
    "judge.sampler.max_prompt_tokens": 256,
    "judge.sampler.max_new_tokens": 8,
    "judge.sampler.steps_per_dispatch": 4,
    "preferences.judgements": 3,
    "preferences.min_margin": 0.5,
    "preferences.balance_lengths": False,
}
STAGES = [
    ["stage0_base:tiny_dense", BASE],
    ["distill:tiny", STUDENT],
    ["reward_helpful:tiny", PAIRED],
    ["ppo_baseline:tiny", CRITIC],
    ["export_hf", EXPORT],
    ["preference_pairs", JUDGED],
]
TRAINED = ("stage0_base", "distill", "reward_helpful", "ppo_baseline")
ROWS = 9  # of each file, odd so that two processes have unequal shares


def launched(processes: int, devices: int, folder: pathlib.Path, command: Callable[[int, int], list[str]]) -> list[str]:
    """Returns what each process of a run printed; `command(index, port)` is that of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{CHEAP} --xla_force_host_platform_device_count={devices // processes}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    running, outputs = [], []
    for index in range(processes):
        outputs.append([folder / f"{processes}.{index}.{kind}" for kind in ("out", "err")])
        out, error = (path.open("w") for path in outputs[-1])
        running.append(subprocess.Popen(command(index, port), env=environment, stdout=out, stderr=error))
    try:
        for process, (_, error) in zip(running, outputs, strict=True):
            assert process.wait(DEADLINE_S) == 0, error.read_text()[-3000:]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [out.read_text() for out, _ in outputs]


def command_line(processes: int, flags: list[str]) -> Callable[[int, int], list[str]]:
    """Returns the command of one of so many processes, which also names where the others are."""

    def command(index: int, port: int) -> list[str]:
        joined = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={index}"]
        return [sys.executable, "-m", "r1jax.launch", *flags, *(joined if processes > 1 else [])]

    return command


def constant_judge(path: pathlib.Path) -> None:
    """Writes a judge that prefers the reply shown first, whatever it says: each word decides the next one alone."""
    words, model = toy_judge.tokenizer(), toy_judge.MODEL.model
    params = sharding.initialize(
        decoder.specs(model), rng.key(0, "judge", "init"), "float32", sharding.make_mesh(MeshConfig())
    )
    params = jax.tree.map(jnp.zeros_like, params)
    verdict = words.encode('{"verdict": "A>>B"}')
    following = jnp.full(model.vocab_size, verdict[0]).at[verdict[0]].set(verdict[1]).at[verdict[1]].set(words.eos_id)
    params = params.replace(
        embedding=jnp.eye(model.vocab_size, model.hidden_size),
        unembedding=10 * jnp.eye(model.hidden_size, model.vocab_size) @ jax.nn.one_hot(following, model.vocab_size),
        final_norm=jnp.ones_like(params.final_norm),
    )
    hf_export.save(path, params, model, words, "float32", "a judge for tests")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Returns the folder of the files that the stages read."""
    folder = tmp_path_factory.mktemp("given")
    constant_judge(folder / "judge")
    train, _ = tasks.linear_problems()
    rows = [
        solved(problem) | {"task": "linear", "answer": str(problem.x), "source": "tiny"} for problem in train[:ROWS]
    ]
    rows[4]["response"] = rows[5]["response"]  # a wrong one, which grading leaves out
    jsonl.write(folder / "rows.jsonl", rows)
    topics = tasks.TOPICS["en"]
    pairs = [
        {
            "id": f"{n}",
            "prompt": f"tell {topic} {n} :",
            "chosen": f"the {topic} is old thanks",
            "rejected": f"{topic} is",
        }
        for n, topic in enumerate((topics * ROWS)[:ROWS])
    ]
    jsonl.write(folder / "pairs.jsonl", pairs)
    replies = [
        {"id": f"{n}", "prompt": "word " * n, "responses": ["good", "bad word", "word " * n]} for n in range(1, ROWS)
    ]
    jsonl.write(folder / "replies.jsonl", replies)
    return folder


def stages_in(processes: int, folder: pathlib.Path, given: pathlib.Path) -> list[dict]:
    """Runs STAGES in so many processes; returns what each of them graded, by stage."""
    workdir = folder / "run"
    workdir.mkdir(parents=True)
    place = lambda value: value.format(run=workdir, given=given) if isinstance(value, str) else value  # noqa: E731
    stages = [[name, {field: place(value) for field, value in fields.items()}] for name, fields in STAGES]

    def command(index: int, port: int) -> list[str]:
        settings = {"processes": processes, "index": index, "port": port, "workdir": str(workdir), "stages": stages}
        return [sys.executable, str(ROOT / "tests" / "together_driver.py"), json.dumps(settings)]

    return [json.loads(text.splitlines()[-1]) for text in launched(processes, 2, folder, command)]


@pytest.fixture(scope="module")
def one_and_two(given, tmp_path_factory):
    """Returns {processes: (working folder, what each process graded)} of one process on two devices, and of two."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"together{processes}")
        found[processes] = folder / "run", stages_in(processes, folder, given)
    return found


def marker(workdir: pathlib.Path, stage: str) -> dict:
    return json.loads((workdir / stage / "DONE").read_text())


def lasting(figures):
    """Returns figures without those that measure time."""
    if not isinstance(figures, dict):
        return figures
    return {name: lasting(value) for name, value in figures.items() if name not in TIMES}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns the bytes of every file below a folder, by its place there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_files(one: pathlib.Path, other: pathlib.Path, stage: str) -> list[str]:
    """Returns the names of a stage's records that both runs have; their bytes must be the same."""
    names = ("metrics.jsonl", "examples.jsonl", "examples_counts.json", "samples.jsonl", "reward_model.json")
    present = [name for name in names if (one / stage / name).exists()]
    for name in present:
        assert (one / stage / name).read_bytes() == (other / stage / name).read_bytes(), (stage, name)
    return present


@pytest.mark.parametrize("stage", TRAINED)
def test_two_processes_leave_the_weights_metrics_examples_and_figures_of_one(one_and_two, stage):
    (one, _), (two, _) = one_and_two[1], one_and_two[2]
    assert marker(two, stage)["output"] == marker(one, stage)["output"]
    assert lasting(marker(two, stage)["figures"]) == lasting(marker(one, stage)["figures"])
    assert "metrics.jsonl" in same_files(one, two, stage)


def test_each_process_grades_its_own_share_of_the_examples_and_of_the_prompts(one_and_two):
    ((_, [alone]), (_, both)) = one_and_two[1], one_and_two[2]
    for stage in ("distill", "ppo_baseline"):
        shares = [set(process[stage]) for process in both]
        if stage == "ppo_baseline":  # its samples; that its references can be graded is checked by every process
            alone[stage] = [name for name in alone[stage] if "/" in name]
            shares = [{name for name in share if "/" in name} for share in shares]
        assert not shares[0] & shares[1] and min(map(len, shares)) >= len(alone[stage]) // 2 - 1
        assert shares[0] | shares[1] == set(alone[stage])
    assert len(alone["distill"]) == ROWS


def test_wrong_examples_are_left_out_whoever_graded_them(one_and_two):
    counts = json.loads((one_and_two[2][0] / "distill" / "examples_counts.json").read_text())
    assert (counts["wrong"], counts["kept"]) == ({"linear": 1}, {"linear": ROWS - 1})


def test_an_export_of_several_files_by_two_processes_is_byte_for_byte_that_of_one(one_and_two):
    one, two = (contents(one_and_two[processes][0] / "exported" / "student") for processes in (1, 2))
    assert one == two
    assert sum(name.endswith(".safetensors") for name in one) >= 3
    assert (one_and_two[1][0] / "base.safetensors").read_bytes() == (
        one_and_two[2][0] / "base.safetensors"
    ).read_bytes()


def test_a_judge_asked_by_two_processes_together_gives_the_pairs_of_one(one_and_two):
    one, two = ((one_and_two[processes][0] / "judged.jsonl").read_bytes() for processes in (1, 2))
    assert one == two
    rows = jsonl.read(one_and_two[2][0] / "judged.jsonl")
    assert len(rows) >= ROWS // 2 and all(len(row["judgements"]) == 3 for row in rows)
    assert not list((one_and_two[2][0] / "preference_pairs").glob("parts-*"))


class Verdicts:
    """Stands for a judge over the devices of all processes: it notes what it is asked."""

    together, batch_deadline_s = True, 1.0

    def score(self, requests):
        self.asked = [request.id for request in requests]
        return [Score(1.0, {"accuracy": 1.0}, True, "") for _ in requests]


def test_a_pool_that_scores_together_is_asked_everything_by_every_process(monkeypatch):
    monkeypatch.setattr(hosts, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "process_index", lambda: 1)
    empty, zeros = np.zeros(0, np.int32), np.zeros(0, np.float32)
    samples = [RolloutSample(number, 0, empty, empty, zeros, zeros, "stop", 0) for number in range(3)]
    prompts = [EncodedPrompt(Problem(f"{number}", "math", "?", "1"), empty, "") for number in range(3)]
    judge = Verdicts()
    terms, scorable = rollout.grade(samples, prompts, ["1"] * 3, judge)
    assert judge.asked == ["0/0/0", "1/1/0", "2/2/0"]
    assert scorable.all() and terms[:, 0].tolist() == [1.0] * 3


def test_the_digest_of_a_stopped_stage_opens_no_store_which_would_wait_for_other_processes(tmp_path, monkeypatch):
    for number in ("5", "10"):
        (tmp_path / "checkpoints" / number).mkdir(parents=True)
        (tmp_path / "checkpoints" / number / "weights").write_text(number)
    (tmp_path / "checkpoints" / "15.orbax-checkpoint-tmp-1").mkdir()
    (tmp_path / common.INPUTS).write_text("{}")
    monkeypatch.setattr(checkpoint, "CheckpointStore", None)
    digest = common.checkpoint_digest(tmp_path)
    (tmp_path / "checkpoints" / "5" / "weights").write_text("other")
    assert common.checkpoint_digest(tmp_path) == digest
    (tmp_path / "checkpoints" / "10" / "weights").write_text("other")
    assert common.checkpoint_digest(tmp_path) != digest


@pytest.mark.slow
def test_two_processes_build_the_tests_that_one_builds(tmp_path):
    written = []
    rows = [
        {**row, "accepted": [program for program in row["accepted"] if isinstance(program, str)]} for row in PROBLEMS
    ]
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        jsonl.write(folder / "in.jsonl", rows[:3])
        flags = ["--config=build_tests", "--config.mesh.fsdp=2", f"--workdir={folder / 'run'}", *FLAGS]
        flags += [f"--config.data.path={folder / 'in.jsonl'}", f"--config.output={folder / 'out.jsonl'}"]
        launched(processes, 2, folder, command_line(processes, flags))
        written.append((folder / "out.jsonl").read_bytes())
    assert written[0] == written[1]


# The quick start with four devices, the smallest number of updates, prompts and examples that trains every stage.
REASONERS = ("r1_zero", "stage2_reasoning_rl", "stage4_all_scenarios", "student_rl")
TUNED, MODELS = ("stage1_coldstart", "stage3_rejection_sft", "distill"), ("reward_helpful", "reward_safety")
SHORT_RL = ("grpo.updates=2", "grpo.updates_per_rollout=1", "grpo.prompts_per_update=4", "grpo.group_size=4")
SHORT_MODEL = ("reward_model.samples_per_prompt=2", "reward_model.epochs=1", "data.max_rows=64")
CHANGES = {stage: ("mesh.data=2", "mesh.tensor=2", "sampler.windows=()") for stage in (*REASONERS, *TUNED, *MODELS)}
CHANGES |= {stage: (*CHANGES[stage], *SHORT_RL) for stage in REASONERS}
CHANGES |= {stage: (*CHANGES[stage], "sft.epochs=1") for stage in TUNED}
CHANGES |= {stage: (*CHANGES[stage], *SHORT_MODEL) for stage in MODELS}
CHANGES["stage1_coldstart"] += ("coldstart.prompts=40",)
CHANGES["stage3_rejection_sft"] += ("rejection.prompts=40",)
CHANGES["stage4_all_scenarios"] += ("scenarios.from_update=1",)


def graph_in(processes: int, folder: pathlib.Path) -> pathlib.Path:
    """Returns the working folder of the whole short graph, run in so many processes."""
    changes = ",".join(f"{stage}.{change}" for stage, of_stage in CHANGES.items() for change in of_stage)
    evaluation = dict(samples_per_problem=1, max_problems=8, consensus_problems=2, greedy="false")
    flags = ["--config=quickstart", f"--workdir={folder / 'run'}", f"--config.set={changes}"]
    flags += [f"--config.evaluation.{name}={value}" for name, value in evaluation.items()]
    launched(processes, 4, folder, command_line(processes, flags))
    return folder / "run"


@pytest.fixture(scope="module")
def graph_of_one(tmp_path_factory):
    return graph_in(1, tmp_path_factory.mktemp("graph1"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_the_whole_graph_in_several_processes_leaves_what_one_process_leaves(processes, graph_of_one, tmp_path):
    several = graph_in(processes, tmp_path)
    for stage in CHANGES:
        assert marker(several, stage)["output"] == marker(graph_of_one, stage)["output"], stage
        assert lasting(marker(several, stage)["figures"]) == lasting(marker(graph_of_one, stage)["figures"]), stage
        assert same_files(graph_of_one, several, stage), stage
    assert contents(several / "export") == contents(graph_of_one / "export") != {}
    summaries = [json.loads((workdir / "summary.json").read_text()) for workdir in (graph_of_one, several)]
    assert lasting(summaries[0]) == lasting(summaries[1])
    printed = [(tmp_path / f"{processes}.{index}.out").read_text() for index in range(processes)]
    assert ["held-out problems" in text for text in printed] == [True] + [False] * (processes - 1)
