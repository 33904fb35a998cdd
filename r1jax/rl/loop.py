"""The RL loop: prompts, rollout, rewards, advantages on whole groups, packed mini-batches, updates, metrics, checkpoint."""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1jax.core import distributed, metrics, runtime, sharding, tree
from r1jax.core.checkpoint import CheckpointStore
from r1jax.core.metrics import MetricsLog
from r1jax.data.packing import PREFIXES, PackedBatch, unpack
from r1jax.models import decoder
from r1jax.rewards.compose import PART_NAMES, RULE_PARTS
from r1jax.rewards.model import RewardModel
from r1jax.rewards.pool import RewardPool
from r1jax.rl import losses, notices, rollout, scenarios, schedules
from r1jax.rl.journal import Journal, Rollout
from r1jax.rl.logprobs import ROUTED, Scorer
from r1jax.rl.rollout import EncodedPrompt, Judgement, Mixture
from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import SamplingLaw
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import Config
from r1jax.train import guard, step


@dataclass
class Cursor:
    """Where a run stands; with the arrays, all that a checkpoint holds."""

    update: int = 0  # policy updates made
    rollout_start: int = 0  # update at which the current rollout started
    draw: int = 0  # prompts drawn before the current rollout
    reference_update: int = 0  # rollout start at which the reference was last replaced
    skipped: int = 0  # updates skipped in a row until now


