"""Label preference pairs with a judge model: {id, prompt, responses} become {id, prompt, chosen, rejected, margin}.

Four judgements a pair, A and B in a random order each time, a mean margin above 1, lengths balanced over the set (P2
B.2).
Hardware: what the judge needs; two CPU cores and 4 GB of memory for one of 135M parameters.
Command: python -m r1jax.launch --config=preference_pairs --config.judge.checkpoint=DIR --config.data.path=IN.jsonl --config.output=OUT.jsonl
"""

from r1jax.configs import _presets
from r1jax.schema import Config

PRESETS = ("tiny", "smollm2_135m", "qwen2_5_1_5b", "qwen2_5_7b", "llama3_1_8b", "v3_671b")


def config(preset: str) -> Config:
    """Returns the run; the preset is the model's that writes replies where rows have none."""
    return Config(
        stage="preference_pairs",
        preset=preset,
        model=_presets.model(preset),
        compute=_presets.compute(preset),
        mesh=_presets.mesh(preset),
        sampler=_presets.sampler(preset),
    )
