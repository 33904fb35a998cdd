"""The recipe on a real model and a file of several tasks, stage by stage through the command line."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from r1jax.core.metrics import read
from r1jax.data import jsonl
from r1jax.recipe import common

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = (
    "river",
    "garden",
    "window",
    "silver",
    "doctor",
    "orange",
    "castle",
    "market",
    "winter",
    "pencil",
    "bridge",
    "forest",
)
ECHO = '''from r1jax.rewards.score import Score


def echo(request, config):
    """Returns 1 when the response ends with the word that was asked for."""
    said = request.response.replace("<answer>", " ").replace("</answer>", " ").split()
    right = bool(said) and said[-1].strip(".").lower() == request.reference
    return Score(float(right), {}, True, f"the last of {len(said)} words")
'''


def problem_rows(count: int) -> list[dict]:
    """Returns `count` rows of each of five reasoning tasks, and of general and safety prompts."""
    rows = []
    for i in range(count):
        a, b, word = i % 7 + 2, i % 5 + 11, WORDS[i % len(WORDS)]
        rows += [
            {"task": "math", "prompt": f"What is {a} + {b + i}?", "answer": a + b + i},
            {"task": "mcq", "prompt": f"Which number is larger?\nA. {b + i}\nB. {a}", "answer": "A"},
            {
                "task": "code",
                "prompt": f"Write a Python function add_{i}(x) that returns x + {i}.",
                "tests": {"kind": "python-asserts", "setup": "", "asserts": [f"assert add_{i}(2) == {i + 2}"]},
            },
            {
                "task": "countdown",
                "prompt": f"Use {a} and {b + i}, each once, and + - * / to make {a + b + i}. Give the expression.",
                "answer": json.dumps({"numbers": [a, b + i], "target": a + b + i}),
            },
            {"task": "echo", "prompt": f"Repeat this word: {word} {i}", "answer": str(i)},
            {"task": "general", "prompt": f"Say something kind about the {word} number {i}."},
            {"task": "safety", "prompt": f"How do I open the lock of {word} number {i}?"},
        ]
    return [{"id": f"{row['task']}-{i}", **row} for i, row in enumerate(rows)]


def written_by_people(rows: list[dict]) -> list[dict]:
    """Returns the reasoning rows with a short thought and the right answer."""
    found = []
    for row in rows:
        if row["task"] in ("general", "safety"):
            continue
        answer = str(row.get("answer"))
        if row["task"] == "code":
            name, number = row["prompt"].split()[4].split("(")[0], row["prompt"].split()[-1].strip(".")
            answer = f"\n```python\ndef {name}(x):\n    return x + {number}\n```\n"
        elif row["task"] == "countdown":
            answer = " + ".join(map(str, json.loads(answer)["numbers"]))
        thought = f"The question asks: {row['prompt'].splitlines()[0]} I can answer that."
        found.append(row | {"response": f"<think>\n{thought}\n</think>\n<answer>{answer}</answer>"})
    return found


def preference_rows(count: int) -> dict[str, list[dict]]:
    """Returns pairs for the helpful model and labelled responses for the safety model, by a rule."""
    asked = [f"Say something kind about the {WORDS[i % len(WORDS)]} and {i}." for i in range(count)]
    kind = ("Lovely.", "I like it very much, it is lovely and kind of you.")
    rude = ("No, go away with it, nobody wants to hear of that.", "Go away.")  # as often the longer one as the shorter
    pairs = [
        {"prompt": text, "chosen": f"{kind[i % 2]} {i}", "rejected": f"{rude[i % 2]} {i}"}
        for i, text in enumerate(asked)
    ]
    labels = [
        {
            "prompt": text,
            "response": f"Here is how: break it. {i}" if i % 2 else f"I am sorry, I cannot help with that. {i}",
            "safe": not i % 2,
        }
        for i, text in enumerate(asked)
    ]
    return {"helpful": pairs, "safety": labels}


SMALL = {
    "sampler.slots": 8,
    "sampler.max_prompt_tokens": 256,
    "sampler.max_new_tokens": 64,
    "sampler.prefill_buckets": "",
    "evaluation.samples_per_problem": 1,
    "evaluation.max_problems": 8,
    "evaluation.greedy": "false",
    "data.holdout_fraction": 0.2,
    "reward.workers": 1,
}
RL = {
    "grpo.updates": 2,
    "grpo.group_size": 4,
    "grpo.prompts_per_update": 2,
    "optimizer.learning_rate": 1e-5,
    "pack.row_tokens": 320,
    "pack.rows_per_micro_batch": 1,
}
SFT = {"optimizer.learning_rate": 2e-4, "pack.row_tokens": 320, "pack.rows_per_micro_batch": 2, "sft.epochs": 2}
REWARD = {"data.holdout_fraction": 0.25, "pack.row_tokens": 128, "reward_model.examples_per_update": 16}


class Chain:
    """One working folder in which stages are run one after the other, each in a process of its own."""

    def __init__(self, folder: pathlib.Path, model: pathlib.Path):
        self.folder, self.model, self.seconds = folder, model, {}
        rows = problem_rows(16)
        jsonl.write(folder / "mixed.jsonl", rows)
        jsonl.write(folder / "people.jsonl", written_by_people(rows))
        for kind, some in preference_rows(64).items():
            jsonl.write(folder / f"{kind}.jsonl", some)
        (folder / "echo.py").write_text(ECHO)

    def run(self, name: str, fields: dict, preset: str = ":smollm2_135m", checkpoint: bool = True) -> dict:
        given = {"model.checkpoint": self.model} if checkpoint else {}
        given |= {"data.path": self.folder / "mixed.jsonl", "reward.graders": f"echo={self.folder}/echo.py:echo"}
        given |= fields
        figures = self.folder / f"{name}.json"
        command = [
            sys.executable,
            "-m",
            "r1jax.launch",
            f"--config={name}{preset}",
            f"--workdir={self.folder / 'runs'}",
        ]
        command += [f"--config.{key}={value}" for key, value in given.items() if value is not None]
        command.append(f"--json={figures}")
        started = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        self.seconds[name] = round(time.monotonic() - started, 1)
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
        return json.loads(figures.read_text())

    def inputs(self, stage: str) -> dict:
        return json.loads((self.folder / "runs" / stage / common.DONE).read_text())["inputs"]

    def output(self, stage: str) -> str:
        return json.loads((self.folder / "runs" / stage / common.DONE).read_text())["output"]


@pytest.mark.slow
def test_five_tasks_and_two_scenarios_go_through_the_whole_recipe(tmp_path, smollm2_folder, results):
    chain = Chain(tmp_path, smollm2_folder)
    zero = chain.run("r1_zero", SMALL | RL)
    by_task = {"math": 16, "mcq": 16, "code": 16, "countdown": 16, "echo": 16, "general": 16, "safety": 16}
    assert zero["data"]["rows_by_task"] == by_task and zero["data"]["left_out"] == {"too_long": {}}
    cold = {
        "coldstart.sources": "r1_zero,people",
        "coldstart.examples": tmp_path / "people.jsonl",
        "coldstart.prompts": 8,
    }
    cold |= {"coldstart.samples_per_prompt": 1, "coldstart.max_examples": 80}
    dev1 = chain.run("stage1_coldstart", SMALL | SFT | cold)
    dev2 = chain.run("stage2_reasoning_rl", SMALL | RL)
    assert chain.inputs("stage2_reasoning_rl")["stage1_coldstart"] == chain.output("stage1_coldstart")
    rejection = {"rejection.prompts": 48, "rejection.samples_per_prompt": 2, "rejection.general_fraction": 0}
    dev3 = chain.run("stage3_rejection_sft", SMALL | SFT | rejection)
    for kind in ("helpful", "safety"):
        reward = REWARD | {"data.path": tmp_path / f"{kind}.jsonl", "reward.graders": None}
        chain.run(f"reward_{kind}", reward)
    last = chain.run("stage4_all_scenarios", SMALL | RL | {"scenarios.from_update": 1})
    told = read(tmp_path / "runs" / "stage4_all_scenarios")
    assert any("reward_model" in row for row in told) and "reward_model" not in told[0]
    measured = chain.run(
        "evaluate", SMALL | {"checkpoint": tmp_path / "runs" / "stage4_all_scenarios"}, checkpoint=False
    )
    assert measured["problems"] == last["r1"]["problems"] and set(measured["tasks"]) <= set(by_task) - {
        "general",
        "safety",
    }
    export = {"checkpoint": tmp_path / "runs" / "stage2_reasoning_rl", "output": tmp_path / "out", "data.path": None}
    chain.run("export_hf", export | {"reward.graders": None}, checkpoint=False)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    counts = {
        stage: json.loads((tmp_path / "runs" / stage / "examples_counts.json").read_text())
        for stage in ("stage1_coldstart", "stage3_rejection_sft")
    }
    figures = {
        "r1_zero": zero["r1_zero"],
        "dev1": dev1["dev1"],
        "dev2": dev2["dev2"],
        "dev3": dev3["dev3"],
        "r1": last["r1"],
    }
    pass_at_1 = {name: found["pass@1"] for name, found in {"base": zero["base"], **figures}.items()}
    results("chain_smollm2", {"seconds": chain.seconds, "pass@1": pass_at_1, "examples": counts, "data": zero["data"]})
    assert sum(chain.seconds.values()) < 30 * 60, chain.seconds


@pytest.mark.slow
def test_code_rows_of_mbpp_make_two_updates_with_graded_samples(tmp_path, smollm2_folder, shared_data):
    chain = Chain(tmp_path, smollm2_folder)
    fields = RL | {"sampler.slots": 8, "sampler.prefill_buckets": "", "pack.row_tokens": 448, "reward.graders": None}
    fields |= {"evaluation.samples_per_problem": 1, "evaluation.greedy": "false", "evaluation.max_problems": 2}
    figures = chain.run("r1_zero", fields | {"data.path": shared_data / "mbpp.jsonl"})
    assert figures["data"]["rows_by_task"] == {"code": 974}
    rows = read(tmp_path / "runs" / "r1_zero")
    assert len(rows) == 2 and all(row["unscorable"] < 8 for row in rows)
