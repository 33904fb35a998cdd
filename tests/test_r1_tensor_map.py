"""The published checkpoint of DeepSeek-R1: all 91,991 tensors by name, shape and type, and the same map executed.

The released config.json and tensors.json.gz (name -> type and shape) come from the `shared_data` fixture.
"""

import gzip
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.checkpoints import fp8, hf, hf_config, hf_export, tokenizer
from r1jax.checkpoints.tensor_file import NAMES, TensorFile, TensorWriter
from r1jax.core import sharding, tree
from r1jax.models import decoder
from r1jax.schema import MeshConfig, ModelConfig

MESH = sharding.make_mesh(MeshConfig())
BLOCK = (4, 4)
# Widths of the shrunken model. 8 + 2 rows of kv_a in blocks of 4 are 3 rows of factors, the last one half filled: like
# 576 rows in blocks of 128, they do not divide.
NARROW = dict(
    vocab_size=200,
    hidden_size=12,
    intermediate_size=10,
    moe_intermediate_size=6,
    num_attention_heads=2,
    num_key_value_heads=2,
    q_lora_rank=6,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=3,
)


@pytest.fixture(scope="module")
def published(shared_data) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns {name: (type, shape)} of the released checkpoint."""
    with gzip.open(shared_data / "deepseek_r1" / "tensors.json.gz") as file:
        return {name: (kind, tuple(shape)) for name, (kind, shape) in json.load(file).items()}


@pytest.fixture(scope="module")
def released(shared_data, tmp_path_factory) -> pathlib.Path:
    """Returns a folder with the released config.json and an index, without the weights."""
    folder = tmp_path_factory.mktemp("released")
    (folder / "config.json").write_bytes((shared_data / "deepseek_r1" / "config.json").read_bytes())
    weight_map = {"model.layers.61.eh_proj.weight": "model-00163-of-000163.safetensors"}
    (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_import_wants_exactly_the_91991_published_tensors(published, released):
    config = hf_config.model_config(released)
    block = fp8.block_size(hf_config.Fields(released / "config.json"))
    found = {name: (NAMES[tensor.dtype], tensor.shape) for name, tensor in hf.tensors(config, block=block).items()}
    assert len(published) == 91_991
    assert found == published


def test_export_writes_exactly_the_91991_published_tensors(published, released):
    config = hf_config.model_config(released)
    tensors = hf_export.tensors(config, "fp8")
    assert len(tensors) == 91_991
    assert {tensor.name: (NAMES[tensor.dtype], tensor.shape) for tensor in tensors} == published


# The same map executed: 61 + 1 layers, 256 experts, narrow.


@pytest.fixture(scope="module")
def narrow(released, tmp_path_factory):
    """Returns (folder of an FP8 export in several files, its config, the parameters that importing it gives)."""
    root = tmp_path_factory.mktemp("narrow")
    fields = json.loads((released / "config.json").read_text()) | NARROW
    (root / "config.json").write_text(json.dumps(fields))
    (root / hf.INDEX_FILE).write_bytes((released / hf.INDEX_FILE).read_bytes())
    config = hf_config.model_config(root)
    draw = np.random.default_rng(0)
    params = sharding.map_specs(lambda s: jnp.asarray(draw.normal(size=s.shape), jnp.float32), decoder.specs(config))
    export(root / "out", params, config)
    return root / "out", config, hf.load(root / "out", config, MESH, jnp.float32), params


def export(folder: pathlib.Path, params: decoder.Params, config: ModelConfig) -> None:
    hf_export.save(folder, params, config, tokenizer.tiny(), "fp8", shard_bytes=400_000, block=BLOCK)


def test_the_narrow_model_has_the_published_names_and_types(published, narrow):
    folder, config, _, _ = narrow
    assert (config.num_hidden_layers, config.num_nextn_predict_layers, config.n_routed_experts) == (61, 1, 256)
    assert hf_config.model_config(folder) == config
    with hf.TensorFiles(folder) as files:
        assert {name: files.dtype(name) for name in files} == {name: kind for name, (kind, _) in published.items()}
        assert files.shape("model.layers.61.self_attn.kv_a_proj_with_mqa.weight_scale_inv") == (3, 3)
    assert len(list(folder.glob("*.safetensors"))) > 5


def test_import_gives_every_weight_to_fp8_precision_and_the_rest_to_bfloat16(narrow):
    _, _, read, params = narrow
    for (path, before), after in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(read), strict=True):
        # Half a unit in the last place of 3 mantissa bits, or of the subnormals: at most 4 * 448 of a block's largest.
        error = np.abs(np.asarray(before) - np.asarray(after)).max()
        assert error < 0.07 * np.abs(np.asarray(before)).max(), path


def test_export_of_the_import_and_import_of_that_are_bit_equal(narrow, tmp_path):
    folder, config, read, _ = narrow
    export(tmp_path / "again", read, config)
    files = sorted(path.name for path in folder.glob("*.safetensors*"))
    assert files == sorted(path.name for path in (tmp_path / "again").glob("*.safetensors*"))
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert tree.digest(hf.load(tmp_path / "again", config, MESH, jnp.float32)) == tree.digest(read)


EXPERT, LATENT = (
    "model.layers.40.mlp.experts.255.down_proj.weight",
    "model.layers.30.self_attn.kv_a_proj_with_mqa.weight",
)


def _rename(tensors):
    tensors[EXPERT.replace("255", "256")] = tensors.pop(EXPERT)


def _drop(tensors):
    del tensors[EXPERT]


def _drop_factors(tensors):
    del tensors["model.layers.61.mlp.experts.17.up_proj.weight_scale_inv"]


def _transpose(tensors):
    tensors[LATENT] = tensors[LATENT].T


def _change_copy(tensors):
    tensors["model.layers.61.embed_tokens.weight"][7, 3] += 1


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (_rename, EXPERT, [f"{EXPERT} is missing", f"{EXPERT.replace('255', '256')} is not in the model"]),
        (_drop, EXPERT, [f"{EXPERT} is missing"]),
        (_drop_factors, "model.layers.61.mlp.experts.17.up_proj.weight", ["17.up_proj.weight_scale_inv is missing"]),
        (_transpose, LATENT, [f"{LATENT} is (12, 10), the model needs (10, 12)"]),
        (
            _change_copy,
            "model.layers.61.embed_tokens.weight",
            ["model.layers.61.embed_tokens.weight differs from model.embed_tokens.weight"],
        ),
    ],
    ids=["renamed", "dropped", "factors dropped", "transposed", "copy changed"],
)
def test_one_wrong_tensor_among_all_is_named(narrow, tmp_path, change, name, words):
    folder, config, _, _ = narrow
    changed = json.loads((folder / hf.INDEX_FILE).read_text())["weight_map"][name]
    for path in folder.glob("*.*"):
        if path.name != changed:
            os.link(path, tmp_path / path.name)
    with TensorFile(folder / changed) as file:
        tensors = {name: file.read(name) for name in file.tensors}
    change(tensors)
    with TensorWriter(
        tmp_path / changed, [(name, value.dtype, value.shape) for name, value in tensors.items()]
    ) as writer:
        for key, value in tensors.items():
            writer.put(key, value)
    with pytest.raises(ValueError) as error:
        hf.load(tmp_path, config, MESH, jnp.float32)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
