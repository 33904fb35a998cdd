"""The control of distillation: the same student trained by RL alone, at equal compute at `tiny`.

Hardware: two CPU cores at `tiny`; the mesh of the size at others.
Command: python -m r1jax.launch --config=student_rl
         python -m r1jax.launch --config=student_rl:qwen2_5_32b --config.model.checkpoint=DIR --config.data.path=FILE.jsonl
"""

from r1jax.configs import _presets, r1_zero
from r1jax.schema import Config, replace

PRESETS = _presets.STUDENTS


def config(preset: str) -> Config:
    """Returns the run: R1-Zero's settings on the student's base, at 2e-6 and with outputs of 32,768 tokens.

    Those are of the paper's control, Qwen2.5-32B-Zero, whose updates are "more than 10,000" (P2 section 2.3, Table 16).
    """
    student = _presets.trained_at(preset)
    base, sampler = r1_zero.recipe(student), _presets.rollouts(student, 32768)
    run = replace(
        base,
        stage="student_rl",
        input_preset=preset,
        optimizer=replace(base.optimizer, learning_rate=2e-6),
        sampler=sampler,
        pack=_presets.rl_pack(student, sampler),
    )
    return _presets.fitted(run)
