"""One GRPO update by Tunix's own loss: `python tunix_update.py SAMPLES.npz CHECKPOINT MICRO_BATCH THREADS`.

Runs in an interpreter with google-tunix. Every sample is padded to the batch's longest, decoder layers are recomputed
in the backward pass, gradients are summed over micro-batches and AdamW makes one step. Prints a JSON object. Tunix's
Llama model uses its own rope base whatever the checkpoint's is, so its loss differs.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import Stopwatch
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as loader
from tunix.rl import algo_core, common
from tunix.rl.grpo.grpo_learner import GRPOConfig

PAD, END = 0, 2


def load(checkpoint: str):
    """Returns Tunix's model of a Llama checkpoint in float32."""
    fields = json.loads((Path(checkpoint) / "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=fields["num_hidden_layers"],
        vocab_size=fields["vocab_size"],
        embed_dim=fields["hidden_size"],
        hidden_dim=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        head_dim=fields["head_dim"],
        num_kv_heads=fields["num_key_value_heads"],
        rope_theta=int(fields["rope_theta"]),
        norm_eps=fields["rms_norm_eps"],
        weight_tying=fields["tie_word_embeddings"],
        remat_config=llama.RematConfig.DECODER,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return loader.create_model_from_safe_tensors(checkpoint, config, mesh, jnp.float32)


def examples(samples: dict, size: int) -> list[common.TrainExample]:
    """Returns the micro-batches in the form of Tunix's loss."""
    lengths = samples["lengths"]
    mask = np.arange(samples["response_ids"].shape[1])[None] < lengths[:, None]
    return [
        common.TrainExample(
            prompt_ids=jnp.asarray(samples["prompt_ids"][part]),
            prompt_mask=jnp.ones(samples["prompt_ids"][part].shape, jnp.int32),
            completion_ids=jnp.asarray(np.where(mask, samples["response_ids"], PAD)[part]),
            completion_mask=jnp.asarray(mask[part].astype(np.int32)),
            advantages=jnp.asarray(samples["advantages"][part]),
            ref_per_token_logps=jnp.asarray(samples["reference_logps"][part]),
            old_per_token_logps=jnp.asarray(samples["behaviour_logps"][part]),
        )
        for part in (slice(first, first + size) for first in range(0, len(lengths), size))
    ]


def main(path: str, checkpoint: str, micro_batch: str, threads: str) -> None:
    samples = dict(np.load(path))
    config = GRPOConfig(
        num_generations=int(samples["group_size"]),
        beta=float(samples["kl_coef"]),
        kl_loss_mode="low_var_kl",
        epsilon=float(samples["clip_ratio"]),
    )
    config.temperature = 1.0
    graph, state = nnx.split(load(checkpoint))
    optimizer = optax.chain(
        optax.clip_by_global_norm(float(samples["clip_norm"])),
        optax.adamw(float(samples["learning_rate"]), b1=0.9, b2=0.95, weight_decay=0.0),
    )
    moments = optimizer.init(state)
    parts = examples(samples, int(micro_batch))

    def accumulate(state, total, example):
        def loss(state):
            out = algo_core.grpo_loss_fn(nnx.merge(graph, state), example, config, PAD, END)
            return (out[0] if isinstance(out, tuple) else out) / len(parts)

        value, grads = jax.value_and_grad(loss)(state)
        return value, jax.tree.map(jnp.add, total, grads)

    def step(state, moments, grads):
        updates, moments = optimizer.update(grads, moments, state)
        return optax.apply_updates(state, updates), moments, optax.global_norm(grads)

    accumulate, step = jax.jit(accumulate, donate_argnums=1), jax.jit(step, donate_argnums=(0, 1))
    zeros = lambda: jax.tree.map(jnp.zeros_like, state)  # noqa: E731
    jax.block_until_ready(accumulate(state, zeros(), parts[0]))
    step = step.lower(state, moments, state).compile()
    grads = zeros()
    stopwatch = Stopwatch()
    values = []
    for part in parts:
        value, grads = accumulate(state, grads, part)
        values.append(value)
    state, moments, norm = jax.block_until_ready(step(state, moments, grads))
    stopwatch.report(float(sum(values)), float(norm))


if __name__ == "__main__":
    main(*sys.argv[1:])
