"""Log-probabilities of tokens under the model, on the mesh in force: every loss computes them here."""

from typing import Any

import jax

from r1jax.core import sharding
from r1jax.kernels import fused_logprob, trained_logprob
from r1jax.schema import ComputeConfig


def settings(compute: ComputeConfig) -> dict[str, Any]:
    """Returns the arguments that the functions below take from config.compute."""
    return dict(implementation=compute.logprob_implementation, vocab_used=compute.vocab_used)


@jax.named_scope("head")
def token_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    temperature: jax.typing.ArrayLike = 1.0,
    chunk_tokens: int = 0,
    chunk_vocab: int = 0,
    implementation: str = "auto",
    vocab_used: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Returns (log p(target), entropy), float32 [B, T] in nats, as `fused_logprob.token_logprobs` does.

    Rows, tokens and the output matrix are sharded by the logical axes batch, sequence, embed and vocab on the mesh in
    force. `implementation` is config.compute.logprob_implementation, `vocab_used` is config.compute.vocab_used. The
    entropy has a gradient; a loss that only reports it must stop it.
    """
    layout, kernel = _layout(targets.shape, unembedding.shape), _kernel(implementation)
    return fused_logprob.token_logprobs(
        hidden, unembedding, targets, temperature, chunk_tokens, chunk_vocab, layout, kernel, vocab_used
    )


def scored_logprobs(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    temperature: jax.typing.ArrayLike = 1.0,
    chunk_tokens: int = 0,
    trained_chunk: int = 0,
    implementation: str = "auto",
    vocab_used: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Returns (log p(target), entropy), float32 [B, T] in nats; values where mask [B, T] is 0 are undefined.

    With trained_chunk > 0, on a mesh of one device, only the positions where mask > 0 are scored, that many at a time
    (`trained_logprob.trained_logprobs`). Otherwise all are, as in `token_logprobs`.
    """
    if trained_chunk and _layout(targets.shape, unembedding.shape) is None:
        kernel = _kernel(implementation)
        with jax.named_scope("head"):
            return trained_logprob.trained_logprobs(
                hidden, unembedding, targets, mask, temperature, trained_chunk, kernel, vocab_used
            )
    return token_logprobs(
        hidden,
        unembedding,
        targets,
        temperature,
        chunk_tokens,
        implementation=implementation,
        vocab_used=vocab_used,
    )


def _kernel(implementation: str) -> fused_logprob.KernelChoice | None:
    if not sharding.use_pallas("logprob_implementation", implementation):
        return None
    device = sharding.device()
    return fused_logprob.KernelChoice(device.device_kind, device.platform == "cpu", backward=implementation == "pallas")


def _layout(rows: tuple[int, ...], matrix: tuple[int, ...]) -> fused_logprob.Layout | None:
    mesh = sharding.current_mesh()
    if mesh is None or mesh.size == 1:
        return None
    embed, vocab = map(sharding.mesh_axes, sharding.partition(("embed", "vocab"), matrix, mesh))
    return fused_logprob.Layout(mesh, sharding.partition(("batch", "sequence"), rows, mesh), vocab, embed)
