"""Export a stage's result to a Hugging Face folder that transformers loads.

Hardware: any that holds the weights, twice while they are read back; the host holds one tensor at a time.
Command: python -m r1jax.launch --config=export_hf --config.checkpoint=RUN/distill --config.output=DIR
"""

from r1jax.configs import _presets
from r1jax.schema import Config, ExportConfig

PRESETS = _presets.EVERY


def config(preset: str) -> Config:
    """Returns the export; the shape of the model is read from the run itself, mesh and dtype are the size's."""
    size = _presets.SIZES[preset]
    return Config(
        stage="export_hf",
        preset=preset,
        model=size.model,
        compute=size.compute,
        mesh=size.mesh,
        export=ExportConfig(dtype=size.export_dtype),
    )
