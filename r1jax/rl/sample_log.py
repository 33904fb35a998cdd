"""Samples of the rollouts of a run for people to read: the best and the worst response to some prompts."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from r1jax.core import files, hosts
from r1jax.data.problems import Problem
from r1jax.rewards.compose import PART_NAMES
from r1jax.rl.journal import Rollout
from r1jax.rl.rollout import Advantages, EncodedPrompt
from r1jax.schema import WatchConfig

SAMPLES_FILE = "rollout_samples.jsonl"
TEXT_KEPT = 8000  # characters of a prompt, a reference answer or a response: its two ends where it is longer


class SampleLog:
    """Keeps a bounded number of samples in rollout_samples.jsonl, which a resumed run writes as one that never stopped.

    Of several processes process 0 writes. The file is replaced whole at every rollout.
    """

    def __init__(self, folder: Path, watch: WatchConfig, updates_per_rollout: int):
        self.path, self._watch, self._every = Path(folder) / SAMPLES_FILE, watch, updates_per_rollout
        self._rows: list[dict] = []

    def begin(self, rollout_start: int) -> None:
        """Keeps the rows of rollouts before the one that starts at an update; a restored run writes the others again.

        Raises ValueError, naming file and line, for a damaged row.
        """
        if hosts.is_writer():
            self._rows = [row for row in files.read_jsonl(self.path) if row["update"] <= rollout_start]

    def write(self, first_update: int, rows: Sequence[Mapping]) -> None:
        """Adds the rows of the rollout that starts at an update, and drops those of rollouts that are no longer kept."""
        if not hosts.is_writer() or not self._watch.rollout_samples:
            return
        kept = kept_rollouts(first_update // self._every, self._watch.rollouts_kept)
        self._rows = [row for row in self._rows if (row["update"] - 1) // self._every in kept]
        self._rows += [{"update": first_update + 1, **row} for row in rows]
        files.write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in self._rows))


def kept_rollouts(newest: int, count: int) -> set[int]:
    """Returns the numbers of the rollouts that are kept once number `newest` is there, at most `count`.

    These are the newest half and, of those before, every 2^k-th. A rollout that is dropped is never wanted again, so
    what is kept does not depend on where a run was stopped.
    """
    recent = count - count // 2
    earlier = max(newest + 1 - recent, 0)
    stride = 1
    while -(-earlier // stride) > count // 2:
        stride *= 2
    return {*range(0, earlier, stride), *range(earlier, newest + 1)}


def chosen(rewards: np.ndarray, group_size: int, count: int) -> list[int]:
    """Returns the numbers of the samples that are written: of the first groups the best and the worst by reward.

    Of equal rewards the best is the first and the worst the last, so that the two differ in a group of several.
    """
    numbers = []
    for first in range(0, len(rewards), group_size):
        group = rewards[first : first + group_size]
        numbers += dict.fromkeys((first + int(np.argmax(group)), first + len(group) - 1 - int(np.argmin(group[::-1]))))
    return numbers[:count]


def rows(
    numbers: Sequence[int],
    rollout: Rollout,
    advantages: Advantages,
    texts: Sequence[str],
    prompts: Sequence[EncodedPrompt],
    terms: Sequence[Sequence[str]],
) -> list[dict]:
    """Returns the rows of the samples with these numbers, in the form of an evaluation's samples.jsonl and with more.

    `prompts` are those of `numbers`, and `terms` the names of the reward terms that count for each; `texts` are those
    of all samples. An advantage that differs from token to token is its mean.
    """
    return [
        _problem_fields(prompt.problem)
        | {
            "text": _ends(prompt.prefill + texts[number]),
            "tokens": len(rollout.samples[number].token_ids),
            "truncated": bool(rollout.samples[number].truncated),
            "parts": {name: _number(rollout.reward_terms[number, PART_NAMES.index(name)]) for name in names},
            "scorable": bool(rollout.scorable[number]),
            "reward": _number(advantages.rewards[number]),
            "advantage": _number(np.mean(advantages.advantages[number], dtype=np.float64)),
        }
        for number, prompt, names in zip(numbers, prompts, terms, strict=True)
    ]


def _problem_fields(problem: Problem) -> dict[str, str]:
    names = {"problem_id": problem.id, "task": problem.task, "source": problem.source}
    return names | {"prompt": _ends(problem.text), "answer": _ends(problem.reference)}


def _ends(text: str) -> str:
    """Returns a text of at most TEXT_KEPT characters, or the two ends of a longer one with how much is left out."""
    left_out = len(text) - TEXT_KEPT
    half = TEXT_KEPT // 2
    return text if left_out <= 0 else f"{text[:half]} […{left_out} characters left out…] {text[-half:]}"


def _number(value: float) -> float | None:
    """Returns a number with six decimals, which JSON writes shortly; None where it is not finite."""
    return round(float(value), 6) if math.isfinite(value) else None
