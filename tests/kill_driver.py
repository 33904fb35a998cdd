"""Ends small runs of several stages at random moments, starts them again until they finish, and compares what they leave.

    python tests/kill_driver.py --term=12 --kill=100 --seed=1 --out=docs/results/kills.json [--jobs=rl,sft,...]

Every job is run undisturbed first. Then runs of it are ended at moments drawn uniformly from the time that the
undisturbed run took, until so many SIGTERM and then so many SIGKILL have been sent, over all jobs in turn. A run that
gets to its end is compared with the undisturbed one, file by file, and a fresh one is begun.
The runs are forked from this process, which has imported everything and has not used a device.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

from r1jax import launch, stage_table
from r1jax.core import preempt
from r1jax.data import jsonl

EVALUATION = ("evaluation.max_problems=4", "evaluation.samples_per_problem=1", "evaluation.greedy=false")
RL = ("grpo.updates=6", "grpo.updates_per_rollout=3", "checkpointing.every_updates=2", "grpo.prompts_per_update=8")
TUNING = ("sft.examples_per_update=8", "checkpointing.every_updates=3")
SET = ",".join(f"r1_zero.{field}" for field in RL) + "," + ",".join(f"stage1_coldstart.{field}" for field in TUNING)
JOBS = {  # -> (config, overrides)
    "rl": ("r1_zero:tiny", (*RL, *EVALUATION)),
    "sft": (
        "distill:tiny",
        (*TUNING, *EVALUATION, "start=", "distill.grade=false", "distill.examples={data}/sft.jsonl"),
    ),
    "reward_model": (
        "reward_helpful:tiny",
        (
            *("start=", "data.world=none", "data.path={data}/pairs.jsonl", "checkpointing.every_updates=3"),
            *("reward_model.balance_lengths=false", "reward_model.examples_per_update=4"),
        ),
    ),
    "graph": (
        "quickstart",
        (*EVALUATION, "only=r1_zero,stage1_coldstart", f"set={SET},stage1_coldstart.coldstart.prompts=60"),
    ),
}
COMPARED = ("metrics.jsonl", "examples.jsonl", "samples.jsonl", "rollout_samples.jsonl", "config.json", "inputs.json")
LIMIT_S = 900.0  # of one undisturbed run
GRACE_S = 30.0


def write_data(folder: pathlib.Path) -> None:
    """Writes rows for the jobs that read files."""
    rng = random.Random(0)
    equations = [(rng.randrange(2, 9), rng.randrange(1, 20), rng.randrange(1, 9)) for _ in range(60)]
    prompts = [f"solve {a} x + {b} = {a * x + b}" for a, b, x in equations]
    answers = [x for *_, x in equations]
    texts = [(f"<think> x = {x} </think> <answer> {x} </answer>", f"<answer> {x + 1} wait </answer>") for x in answers]
    rows = [{"id": f"s{i}", "prompt": prompts[i], "response": texts[i][0]} for i in range(60)]
    pairs = [{"id": f"p{i}", "prompt": prompts[i], "chosen": texts[i][0], "rejected": texts[i][1]} for i in range(60)]
    jsonl.write(folder / "sft.jsonl", rows)
    jsonl.write(folder / "pairs.jsonl", pairs)


def start(job: str, workdir: pathlib.Path, data: pathlib.Path) -> int:
    """Starts a run of a job in a process of its own and returns its number; what it prints is in WORKDIR.log."""
    config, overrides = JOBS[job]
    arguments = [f"--config={config}", f"--workdir={workdir}", f"--grace_s={GRACE_S}"]
    arguments += [f"--config.{override.format(data=data)}" for override in overrides]
    process = os.fork()
    if process:
        return process
    log = os.open(workdir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        code = launch.main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)  # without the exit handlers of the parent


def wait(process: int, seconds: float) -> int | None:
    """Returns how a process ended (its code, or minus the signal), None if it runs on after so many seconds."""
    limit = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            return None
        time.sleep(0.005)


def to_end(job: str, workdir: pathlib.Path, data: pathlib.Path) -> None:
    code = wait(start(job, workdir, data), LIMIT_S)
    assert code == 0, f"{job}: {code}: {workdir.with_suffix('.log').read_text()[-2000:]}"


def artefacts(workdir: pathlib.Path) -> dict[str, str]:
    """Returns the digest of every stage's weights, of its metrics, examples and samples."""
    kept = {}
    for marker in sorted(workdir.glob("*/DONE")):
        folder = marker.parent
        kept[f"{folder.name} weights"] = json.loads(marker.read_text())["output"]
        for path in (folder / name for name in COMPARED):
            text = path.read_bytes().replace(f"{workdir}/".encode(), b"") if path.exists() else b""
            kept[f"{folder.name} {path.name}"] = hashlib.sha256(text).hexdigest()
    return kept


