"""Evaluate a checkpoint: k samples a problem, pass@1 with its error, one greedy sample, length and behaviour.

Hardware: two CPU cores at `tiny` and `tiny_dense` (under a minute); 8 GB of memory at `smollm2_135m`; TPUs for the rest.
Command: python -m r1jax.launch --config=evaluate --config.checkpoint=RUN/r1_zero --json=FIGURES.json
"""

from r1jax.configs import _presets
from r1jax.schema import Config, EvalConfig, replace

SMALL = ("tiny", "tiny_dense", "smollm2_135m")
# fmt: off
PRESETS = (
    "tiny", "tiny_dense", "smollm2_135m", "qwen2_5_1_5b", "qwen2_5_7b", "qwen2_5_14b", "qwen2_5_32b", "llama3_1_8b",
    "llama3_3_70b", "v2_lite_16b", "moonlight_16b", "v3_671b",
)
# fmt: on


def config(preset: str) -> Config:
    """Returns the run: sampled pass@1 on every row of the files, at temperature 1, or 0.6 with top-p 0.95 (P2 D.1).

    Of files that the checkpoint was trained on, only what its run held out is evaluated.
    """
    paper = EvalConfig(samples_per_problem=16, temperature=0.6, top_p=0.95)
    return Config(
        stage="evaluate",
        preset=preset,
        model=_presets.model(preset),
        compute=_presets.compute(preset),
        mesh=_presets.mesh(preset),
        data=replace(_presets.data(preset), holdout_fraction=1.0),  # nothing is trained on
        sampler=_presets.sampler(preset),
        evaluation=EvalConfig(samples_per_problem=5) if preset in SMALL else paper,
    )