class Timer:
    """Seconds by phase, and other sums, since the last `take`; threads may share it."""

    def __init__(self):
        self._sums: dict[str, float] = {}
        self._lock = threading.Lock()

    def run(self, name: str, function: Callable, *arguments):
        started = time.perf_counter()
        result = function(*arguments)
        self.add(**{f"{name}_s": time.perf_counter() - started})
        return result

    def add(self, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        with self._lock:
            sums, self._sums = self._sums, {}
        return sums


class PolicyTraining:
    """The parts of one RL run and its state; `run` is the loop."""

    def __init__(
        self,
        config: Config,
        tokenizer: Any,
        mesh: Mesh,
        prompts: Mixture | Sequence[EncodedPrompt],
        params: decoder.Params,
        folder: Path,
        on_update: Callable[[int, dict[str, float], dict[str, float]], None] = lambda update, row, timing: None,
        describe: Callable[[list[str]], dict[str, float]] = lambda texts: {},
        later: tuple[int, Sequence[Sequence[EncodedPrompt]], Sequence[float]] | None = None,
        sampler_mesh: Mesh | None = None,
        reward_models: Mapping[str, RewardModel] | None = None,
    ):
        """`tokenizer` gives stop_ids and decode_batch; `describe` adds figures about a rollout's texts to its metrics.

        `later` is (update, sources, weights): the mixture of prompts from that update on, in place of `prompts`. The
        sampler lies on `sampler_mesh`, by default on `mesh`. `reward_models` score the samples of their task.
        """
        self.config, self.tokenizer, self.mesh, self.folder, self.on_update = config, tokenizer, mesh, folder, on_update
        self.describe, self.reward_models = describe, dict(reward_models or {})
        self.watched: list[dict] | None = None  # figures of the rollouts until now, where reward models are watched
        config.require_mixture()
        self.prompts = rollout.PromptPhases(prompts, later, config)
        _check_row(config, self.prompts.all)
        model = config.model
        loss = losses.make_loss(model, config.grpo, trained_chunk=config.pack.trained_chunk)
        self.trainer = step.Trainer(model, config.optimizer, mesh, loss, config.grpo.updates)
        self.scorer = Scorer(model, mesh, offloaded=config.grpo.offload_reference)
        placed = self.trainer.param_shardings
        self.reference_shardings = sharding.on_host(placed) if config.grpo.offload_reference else placed
        recorded = config.grpo.routing_replay  # nothing else reads the experts of a rollout
        self.sampler = RolloutSampler(
            Engine(
                model,
                config.sampler,
                sampler_mesh or mesh,
                tokenizer.stop_ids,
                tokenizer,
                record_experts=recorded,
            )
        )
        self._compute = tree.copier(model.compute_dtype, self.reference_shardings)
        self.state, self.reference, self.cursor = self.trainer.init(params), None, Cursor()
        self.store = CheckpointStore(folder / "checkpoints", config.checkpointing.keep)
        self.journal, self.log, self.timer = Journal(folder / "journal"), MetricsLog(folder), Timer()
        self.skipped = guard.SkippedUpdates(config.stage, config.optimizer.max_skipped_updates)
        self.programs = runtime.ProgramSet()
        self.phase_file = folder / "phase"

    def run(self) -> decoder.Params:
        """Trains to the last update, resuming from the newest checkpoint, and returns the float32 weights."""
        self.resume()
        self.warm_up()
        with RewardPool(self.config.reward) as pool, self.ahead():
            while self.cursor.update < self.config.grpo.updates:
                start = self.cursor.rollout_start
                self.refresh_reference(start)
                scored = self.journal.read(start) or self.journal.write(start, self.next_rollout(start, pool))
                self.look_ahead(scored, start, pool)
                scored = self.with_values(scored, start)
                judged, summary = self.judge(scored, start)
                batches = rollout.mini_batches(scored, start, self.config)
                for packed in self.packed(scored, batches[self.cursor.update - start :], judged, start):
                    arrays, filled = self.score_batch(packed, start)
                    mismatch = self.check_replay(arrays, filled, start)
                    stats = self.update(arrays, filled, start)
                    self.record(stats, summary | mismatch)
                    if self.cursor.update == start + len(batches):
                        self.cursor.rollout_start = self.cursor.update
                        self.cursor.draw += scored.draws
                    self.checkpoint()
        self.close()
        return self.state.params

    def ahead(self) -> contextlib.AbstractContextManager:
        """Returns the context in which rollouts run ahead; leaving it, however, ends them. Here there are none."""
        return contextlib.nullcontext()

    def resume(self) -> None:
        """Loads the newest checkpoint, if there is one, and drops metrics rows after it."""
        number = self.store.latest()
        if number is None:
            self.reference = self._compute(self.state.params) if self.config.grpo.uses_reference else None
        else:
            self.cursor = Cursor(**self.store.record(number))
            self.take(self.store.restore(number, self.targets()))
            self.skipped.in_a_row = self.cursor.skipped
        self.log.truncate(self.cursor.update)

    def items(self) -> dict[str, Any]:
        """Returns what a checkpoint holds; the reference only where the loss has a KL term."""
        kept = {"reference": self.reference} if self.config.grpo.uses_reference else {}
        return {"params": self.state.params, "optimizer": self.state.optimizer} | kept

    def targets(self) -> dict[str, Any]:
        """Returns the shapes and shardings of `items`."""
        target = self.trainer.restore_target()
        found = {"params": target.params, "optimizer": target.optimizer}
        if self.config.grpo.uses_reference:
            shapes = jax.eval_shape(self._compute, target.params)
            place = lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)  # noqa: E731
            found["reference"] = jax.tree.map(place, shapes, self.reference_shardings)
        return found

    def take(self, items: dict[str, Any]) -> None:
        """Takes over restored `items`; the cursor is set."""
        self.reference = items.get("reference")
        self.state = self.trainer.state(items["params"], items["optimizer"], self.cursor.update)

    def warm_up(self) -> None:
        """Compiles every program once, on data that leaves no trace, and freezes their number."""
        self.phase("warm_up")
        self.sampler.warm_up(self.sampler_weights())
        size = self.config.pack
        shape = (rollout.micro_batches(self.config), size.rows_per_micro_batch, size.row_tokens)
        names = ("tokens", "targets", "positions", "segments")
        arrays = {name: np.zeros(shape, np.int32) for name in names}
        arrays |= {name: np.zeros(shape, np.float32) for name in ("loss_mask", *self.batch_fields())}
        if self.config.grpo.routing_replay:
            model = self.config.model
            arrays[ROUTED] = np.full((*shape, model.num_moe_layers, model.num_experts_per_tok), -1, np.int16)
        if size.shared_prompts:
            arrays[PREFIXES] = np.zeros(shape, np.int32)
        self.warm_up_training(arrays)
        for task, model in self.reward_models.items():
            model.warm_up()
            self.programs.add(f"reward_model_{task}", lambda model=model: model.compilations)
        for name in self.sampler.engine.compilations():
            self.programs.add(name, lambda name=name: self.sampler.engine.compilations()[name])
        self.programs.freeze()

    def warm_up_training(self, arrays: dict[str, np.ndarray]) -> None:
        """Compiles what is run on a batch."""
        if self.config.grpo.uses_reference or self.config.grpo.replay_check_every or self.value_scorers():
            self.scorer(self._compute(self.state.params), arrays, 1, 1.0)
        spare = jax.tree.map(jnp.copy, self.state)
        jax.block_until_ready(self.trainer.update(spare, arrays, 1, self.arguments(0)))
        self.programs.add("update", lambda: self.trainer.compilations)
        self.programs.add("reference", lambda: self.scorer.compilations)

    def batch_fields(self) -> tuple[str, ...]:
        """Returns the names of the per-token values of a batch."""
        return losses.fields(self.config.grpo)

    def refresh_reference(self, start: int) -> None:
        """Replaces the reference by the policy at the first rollout at or after each multiple of the interval."""
        every = self.config.grpo.reference_refresh_updates if self.config.grpo.uses_reference else 0
        if start == self.cursor.update and schedules.reference_refresh_due(start, self.cursor.reference_update, every):
            self.reference = self._compute(self.state.params)
            self.cursor.reference_update = start

    def next_rollout(self, start: int, pool: RewardPool) -> Rollout:
        """Returns the scored samples of the rollout that starts at an update, drawn with the weights of now."""
        return self.roll_out(start, pool, self.cursor.draw, self.sampler_weights(), start)

    def look_ahead(self, scored: Rollout, start: int, pool: RewardPool) -> None:
        """Is called before a rollout is trained on; here it does nothing."""

    def sampler_weights(self) -> decoder.Params:
        """Returns the policy as the sampler takes it."""
        return self.sampler.engine.load_params(self.state.params)

    def roll_out(self, start: int, pool: RewardPool, draw: int, weights: decoder.Params, version: int) -> Rollout:
        """Returns the scored samples of the rollout that starts at an update, its first prompt being number `draw`.

        `version` is the number of updates that `weights` have seen. With dynamic sampling, prompts whose rewards tie are
        replaced by further ones, in a bounded number of rounds; what is then missing are tied groups again.
        """
        grpo = self.config.grpo
        updates = schedules.updates_in_rollout(start, grpo.updates, grpo.updates_per_rollout)
        wanted, drawn, parts = updates * grpo.prompts_per_update, 0, []
        for _ in range(1 + grpo.dynamic_sampling_rounds):
            missing = wanted - sum(int(rollout.signals(part, self.config).sum()) for part in parts)
            if missing <= 0:
                break
            parts.append(
                self.sample_and_grade(range(draw + drawn, draw + drawn + missing), start, pool, weights, version)
            )
            drawn += missing
        return parts[0] if len(parts) == 1 else rollout.keep_groups(parts, wanted, self.config)

    def sample_and_grade(
        self, draws: range, start: int, pool: RewardPool, weights: decoder.Params, version: int
    ) -> Rollout:
        """Returns the scored samples of the prompts with the numbers `draws`."""
        config, group = self.config, self.config.grpo.group_size
        prompts = [self.prompts.prompt(draw, start) for draw in draws]
        by_draw = dict(zip(draws, prompts, strict=True))
        grader, timer = rollout.Grader(by_draw, pool, self.tokenizer.decode_batch), Timer()
        requests = rollout.requests_for(prompts, draws, group, self.law(start), config.seed, config.stage, "sample")
        self.phase("rollout")
        begun = time.perf_counter()
        samples = self.sampler.generate(requests, weights, version, lambda done: timer.run("rewards", grader.add, done))
        graded_s = timer.take().get("rewards_s", 0.0)
        seconds, statistics = time.perf_counter() - begun - graded_s, self.sampler.statistics
        self.timer.add(
            rollout_s=seconds,
            rollout_tokens=statistics.tokens,
            rollout_occupied_s=seconds * statistics.occupancy,
            rewards_s=graded_s,
        )
        self.phase("grading")
        parts, scorable = self.timer.run("rewards", grader.scores, samples)
        if self.reward_models:
            given = (parts, samples, self.tokenizer.decode_batch, by_draw, self.reward_models)
            parts = self.timer.run("rewards", scenarios.with_model_rewards, *given)
        usage = pool.take_usage()
        self.timer.add(reward_cache_hits=usage.cache_hits, reward_workers_started=usage.workers_started)
        return Rollout(samples, parts, scorable, len(draws))

    def with_values(self, scored: Rollout, start: int) -> Rollout:
        """Returns the rollout with what the trainer says of its tokens before the first update, where that is needed."""
        scorers = self.value_scorers()
        if set(scorers) <= set(scored.values):
            return scored
        longest = self.law(start).max_new_tokens
        blank = Judgement(*np.zeros((2, len(scored)), np.float32), *np.ones((3, len(scored)), bool))
        values = {name: [np.empty(0)] * len(scored) for name in scorers}
        for chosen in rollout.mini_batches(scored, start, self.config):
            packed = rollout.pack_mini_batch(scored, chosen, blank, self.config, longest)
            for name, (scorer, weights) in scorers.items():
                found = self.timer.run("reference", self.score, scorer, weights, packed, start)
                rows = unpack(found.reshape(packed.tokens.shape), packed)[: len(chosen)]  # prefixes stand after
                for index, row in zip(chosen, rows, strict=True):
                    values[name][index] = row[-len(scored.samples[index].token_ids) :]
        return self.journal.write(start, dataclasses.replace(scored, values=values))

    def value_scorers(self) -> dict[str, tuple[Scorer, decoder.Params]]:
        """Returns the scorer and weights of each value that `with_values` adds, by name."""
        found = {}
        if self.config.grpo.old_logp == "recomputed":
            found["old_logp"] = self.scorer, self._compute(self.state.params)
        if self.config.grpo.uses_reference and self.config.grpo.kl_placement == "reward":
            found["reference_logp"] = self.scorer, self.reference
        return found

    def judge(self, scored: Rollout, start: int) -> tuple[Judgement, dict[str, float]]:
        """Returns (what the scores come to, summary of the rollout for its metrics rows)."""
        beta = self.kl_coef(start)
        judged = rollout.judge(scored, self.config, self.law(start).max_new_tokens, beta)
        for line in notices.of_rollout(scored, judged, self.config.grpo, beta):
            self.say(f"update {start + 1}: {line}")
        texts = self.tokenizer.decode_batch([sample.token_ids for sample in scored.samples])
        counted = np.flatnonzero(scored.scorable)
        summary = {name: _mean(scored.parts[counted, PART_NAMES.index(name)]) for name in RULE_PARTS}
        if self.reward_models:
            graded = counted[self.graded(scored, start)[counted]]
            del summary["accuracy"]
            if len(graded):
                summary["accuracy"] = _mean(scored.parts[graded, PART_NAMES.index("accuracy")])
        summary |= {
            "reward": _mean(judged.rewards[counted]),
            "unscorable": float(len(scored) - len(counted)),
            "zero_variance_groups": float(1 - judged.signal.mean()),
            "length": _mean([len(sample.token_ids) for sample in scored.samples]),
            "truncated": _mean([sample.truncated for sample in scored.samples]),
        }
        grpo, lengths = self.config.grpo, [len(sample.token_ids) for sample in scored.samples]
        updates = schedules.updates_in_rollout(start, grpo.updates, grpo.updates_per_rollout)
        summary["sampled_tokens"] = (sum(lengths) + scored.dropped_tokens) / updates
        if grpo.dynamic_sampling_rounds:
            left = [] if scored.dropped_parts is None else scored.dropped_parts[:, PART_NAMES.index("accuracy")]
            accuracies = [*scored.parts[:, PART_NAMES.index("accuracy")], *left]
            summary |= {"prompts_drawn": float(scored.draws), "drawn_accuracy": _mean(accuracies)}
        if self.reward_models:
            summary |= self.against_verified(scored, start)
        return judged, summary | self.describe(texts)

    def graded(self, scored: Rollout, start: int) -> np.ndarray:
        """Returns whether each sample's accuracy is a grader's, [N] bool: no reward model speaks in its place."""
        tasks = [self.prompts.prompt(sample.request_id, start).problem.task for sample in scored.samples]
        return ~np.isin(tasks, list(self.reward_models))

    def against_verified(self, scored: Rollout, start: int) -> dict[str, float]:
        """Returns what the reward models say beside what can be verified, and warns where the two part ways."""
        group, given = self.config.grpo.group_size, self.config.scenarios
        prompts = [self.prompts.prompt(sample.request_id, start) for sample in scored.samples[::group]]
        now = scenarios.figures(scored, prompts, self.reward_models, group)
        if not now:
            return {}
        if self.watched is None:
            every = self.config.grpo.updates_per_rollout
            rows = distributed.decide(metrics.read, self.folder, name=f"the metrics of {self.folder}")
            self.watched = [row for row in rows if (row["update"] - 1) % every == 0 and row["update"] <= start]
        told, line = scenarios.watch(self.watched, now, given.hacking_window, given.hacking_errors)
        self.watched.append(now)
        if line:
            self.say(f"update {start + 1}: {line}")
        return now | told

    def packed(
        self, scored: Rollout, batches: list[np.ndarray], judged: Judgement, start: int
    ) -> Iterator[PackedBatch]:
        """Yields the mini-batches packed; the next one is packed in a thread while the device updates on this one."""
        longest = self.law(start).max_new_tokens
        with ThreadPoolExecutor(1, thread_name_prefix="pack") as worker:
            pack = lambda chosen: rollout.pack_mini_batch(scored, chosen, judged, self.config, longest)  # noqa: E731
            following = worker.submit(pack, batches[0])
            for number in range(1, len(batches) + 1):
                packed = following.result()
                following = worker.submit(pack, batches[number]) if number < len(batches) else None
                yield packed

    def score_batch(self, packed: PackedBatch, start: int) -> tuple[dict, int]:
        """Returns (arrays [M, R, T], filled micro-batches) of one mini-batch, scored under the reference."""
        self.phase("pack")
        fields = tuple(name for name in self.batch_fields() if name in packed.values)
        arrays = step.batch_arrays(packed, self.config.pack, rollout.micro_batches(self.config), fields)
        if "reference_logp" in self.batch_fields() and "reference_logp" not in packed.values:
            arrays["reference_logp"] = self.timer.run(
                "reference", self.score, self.scorer, self.reference, packed, start
            )
        return arrays, step.filled_micro_batches(packed, self.config.pack)

    def score(self, scorer: Scorer, weights: decoder.Params, packed: PackedBatch, start: int) -> np.ndarray:
        """Returns what a scorer says of a packed mini-batch under `weights`, float32 [M, R, T]."""
        arrays = step.batch_arrays(packed, self.config.pack, rollout.micro_batches(self.config), ())
        filled = step.filled_micro_batches(packed, self.config.pack)
        return scorer(weights, arrays, filled, self.law(start).temperature or 1.0)

    def check_replay(self, arrays: dict, filled: int, start: int) -> dict[str, float]:
        """Returns the mismatch of sampler and trainer if the live routers chose; {} unless a check is due."""
        grpo = self.config.grpo
        rollouts, every = start // grpo.updates_per_rollout, grpo.replay_check_every
        if not every or rollouts % every or self.cursor.update != start:
            return {}
        live = arrays | {ROUTED: np.full_like(arrays[ROUTED], -1)}
        logp = self.scorer(self._compute(self.state.params), live, filled, self.law(start).temperature or 1.0)
        found = np.abs(logp - arrays["behaviour_logp"])[arrays["loss_mask"] > 0]
        return {"mean_logprob_difference_without_replay": _mean(found)}

    def update(self, arrays: dict, filled: int, start: int) -> dict[str, float]:
        """Makes one policy update and returns its statistics."""
        self.phase("update")

        def run():
            self.state, stats = self.trainer.update(self.state, arrays, filled, self.arguments(start))
            return {name: float(value) for name, value in jax.device_get(stats).items()}

        stats = self.timer.run("update", run)
        self.cursor.update += 1
        self.programs.check()
        return stats

    def record(self, stats: dict[str, float], summary: dict[str, float]) -> None:
        """Writes the metrics row of the update just made, and what it took apart from it.

        Raises ValueError when too many updates in a row were skipped.
        """
        tokens = max(stats["tokens"], 1.0)
        row = summary | {name: value / tokens if name in losses.TOKEN_MEANS else value for name, value in stats.items()}
        if self.cursor.update - 1 > self.cursor.rollout_start or row.get("staleness"):
            # Only the first update of a rollout runs the very weights that sampled it.
            row["max_policy_shift"] = row.pop("max_logprob_difference")
            row["mean_policy_shift"] = row.pop("mean_logprob_difference")
        timing = self.timer.take()
        if "rollout_s" in timing:
            timing["rollout_tokens_per_s"] = timing.pop("rollout_tokens") / timing["rollout_s"]
            timing["slot_occupancy"] = timing.pop("rollout_occupied_s") / timing["rollout_s"]
        row = guard.recorded(row)
        self.log.write(self.cursor.update, row, timing)
        self.on_update(self.cursor.update, row, timing)
        self.skipped.note(self.cursor.update, stats)
        self.cursor.skipped = self.skipped.in_a_row

    def checkpoint(self) -> None:
        """Saves everything when it is due, then drops rollouts that no resume can need."""
        update, every = self.cursor.update, self.config.checkpointing.every_updates
        if update % every and update != self.config.grpo.updates:
            return
        self.phase("checkpoint")
        self.timer.run("checkpoint", self.store.save, update, self.items(), vars(self.cursor))
        self.journal.prune(self.cursor.rollout_start)

    def law(self, start: int) -> SamplingLaw:
        """Returns the sampling law of the rollout that starts at an update."""
        s = self.config.sampler
        longest = int(schedules.value_at(s.max_new_tokens_schedule, start, s.max_new_tokens))
        return SamplingLaw(s.temperature, s.top_p, s.top_k, longest, self.tokenizer.stop_ids)

    def arguments(self, start: int) -> losses.LossArguments:
        """Returns the loss arguments of the rollout that starts at an update."""
        return losses.arguments(self.config.grpo, self.kl_coef(start), self.config.sampler.temperature)

    def kl_coef(self, start: int) -> float:
        """Returns beta of the rollout that starts at an update."""
        return schedules.value_at(self.config.grpo.kl_coef_schedule, start, self.config.grpo.kl_coef)

    def say(self, line: str) -> None:
        """Prints a line about this run; of several processes, process 0 does."""
        if distributed.is_writer():
            print(f"{self.config.stage} {line}", file=sys.stderr, flush=True)

    def phase(self, name: str) -> None:
        """Notes what the run is doing, for people and scripts that watch it from outside."""
        if distributed.is_writer():
            self.phase_file.write_text(f"{name} {self.cursor.update}\n")

    def close(self) -> None:
        self.phase("done")
        self.store.close()
        self.log.close()


def _check_row(config: Config, prompts: Sequence[EncodedPrompt]) -> None:
    """Raises ValueError when a packed row cannot hold the longest prompt with a full response."""
    if not prompts:
        raise ValueError(f"{config.stage}: no training prompts")
    longest = max(len(prompt.ids) for prompt in prompts)
    if longest + config.sampler.max_new_tokens > config.pack.row_tokens:
        raise ValueError(
            f"config.pack.row_tokens={config.pack.row_tokens} cannot hold the longest prompt ({longest} tokens) and "
            f"config.sampler.max_new_tokens={config.sampler.max_new_tokens}; raise it to "
            f"{longest + config.sampler.max_new_tokens}"
        )


def _mean(values: Any) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else 0.0
