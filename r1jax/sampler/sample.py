"""Requests to the sampler and the samples that it returns."""

from dataclasses import dataclass

import numpy as np

FINISH_REASONS = {1: "stop", 2: "length", 3: "capacity"}  # by the engine's status


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. temperature 0 is greedy; top_p 1 and top_k 0 are off.

    A response ends at one of `stop_ids`, or of config.sampler.stop_ids and config.sampler.stop_strings.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class RolloutRequest:
    """One prompt and the keys of its samples: uint32 [n, 2] from core.rng.sample_keys."""

    request_id: int  # the draw of the prompt stream
    prompt_ids: np.ndarray  # int32 [P]
    keys: np.ndarray
    sampling: SamplingParams


@dataclass(frozen=True, eq=False)
class RolloutSample:
    """One finished response with the token ids exactly as they were decoded."""

    request_id: int
    sample_index: int
    prompt_ids: np.ndarray  # int32 [P]
    token_ids: np.ndarray  # int32 [N], the stop token, or the tokens of a stop string, included
    logps: np.ndarray  # float32 [N], of softmax(logits)
    behaviour_logps: np.ndarray  # float32 [N], of the distribution sampled from (after temperature and filters)
    finish_reason: str  # stop, length or capacity
    weight_version: int
    routed_experts: np.ndarray | None = None  # int16 [P + N, Lm, k], by global layer order

    @property
    def truncated(self) -> bool:
        return self.finish_reason != "stop"
