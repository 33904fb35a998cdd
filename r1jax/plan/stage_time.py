"""Adds the bounds of a stage's programs up to seconds, hours and cost: at the datasheet's rates, and as expected.

A round is what repeats: in reinforcement learning a rollout with the updates on it, in fine-tuning one update. Grading,
journal, checkpoints, start-up and compilation are not in a round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from r1jax.data.packing import rows_needed
from r1jax.models import flops
from r1jax.models.flops import Work
from r1jax.plan import lengths, roofline
from r1jax.plan.lengths import LengthLaw
from r1jax.plan.roofline import EFFICIENCY, Bound, Placed
from r1jax.schema import GRPOConfig, OptimizerConfig, PackConfig, SamplerConfig, replace


@dataclass(frozen=True)
class Run:
    """A program of a round."""

    bound: Bound  # of one run
    times: float  # that it runs in a round
    sampling: bool = False  # whether it runs on the sampler's devices where there are two sets

    @property
    def round(self) -> Bound:
        """The bound of all its runs in a round."""
        return self.bound * self.times


@dataclass(frozen=True)
class StageTime:
    """The programs of a stage, and what they add up to."""

    runs: Mapping[str, Run]  # by program
    trainer: Placed
    rounds: float
    updates_per_round: int  # 0: the stage makes no updates
    tokens: float  # that a round trains on, prompts included; of a stage without updates, that it samples
    sampler: Placed | None = None  # None: on the trainer's devices
    overlap: bool = False  # whether the sampler's devices draw the next rollout while this one is trained on
    rollout: Mapping[str, float] = field(default_factory=dict)  # how the slots are used
    longest: int = 0  # tokens of a response at most; 0: nothing is sampled
    before: tuple["StageTime", ...] = ()  # the parts of a run with shorter outputs, which come first

    @property
    def chips(self) -> int:
        return self.trainer.chips + (self.sampler.chips if self.sampler else 0)

    def round_s(self, efficiency: float = 1.0) -> float:
        """Returns the seconds of a round: by the bounds, or what is expected at an efficiency."""
        sides = [0.0, 0.0]
        for run in self.runs.values():
            sides[run.sampling] += run.round.bound_s / efficiency
        return max(sides) if self.overlap and self.sampler else sum(sides)

    def column(self, efficiency: float = 1.0, price: float = 0.0) -> dict[str, Any]:
        """Returns the sums at an efficiency, where a chip costs `price` an hour.

        Hours and cost are of the whole stage, `before` included; everything else is of a round, the longest one.
        """
        seconds = self.round_s(efficiency)
        hours = sum(one.round_s(efficiency) * one.rounds for one in (*self.before, self)) / 3600
        needed = sum(run.round.model_flops for run in self.runs.values())
        peak = self.trainer.peak + (self.sampler.peak if self.sampler else 0.0)
        return {
            "seconds": {name: run.round.bound_s / efficiency for name, run in self.runs.items()},
            "round_s": seconds,
            "update_s": seconds / self.updates_per_round if self.updates_per_round else None,
            "tokens_per_s": self.tokens / seconds,
            "tokens_per_s_chip": self.tokens / seconds / self.chips,
            "mfu": needed / (seconds * peak),
            "hours": hours,
            "chip_hours": hours * self.chips,
            "cost": hours * self.chips * price,
        }

    def figures(self, efficiency: float = EFFICIENCY, price: float = 0.0) -> dict[str, Any]:
        """Returns everything as JSON values: `bound` at the datasheet's rates, `expected` at the efficiency."""
        programs = {
            name: run.bound.figures(efficiency) | {"runs": run.times, "sampling": run.sampling}
            for name, run in self.runs.items()
        }
        placed = {"trainer": self.trainer, "sampler": self.sampler or self.trainer}
        return {
            "generation": self.trainer.generation.name,
            "chips": self.chips,
            "mesh": {name: {k: v for k, v in one.sizes.items() if v > 1} for name, one in placed.items()},
            "rounds": self.rounds + sum(one.rounds for one in self.before),
            "phases": [
                {
                    "max_new_tokens": one.longest,
                    "rounds": one.rounds,
                    "round_s": {"bound": one.round_s(), "expected": one.round_s(efficiency)},
                }
                for one in (*self.before, self)
            ],
            "updates_per_round": self.updates_per_round,
            "tokens_per_round": self.tokens,
            "rollout": dict(self.rollout),
            "efficiency": efficiency,
            "price_per_chip_hour": price,
            "programs": programs,
            "bound": self.column(1.0, price),
            "expected": self.column(efficiency, price),
        }


