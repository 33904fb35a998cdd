"""Build the tests of code prompts from input generators and from programs known to be right and wrong.

Rows {id, prompt, accepted, wrong, generators} become rows {id, task, prompt, tests}; a judge model writes missing
generators.
Hardware: Linux with namespaces (docs/sandbox.md); two CPU cores and no accelerator where rows bring their generators.
Command: python -m r1jax.launch --config=build_tests --config.data.path=IN.jsonl --config.output=OUT.jsonl
"""

from r1jax.schema import Config

PRESETS = ("tiny",)


def config(preset: str) -> Config:
    """Returns the run; `reward.sandbox` has the limits of one program on one input."""
    return Config(stage="build_tests", preset=preset)
