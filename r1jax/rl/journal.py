"""The journal: a rollout's samples and scores are written to disk before they are used, and a resumed run reads them.

Which samples miss a deadline or are dropped depends on the moment; with the journal a resumed run keeps the same ones.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from r1jax.core import files, hosts
from r1jax.rewards.compose import PART_NAMES
from r1jax.sampler.sample import RolloutSample

UNNAMED_TERMS = ("accuracy", "format", "language")  # the columns of files without part_names


@dataclass(frozen=True, eq=False)
class Rollout:
    """Scored samples in group order."""

    samples: list[RolloutSample]
    reward_terms: np.ndarray  # float32 [N, P] in the order of PART_NAMES
    scorable: np.ndarray  # bool [N]
    draws: int  # prompts drawn for it, dropped ones included
    # The trainer's per-token values before the first update, such as old log-probs: name -> float32 [length] a sample.
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    dropped_terms: np.ndarray | None = None  # float32 [D, P] reward terms of samples that were drawn and left out
    dropped_tokens: int = 0  # tokens of those samples

    def __len__(self) -> int:
        return len(self.samples)


class Journal:
    """A folder with one file a rollout, named by the update at which the rollout starts."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not hosts.is_writer():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_unfinished(self.folder)

    def _path(self, first_update: int) -> Path:
        return self.folder / f"rollout_{first_update:08d}.npz"

    def write(self, first_update: int, rollout: Rollout) -> Rollout:
        """Stores the rollout under a temporary name, renames it and returns it.

        With several processes process 0 writes, and all return when it has.
        """
        hosts.decide(self._store, first_update, rollout, name=f"the journal of rollout {first_update}")
        return rollout

    def _store(self, first_update: int, rollout: Rollout) -> None:
        samples = rollout.samples
        lengths = np.asarray([(len(s.prompt_ids), len(s.token_ids)) for s in samples], np.int32)
        fields: dict[str, Any] = dict(
            parts=rollout.reward_terms,
            part_names=np.asarray(PART_NAMES),
            scorable=rollout.scorable,
            draws=np.int64(rollout.draws),
            lengths=lengths,
            ids=np.asarray([(s.request_id, s.sample_index, s.weight_version) for s in samples], np.int64),
            reasons=np.asarray([s.finish_reason for s in samples]),
            prompts=np.concatenate([s.prompt_ids for s in samples]),
            tokens=np.concatenate([s.token_ids for s in samples]),
            logps=np.concatenate([s.logps for s in samples]),
            behaviour=np.concatenate([s.behaviour_logps for s in samples]),
        )
        if samples[0].routed_experts is not None:
            fields["experts"] = np.concatenate([s.routed_experts for s in samples])
        if rollout.dropped_terms is not None:
            fields |= dict(dropped_parts=rollout.dropped_terms, dropped_tokens=np.int64(rollout.dropped_tokens))
        fields |= {f"value_{name}": np.concatenate(arrays) for name, arrays in rollout.values.items()}
        with files.replacing(self._path(first_update)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **fields)

    def holds(self, first_update: int) -> bool:
        """Returns whether the rollout that starts at an update is stored."""
        return hosts.decide(self._path(first_update).exists, name=f"the journal of rollout {first_update}")

    def read(self, first_update: int) -> Rollout | None:
        """Returns the rollout that starts at an update, or None if it is not stored."""
        if not self.holds(first_update):
            return None
        with np.load(self._path(first_update)) as file:
            f = {name: file[name] for name in file.files}
        prompt_ends, token_ends = np.cumsum(f["lengths"], axis=0).T
        samples = []
        for i, (prompt_length, length) in enumerate(f["lengths"]):
            tokens = slice(token_ends[i] - length, token_ends[i])
            both = prompt_ends[i] + token_ends[i]
            samples.append(
                RolloutSample(
                    request_id=int(f["ids"][i, 0]),
                    sample_index=int(f["ids"][i, 1]),
                    prompt_ids=f["prompts"][prompt_ends[i] - prompt_length : prompt_ends[i]],
                    token_ids=f["tokens"][tokens],
                    logps=f["logps"][tokens],
                    behaviour_logps=f["behaviour"][tokens],
                    finish_reason=str(f["reasons"][i]),
                    weight_version=int(f["ids"][i, 2]),
                    routed_experts=f["experts"][both - prompt_length - length : both] if "experts" in f else None,
                )
            )
        named = {name.removeprefix("value_"): array for name, array in f.items() if name.startswith("value_")}
        values = {name: np.split(array, token_ends[:-1]) for name, array in named.items()}
        names = [str(name) for name in f.get("part_names", UNNAMED_TERMS)]
        dropped = _by_name(f["dropped_parts"], names) if "dropped_parts" in f else None
        reward_terms, dropped_tokens = _by_name(f["parts"], names), int(f.get("dropped_tokens", 0))
        return Rollout(samples, reward_terms, f["scorable"], int(f["draws"]), values, dropped, dropped_tokens)

    def prune(self, before: int) -> None:
        """Removes rollouts that start before an update."""
        if not hosts.is_writer():
            return
        for path in self.folder.glob("rollout_*.npz"):
            if int(path.stem.split("_")[1]) < before:
                path.unlink()

    def drop(self, first_update: int) -> None:
        """Removes the rollout that starts at an update, if it is stored."""
        if hosts.is_writer():
            self._path(first_update).unlink(missing_ok=True)


def _by_name(terms: np.ndarray, names: list[str]) -> np.ndarray:
    """Returns the columns, named `names`, in the order of PART_NAMES; 0 for terms that the file does not have."""
    missing = np.zeros(len(terms), np.float32)
    columns = [terms[:, names.index(name)] if name in names else missing for name in PART_NAMES]
    return np.stack(columns, axis=1)
