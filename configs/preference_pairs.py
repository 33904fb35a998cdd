"""Label preference pairs with a judge model: {id, prompt, responses} become {id, prompt, chosen, rejected, margin}.

Four judgements a pair, A and B in a random order each time, a mean margin above 1, lengths balanced over the set (P2
B.2).
Hardware: what the judge needs; two CPU cores and 4 GB of memory for one of 135M parameters.
Command: python -m r1jax.launch --config=preference_pairs --config.judge.checkpoint=DIR --config.data.path=IN.jsonl --config.output=OUT.jsonl
"""

from r1jax.configs import _presets
from r1jax.schema import Config, DataConfig

PRESETS = _presets.EVERY


def config(preset: str) -> Config:
    """Returns the run; the preset is the model's that writes replies where rows have none."""
    sampler = _presets.SIZES[preset].sampler
    return _presets.config("preference_pairs", preset, data=DataConfig(), sampler=sampler)  # its rows are a file's
