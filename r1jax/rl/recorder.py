"""What a run writes besides its weights: metrics rows, timing, warnings and its current phase."""

import threading
from typing import Any

import numpy as np

from r1jax.core import files, hosts, observe
from r1jax.core.metrics import MetricsLog, Timer
from r1jax.core.say import say
from r1jax.models import utilisation
from r1jax.rewards.compose import PART_NAMES, RULE_PARTS
from r1jax.rl import losses, sample_log, schedules, warnings
from r1jax.rl.journal import Rollout
from r1jax.rl.reward_model_monitor import HackingMonitor
from r1jax.rl.rollout import Advantages
from r1jax.rl.state import RunInputs, RunState
from r1jax.train import guard

ACCURACY = PART_NAMES.index("accuracy")


class Recorder:
    """Writes the metrics rows and timing of a run, and prints its warnings."""

    def __init__(self, run: RunState, inputs: RunInputs):
        self.config, self.run, self.inputs = run.config, run, inputs
        self.log = MetricsLog(inputs.folder, wandb_project=self.config.watch.wandb_project)
        updates = self.config.grpo.updates_per_rollout
        self.samples = sample_log.SampleLog(inputs.folder, self.config.watch, updates)
        self.timer, self._writing_phase = Timer(), threading.Lock()
        self.timed, self.trace = self.timer.run, observe.UpdateTrace(self.config.stage, inputs.folder)
        trainers = utilisation.peak(run.mesh)
        self._peaks = {"reference": trainers, "update": trainers}
        self._peaks["rollout"] = utilisation.peak(inputs.sampler_mesh or inputs.mesh)
        self.skipped = guard.SkippedUpdates(self.config.stage, self.config.optimizer.max_skipped_updates)
        self.monitor = HackingMonitor(self.config, inputs.folder, inputs.prompts, inputs.reward_models)
        self.figures: dict[str, float] = {}  # of the current rollout, in every row of its updates

    def begin(self) -> None:
        """Drops metrics rows and samples after the cursor, which a restored run writes again."""
        self.skipped.in_a_row = self.run.cursor.skipped
        self.log.truncate(self.run.cursor.update)
        self.samples.begin(self.run.cursor.rollout_start)

    def rollout(self, rollout: Rollout, advantages: Advantages, staleness: dict[str, float]) -> None:
        """Computes the figures of a rollout, which go into every row of its updates; prints its warnings, writes samples."""
        first_update, grpo = self.run.cursor.rollout_start, self.config.grpo
        lines = warnings.of_rollout(rollout, advantages, grpo, schedules.kl_coef(grpo, first_update))
        of_models, hacking = self.monitor.figures(rollout, first_update)
        for line in [*lines, *([hacking] if hacking else [])]:
            say(f"{self.config.stage} update {first_update + 1}: {line}")
        texts = self.inputs.tokenizer.decode_batch([sample.token_ids for sample in rollout.samples])
        self.figures = self._rewards(rollout, advantages, first_update) | self._tokens(rollout, first_update)
        self.figures |= of_models | self.inputs.describe(texts) | staleness
        self._write_samples(rollout, advantages, texts, first_update)

    def update(self, stats: dict[str, float]) -> None:
        """Writes the metrics row of the last update, its times to the timing file, and the trace where one is due.

        Raises ValueError when too many updates in a row were skipped.
        """
        cursor, tokens = self.run.cursor, max(stats["tokens"], 1.0)
        means = {name: value / tokens if name in losses.TOKEN_MEANS else value for name, value in stats.items()}
        row = self.figures | means
        if cursor.update - 1 > cursor.rollout_start or row.get("staleness"):
            # Only at the first update of a rollout does the trainer have the weights that sampled it.
            for kind in ("max", "mean"):
                if f"{kind}_logprob_difference" in row:
                    row[f"{kind}_policy_shift"] = row.pop(f"{kind}_logprob_difference")
        timing = self.timer.take()
        if "rollout_s" in timing:
            timing["rollout_tokens_per_s"] = timing.pop("rollout_tokens") / timing["rollout_s"]
            timing["slot_occupancy"] = timing.pop("rollout_occupied_s") / timing["rollout_s"]
        row, timing = guard.recorded(row), utilisation.with_mfu(timing, self._peaks)
        self.log.write(cursor.update, row, timing)
        self.inputs.on_update(cursor.update, row, timing)
        self.skipped.note(cursor.update, stats)
        cursor.skipped = self.skipped.in_a_row
        self.trace.end(cursor.update)

    def phase(self, name: str) -> None:
        """Writes the run's phase to the file `phase`, for people and scripts that watch from outside."""
        if hosts.is_writer():
            with self._writing_phase:  # a rollout has a thread of its own where sampling has its own devices
                files.write_text(self.inputs.folder / "phase", f"{name} {self.run.cursor.update}\n")

    def close(self) -> None:
        self.log.close()

    def _write_samples(self, rollout: Rollout, advantages: Advantages, texts: list[str], first_update: int) -> None:
        """Writes some samples of the rollout, each with the reward terms that are weighed and that something gave it."""
        numbers = sample_log.chosen(advantages.rewards, self.config.grpo.group_size, self.config.watch.rollout_samples)
        prompts = [self.inputs.prompts.prompt(rollout.samples[number].request_id, first_update) for number in numbers]
        weighed = [name for name in PART_NAMES if getattr(self.config.reward, name)]
        models = self.inputs.reward_models  # these give the accuracy of their tasks; no grader does
        terms = [
            [name for name in weighed if name != "accuracy" or prompt.problem.task not in models] for prompt in prompts
        ]
        self.samples.write(first_update, sample_log.rows(numbers, rollout, advantages, texts, prompts, terms))

    def _rewards(self, rollout: Rollout, advantages: Advantages, first_update: int) -> dict[str, float]:
        """Returns the means of the rewards of a rollout, over its scorable samples."""
        scorable = np.flatnonzero(rollout.scorable)
        figures = {name: _mean(rollout.reward_terms[scorable, PART_NAMES.index(name)]) for name in RULE_PARTS}
        if self.inputs.reward_models:  # accuracy is then the mean over samples that a grader scored
            graded = scorable[self.monitor.graded(rollout, first_update)[scorable]]
            del figures["accuracy"]
            if len(graded):
                figures["accuracy"] = _mean(rollout.reward_terms[graded, ACCURACY])
        return figures | {
            "reward": _mean(advantages.rewards[scorable]),
            "unscorable": float(len(rollout) - len(scorable)),
            "zero_variance_groups": float(1 - advantages.has_signal.mean()),
        }

    def _tokens(self, rollout: Rollout, first_update: int) -> dict[str, float]:
        """Returns the figures of lengths and tokens, and with dynamic sampling those of all prompts drawn."""
        grpo, lengths = self.config.grpo, [len(sample.token_ids) for sample in rollout.samples]
        updates = schedules.updates_in_rollout(first_update, grpo.updates, grpo.updates_per_rollout)
        figures = {
            "length": _mean(lengths),
            "truncated": _mean([sample.truncated for sample in rollout.samples]),
            "sampled_tokens": (sum(lengths) + rollout.dropped_tokens) / updates,
        }
        if grpo.dynamic_sampling_rounds:
            dropped = [] if rollout.dropped_terms is None else rollout.dropped_terms[:, ACCURACY]
            accuracies = [*rollout.reward_terms[:, ACCURACY], *dropped]
            figures |= {"prompts_drawn": float(rollout.draws), "drawn_accuracy": _mean(accuracies)}
        return figures


def _mean(values: Any) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else 0.0
