"""Draws the samples of a rollout and scores them while others are still drawn."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from r1jax.core import hosts
from r1jax.core.metrics import Timer
from r1jax.models import decoder, flops
from r1jax.rewards.pool import RewardPool
from r1jax.rl import reward_model_monitor, schedules
from r1jax.rl import rollout as rollouts
from r1jax.rl.journal import Rollout
from r1jax.rl.recorder import Recorder
from r1jax.rl.settings import RunSettings, at_update
from r1jax.rl.state import RunInputs
from r1jax.sampler.build import build_sampler, sampling_params
from r1jax.sampler.sample import RolloutSample
from r1jax.sampler.scheduler import RolloutSampler


class Sampling:
    """The sampler of a run with its prompts, its pool of graders and its reward models."""

    def __init__(self, config: RunSettings, inputs: RunInputs, recorder: Recorder):
        self.config, self.inputs, self.recorder = config, inputs, recorder
        self.pool: RewardPool | None = None  # between `open` and `close`
        self.sampler = self._build(at_update(config, 0))
        self._longest: RolloutSampler | None = None  # for evaluations, while the rollouts' is shorter

    def open(self) -> None:
        self.pool = RewardPool(self.config.reward)

    def close(self) -> None:
        assert self.pool is not None
        self.pool.close()

    def _build(self, settings: RunSettings) -> RolloutSampler:
        mesh, tokenizer = self.inputs.sampler_mesh or self.inputs.mesh, self.inputs.tokenizer
        record_experts = settings.grpo.routing_replay  # nothing else reads the experts of a rollout
        sampler = build_sampler(settings.network, settings.sampler, mesh, tokenizer, record_experts)
        if self.inputs.sampler_mesh is None:
            sampler.between_dispatches = hosts.between_dispatches()
        return sampler

    def warm_up(self, first_update: int, weights: Callable[[], decoder.Params]) -> None:
        """Compiles the sampler of the rollout that starts at an update, with `weights`, and the reward models."""
        if not self._fit(first_update, weights):
            self._warm_up_sampler(weights)
        for task, model in self.inputs.reward_models.items():
            model.warm_up()
            self.recorder.run.programs.add(f"reward_model_{task}", lambda model=model: model.compilations)

    def _fit(self, first_update: int, weights: Callable[[], decoder.Params]) -> bool:
        """Returns whether the rollout that starts at an update needs another sampler, which is then made and compiled.

        It does where its responses have another limit, and the slots another length, than before.
        """
        settings = at_update(self.config, first_update)
        if settings.sampler.max_new_tokens == self.sampler.engine.sampler.max_new_tokens:
            return False
        self.sampler = self._another(settings)  # the old slots go
        self._warm_up_sampler(weights)
        return True

    def _another(self, settings: RunSettings) -> RolloutSampler:
        sampler = self._build(settings)
        sampler.cancelled = self.sampler.cancelled
        return sampler

    def _warm_up_sampler(self, weights: Callable[[], decoder.Params]) -> None:
        self.sampler.warm_up(weights())
        self._watch(self.sampler, "")

    def _watch(self, sampler: RolloutSampler, prefix: str) -> None:
        """Adds the programs of a sampler that is compiled to those of the run."""
        engine = sampler.engine
        for name in engine.compilations():
            self.recorder.run.programs.add(f"{prefix}{name}", lambda name=name: engine.compilations()[name])

    def evaluate(self, weights: decoder.Params) -> dict[str, float]:
        """Returns the figures of weights on held-out problems, with responses of the longest length of the run.

        Where a schedule of lengths has not come to it, they are drawn by a sampler of their own, compiled once.
        """
        assert self.pool is not None and self.inputs.measure is not None
        if self.sampler.engine.sampler.max_new_tokens == self.config.sampler.max_new_tokens:
            self._longest = None
            figures = self.inputs.measure(self.sampler, weights, self.pool)
        else:
            self.sampler.drop_slots()
            if self._longest is None:
                self._longest = self._another(self.config)
                self._longest.warm_up(weights)
                self._watch(self._longest, "evaluation_")
            figures = self.inputs.measure(self._longest, weights, self.pool)
            self._longest.drop_slots()
        self.pool.take_usage()
        return figures

    def draw(self, first_update: int, first: int, weights: Callable[[], decoder.Params], version: int) -> Rollout:
        """Returns the scored samples of the rollout that starts at an update, its first prompt being number `first`.

        `weights` returns those to draw with, to which `version` updates were made. With dynamic sampling, prompts whose
        rewards tie are replaced by further ones, in a bounded number of rounds; if groups are still missing after
        these, tied ones fill up.
        """
        self._fit(first_update, weights)
        placed, grpo = weights(), self.config.grpo
        updates = schedules.updates_in_rollout(first_update, grpo.updates, grpo.updates_per_rollout)
        wanted, drawn, rounds = updates * grpo.prompts_per_update, 0, []
        for _ in range(1 + grpo.dynamic_sampling_rounds):
            missing = wanted - sum(int(rollouts.signals(one, self.config).sum()) for one in rounds)
            if missing <= 0:
                break
            numbers = range(first + drawn, first + drawn + missing)
            rounds.append(self.sample_and_grade(numbers, first_update, placed, version))
            drawn += missing
        return rounds[0] if len(rounds) == 1 else rollouts.keep_groups(rounds, wanted, self.config)

    def sample_and_grade(self, numbers: range, first_update: int, weights: decoder.Params, version: int) -> Rollout:
        """Returns the scored samples of the prompts with these numbers."""
        config, recorder = self.config, self.recorder
        assert self.pool is not None
        prompts = [self.inputs.prompts.prompt(number, first_update) for number in numbers]
        by_number = dict(zip(numbers, prompts, strict=True))
        grader, grading = rollouts.Grader(by_number, self.pool, self.inputs.tokenizer.decode_batch), Timer()
        group = config.grpo.group_size
        sampling = sampling_params(self.sampler.engine.sampler, self.inputs.tokenizer.stop_ids)
        requests = rollouts.requests_for(prompts, numbers, group, sampling, config.seed, config.stage, "sample")
        recorder.phase("rollout")
        begun = time.perf_counter()
        grade = lambda done: grading.run("rewards", grader.add, done)  # noqa: E731
        samples = self.sampler.generate(requests, weights, version, grade)
        graded_s = grading.take().get("rewards_s", 0.0)
        seconds, statistics = time.perf_counter() - begun - graded_s, self.sampler.statistics
        recorder.timer.add(
            rollout_s=seconds,
            rollout_tokens=statistics.tokens,
            rollout_flops=flops.forward(config.network, sampled_work(samples)).total,
            rollout_occupied_s=seconds * statistics.occupancy,
            rewards_s=graded_s,
        )
        recorder.phase("grading")
        reward_terms, scorable = recorder.timed("rewards", grader.scores, samples)
        if self.inputs.sampler_mesh is None:  # the notice may have ended workers, and their scores do not count then
            hosts.raise_if_preempted("the scores of a rollout")
        if self.inputs.reward_models:
            reward_terms = recorder.timed("rewards", self._with_model_rewards, reward_terms, samples, by_number)
        usage = self.pool.take_usage()
        recorder.timer.add(reward_cache_hits=usage.cache_hits, reward_workers_started=usage.workers_started)
        return Rollout(samples, reward_terms, scorable, len(numbers))

    def _with_model_rewards(
        self, reward_terms: np.ndarray, samples: list[RolloutSample], by_number: dict
    ) -> np.ndarray:
        decode, models = self.inputs.tokenizer.decode_batch, self.inputs.reward_models
        return reward_model_monitor.with_model_rewards(reward_terms, samples, decode, by_number, models)


def sampled_work(samples: Sequence[RolloutSample]) -> flops.Work:
    """Returns the work of drawing the samples: each prompt passes once, and each sampled token is read and passes."""
    lengths: dict[int, tuple[int, list[int]]] = {}
    for sample in samples:
        _, responses = lengths.setdefault(sample.request_id, (len(sample.prompt_ids), []))
        responses.append(len(sample.token_ids))
    return sum((flops.of_group(*one) for one in lengths.values()), flops.Work(0, 0, 0))
