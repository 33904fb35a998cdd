"""FP8 checkpoints give transformers' logits on weights that plain NumPy multiplied out."""

import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from parity import their_logits, torch, transformers
from safetensors.torch import load_file, save_file

from r1jax.checkpoints import hf, hf_config
from r1jax.core import sharding
from r1jax.models import decoder
from r1jax.schema import MeshConfig, Network

TOLERANCE = 2e-4  # of the largest logit
LENGTH = 80
FIELDS = dict(
    vocab_size=67,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    max_position_embeddings=256,
    num_attention_heads=4,
    num_key_value_heads=4,
    initializer_range=0.1,
    q_lora_rank=48,
    qk_nope_head_dim=24,
    qk_rope_head_dim=16,
    v_head_dim=20,
    moe_intermediate_size=32,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=0,
)
# Block and latent width: kv_a has 48 rows and 2 rows of factors, or 208 rows and 2. Dividing gives tiles of 24 and of
# 104 rows, as 576 / 5 gives 116 in the published checkpoints; the blocks are 32 and 128.
CASES = [(32, 32), (128, 192)]


def dequantised(values: torch.Tensor, scales: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Returns the float32 matrix, one weight after the other's tile looked up by its row and column."""
    rows, columns = (np.arange(size) // cut for size, cut in zip(values.shape, tile, strict=True))
    wide = np.frombuffer(values.contiguous().view(torch.uint8).numpy().tobytes(), ml_dtypes.float8_e4m3fn)
    wide = wide.astype(np.float32).reshape(values.shape)
    return torch.from_numpy(wide * scales.numpy()[np.ix_(rows, columns)])


def is_matrix(name: str) -> bool:
    return name.endswith(("proj.weight", "proj_with_mqa.weight"))


@pytest.fixture(scope="module", params=CASES, ids=str)
def folders(request, tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path, int]:
    """Returns (folder of transformers' model, the same in FP8, its block), both with the same random weights."""
    block, latent = request.param
    root = tmp_path_factory.mktemp("fp8")
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**FIELDS, kv_lora_rank=latent)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                value.copy_(0.5 * torch.rand_like(value))  # positive, so that every picked expert's score is
    model.save_pretrained(root / "wide")
    small, draw = {}, np.random.default_rng(1)
    for name, value in load_file(root / "wide" / hf.SINGLE_FILE).items():
        small[name] = value
        if is_matrix(name):
            shape = [-(-size // block) for size in value.shape]
            small[name + "_scale_inv"] = torch.from_numpy(draw.uniform(0.5, 2, shape).astype(np.float32))
            small[name] = (value * 8).to(torch.float8_e4m3fn)
            small[name + "_scale_inv"] /= 8
    return write(root, small, block), root, block


def write(root: pathlib.Path, small: dict[str, torch.Tensor], block: int) -> pathlib.Path:
    """Writes the FP8 folder, the factors in another file than the matrices, and returns it."""
    folder = root / "fp8"
    folder.mkdir()
    fields = json.loads((root / "wide" / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(fields))
    files = {name: f"model-0000{1 + name.endswith('_scale_inv')}-of-00002.safetensors" for name in small}
    for file in set(files.values()):
        save_file({name: value.contiguous() for name, value in small.items() if files[name] == file}, folder / file)
    (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": files}))
    return folder


def reference(folder: pathlib.Path, root: pathlib.Path, tile_of) -> np.ndarray:
    """Returns transformers' logits on the FP8 weights multiplied out with tile_of(shape, factors' shape)."""
    small: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        small |= load_file(file)
    wide = {}
    for name, value in small.items():
        if is_matrix(name):
            scales = small[name + "_scale_inv"]
            wide[name] = dequantised(value, scales, tile_of(value.shape, scales.shape))
        elif not name.endswith("_scale_inv"):
            wide[name] = value
    save_file(wide, root / "wide" / hf.SINGLE_FILE, metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "wide", dtype=torch.float32).eval()
    return their_logits(model, tokens())


def tokens() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 67, (2, LENGTH)).astype(np.int32)


def ours(folder: pathlib.Path) -> np.ndarray:
    config = hf_config.model_config(folder)
    params = hf.load(folder, config, sharding.make_mesh(MeshConfig()), jnp.float32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    hidden = decoder.forward(params, tokens(), positions, np.ones_like(positions), Network(config))[0]
    return np.asarray(decoder.logits(params, hidden))


def test_fp8_weights_give_the_logits_of_transformers_on_dequantised_ones(folders):
    folder, root, block = folders
    expected, found = reference(folder, root, lambda *_: (block, block)), ours(folder)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"block {block}: largest difference {error:.2e} of the largest logit")
    assert error < TOLERANCE


def test_a_tile_derived_from_the_shapes_would_be_seen(folders):
    folder, root, block = folders
    divided = reference(
        folder, root, lambda shape, scales: tuple(-(-n // s) for n, s in zip(shape, scales, strict=True))
    )
    assert np.abs(ours(folder) - divided).max() > 50 * TOLERANCE * np.abs(divided).max()
