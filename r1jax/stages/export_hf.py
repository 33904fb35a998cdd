"""Export a stage's result to a Hugging Face folder and check that what was written is what was trained."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.checkpoints import hf, hf_export
from r1jax.config import override
from r1jax.core import tree
from r1jax.models import decoder
from r1jax.schema import Config, replace
from r1jax.stages import common, lineage


def run(config: Config, workdir: Path) -> dict:
    """Writes config.output from the stage folder config.checkpoint, verifies it and returns its size and digest."""
    if not config.checkpoint or not config.output:
        raise ValueError("export_hf: give --config.checkpoint=STAGE_FOLDER and --config.output=NEW_FOLDER")
    source = Path(config.checkpoint)
    if common.is_hugging_face(source):
        raise ValueError(f"{source} is a Hugging Face folder already; give a stage's folder")
    own = stage_config(source, config)
    own, tokenizer, mesh = common.prepare(own)
    if not own.data.path and not tokenizer.chat_template:
        tokenizer.chat_template = "{{ messages[-1]['content'] }}"  # a question of the tiny world stands for itself
    params = common.load_weights(own, mesh, str(source), lambda: None)
    target = Path(config.output)
    hf_export.save(target, params, own.model, tokenizer, config.export.dtype, card(source, own, target.name))
    figures = {"tensors": len(list(hf.TensorFiles(target))), "parameters": tree.count(params)}
    if config.export.verify:
        figures |= verify(target, params, own, mesh, config.export.dtype)
    return figures


def stage_config(folder: Path, config: Config) -> Config:
    """Returns the config of the run in a folder, as its config.json tells its shape, data and checkpoint."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json; give the folder of a stage")
    fields = json.loads(path.read_text())
    wanted = [(key, str(value)) for key, value in fields.items() if key.startswith(("model.", "data.path"))]
    return override(config, [(key, "" if value == "None" else value) for key, value in wanted])


def verify(folder: Path, params, config: Config, mesh, dtype: str) -> dict:
    """Returns the largest logit difference after reading the folder back. Raises ValueError when a weight differs."""
    shape = hf.model_config(folder, config.model)
    back = hf.load(folder, shape, mesh, jnp.float32)
    kept = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(kept), jax.tree.leaves(back), strict=True):
        if not np.array_equal(a, b) and not hf.leaf_path(path).endswith("ffw.bias"):
            raise ValueError(f"{folder}: {hf.leaf_path(path)} reads back differently; the export is not to be trusted")

    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (2, 24)).astype(np.int32)
    places, segments = np.tile(np.arange(24, dtype=np.int32), (2, 1)), np.ones((2, 24), np.int32)
    both = [
        decoder.logits(p, decoder.forward(p, tokens, places, segments, replace(shape, compute_dtype="float32"))[0])
        for p in (kept, back)
    ]
    return {"logit_difference": float(jnp.abs(both[0] - both[1]).max())}


def card(source: Path, config: Config, name: str) -> str:
    """Returns the model card: what was trained and the figures that were measured, if any."""
    lines = [f"# {name}", "", f"Trained with r1jax, stage `{source.name}`, {config.model.family} architecture."]
    marker = source / common.DONE
    if marker.exists():
        figures = json.loads(marker.read_text())["figures"].get(lineage.RESULTS.get(source.name, source.name), {})
        shown = [(key, value) for key, value in figures.items() if isinstance(value, float)]
        lines += ["", "| held-out figure | value |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in shown)]
    return "\n".join(lines) + "\n"
