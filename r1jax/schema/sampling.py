"""How rollouts are drawn."""

from dataclasses import dataclass

from r1jax.schema.checks import Check, Checked, Schedule, at_least, rising


@dataclass(frozen=True)
class SamplerConfig(Checked):
    """The rollout engine's slots and lengths, and the sampling parameters."""

    slots: int = 64  # concurrent decodes
    steps_per_dispatch: int = 8  # K: tokens per device call
    max_prompt_tokens: int = 16
    max_new_tokens: int = 80
    max_new_tokens_schedule: Schedule = ()  # overrides max_new_tokens from each update on; () keeps it
    temperature: float = 1.0
    top_p: float = 1.0  # 1 in RL: truncation biases the ratio
    top_k: int = 0  # 0 is off
    windows: tuple[int, ...] = ()  # cache lengths that decode is compiled for, rising; () is one, the full length
    prefill_buckets: tuple[int, ...] = ()  # padded prompt lengths; () is one, max_prompt_tokens
    stop_ids: tuple[int, ...] = ()  # tokens that end a response, besides those of tokenizer and checkpoint
    stop_strings: tuple[str, ...] = ()  # texts that end a response, at the token which completes one
    stall_deadline_s: float = 600.0  # a dispatch that makes no progress for this long is an error

    checks = (
        *at_least(1, "slots"),
        Check("temperature", lambda c: c.temperature >= 0, "must be 0 (greedy) or more"),
        Check("top_p", lambda c: 0 < c.top_p <= 1, "must be in (0, 1]"),
        Check("stop_ids", lambda c: min(c.stop_ids, default=0) >= 0, ": a token's id is 0 or more"),
        Check("stop_strings", lambda c: all(c.stop_strings), ": an empty text ends nothing"),
        *at_least(1, "max_new_tokens"),
        rising("max_new_tokens_schedule"),
        Check(
            "max_new_tokens",
            lambda c: c.longest_scheduled <= c.max_new_tokens,
            "is below max_new_tokens_schedule's {c.longest_scheduled:g}: the cache is made for max_new_tokens",
        ),
    )

    @property
    def longest_scheduled(self) -> float:
        """Largest response length of max_new_tokens_schedule, 0 without one."""
        return max((value for _, value in self.max_new_tokens_schedule), default=0)
