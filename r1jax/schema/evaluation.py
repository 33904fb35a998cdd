"""How a stage's result is measured, at its end and between its updates, and what it must reach."""

from dataclasses import dataclass, replace

from r1jax.schema.checks import Check, Checked, at_least


@dataclass(frozen=True)
class EvalConfig(Checked):
    """k samples per held-out problem; pass@1 is their mean (P2 D.1)."""

    samples_per_problem: int = 5
    max_problems: int = 0  # 0 takes all
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = True  # also one greedy sample per problem
    pass_at: tuple[int, ...] = ()  # the k of pass@k, estimated from pass@1's samples; each at most their number
    consensus_problems: int = 0  # cons@k is measured on this many problems; 0 leaves it out
    consensus_samples: int = 16  # the k of cons@k

    checks = (
        *at_least(1, "samples_per_problem", "consensus_samples"),
        *at_least(0, "max_problems", "consensus_problems"),
        Check("temperature", lambda c: c.temperature >= 0, "must be 0 (greedy) or more"),
        Check("top_p", lambda c: 0 < c.top_p <= 1, "must be in (0, 1]"),
        Check(
            "pass_at",
            lambda c: not _beyond_samples(c),
            lambda c: (
                f": k={_beyond_samples(c)[0]} must be between 1 and samples_per_problem={c.samples_per_problem}; raise "
                "evaluation.samples_per_problem"
            ),
        ),
    )


def _beyond_samples(config: EvalConfig) -> list[int]:
    """Returns the k of pass_at that exceed the samples of a problem, or are below 1."""
    return [k for k in config.pass_at if not 1 <= k <= config.samples_per_problem]


@dataclass(frozen=True)
class TrainEvalConfig(Checked):
    """Evaluations between the updates of a stage, by its EvalConfig, and the figure that chooses the best weights."""

    every: int = 0  # updates between two evaluations, the last of which is after the last update; 0: none
    metric: str = "pass@1"  # the weights with the highest are kept; pass@k, greedy and cons@k where they are measured
    samples_per_problem: int = 0  # 0: those of EvalConfig
    max_problems: int = 0  # 0: those of EvalConfig

    checks = at_least(0, "every", "samples_per_problem", "max_problems")

    def settings(self, evaluation: EvalConfig) -> EvalConfig:
        """Returns what is measured between updates; of pass_at what the samples of a problem allow."""
        samples = self.samples_per_problem or evaluation.samples_per_problem
        return replace(
            evaluation,
            samples_per_problem=samples,
            max_problems=self.max_problems or evaluation.max_problems,
            pass_at=tuple(k for k in evaluation.pass_at if k <= samples),
        )

    def metrics(self, evaluation: EvalConfig) -> list[str]:
        """Returns the figures that may choose the best weights: of each a higher value is a better one."""
        measured = self.settings(evaluation)
        voted = [f"cons@{measured.consensus_samples}"] if measured.consensus_problems else []
        several = [f"pass@{k}" for k in measured.pass_at if k > 1]
        greedy = ["greedy"] if measured.greedy else []
        return ["pass@1", *several, *greedy, *voted, "format", "language_consistency"]


@dataclass(frozen=True)
class GateConfig:
    """Figures that a stage's result must reach on held-out problems, else the graph stops; 0 is no gate."""

    pass_at_1: float = 0.0
    language_consistency: float = 0.0
