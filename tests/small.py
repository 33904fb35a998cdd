"""Small things that several tests start from."""

import pathlib

from r1jax.models import decoder
from r1jax.schema import Config, ModelConfig
from r1jax.stages import common

# A mixture of experts of a few thousand parameters.
MIXTURE = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    moe_intermediate_size=8,
    initializer_range=0.3,
    scan_layers=False,
)
# Overrides of r1_zero:tiny and r1_zero:tiny_dense for runs of seconds, beside their numbers of updates and samples.
RL_FIELDS = {
    "model.hidden_size": 32,
    "model.intermediate_size": 32,
    "model.num_hidden_layers": 2,
    "model.moe_intermediate_size": 16,
    "grpo.reference_refresh_updates": 4,
    "optimizer.learning_rate": 1e-2,
    "sampler.windows": (),
    "pack.row_tokens": 32,
}


def finished_stage(config: Config, workdir: pathlib.Path, params: decoder.Params, figures: dict) -> pathlib.Path:
    """Returns the folder of a stage that has ended with these weights and figures."""
    folder = common.StageFolder(config, workdir)
    folder.start({})
    store = folder.checkpoints()
    store.save(1, {"params": params}, {})
    store.close()
    folder.finish(figures, {}, "")
    return folder.path
