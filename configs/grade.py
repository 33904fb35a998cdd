"""Grade a JSONL of responses against references, without a model.

Rows {id, task, reference, response} become rows {id, value, scorable, detail}.
Hardware: any; no accelerator and no JAX.
Command: python -m r1jax.launch --config=grade --config.data.path=FILE.jsonl --config.output=OUT.jsonl
One row, step by step: python -m r1jax.launch --config=grade --config.data.path=FILE.jsonl --explain=ID
"""

from r1jax.schema import Config

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the run; `reward.extraction` is where in a response the answer is looked for."""
    return Config(stage="grade", preset=preset)
