"""Distillation: a dense student learns from a teacher's examples by SFT alone.

The examples are those of stage 3 in the working folder, or a JSONL of {prompt, response} rows. `smollm2_135m` and the
six students of the release start from the Hugging Face folder that is given; its config.json decides the shape.
Hardware: two CPU cores at `tiny`; it runs the stages before it first when the working folder has none. The students of
the release spread weights and moments (14 bytes a parameter) over 1 to 32 devices of 95 GB (config.mesh); attention
scores come on top, 4.3 GB a head for a row of 32,768 tokens: lower config.pack.row_tokens where they do not fit.
Command: python -m r1jax.launch --config=distill
         python -m r1jax.launch --config=distill:qwen2_5_1_5b --config.model.checkpoint=DIR --config.distill.examples=FILE.jsonl
"""

from r1jax.configs import _presets
from r1jax.configs.stage1_coldstart import CONTEXT
from r1jax.schema import CheckpointConfig, Config, OptimizerConfig, RewardConfig, SFTConfig

PRESETS = _presets.STUDENTS


def config(preset: str) -> Config:
    """Returns the run of a student: cosine to a tenth of its rate, batch 64, rows of 32,768 tokens (P2 B.4.3, Table 6).

    Two epochs (the paper: two or three), without warm-up (the paper gives none).
    """
    student = _presets.trained_at(preset)
    size = _presets.SIZES[student]
    run = _presets.config(
        "distill",
        student,
        input_preset=preset,
        optimizer=OptimizerConfig(learning_rate=size.distill_rate, schedule="cosine", final_fraction=0.1),
        sampler=size.sampler,
        reward=RewardConfig(extraction="boxed"),  # R1's answers are boxed, without answer tags
        pack=_presets.pack(student, CONTEXT),
        sft=SFTConfig(epochs=2, examples_per_update=64),
        checkpointing=CheckpointConfig(every_updates=200),
        evaluation=_presets.EVALUATION,
    )
    return _presets.fitted(run)