def sampling(
    placed: Placed, settings: SamplerConfig, law: LengthLaw, prompt_tokens: float, prompts: int, samples: int
) -> tuple[dict[str, Run], dict[str, float]]:
    """Returns the programs that draw `samples` responses to each of `prompts` prompts, and how the slots are used.

    Raises ValueError for prompts that are longer than the sampler takes.
    """
    if prompt_tokens > settings.max_prompt_tokens:
        raise ValueError(
            f"plan: prompts of {prompt_tokens:g} tokens exceed config.sampler.max_prompt_tokens="
            f"{settings.max_prompt_tokens}"
        )
    drawn = law.lengths(prompts * samples)
    used = lengths.occupancy(drawn, settings.slots, prompt_tokens, settings.steps_per_dispatch)
    bucket = min((b for b in settings.prefill_buckets if b >= prompt_tokens), default=settings.max_prompt_tokens)
    runs = {
        "prefill": Run(roofline.prefill(placed, prompt_tokens, bucket), prompts, sampling=True),
        "decode": Run(roofline.rollout(placed, used), 1, sampling=True),
    }
    summary = {
        "samples": len(drawn),
        "mean_tokens": used.tokens / len(drawn),
        "longest_tokens": law.longest_of(len(drawn)),
        "cut_share": float((drawn >= law.longest).mean()),
        "decode_steps": used.total_steps,
        "occupancy": used.share,
        "tail_share": used.tail_share,
        "mean_context": used.mean_context,
    }
    return runs, summary


def sampled(
    placed: Placed, settings: SamplerConfig, law: LengthLaw, prompt_tokens: float, prompts: int, samples: int
) -> StageTime:
    """Returns the time of a stage that only samples, such as an evaluation; ValueError as `sampling`."""
    runs, summary = sampling(placed, settings, law, prompt_tokens, prompts, samples)
    tokens = summary["samples"] * summary["mean_tokens"]
    return StageTime(runs, placed, 1, 0, tokens, rollout=summary, longest=law.longest)


def fine_tuned(
    placed: Placed, pack: PackConfig, optimizer: OptimizerConfig, law: LengthLaw, examples: int, updates: int
) -> StageTime:
    """Returns the time of `updates` updates on `examples` examples each, whose whole lengths have this law.

    A reward model's pair is two examples. Raises ValueError for a row that is shorter than the longest example.
    """
    sizes = law.lengths(examples).tolist()
    work, micro_batches = flops.of_samples(sizes), _micro_batches(sizes, pack)
    rows = pack.rows_per_micro_batch, pack.row_tokens, micro_batches
    return StageTime(
        {"update": Run(roofline.update(placed, *rows, work, optimizer), 1)}, placed, updates, 1, work.tokens
    )


def reinforced(
    trainer: Placed,
    settings: SamplerConfig,
    grpo: GRPOConfig,
    pack: PackConfig,
    optimizer: OptimizerConfig,
    law: LengthLaw,
    prompt_tokens: float,
    sampler: Placed | None = None,
) -> StageTime:
    """Returns the time of an RL stage whose responses have this law, with a critic for grpo.advantage=gae.

    `sampler` is the mesh of its own devices where the stage is disaggregated. Raises ValueError for rows
    or prompts that are too short.
    """
    updates, samples = grpo.updates_per_rollout, grpo.prompts_per_update * grpo.group_size
    runs, summary = sampling(
        sampler or trainer, settings, law, prompt_tokens, updates * grpo.prompts_per_update, grpo.group_size
    )
    sizes = [length + prompt_tokens for length in law.lengths(updates * samples).tolist()]
    whole = flops.of_samples(sizes)
    one = Work(whole.tokens / updates, whole.pairs / updates, whole.read / updates)
    batches = [sizes[first : first + samples] for first in range(0, len(sizes), samples)]
    micro_batches = sum(_micro_batches(batch, pack) for batch in batches)
    rows, network = (pack.rows_per_micro_batch, pack.row_tokens), trainer.network
    runs["reshard"] = Run(roofline.reshard(trainer, optimizer.param_dtype), 1, sampling=True)
    scored = grpo.uses_reference + (grpo.old_logp == "recomputed")
    critic = replace(trainer, network=replace(network, scalar_head=True))
    mean = micro_batches / updates
    for name, placed, times in (("", trainer, scored), ("critic_", critic, int(grpo.advantage == "gae"))):
        if times:
            runs[f"{name}scoring"] = Run(roofline.scoring(placed, *rows, micro_batches, whole), times)
        if placed is trainer or times:
            runs[f"{name}update"] = Run(roofline.update(placed, *rows, mean, one, optimizer), updates)
    return StageTime(
        runs,
        trainer,
        grpo.updates / updates,
        updates,
        whole.tokens,
        sampler,
        overlap=grpo.rollouts_ahead > 0,
        rollout=summary,
        longest=law.longest,
    )


def _micro_batches(sizes: Sequence[float], pack: PackConfig) -> int:
    """Returns how many micro-batches samples of these tokens fill. Prompts are not shared."""
    return -(-rows_needed([round(size) for size in sizes], pack.row_tokens) // pack.rows_per_micro_batch)