def place(workdir: pathlib.Path) -> str:
    """Returns the stage that was at work, with what it was doing and at which update where it says so."""
    folders = [path.parent for path in workdir.glob("*/config.json") if not (path.parent / "DONE").exists()]
    if not folders:
        return "before or after a stage"
    newest = max(folders, key=lambda folder: (folder / "config.json").stat().st_mtime)
    phase = newest / "phase"
    return f"{newest.name} {phase.read_text().strip() if phase.exists() else ''}".strip()


class Job:
    """A job with what its undisturbed run left, and the run of it that is being disturbed."""

    def __init__(self, name: str, folder: pathlib.Path, data: pathlib.Path):
        self.name, self.folder, self.data = name, folder, data
        to_end(name, folder / f"{name}_warm", data)  # compiles
        started = time.monotonic()
        to_end(name, folder / f"{name}_undisturbed", data)
        self.seconds = time.monotonic() - started
        self.expected = artefacts(folder / f"{name}_undisturbed")
        assert self.expected == artefacts(folder / f"{name}_warm"), f"{name} does not repeat"
        self.finished, self.different = 0, []
        self.workdir = folder / name

    def disturb(self, rng: random.Random, number: signal.Signals) -> dict:
        """Sends one signal at a random moment of the run; runs that end before are compared, and others are started."""
        while True:
            process, moment = start(self.name, self.workdir, self.data), rng.uniform(0.5, 0.9 * self.seconds)
            code = wait(process, moment)
            if code is None:
                break
            self.compare(code)
        sent = {"job": self.name, "signal": number.name, "after_s": round(moment, 2), "place": place(self.workdir)}
        os.kill(process, number)
        begun = time.monotonic()
        code = wait(process, 2 * GRACE_S)
        sent |= {"ended_s": round(time.monotonic() - begun, 2), "code": code}
        if code is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        elif code == 0:  # the signal came when the work was done
            self.compare(code)
        return sent

    def compare(self, code: int) -> None:
        """Compares a run that has come to its end, and makes room for a fresh one."""
        assert code == 0, f"{self.name}: {code}: {self.workdir.with_suffix('.log').read_text()[-2000:]}"
        left = artefacts(self.workdir)
        names = {*self.expected, *left}
        self.different += sorted(name for name in names if self.expected.get(name) != left.get(name))
        self.finished += 1
        shutil.rmtree(self.workdir)

    def end(self) -> None:
        if self.workdir.exists():
            self.compare(wait(start(self.name, self.workdir, self.data), LIMIT_S) or 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--term", type=int, default=4)
    parser.add_argument("--kill", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--most_s", type=float, default=float("inf"), help="no further signal after so many seconds")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    for stage in stage_table.STAGES:
        stage_table.function(stage)  # imports everything, so that a forked run begins at once
    ends = time.monotonic() + options.most_s
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write_data(folder / "data")
        jobs = [Job(name, folder, folder / "data") for name in options.jobs.split(",")]
        sent: list[dict] = []
        for number in [signal.SIGTERM] * options.term + [signal.SIGKILL] * options.kill:
            if time.monotonic() > ends:
                break
            sent.append(jobs[len(sent) % len(jobs)].disturb(rng, number))
            print(json.dumps(sent[-1]), file=sys.stderr, flush=True)
        for job in jobs:
            job.end()
    codes = {"SIGTERM": {preempt.PREEMPTED_EXIT, 0}, "SIGKILL": {-signal.SIGKILL}}
    result = {
        "asked_for": {"SIGTERM": options.term, "SIGKILL": options.kill},
        "sent": {name: sum(one["signal"] == name for one in sent) for name in codes},
        "seed": options.seed,
        "undisturbed_s": {job.name: round(job.seconds, 1) for job in jobs},
        "runs_compared": {job.name: job.finished for job in jobs},
        "different": {job.name: job.different for job in jobs},
        "grace_s": GRACE_S,
        "slowest_end_s": max((one["ended_s"] for one in sent), default=0.0),
        "other_codes": [one for one in sent if one["code"] not in codes[one["signal"]]],
        "signals": sent,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
