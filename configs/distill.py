"""Distillation: a dense student learns from a teacher's examples by SFT alone.

The examples are those of stage 3 in the working folder, or a JSONL of {prompt, response} rows. The six real students
start from the Hugging Face folder that is given; its config.json decides the shape.
Hardware: two CPU cores at `tiny`; it runs the stages before it first when the working folder has none. The real presets
spread weights and moments (14 bytes a parameter) over 1 to 32 devices of 95 GB (config.mesh); attention scores come on top,
4.3 GB a head for a row of 32,768 tokens: lower config.pack.row_tokens where they do not fit.
Command: python -m r1jax.launch --config=distill
         python -m r1jax.launch --config=distill:qwen2_5_1_5b --config.model.checkpoint=DIR --config.distill.examples=FILE.jsonl
"""

from r1jax.configs import _presets, stage1_coldstart
from r1jax.schema import CheckpointConfig, Config, EvalConfig, OptimizerConfig, RewardConfig, SFTConfig, replace

PRESETS = ("tiny", "qwen2_5_1_5b", "qwen2_5_7b", "qwen2_5_14b", "qwen2_5_32b", "llama3_1_8b", "llama3_3_70b")
STUDENT = "tiny_dense"
# Initial rates of the six students (P2 Table 6).
LEARNING_RATES = {
    "qwen2_5_1_5b": 1e-4,
    "qwen2_5_7b": 8e-5,
    "qwen2_5_14b": 7e-5,
    "qwen2_5_32b": 6e-5,
    "llama3_1_8b": 5e-5,
    "llama3_3_70b": 2e-5,
}


def config(preset: str) -> Config:
    """Returns the run: the student's base, two or three epochs, cosine to a tenth (P2 B.4.3)."""
    if preset in LEARNING_RATES:
        return _real(preset)
    base = stage1_coldstart.config(STUDENT)
    return replace(
        base,
        stage="distill",
        model=_presets.model(STUDENT),
        compute=_presets.compute(STUDENT),
        optimizer=replace(base.optimizer, learning_rate=2e-3),
        sft=SFTConfig(epochs=3, examples_per_update=48),
        input_preset=preset,
    )


def _real(preset: str) -> Config:
    """Returns the run of a released student: batch 64, rows of 32,768 tokens, the paper's evaluation (P2 B.4.3, D.1)."""
    return Config(
        stage="distill",
        preset=preset,
        input_preset=preset,
        model=_presets.model(preset),
        compute=_presets.compute(preset),
        mesh=_presets.mesh(preset),
        # Warm-up is not given in the paper: none.
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATES[preset], schedule="cosine", final_fraction=0.1),
        sampler=_presets.sampler(preset),
        reward=RewardConfig(extraction="boxed"),  # R1's answers are boxed, without answer tags
        pack=_presets.sft_pack(preset),
        sft=SFTConfig(epochs=2, examples_per_update=64),
        checkpointing=CheckpointConfig(every_updates=200),
        evaluation=EvalConfig(samples_per_problem=4, temperature=0.6, top_p=0.95, greedy=False),
    )
