"""Model FLOPs: the floating-point operations that a model needs for given lengths, forward and for an update, by part.

Counted are products with weights, 2 operations per weight and token, and attention's products of queries with keys and
of probabilities with values. Attention is causal: a token sees itself and what comes before it in its own sample. A
mixture counts the experts that a token is sent to. Norms, rotations, softmax, the optimiser, padding, recomputed
blocks and whatever else a program does beyond the model's need are left out, so a count depends on lengths alone.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from r1jax.schema import ModelConfig, Network


@dataclass(frozen=True)
class Work:
    """What a forward pass goes over; sums of works are works."""

    tokens: float  # that pass through the layers
    pairs: float  # of a query and a key that it sees, in one head of one layer
    read: float  # tokens at which the output head, or the scalar head, is computed

    def __add__(self, other: Self) -> Self:
        return type(self)(self.tokens + other.tokens, self.pairs + other.pairs, self.read + other.read)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by part of the model."""

    projections: float = 0.0  # attention's products with its weights, and the prediction module's of its two inputs
    scores: float = 0.0  # queries with keys, and probabilities with values
    dense: float = 0.0  # feed-forward of the dense layers
    router: float = 0.0
    experts: float = 0.0  # those that a token is sent to
    shared: float = 0.0  # those that every token uses
    head: float = 0.0  # the output matrix, or the scalar head

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(self.by_part.values(), other.by_part.values(), strict=True)))

    def __mul__(self, factor: float) -> Self:
        return type(self)(*(factor * value for value in self.by_part.values()))

    @property
    def by_part(self) -> dict[str, float]:
        return {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}

    @property
    def total(self) -> float:
        return sum(self.by_part.values())


def of_samples(lengths: Iterable[float], read: float | None = None) -> Work:
    """Returns the work of whole samples of these tokens each; `read` of all their tokens are read (default all)."""
    sizes = list(lengths)
    return Work(sum(sizes), sum(map(causal_pairs, sizes)), sum(sizes) if read is None else read)


def of_group(prompt: float, responses: Iterable[float]) -> Work:
    """Returns the work of responses to one prompt that passes once: sampled, or packed with the prompt shared.

    The tokens read are as many as the responses'.
    """
    sizes = list(responses)
    pairs = causal_pairs(prompt) + sum(prompt * size + causal_pairs(size) for size in sizes)
    return Work(prompt + sum(sizes), pairs, sum(sizes))


def causal_pairs(tokens: float) -> float:
    """Returns the pairs of query and key in one sample."""
    return tokens * (tokens + 1) / 2


def forward(network: Network, work: Work, absorbed: bool = False) -> Flops:
    """Returns the operations of one forward pass, without the prediction module.

    A decode step of S slots that see c keys each is Work(S, S * c, S). With `absorbed` MLA scores the latent itself, as
    decode steps do, which takes more operations a pair and saves the expansion of cached keys; other models are alike.
    """
    c = network.model
    flops = _layers(c, work, c.num_dense_layers, c.num_moe_layers, absorbed)
    return dataclasses.replace(flops, head=_head(network, work))


def prediction(network: Network, work: Work) -> Flops:
    """Returns the operations of the multi-token prediction module, which reads as many tokens; all 0 without one."""
    c = network.model
    sparse = c.num_nextn_predict_layers if c.num_moe_layers else 0
    layers = _layers(c, work, c.num_nextn_predict_layers - sparse, sparse, absorbed=False)
    joined = 2.0 * c.num_nextn_predict_layers * (2 * c.hidden_size) * c.hidden_size * work.tokens
    return layers + Flops(projections=joined, head=c.num_nextn_predict_layers * _head(network, work))


def update(network: Network, work: Work) -> Flops:
    """Returns the operations of training on the work: three forward passes' (arXiv 2001.08361, section 2.1).

    The prediction module is included where its loss has a weight; reward models and critics train none.
    """
    flops = forward(network, work)
    if not network.scalar_head and network.auxiliary.mtp_loss_weight:
        flops += prediction(network, work)
    return flops * 3.0


def per_token(network: Network, context: float, absorbed: bool = False) -> Flops:
    """Returns the operations of one forward pass for a token that sees `context` keys, itself included."""
    return forward(network, Work(1, context, 1), absorbed)


def _layers(c: ModelConfig, work: Work, dense: int, sparse: int, absorbed: bool) -> Flops:
    """Returns the operations of so many dense and mixture layers."""
    weights, scored = (_latent if c.is_mla else _grouped)(c, absorbed)
    layers, expert = dense + sparse, 3.0 * c.hidden_size * c.moe_intermediate_size
    return Flops(
        projections=2.0 * layers * weights * work.tokens,
        scores=2.0 * layers * scored * work.pairs,
        dense=2.0 * dense * 3 * c.hidden_size * c.intermediate_size * work.tokens,
        router=2.0 * sparse * c.hidden_size * c.n_routed_experts * work.tokens,
        experts=2.0 * sparse * expert * c.num_experts_per_tok * work.tokens,
        shared=2.0 * sparse * expert * c.n_shared_experts * work.tokens,
    )


def _head(network: Network, work: Work) -> float:
    c = network.model
    outputs = 1 if network.scalar_head else network.compute.vocab_used or c.vocab_size
    return 2.0 * c.hidden_size * outputs * work.read


def _latent(c: ModelConfig, absorbed: bool) -> tuple[int, int]:
    """Returns MLA's (weights, width of queries and values over all heads) in one layer.

    Folding W_UK into a query and W_UV into an output is as many products as expanding one token's key and value.
    """
    heads, rope = c.num_attention_heads, c.qk_rope_head_dim
    query = c.qk_nope_head_dim + rope
    weights = c.q_lora_rank * (c.hidden_size + heads * query) if c.q_lora_rank else c.hidden_size * heads * query
    weights += c.hidden_size * (c.kv_lora_rank + rope)
    weights += c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    weights += heads * c.v_head_dim * c.hidden_size
    return weights, heads * (2 * c.kv_lora_rank + rope if absorbed else query + c.v_head_dim)


def _grouped(c: ModelConfig, absorbed: bool) -> tuple[int, int]:
    """Returns GQA's (weights, width of queries and values over all heads) in one layer, whose keys are as they are."""
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return 2 * c.hidden_size * (queries + keys), 2 * queries
