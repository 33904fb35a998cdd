"""Export a stage's result to a Hugging Face folder that transformers loads.

Hardware: any that holds the weights; the host holds one tensor at a time.
Command: python -m r1jax.launch --config=export_hf --config.checkpoint=RUN/distill --config.output=DIR
"""

from r1jax.configs import _presets
from r1jax.schema import Config, DataConfig, ExportConfig

PRESETS = _presets.EVERY


def config(preset: str) -> Config:
    """Returns the export; the shape of the model is read from the run itself, mesh and dtype are the size's."""
    export = ExportConfig(dtype=_presets.SIZES[preset].export_dtype)
    return _presets.config("export_hf", preset, data=DataConfig(), export=export)  # it reads no problems
