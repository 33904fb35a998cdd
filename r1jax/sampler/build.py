"""Builds a sampler, and the parameters it samples with, from the configuration."""

from typing import Any

from jax.sharding import Mesh

from r1jax.sampler.engine import Engine
from r1jax.sampler.sample import SamplingParams
from r1jax.sampler.scheduler import RolloutSampler
from r1jax.schema import Network, SamplerConfig


def build_sampler(
    network: Network, settings: SamplerConfig, mesh: Mesh, tokenizer: Any, record_experts: bool = False
) -> RolloutSampler:
    """Returns a sampler of a model on a mesh; the tokenizer's stop ids end every response.

    With `record_experts` its samples hold the experts that each token was sent to.
    """
    engine = Engine(network, settings, mesh, tokenizer.stop_ids, tokenizer, record_experts=record_experts)
    return RolloutSampler(engine)


def sampling_params(settings: SamplerConfig, stop_ids: tuple[int, ...]) -> SamplingParams:
    """Returns the parameters that config.sampler asks for."""
    return SamplingParams(settings.temperature, settings.top_p, settings.top_k, settings.max_new_tokens, stop_ids)
