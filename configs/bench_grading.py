"""Measure the graders on known answers, at least five rewritings of each, and near misses that must be wrong.

A file of cases {id, task, reference, response, expected} gives a table of right and wrong verdicts by kind instead.
Hardware: any; no accelerator and no JAX (minutes on two CPU cores).
Command: python -m r1jax.launch --config=bench_grading --config.data.path=FOLDER_OR_FILE --json=FIGURES.json
"""

from r1jax.schema import Config

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the measurement; `data.max_rows` takes fewer rows of each file."""
    return Config(stage="bench_grading", preset=preset)
