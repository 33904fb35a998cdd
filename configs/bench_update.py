"""Measure the update: packed, shared and padded prompts, other libraries on the same samples; SmolLM2-135M, float32.

Hardware: Linux, 4 GB of memory (20 GB with the peers), two CPU cores; about 10 minutes without peers, an hour with
them.
Command: python -m r1jax.launch --config=bench_update --json=FIGURES.json --config.model.checkpoint=DIR
         [--config.bench.trl_python=VENV/bin/python] [--config.bench.tunix_python=VENV/bin/python]
"""

from r1jax.configs import _presets
from r1jax.schema import Config, GRPOConfig, PackConfig, SamplerConfig, replace

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the measurement: 64 samples of 64 prompt tokens, responses of median 48 and 99th percentile 512 tokens.

    Seed 54 draws 4,723 response tokens with a longest of 357: near the law's mean (5,157), and no draw is cut.
    """
    size = _presets.SIZES["smollm2_135m"]
    return Config(
        stage="bench_update",
        preset=preset,
        seed=54,
        model=size.model,
        compute=replace(size.compute, attention_block=64, remat=True),
        sampler=SamplerConfig(
            slots=64, steps_per_dispatch=8, max_prompt_tokens=64, max_new_tokens=96, prefill_buckets=(32,)
        ),
        grpo=GRPOConfig(group_size=8, prompts_per_update=8, updates_per_rollout=1),
        pack=PackConfig(row_tokens=1120, rows_per_micro_batch=1, trained_chunk=512),
    )
